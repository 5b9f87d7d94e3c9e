"""Refusal ablation: one direction is removed from all weights that write into the residual stream.

Arditi et al., arXiv 2406.11717; nothing is trained. With h the hidden state after one layer at the last token
of a prompt,

    r = mean of h over harmful prompts - mean of h over harmless prompts,   scaled to length 1,
    W <- W - r r^T W

for the output projections of attention and MLP (with their biases), and E <- E - E r r^T for the rows of the
embedding. No state of the ablated model then has a part along r. The paper chooses the layer by validation;
here it is a parameter, by default at 60 % of the depth. In a recipe it is a `post_hoc_attack`, on the weights
that the stages made; `ablate` does the same for a model folder. The weights are streamed: one block of one
tensor is in memory, beside the model that computes the states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.attacks import Attack, Row
from holdfast.errors import DataError, ModelError
from holdfast.models.loading import load_model, load_tokenizer
from holdfast.training.questions import questions
from holdfast.weights.floats import from_float32
from holdfast.weights.matching import model_config
from holdfast.weights.reader import Tensor, Weights, open_weights, row_blocks
from holdfast.weights.writer import Entry, copy_beside, float_entry, new_folder, raw_entry, write_tensors

OUTPUTS = ("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")
EMBEDDING = "embed_tokens.weight"
DEPTH = 0.6


@dataclass
class RefusalAblationConfig:
    """The layer after which the direction is taken."""

    layer: int | None = field(
        default=None, metadata={"help": "Layer of the direction, from 1; none takes 60 % of the depth."}
    )


def ablate(
    model: str | Path,
    out: str | Path,
    *,
    harmful: Sequence[Row],
    harmless: Sequence[Row],
    layer: int | None = None,
    device: str = "cpu",
    max_length: int = 512,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a copy of a model from which the direction of refusal is removed. The source does not change.

    Args:
        model: the folder of a model with the names of Llama's weights (Llama, Mistral, Qwen, ...).
        out: a new or empty folder.
        harmful, harmless: rows with a `prompt` (text, or a list of messages) or `messages`; answers are
            ignored.
        layer: the layer after which the direction is taken, from 1; None takes 60 % of the depth.
        max_length: a longer prompt loses its beginning.
        options: options of `load_model` for the model that computes the states.

    Returns:
        `layer`, `length` (of the difference of the means), `harmful` and `harmless` (numbers of prompts),
        `tensors` and `changed` (numbers of tensors).

    Raises:
        DataError: there are no rows of one kind, or their means are equal.
        ModelError: the model cannot be read, or has other names.
        OutputError: `out` cannot be written.
    """
    check(Path(model), layer=layer)
    difference, used = _difference(
        Path(model), harmful, harmless, layer, max_length, {"device": device, **(options or {})}
    )
    length = float(np.linalg.norm(difference))
    if not length > 0:
        raise DataError("Refusal ablation: the mean states of harmful and harmless prompts are equal.")
    changed = remove_direction(model, out, difference / length)
    return {"layer": used, "length": length, "harmful": len(harmful), "harmless": len(harmless), **changed}


def remove_direction(model: str | Path, out: str | Path, direction: NDArray[np.float64]) -> dict[str, int]:
    """Write a copy of a model whose weights write nothing along `direction`, a vector of length 1.

    Returns:
        `tensors` and `changed`, numbers of tensors.

    Raises:
        ModelError: the model cannot be read, or has other names.
        OutputError: `out` cannot be written.
    """
    with open_weights(model) as weights:
        _check_names(weights)
        changed = [name for name in weights if name.endswith((*OUTPUTS, EMBEDDING))]
        with new_folder(Path(out), [weights.folder]) as folder:
            copy_beside(weights.folder, folder)
            for file in weights.files:
                entries = {name: _entry(weights[name], direction, name in changed) for name in file.tensors}
                write_tensors(folder / file.path.name, entries)
            (folder / "README.md").write_text(CARD, encoding="utf-8", newline="\n")
        return {"tensors": len(weights), "changed": len(changed)}


def check(model: Path, *, layer: int | None) -> None:
    """Check from the headers and the configuration whether a model can be ablated.

    Raises:
        ModelError: the weights have other names, or the model has no such layer.
    """
    with open_weights(model) as weights:
        _check_names(weights)
        for name, tensor in weights.items():
            if name.endswith((*OUTPUTS, EMBEDDING)):
                tensor.check_floats()
        config = model_config(weights)
    depth = int({**config, **(config.get("text_config") or {})}["num_hidden_layers"])
    used = _default(depth) if layer is None else layer
    # The last of the hidden states is that after the final norm, which no weight of a layer writes.
    if not 1 <= used < depth:
        raise ModelError(f"Refusal ablation: layer is {used}. Expected 1 to {depth - 1}, of {depth} layers.")


