"""The model card of what is handed out: what it was made from, with hashes, and what was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.weights.model import fingerprint, looks_local

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


def write_card(folder: Path, what: str, base: str | None, adapters: Sequence[Path], notes: str = "") -> None:
    """`README.md` in `folder`, as the Hub reads it.

    Args:
        what: "combined" or "merged".
        base: a Hub id or a folder; a folder's name alone is written, no path of this machine.
    """
    head = ["---"]
    if base and not looks_local(base):
        head.append(f"base_model: {base}")
        head.append(f"base_model_relation: {'adapter' if what == 'combined' else 'finetune'}")
    head += [f"library_name: {'peft' if what == 'combined' else 'transformers'}", "tags:", "- lora", "---"]
    rows = [f"| {i} | {path.resolve().name} | `{fingerprint(path)}` |" for i, path in enumerate(adapters, 1)]
    name = "unknown" if base is None else Path(base).resolve().name if looks_local(base) else base
    text = [
        f"# {what.capitalize()} by Holdfast",
        "",
        WHAT[what],
        "",
        f"Base model: {name}{notes}.",
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
