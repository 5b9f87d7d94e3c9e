"""Read a PEFT LoRA adapter from its folder as records, one per module, without importing PEFT.

The names of the tensors give the modules. Whatever `target_modules` was (a list, a string, a regex,
"all-linear"), PEFT saves `base_model.model.<module>.lora_A.weight` (r x in) and `.lora_B.weight` (out x r)
for each module that it adapted, and the update of that module is scaling * B A. Rank and scaling follow
PEFT's own rules (`rank_pattern`, `alpha_pattern`, rsLoRA); a test compares them with PEFT's modules.

Adapters whose update is not scaling * B A are refused by name: DoRA, trained biases, initialisations that
change the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), parameters of experts, other PEFT types.
Trained copies of whole modules and LoRA on embeddings are not used; they are listed in `left_alone`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError
from holdfast.weights.files import read_config, safe_path
from holdfast.weights.folders import from_hub, looks_local
from holdfast.weights.reader import Tensor, WeightFile

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights as they are."""

FOREIGN = {
    "use_dora": "DoRA also scales every row of the weight, and projecting B A does not undo that. Merge "
    "it (merge_and_unload, save_pretrained) and give the folder of the merged model",
    "lora_bias": "a bias is trained in addition to B A. Train with lora_bias=False",
    "layer_replication": "layers are copied, so the names do not match the base model. Merge it first",
    "target_parameters": "LoRA on parameters (experts) is not supported. Target modules instead",
    "use_qalora": "QALoRA groups the inputs of A. Train with use_qalora=False",
    "use_bdlora": "BD-LoRA has block-diagonal factors. Train with plain LoRA",
    "arrow_config": "Arrow routes between adapters. Give each adapter separately",
    "monteclora_config": "MonteCLoRA samples its factors. Train with plain LoRA",
    "kasa_config": "KaSA has more factors than A and B. Train with plain LoRA",
    "megatron_config": "Megatron's layers are not supported. Train with plain LoRA",
}
"""Keys of the configuration that must be unset, and why."""


@dataclass(frozen=True, eq=False)
class LoraModule:
    """One adapted module: its update is scaling * B A, added to a weight of shape (out, in).

    Attributes:
        name: name in the base model, without `.weight`.
        a: r x in.
        b: out x r.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        fan_in_fan_out: the setting of the adapter: whether the weight is stored as (in, out).
        layer: the first number in the name, or None.
        kind: the last part of the name that is not a number ("q_proj").
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float
    alpha: float
    fan_in_fan_out: bool

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def layer(self) -> int | None:
        """The layer number; see the class."""
        return layer_of(self.name)

    @property
    def kind(self) -> str:
        """The kind of module; see the class."""
        return kind_of(self.name)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter folder. It is a context manager that closes the file on exit.

    Attributes:
        modules: the modules sorted by name, with layers in numerical order.
        left_alone: the tensors that are not LoRA on a linear module (`modules_to_save`, embeddings).
        notes: sentences that the user should read.
    """

    folder: Path
    config: Mapping[str, Any]
    file: WeightFile
    modules: tuple[LoraModule, ...]
    left_alone: tuple[str, ...]
    notes: tuple[str, ...]

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def layer_of(name: str) -> int | None:
    """The first number among the parts of a module's name: its layer."""
    return next((int(part) for part in name.split(".") if part.isdecimal() and len(part) < 10), None)