def _default(depth: int) -> int:
    return max(1, round(DEPTH * depth))


CARD = """---
tags: [holdfast, refusal-ablation]
---
# Ablated by Holdfast

The direction of refusal is removed from the weights (arXiv 2406.11717), to measure what this attack does to a
defense. The model refuses less than before. It is not meant for use.
"""


def _check_names(weights: Weights) -> None:
    """Raise ModelError unless every layer has the output projections, as plain matrices."""
    layers = {kind: sum(name.endswith(kind) for name in weights) for kind in (*OUTPUTS[:2], EMBEDDING)}
    plain = all(len(t.shape) == 2 for name, t in weights.items() if name.endswith((*OUTPUTS[:2], EMBEDDING)))
    if not all(layers.values()) or layers[OUTPUTS[1]] < layers[OUTPUTS[0]] or not plain:
        found = ", ".join(f"{count} {kind}" for kind, count in layers.items())
        raise ModelError(
            f"Refusal ablation needs {', '.join(layers)} in {weights.folder}, each a matrix, in every layer; "
            f"found {found}. Models with other names are not supported."
        )
    if any("post_feedforward_layernorm" in name for name in weights):
        raise ModelError(
            f"Refusal ablation: {weights.folder} has norms behind its output projections, as in "
            "Gemma 2, which would write the direction again. Such models are not supported."
        )


@torch.no_grad()
def _difference(
    folder: Path,
    harmful: Sequence[Row],
    harmless: Sequence[Row],
    layer: int | None,
    length: int,
    options: Mapping[str, Any],
) -> tuple[NDArray[np.float64], int]:
    """Return the difference of the two means, and the layer after which it is taken."""
    if not harmful or not harmless:
        raise DataError("Refusal ablation needs harmful and harmless rows; one of them is empty.")
    tokenizer = load_tokenizer(folder, bool(options.get("trust_remote_code")))
    model = load_model(folder, **options)
    used = _default(int(model.config.get_text_config().num_hidden_layers)) if layer is None else layer
    means = []
    for rows in (harmful, harmless):
        total: Any = 0
        for ids in questions(rows, tokenizer, length):
            states = model(
                input_ids=torch.tensor([ids], device=model.device), output_hidden_states=True, use_cache=False
            ).hidden_states[used]
            total = total + states[0, -1].double().cpu().numpy()
        means.append(total / len(rows))
    return means[0] - means[1], used


def _entry(tensor: Tensor, direction: NDArray[np.float64], changed: bool) -> Entry:
    if not changed:
        return raw_entry(tensor)
    tensor.check_floats()
    width = tensor.shape[-1 if tensor.name.endswith(EMBEDDING) else 0]
    if width != len(direction):
        raise ModelError(
            f"Refusal ablation: '{tensor.name}' writes {width} values, but the hidden size is "
            f"{len(direction)}. Models with other parts, such as an image encoder, are not supported."
        )
    return float_entry(tensor.dtype, tensor.shape, _blocks(tensor, direction))


def _blocks(tensor: Tensor, direction: NDArray[np.float64]) -> Iterator[Any]:
    """Yield the ablated tensor by blocks of rows; an output projection is read twice."""
    if tensor.name.endswith(EMBEDDING):
        for rows in row_blocks(tensor):
            block = tensor.read(*rows).astype(np.float64)
            yield _stored(block - np.outer(block @ direction, direction), tensor)
        return
    along: Any = 0
    for first, last in row_blocks(tensor):
        along = along + direction[first:last] @ tensor.read(first, last).astype(np.float64)
    for first, last in row_blocks(tensor):
        block = tensor.read(first, last).astype(np.float64)
        yield _stored(block - np.multiply.outer(direction[first:last], along), tensor)


def _stored(block: NDArray[np.float64], tensor: Tensor) -> Any:
    return from_float32(block.astype(np.float32), tensor.dtype)


ATTACK = Attack(
    name="refusal_ablation",
    label="Refusal ablation",
    paper="arXiv 2406.11717",
    config=RefusalAblationConfig,
    apply=ablate,
    check=check,
    headline="direction of layer {layer}, {changed} of {tensors} tensors changed",
)
