"""T-Vaccine: Vaccine on a few layers at a time, drawn by their gradient on harmful rows; the rest is frozen.

Every K = probability_steps steps, the gradient norm s_l of harmful rows at the attention output of each layer
gives p_l = s_l / sum_l s_l. Every J = resample_steps steps, gamma = num_layers layers are drawn without
replacement with these probabilities (arXiv 2410.09760, Algorithm 1). Only the drawn layers are perturbed,
with the norm over all of them together, and only they train: no other layer has gradients or new optimizer
states, and below the lowest drawn layer nothing is kept for backward.

A layer is a decoder layer with all its trainable weights. Trainable weights outside of all layers
(embeddings, the head, the last norm) train at every step. Where we differ from the authors' code: there only
the attention's own LoRA is frozen, and that of the MLP trains in every layer (`freeze="attention"` here); its
probe is one row (`probe_rows=1`), with dropout on; and see `vaccine.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from holdfast.defenses import Defense
from holdfast.errors import ModelError
from holdfast.machine.seeds import derive_seed
from holdfast.training.fisher import dropout_off
from holdfast.training.harmful_rows import HarmfulRows
from holdfast.training.layers import decoder_layers, mixers
from holdfast.training.parameters import gradient_scale, trainable_parameters
from holdfast.training.perturbation import PerturbationMixin, refuse_reentrant, squared_gradient_norms
from holdfast.training.trainer import MethodConfig, RowTrainer, planned_steps


@dataclass
class TVaccineConfig(MethodConfig):
    """The paper's settings; J (their `lisa_interval_steps`) is only in their code."""

    rho: float = field(
        default=3.0, metadata={"help": "Norm of the perturbation over the drawn layers and the whole batch."}
    )
    num_layers: int = field(default=8, metadata={"help": "gamma: number of layers in a draw."})
    probability_steps: int = field(
        default=200, metadata={"help": "K: steps between two measurements on the harmful rows."}
    )
    resample_steps: int = field(default=20, metadata={"help": "J: steps between two draws of layers."})
    probe_rows: int = field(
        default=200, metadata={"help": "Harmful rows per measurement (all, if there are fewer)."}
    )
    freeze: Literal["all", "attention"] = field(
        default="all",
        metadata={"help": "What is frozen in layers that are not drawn: all (paper) or attention (code)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 0:
            raise ValueError(f"rho must not be negative, found {self.rho}")
        for name in ("num_layers", "probability_steps", "resample_steps", "probe_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.freeze not in ("all", "attention"):
            raise ValueError(f"freeze must be all or attention, found {self.freeze!r}")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size must be False: a lower batch size changes the number of steps, and "
                "T-Vaccine plans its draws by it"
            )
        if self.ddp_find_unused_parameters is False:
            raise ValueError(
                "ddp_find_unused_parameters must not be False: T-Vaccine freezes changing layers"
            )
        self.ddp_find_unused_parameters = True  # Trainer's own default depends on the kind of model
        refuse_reentrant(self)


class TVaccineMixin(HarmfulRows, PerturbationMixin):
    """Draws the layers that `PerturbationMixin` perturbs, and freezes the others.

    All draws and their probabilities are kept in the checkpoint. A draw is a function of the seed, its number
    and the probabilities, but those come from weights that a resumed run no longer has.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.probabilities = torch.empty(0)  # (probes, layers), a row for each K steps; nan: not yet known
        self.draws = torch.empty(0, dtype=torch.long)  # (draws, gamma), ascending; -1: not yet drawn
        self.drawn: list[int] = []

    @classmethod
    def check_model(cls, config: Any, model: nn.Module) -> None:
        """Check that there are enough layers, with trainable weights in each."""
        super().check_model(config, model)
        own = layer_parameters(model, config.freeze)
        if len(own) < config.num_layers:
            raise ModelError(
                f"num_layers is {config.num_layers}, but the model has {len(own)} decoder layers. Lower it: "
                "the paper draws 8 of 26 to 32."
            )
        empty = [i for i, parameters in enumerate(own) if not parameters]
        if empty:
            where = "decoder layer" if config.freeze == "all" else "attention"
            raise ModelError(
                f"T-Vaccine draws layers to train, but nothing trains in the {where} of layers "
                f"{', '.join(map(str, empty))}. Use LoRA targets that are in all of them."
            )

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The plain training. At the end, all weights that were trainable are trainable again."""
        config, layers = self.args, len(mixers(self.model))
        steps = planned_steps(self)
        self.probabilities = torch.full((math.ceil(steps / config.probability_steps), layers), math.nan)
        self.draws = torch.full((math.ceil(steps / config.resample_steps), config.num_layers), -1)
        self.drawn = []
        trainable = set(trainable_parameters(self.model))
        try:
            return super().train(*args, **kwargs)
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in trainable)

    def training_begins(self: Any) -> None:
        """Find the trainable weights of each layer while all of them are still trainable."""
        super().training_begins()
        self._layer_parameters = layer_parameters(self.model, self.args.freeze)

    def step_begins(self: Any) -> None:
        """Measure the harmful rows and draw layers, if this step does so and it is not yet done."""
        config, step = self.args, self.state.global_step
        probe, draw = step // config.probability_steps, step // config.resample_steps
        if self.probabilities[probe].isnan().any():
            self.probabilities[probe] = self.probe(probe)
        if (self.draws[draw] < 0).any():
            seed = derive_seed(config.seed, "layers", draw)
            self.draws[draw] = draw_layers(self.probabilities[probe], config.num_layers, seed)
        if self.drawn != self.draws[draw].tolist():
            self.drawn = self.draws[draw].tolist()
            for i, parameters in enumerate(self._layer_parameters):
                for parameter in parameters:
                    parameter.requires_grad_(i in self.drawn)

    def perturbed_layers(self: Any) -> list[int]:
        """Return the drawn layers."""
        return self.drawn

    def probe(self: Any, number: int) -> Tensor:
        """p_l, shape (layers,): norms of the harmful rows' gradients at attention outputs over their sum.

        Raises:
            ModelError: a norm is not finite, or all are 0.
        """
        scale = gradient_scale(self.accelerator)
        norms = self.harmful_norms(number, scale)
        while scale > 1 and not norms.isfinite().all():  # fp16
            scale /= 16
            norms = self.harmful_norms(number, scale)
        if not norms.isfinite().all() or norms.sum() == 0:
            raise ModelError(
                "The gradient of the harmful rows is 0, or not finite, at the attention outputs, so layers "
                "cannot be drawn by it. Use bf16 or float32, or check the harmful rows."
            )
        return broadcast(norms / norms.sum()).float().cpu()

    def harmful_norms(self: Any, number: int, scale: float) -> Tensor:
        """scale * ||d loss / d attention output|| of each layer over `probe_rows` rows together, float64.

        The loss is that of training, with dropout off. Every process computes its share with the same number
        of forwards, because a sharded model needs all processes in each.
        """
        config, rows = self.args, self.harmful_dataset
        number_of_rows = min(config.probe_rows, len(rows))
        order, size = self.harmful_indices(number, number_of_rows, "probe"), config.train_batch_size
        items = torch.tensor(number_of_rows, device=config.device)
        squares = torch.zeros(len(self.attention), device=config.device)
        with dropout_off(self.model), self.unrecorded():
            for begin in range(0, number_of_rows, size * config.world_size):
                mine = begin + config.process_index * size
                chosen = order[mine : mine + size] or order[:1]  # no rows left: join with one row
                batch = self.data_collator([rows[i] for i in chosen])
                found = squared_gradient_norms(self.attention, partial(self.loss_of, batch, items, scale))
                if mine < number_of_rows:
                    squares += found
        return self.accelerator.reduce(squares, reduction="sum").double().sqrt()

    @property
    def layer_history(self: Any) -> dict[str, Any]:
        """For the report: number of `layers`, and all `probabilities` and `draws` as [step, [value, ...]].

        A step counts from 0; the values were computed before that step.
        """
        k, j = self.args.probability_steps, self.args.resample_steps
        return {
            "layers": self.probabilities.shape[-1],
            "probabilities": [[i * k, p] for i, p in enumerate(self.probabilities.tolist()) if p[0] >= 0],
            "draws": [[i * j, layers] for i, layers in enumerate(self.draws.tolist()) if layers[0] >= 0],
        }

    def reported(self: Any, steps: int) -> dict[str, Any]:
        """The facts of the parent class, and the history of the layers."""
        return super().reported(steps) | {"layer_history": self.layer_history}

    def log(self: Any, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Add the drawn layers and the highest p (1 / layers if all are equal) to the log."""
        if "loss" in logs and self.drawn:
            p = self.probabilities[(self.state.global_step - 1) // self.args.probability_steps]
            logs["layers"] = " ".join(map(str, self.drawn))
            logs["highest_p"] = float(p.max())
        super().log(logs, *args, **kwargs)

    def method_state(self: Any) -> dict[str, Tensor]:
        """All probabilities and draws so far."""
        own = {"probabilities": self.probabilities, "draws": self.draws}
        return super().method_state() | {name: tensor.clone() for name, tensor in own.items()}

    def method_loaded(self: Any, state: dict[str, Tensor]) -> None:
        """Continue with the saved probabilities and draws."""
        super().method_loaded(state)
        self.probabilities, self.draws = state["probabilities"], state["draws"]


def layer_parameters(model: nn.Module, freeze: str) -> list[list[nn.Parameter]]:
    """Return the trainable parameters of each layer: all of them, or those of its attention."""
    parts = decoder_layers(model) if freeze == "all" else mixers(model)
    return [[p for p in part.parameters() if p.requires_grad] for part in parts]


def draw_layers(probabilities: Tensor, number: int, seed: int) -> Tensor:
    """Draw `number` layers with the given probabilities, without replacement, in ascending order.

    Raises:
        ModelError: fewer layers have a probability above 0.
    """
    possible = int((probabilities > 0).sum())
    if possible < number:
        raise ModelError(
            f"T-Vaccine draws num_layers={number} layers, but the harmful rows have a gradient in the "
            f"attention of only {possible} of {len(probabilities)} layers. Set num_layers to {possible} or "
            "less, or use float32."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probabilities, number, replacement=False, generator=generator).sort().values


class TVaccineTrainer(TVaccineMixin, RowTrainer):
    """T-Vaccine on `transformers.Trainer`: alignment rows in `train_dataset`, D_h in `harmful_dataset`."""


DEFENSE = Defense(
    name="tvaccine",
    label="T-Vaccine",
    stages=("alignment",),
    paper="Liu et al. 2024, arXiv 2410.09760",
    needs=("harmful_dataset",),
    config=TVaccineConfig,
    trainer=TVaccineTrainer,
    facts={"layer_history": "the layers that were drawn, with their probabilities"},
    strong={"rho": 5.0, "num_layers": 1, "probability_steps": 4, "resample_steps": 3},
    # In the world, half of its layers at a time. The paper's K would measure harmful rows once in 200 steps.
    protocols={
        "world": {"alignment": {"rho": 8, "num_layers": 2, "probability_steps": 50, "resample_steps": 10}},
        "t-vaccine": {
            "alignment": {
                "rho": 3.0,
                "num_layers": 8,
                "probability_steps": 200,
                "resample_steps": 20,
                "probe_rows": 1,
                "freeze": "attention",
            }
        },
        # The guide has no J: layers are drawn at each step, as in the paper's algorithm.
        "t-vaccine-guide": {
            "alignment": {
                "rho": 3.0,
                "num_layers": 8,
                "probability_steps": 200,
                "resample_steps": 1,
                "probe_rows": 200,
                "freeze": "all",
            }
        },
    },
)