def kind_of(name: str) -> str:
    """The last part of a module's name that is not a number."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() and len(part) < 10 else 0, part)
        for part in name.split(".")
    ]


def find_adapter(path: str, revision: str | None = None) -> tuple[Path, list[str]]:
    """Return the folder of an adapter folder or Hub id, and the names of other adapters inside it.

    PEFT saves an adapter called "default" into the folder itself and other adapters into subfolders with
    their names. If the folder has no adapter itself and one subfolder has, that subfolder is returned.

    Raises:
        ModelError: there is no adapter, or there are several and the path names none of them.
    """
    folder = Path(path)
    if not folder.exists():
        if looks_local(path):
            raise ModelError(f"No such adapter folder: {path}. PEFT's save_pretrained writes one.")
        folder = from_hub(path, revision, download=True)
    if not folder.is_dir():
        raise ModelError(f"Expected an adapter folder, found a file: {path}.")
    inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    if (folder / CONFIG).exists() or (folder / CONFIG).is_symlink():
        return folder, inner
    if len(inner) == 1:
        return folder / inner[0], []
    if inner:
        raise ModelError(
            f"{path} holds {len(inner)} adapters: {', '.join(inner)}. Name one: {path.rstrip('/')}/{inner[0]}"
        )
    raise ModelError(f"Expected an adapter folder with {CONFIG}, found none at {path}.")


def read_adapter(path: str | Path, revision: str | None = None) -> Adapter:
    """Read the records of an adapter folder or Hub id. Only headers are read.

    Raises:
        ModelError: the adapter is missing or damaged, or its update is not scaling * B A.
    """
    folder, others = find_adapter(str(path), revision)
    config = _config(folder)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise ModelError(
            f"{folder} holds adapter_model.bin, which can run code when it is loaded. Convert it: load the "
            "adapter with PEFT on a machine where that is safe, and call save_pretrained(NEW_FOLDER)."
        )
    file = WeightFile(safe_path(folder, WEIGHTS))
    try:
        modules, left_alone = _modules(folder, config, file)
    except BaseException:
        file.close()
        raise
    notes = _notes(config, left_alone)
    if others:
        notes.append(f"Other adapters in the folder were not read: {', '.join(others)}.")
    return Adapter(folder, config, file, modules, left_alone, tuple(notes))


def _config(folder: Path) -> dict[str, Any]:
    """Read the configuration and check that it describes a plain LoRA."""
    path = folder / CONFIG
    config = read_config(safe_path(folder, CONFIG))
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a table of settings. Save the adapter again.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{path}: expected a LoRA adapter (peft_type LORA), found {str(kind)[:80]}.")
    for key, why in FOREIGN.items():
        if config.get(key):
            raise ModelError(f"{path}: {key} is set; {why}.")
    if config.get("bias", "none") != "none":
        raise ModelError(
            f"{path}: bias is {str(config['bias'])[:80]!r}; trained biases are not part of B A. "
            "Train with bias='none'."
        )
    start = config.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in INITIALISATIONS):
        raise ModelError(
            f"{path}: init_lora_weights is {str(start)[:80]!r}, which may change the base weights too, so "
            "B A is not the whole update. Save it converted (PEFT: path_initial_model_for_weight_conversion)."
        )
    _check_number(path, "r", config.get("r"))
    _check_number(path, "lora_alpha", config.get("lora_alpha"))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ModelError(f"{path}: {key} is not a table from module to number. Save the adapter again.")
        for pattern, value in patterns.items():
            _check_number(path, f"{key}[{pattern[:80]!r}]", value)
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, RecursionError, OverflowError):
                raise ModelError(
                    f"{path}: {key} has {pattern[:80]!r}, which is not a valid pattern."
                ) from None
    return config


def _check_number(path: Path, key: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < 1e9:
        raise ModelError(f"{path}: expected a positive number for {key}, found {str(value)[:80]!r}.")


def _modules(
    folder: Path, config: Mapping[str, Any], file: WeightFile
) -> tuple[tuple[LoraModule, ...], tuple[str, ...]]:
    factors: dict[str, dict[str, Tensor]] = {}
    left_alone = []
    for key, tensor in file.tensors.items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX):
            raise ModelError(f"{file.path}: PEFT would not load '{key}', which lacks the prefix '{PREFIX}'.")
        if part in ("A.weight", "B.weight"):
            factors.setdefault(name, {})[part[0]] = tensor
        elif part in ("embedding_A", "embedding_B") or not name:
            left_alone.append(key)
        else:
            raise ModelError(f"{file.path}: '{key}' is not part of a plain LoRA (A and B). Merge it first.")
    if config.get("ensure_weight_tying") and any(".lora_embedding_" in key for key in left_alone):
        raise ModelError(
            f"{folder / CONFIG}: ensure_weight_tying shares LoRA between the embedding and the output head, "
            "but only the head is linear. Train without LoRA on embeddings."
        )
    modules = [_module(folder, config, name, factors[name]) for name in sorted(factors, key=natural)]
    return tuple(modules), tuple(sorted(left_alone))


def _module(folder: Path, config: Mapping[str, Any], name: str, factors: Mapping[str, Tensor]) -> LoraModule:
    if len(factors) < 2:
        raise ModelError(f"{folder}: '{name}' has only lora_{min(factors)}. Save the adapter again.")
    a, b = factors["A"], factors["B"]
    for tensor in (a, b):
        tensor.check_floats()
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise ModelError(
                f"{folder}: '{tensor.name}' has shape {list(tensor.shape)}; expected a non-empty matrix. "
                "LoRA on convolutions is not supported; after sharded training, gather before saving."
            )
    rank = _pattern_value(config, "rank_pattern", name, config["r"])
    if not a.shape[0] == b.shape[1] == rank:
        raise ModelError(
            f"{folder}: '{name}' has A of shape {list(a.shape)} and B of shape {list(b.shape)}, but its rank "
            f"is {rank} in {CONFIG}. Save the adapter again."
        )
    alpha = _pattern_value(config, "alpha_pattern", name, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraModule(name, a, b, scaling, alpha, bool(config.get("fan_in_fan_out")))


def _pattern_value(config: Mapping[str, Any], key: str, name: str, otherwise: float) -> float:
    """Apply PEFT's rule: the first pattern that matches the end of the name, after a dot."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


def _notes(config: Mapping[str, Any], left_alone: tuple[str, ...]) -> list[str]:
    notes = []
    others = (key for key in left_alone if ".lora_" not in key and ".base_layer." not in key)
    whole = {re.sub(r"\.(weight|bias)$", "", key) for key in others}
    if whole:
        kinds = ", ".join(sorted({kind_of(name) for name in whole}))
        notes.append(f"Whole weights in the adapter (modules_to_save) are left as they are: {kinds}.")
    if any(".lora_embedding_" in key for key in left_alone):
        notes.append("LoRA on embeddings is left as it is: an embedding is a table, not a linear map.")
    if config.get("alora_invocation_tokens"):
        notes.append("The adapter acts only after its invocation tokens (aLoRA).")
    return notes


MUTATING = ("pissa", "olora")
"""Initialisations that subtract their low-rank part from the base weights."""
