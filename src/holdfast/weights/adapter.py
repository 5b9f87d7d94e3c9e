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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError
from holdfast.weights.adapter_folder import CONFIG, PREFIX, open_adapter
from holdfast.weights.patterns import check_patterns, matches_end
from holdfast.weights.reader import Tensor, WeightFile

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


def read_adapter(path: str | Path, revision: str | None = None) -> Adapter:
    """Read the records of an adapter folder or Hub id.

    Raises:
        ModelError: the adapter is missing or damaged, or its update is not scaling * B A.
    """
    opened = open_adapter(path, revision)
    notes = []
    if opened.others:
        notes.append(f"Other adapters in the folder were not read: {', '.join(opened.others)}.")
    try:
        return adapter_of(opened.folder, opened.config, opened.file, notes)
    except BaseException:
        opened.file.close()
        raise


def adapter_of(
    folder: Path, config: Mapping[str, Any], file: WeightFile, notes: Iterable[str] = ()
) -> Adapter:
    """Return the records of an adapter with checked settings and tensors.

    Raises:
        ModelError: its update is not scaling * B A.
    """
    _check_plain(folder, config)
    check_patterns(folder / CONFIG, config, {_module_name(key) for key in file.tensors})
    modules, left_alone = _modules(folder, config, file)
    return Adapter(folder, config, file, modules, left_alone, (*_notes(config, left_alone), *notes))


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that the configuration describes a plain LoRA."""
    path = folder / CONFIG
    for key, why in FOREIGN.items():
        if config.get(key):
            raise ModelError(f"{path}: {key} is set; {why}.")
    if config.get("bias", "none") != "none":
        raise ModelError(
            f"{path}: bias is {str(config['bias'])[:80]!r}; trained biases are not part of B A. "
            "Train with bias='none'."
        )


def _module_name(key: str) -> str:
    """The name of a module in the base model, from the name of one of its tensors."""
    return key.removeprefix(PREFIX).partition(".lora_")[0]


def _modules(
    folder: Path, config: Mapping[str, Any], file: WeightFile
) -> tuple[tuple[LoraModule, ...], tuple[str, ...]]:
    factors: dict[str, dict[str, Tensor]] = {}
    left_alone = []
    for key, tensor in file.tensors.items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
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
        if matches_end(pattern, name):
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
