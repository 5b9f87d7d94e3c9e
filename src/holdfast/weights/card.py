"""The model card of a combined or merged model: its sources, with hashes, and what was not measured.

A card names a folder by its last part, so that no path of this machine is published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from holdfast.machine.files import write_json
from holdfast.weights.files import read_config
from holdfast.weights.folders import ADAPTER_CONFIG, fingerprint, looks_local

WHAT = {
    "combined": (
        "One LoRA adapter that does what the adapters below, stacked in this order, do "
        "(rank concatenation; the scalings are folded into B, so alpha = r)."
    ),
    "merged": "A full model: the base model with the adapters below added to its weights, in this order.",
}
HOW = {
    "combined": 'model = PeftModel.from_pretrained(base_model, "THIS FOLDER")',
    "merged": 'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
}


def is_hub_id(path: str | Path) -> bool:
    """Whether `path` names a model on the Hub and not a local folder."""
    return not looks_local(str(path)) and not Path(path).exists()


def public_name(path: str | Path) -> str:
    """Return a Hub id (also for a folder in the Hub's cache), or the last part of a folder's name."""
    if is_hub_id(path):
        return str(path)
    if not Path(path).exists():  # a path of another machine, or a name
        return PureWindowsPath(path).name or str(path)
    folder = Path(path).resolve()
    if folder.parent.name == "snapshots":  # <cache>/models--a--b/snapshots/<revision>
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def without_paths(value: Any) -> Any:
    """Return plain values with the last part of each absolute path in place of the path."""
    if isinstance(value, Mapping):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(part) for part in value]
    absolute = isinstance(value, str) and (value.startswith("~") or PureWindowsPath(value).root)
    return PureWindowsPath(value).name if absolute else value


def name_base(folder: Path, base: str | None = None) -> None:
    """Write the public name of the base model into an adapter's configuration.

    Args:
        base: the name; by default the one that the configuration has, without its path.
    """
    config = read_config(folder / ADAPTER_CONFIG)
    known = config.get("base_model_name_or_path")
    name = base or (public_name(known) if isinstance(known, str) else known)
    if name != known:
        write_json(folder / ADAPTER_CONFIG, {**config, "base_model_name_or_path": name}, indent=2)


def write_card(folder: Path, what: str, base: str | None, adapters: Sequence[Path], notes: str = "") -> None:
    """Write `README.md` into `folder`, in the format that the Hub reads.

    Args:
        what: "combined" or "merged".
        base: a Hub id or a folder, or None if it is unknown.
    """
    head = ["---"]
    if base and is_hub_id(base):
        head.append(f"base_model: {base}")
        head.append(f"base_model_relation: {'adapter' if what == 'combined' else 'finetune'}")
    head += [f"library_name: {'peft' if what == 'combined' else 'transformers'}", "tags:", "- lora", "---"]
    rows = [f"| {i} | {public_name(path)} | `{fingerprint(path)}` |" for i, path in enumerate(adapters, 1)]
    text = [
        f"# {what.capitalize()} by Holdfast",
        "",
        WHAT[what],
        "",
        f"Base model: {public_name(base) if base else 'unknown'}{notes}.",
        "",
        "| | adapter | fingerprint |",
        "|---|---|---|",
        *rows,
        "",
        "```python",
        HOW[what],
        "```",
        "",
        "Not measured for this folder: harmfulness, accuracy on the task, over-refusal. If an adapter was "
        "trained on weights that had been merged and rounded (bf16), this sum differs from the trained model "
        "by that rounding.",
    ]
    (folder / "README.md").write_text("\n".join([*head, *text]) + "\n", encoding="utf-8", newline="\n")
