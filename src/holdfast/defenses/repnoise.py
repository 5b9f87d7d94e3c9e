"""RepNoise: harmful answers become noise to the model, in every layer (NeurIPS 2024, arXiv 2405.14577).

    loss = stability + beta noise - alpha ascent
    noise  = 1/L sum_l MMD^2(Z_l, N_l)
    ascent = log(1 + 1/L sum_l CE_l)

stability is the cross-entropy on the safe rows (`train_dataset`). Z_l is the output that the feed-forward
block of layer l of L adds to the residual stream, at the answer tokens of a batch of harmful rows: each row
is one sample, its tokens side by side, zero elsewhere. N_l is Gaussian noise of the same shape, zero where
Z_l is. CE_l is the cross-entropy of the harmful answers when the model's own last norm and head read the
output of layer l. alpha and beta are those of the authors' code; descriptions of the paper have them swapped.

Neither term is a sum over rows: the kernels compare all rows of a batch, and the logarithm is of its mean.
The batch is that of an optimizer step, over all micro-batches and processes, and is processed twice:

1. without gradients: Z_l of all rows and the mean of CE_l. They give MMD^2, its gradient G_l at Z_l, and the
   slope 1 / (1 + mean) of the logarithm;
2. micro-batch by micro-batch: backward from beta/L sum_l <Z_l, G_l> - alpha slope (its share of the mean).
   This is the gradient of the equation above, with one micro-batch's activations in memory at a time.

Where we differ from the authors' code, and why:

- the answer tokens are those with a label. Theirs are those at which a harmful row differs from the safe row
  next to it, which needs pairs with the same question and includes padding;
- every layer counts once in `ascent`. Theirs also counts the embeddings, and counts the last layer twice,
  once with the last norm applied twice. It also counts the first token of an answer as a constant, because it
  sets the logits of that token to 0;
- everything works under PEFT, for any names of the modules; dropout is off in both passes;
- the noise is a function of the seed, the step and the row, so a resumed run draws the same noise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.defenses import Defense
from holdfast.errors import InputError, ModelError
from holdfast.machine.seeds import derive_seed
from holdfast.training.fisher import dropout_off
from holdfast.training.gradient_checkpointing import checkpoints_reentrantly
from holdfast.training.harmful_rows import HarmfulRows
from holdfast.training.layers import decoder_layers
from holdfast.training.parameters import gradient_scale
from holdfast.training.passes import Means, refuse_deepspeed, share_of_step, step_backward
from holdfast.training.tokenising import IGNORED
from holdfast.training.trainer import MethodConfig, RowTrainer

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Bandwidths of the five kernels in units of the mean squared distance, as in the authors' code."""


@dataclass
class RepNoiseConfig(MethodConfig):
    """Defaults of the authors' code for their Llama-2 models: alpha = 1, beta = 0.001."""

    alpha: float = field(default=1.0, metadata={"help": "Weight of the ascent on harmful answers."})
    beta: float = field(default=0.001, metadata={"help": "Weight of the distance to noise."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")


def mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float] = BANDWIDTHS) -> Tensor:
    """Squared maximum mean discrepancy of two sets of n points in d dimensions; a scalar.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over all pairs, including i = j. The kernel is the sum over
    b of exp(-||u - v||^2 / (b m)), where m is the mean of ||u - v||^2 over all pairs u != v of both sets
    together, taken as a constant.
    """
    n, points = len(x), torch.cat([x, y])
    squares = points.square().sum(1)
    distance = (squares[:, None] + squares - 2 * points @ points.T).clamp(min=0)
    mean = distance.detach().sum() / (len(points) ** 2 - len(points))
    kernel = torch.stack([(-distance / (b * mean)).exp() for b in bandwidths]).sum(0)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def ascent(layer_losses: Tensor) -> Tensor:
    """log(1 + their mean); its slope at the mean m is 1 / (1 + m)."""
    return torch.log1p(layer_losses.mean())


def feed_forwards(model: nn.Module) -> list[nn.Module]:
    """Return each decoder layer's block that is added to the residual stream last, from the lowest layer.

    The block is found by its name (mlp, feed_forward, ffn, moe), or else it is the last part of the layer
    that has a matrix (OPT).

    Raises:
        ModelError: a layer has no such block.
    """
    found = []
    for layer in decoder_layers(model):
        parts = {k: m for k, m in layer.named_children() if any(p.ndim > 1 for p in m.parameters())}
        if not parts:
            raise ModelError(
                f"No feed-forward block was found in {type(layer).__name__}, whose parts are "
                f"{', '.join(name for name, _ in layer.named_children()) or 'none'}. RepNoise needs another "
                "model."
            )
        named = [name for name in parts if re.search("mlp|feed_forward|ffn|moe", name)]
        found.append(parts[(named or list(parts))[-1]])
    return found


@contextmanager
def every_layer_read(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Make norm, head and loss of the model read the outputs of all layers, as L times as many rows.

    So every layer is read like the last one, in any architecture (soft caps, scales). Labels [rows,
    tokens] must be repeated L times: `labels.repeat(L, 1)`.
    """
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> Any:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        if len(outputs) < len(layers):
            return None
        every = torch.cat(outputs)
        outputs.clear()
        return (every, *output[1:]) if isinstance(output, tuple) else every

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs_kept(modules: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Yield a dict with the output of each module in the last forward, by its position."""
    kept: dict[int, Tensor] = {}

    def keeper(place: int) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            # Checkpointing runs the module again in backward; only the first output is part of the graph.
            kept.setdefault(place, output[0] if isinstance(output, tuple) else output)

        return keep

    handles = [module.register_forward_hook(keeper(i)) for i, module in enumerate(modules)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


class Answers:
    """Positions of the answer tokens in this process's micro-batches.

    A compact tensor [tokens, d] holds them one after the other. A placed tensor [rows, longest, d] has one
    row of the batch per row, with zeros where there is no answer token.
    """

    def __init__(self, batches: Sequence[dict[str, Any]]):
        self.masks = [batch["labels"] != IGNORED for batch in batches]
        rows: list[Tensor] = []
        columns: list[Tensor] = []
        for batch, mask in zip(batches, self.masks, strict=True):
            row, column = mask.nonzero(as_tuple=True)
            padding = batch.get("attention_mask", torch.ones_like(mask)).long().argmax(1)
            rows.append(row + sum(len(m) for m in self.masks[: len(rows)]))
            columns.append(column - padding[row])
        self.row, self.column = torch.cat(rows), torch.cat(columns)
        self.counts = [len(row) for row in rows]
        self.number = sum(len(mask) for mask in self.masks)
        self.longest = int(self.column.max()) + 1

    def of(self, hidden: Tensor, micro_batch: int) -> Tensor:
        """Return the compact tensor for all tokens [rows, tokens, d] of a micro-batch."""
        mask = self.masks[micro_batch]
        return hidden.reshape(*mask.shape, -1)[mask].float()

    def placed(self, compact: Tensor) -> Tensor:
        """Return the placed tensor for a compact one."""
        placed = compact.new_zeros(self.number, self.longest, compact.shape[-1])
        placed[self.row, self.column] = compact
        return placed

    def noise(self, size: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Return compact standard normal noise of width `size`, with one generator per row."""
        counts = torch.bincount(self.row, minlength=self.number).tolist()
        drawn = zip(counts, generators, strict=True)
        return torch.cat([torch.randn(n, size, generator=g, device=g.device) for n, g in drawn])


class RepNoiseMixin(HarmfulRows):
    """Adds the gradient of beta noise - alpha ascent to that of a `Trainer`, once per optimizer step."""

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._terms = Means()
        if self._acts():
            refuse_deepspeed(self)
            if getattr(self.args, "packing", False) or getattr(self.args, "padding_free", False):
                raise InputError(
                    "RepNoise compares harmful rows with each other, but packing joins several into one. Set "
                    "packing=False and padding_free=False."
                )
            self.check_model(self.args, self.model)

    @classmethod
    def check_model(cls, config: Any, model: nn.Module) -> None:
        """Refuse a model whose layers or feed-forward blocks cannot be found."""
        super().check_model(config, model)
        feed_forwards(model)

    def _acts(self: Any) -> bool:
        return self.args.alpha > 0 or self.args.beta > 0

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The plain step, plus the two passes over the harmful batch after the last micro-batch."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._acts() and self.accelerator.sync_gradients:
            if checkpoints_reentrantly(self.model):
                raise InputError(
                    "RepNoise reads activations inside the layers, which reentrant checkpointing hides. Set "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            with dropout_off(self.model):
                self._harmful_passes(model)
        return loss

    def _harmful_passes(self: Any, model: Any) -> None:
        batches, items = self.harmful_batches(self.state.global_step, "repnoise")
        layers, blocks = decoder_layers(self.model), feed_forwards(self.model)
        answers = Answers(batches)
        times = len(layers)

        def read(position: int, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
            """Return the micro-batch's share of the mean of CE_l, and its rows of Z_l as compact tensors."""
            every = {**inputs, "labels": inputs["labels"].repeat(times, 1)}
            counted = None if items is None else items * times
            with every_layer_read(layers), outputs_kept(blocks) as kept:
                loss = share_of_step(self, model, every, counted, len(batches))
            return loss, [answers.of(kept[i], position) for i in range(times)]

        with torch.no_grad():
            seen = [read(position, inputs) for position, inputs in enumerate(batches)]
        mean = self.accelerator.reduce(torch.stack([loss for loss, _ in seen]).sum(), reduction="mean")
        slope = 1 / (1 + mean)
        noise, pulls = self._noise(answers, [list(z) for z in zip(*(zs for _, zs in seen), strict=True)])
        del seen
        beta = self.args.beta * self.args.world_size  # the processes' gradients are averaged

        def share(position: int, inputs: dict[str, Any]) -> Tensor:
            loss, found = read(position, inputs)
            pull = torch.stack([(z * g[position]).sum() for z, g in zip(found, pulls, strict=True)]).mean()
            return beta * pull - self.args.alpha * slope * loss

        step_backward(self, model, batches, share, gradient_scale(self.accelerator))
        self._terms.add(noise, ascent(mean))

    def _noise(self: Any, answers: Answers, z: list[list[Tensor]]) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Return the mean of MMD^2 over the layers, and its compact gradient for each layer and micro-batch.

        Args:
            z: the compact Z_l of each micro-batch, for each layer.
        """
        accelerator, args = self.accelerator, self.args
        own = slice(args.process_index * answers.number, (args.process_index + 1) * answers.number)
        generators = [
            torch.Generator(z[0][0].device).manual_seed(
                derive_seed(args.seed, "repnoise", self.state.global_step, row)
            )
            for row in self.harmful_places()
        ]
        values, gradients = [], []
        for parts in z:
            compact = torch.cat(parts)
            pair = [answers.placed(t) for t in (compact, answers.noise(compact.shape[-1], generators))]
            every = accelerator.gather(accelerator.pad_across_processes(torch.stack(pair, dim=1), dim=2))
            points, noise = every[:, 0].flatten(1).requires_grad_(), every[:, 1].flatten(1)
            value = mmd(points, noise)
            (gradient,) = torch.autograd.grad(value, points)
            mine = gradient.view_as(every[:, 0])[own]
            values.append(value.detach())
            gradients.append(mine[answers.row, answers.column].split(answers.counts))
        return torch.stack(values).mean(), gradients

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the two terms, before alpha and beta, to the log: means over the steps since the last entry."""
        terms = self._terms.take() if "loss" in logs else None
        if terms is not None:
            logs["noise_loss"], logs["ascent_loss"] = terms.tolist()
        super().log(logs, *args, **kwargs)


class RepNoiseTrainer(RepNoiseMixin, RowTrainer):
    """RepNoise on `transformers.Trainer`; `train_dataset` holds the safe rows."""


DEFENSE = Defense(
    name="repnoise",
    label="RepNoise",
    stages=("alignment",),
    paper="arXiv 2405.14577",
    needs=("harmful_dataset",),
    config=RepNoiseConfig,
    trainer=RepNoiseTrainer,
    series={"noise_loss": ("Noise", "distance from noise"), "ascent_loss": ("Ascent", "ascent")},
    # Harmful rows, batch and length as in T-Vaccine's script.
    protocols={
        "t-vaccine": {
            "data": {"alignment": {"harmful": {"size": 2000}}},
            "alignment": {
                "alpha": 0.1,
                "beta": 0.001,
                "training": {"per_device_train_batch_size": 8, "max_length": 100},
            },
        },
    },
)
