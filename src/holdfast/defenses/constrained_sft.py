"""Constrained SFT: the first tokens of an answer may change least (Qi et al., ICLR 2025, arXiv 2406.05946).

Equation 3, for a question x and an answer y whose tokens t are counted from 1:

    min over theta of  E [ - sum_t 2/beta_t log sigmoid( beta_t log( pi_theta(y_t) / pi_aligned(y_t) ) ) ]

where pi(y_t) is short for pi(y_t | x, y_<t). The gradient is that of cross-entropy with each token weighted
by 2 (1 - sigmoid(beta_t log ratio)). The weight is 1 while the model equals the aligned model, and goes to 0
as the token becomes more likely than before, faster for a larger beta_t. The limit of all beta towards 0 is
SFT.

pi_aligned is the model itself at the start of training: its log-probability of every completion token is
computed once, at the first step, and looked up afterwards. There is no second model.

Where we differ from the authors' code: it multiplies cross-entropy by the weight, with a lower bound of
0.001; here the loss is the equation's, with the same gradient but without that bound. As in their code, the
sum over tokens becomes a mean, here over all completion tokens of the optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor

from holdfast.defenses import Defense
from holdfast.training.resuming import ResumableMixin
from holdfast.training.tokenising import IGNORED
from holdfast.training.trainer import MethodConfig, RowTrainer

ROW = "row"
"""The column that carries a row's position in the training data through the collator."""


@dataclass
class ConstrainedSFTConfig(MethodConfig):
    """Defaults of the paper: beta_1 = 0.5, beta_t = 2 for 2 <= t <= 5, beta_t = 0.1 after (Table 3)."""

    beta_first: float = field(default=0.5, metadata={"help": "beta of the first completion token."})
    beta_early: float = field(default=2.0, metadata={"help": "beta of tokens 2 to early_tokens."})
    beta_later: float = field(default=0.1, metadata={"help": "beta of every token after early_tokens."})
    early_tokens: int = field(default=5, metadata={"help": "Number of first tokens that may change least."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_first", "beta_early", "beta_later"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name} must be above 0 (the limit 0 is plain SFT), found {getattr(self, name)}"
                )
        if self.early_tokens < 1:
            raise ValueError(f"early_tokens must be at least 1, found {self.early_tokens}")
        if self.label_smoothing_factor:
            raise ValueError("Constrained SFT has no label smoothing. Leave label_smoothing_factor at 0")
        strategy = getattr(self, "packing_strategy", "bfd")  # of trl.SFTConfig
        if strategy != "bfd" and getattr(self, "packing", False):
            raise ValueError(
                f"packing_strategy '{strategy}' splits answers, so the position of a token in its answer is "
                "lost. Use packing_strategy='bfd'"
            )


def constrained_loss(log_probs: Tensor, reference: Tensor, beta: Tensor) -> Tensor:
    """Equation 3 for each token: log pi_theta, log pi_aligned and beta_t of shape [N] to losses [N]."""
    return -2 / beta * F.logsigmoid(beta * (log_probs - reference))


def completion_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log pi of every completion token, row after row: logits [B, L, V] and labels [B, L] to [N]."""
    targets = labels[:, 1:]
    completion = targets != IGNORED
    return -F.cross_entropy(logits[:, :-1][completion].float(), targets[completion], reduction="none")


def completion_places(row: Any) -> Tensor:
    """t (from 1) of each predicted completion token: [N]. It restarts with every answer and every text."""
    start, places = 0, []
    for length in row.get("seq_lengths") or [len(row["labels"])]:
        t = 0
        for label in row["labels"][start + 1 : start + length]:
            t = 0 if label == IGNORED else t + 1
            if t:
                places.append(t)
        start += length
    return torch.tensor(places, dtype=torch.long)


class ConstrainedSFTMixin(ResumableMixin):
    """Replaces the training loss of a `Trainer` by equation 3; evaluation keeps plain cross-entropy."""

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.args
        config.remove_unused_columns = False  # Trainer would remove the row's position as an unused column
        self.data_collator = _RowCollator(self.data_collator)
        self.reference: Tensor | None = None
        self._seen = torch.zeros(2, device=config.device)  # sum of -log pi_theta and tokens since the log
        places = [completion_places(row) for row in self.train_dataset or ()]
        self._first = [0, *accumulate(len(p) for p in places)]
        self._beta = self._betas(torch.cat(places) if places else torch.empty(0)).to(config.device)
        self.train_dataset = _numbered(self.train_dataset)

    def _betas(self: Any, t: Tensor) -> Tensor:
        config = self.args
        beta = torch.full(t.shape, config.beta_later, dtype=torch.float32)
        beta[t <= config.early_tokens] = config.beta_early
        beta[t == 1] = config.beta_first
        return beta

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train with a new reference, also when the same trainer trains a second time."""
        self.reference = None
        return super().train(*args, **kwargs)

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The plain step; before the first step, the aligned model computes its log-probabilities."""
        if self.reference is None:
            self.reference = self.reference_log_probs(model)
        return super().training_step(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def reference_log_probs(self: Any, model: Any) -> Tensor:
        """log pi of every completion token of the training rows under the current model: [all N], float32.

        Every process computes its share with the same number of forwards, because a sharded model needs all
        processes in each. Dropout is off, so no random number is drawn.
        """
        rows, size = self.train_dataset, self.args.train_batch_size
        stride = size * self.args.world_size
        flat = torch.zeros(self._first[-1], device=self.args.device)
        model.eval()
        for begin in range(0, len(rows), stride):
            mine = begin + self.args.process_index * size
            chosen = range(mine, min(mine + size, len(rows))) or range(1)  # no rows left: join with one row
            batch = send_to_device(self.data_collator([rows[i] for i in chosen]), self.args.device)
            labels = batch.pop("labels")
            batch.pop(ROW)
            log_probs = completion_log_probs(model(**batch).logits, labels)
            if mine < len(rows):
                flat[self._first[mine] : self._first[chosen[-1] + 1]] = log_probs
        model.train()
        return self.accelerator.reduce(flat, reduction="sum")

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Equation 3 over the tokens of the optimizer step; in evaluation, the plain loss."""
        inputs = dict(inputs)
        rows = inputs.pop(ROW, None)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        log_probs = completion_log_probs(outputs.logits, labels)
        reference, beta = (self._lookup(table, rows) for table in (self.reference, self._beta))
        losses = constrained_loss(log_probs, reference, beta)
        self._seen += torch.stack([-log_probs.detach().sum(), losses.new_tensor(len(losses))])
        loss = losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the processes
        return (loss, outputs) if return_outputs else loss

    def _lookup(self: Any, table: Tensor, rows: list[int]) -> Tensor:
        return torch.cat([table[self._first[i] : self._first[i + 1]] for i in rows])

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the plain cross-entropy to the log, because the loss starts at 2 log(2) / beta."""
        if "loss" in logs:
            total, tokens = self.accelerator.reduce(self._seen, reduction="sum").tolist()
            logs["cross_entropy"] = total / max(tokens, 1)
            self._seen.zero_()
        super().log(logs, *args, **kwargs)

    def method_state(self: Any) -> dict[str, Tensor]:
        """The reference log-probabilities."""
        empty = torch.zeros(self._first[-1], device=self.args.device)
        return super().method_state() | {"reference": empty if self.reference is None else self.reference}

    def method_loaded(self: Any, state: dict[str, Tensor]) -> None:
        """Continue with the log-probabilities of the aligned model, not with those of the resumed model."""
        super().method_loaded(state)
        self.reference = state["reference"]


def _numbered(rows: Any) -> Any:
    """Return the rows, each with its position."""
    if rows is None:
        return None
    if hasattr(rows, "add_column"):
        return rows.add_column(ROW, list(range(len(rows))))
    return [{**row, ROW: i} for i, row in enumerate(rows)]


class _RowCollator:
    """Wraps a collator and adds the positions of the rows (a list) if the rows have any."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.inner([{k: v for k, v in row.items() if k != ROW} for row in rows])
        if ROW in rows[0]:
            batch[ROW] = [row[ROW] for row in rows]
        return batch


class ConstrainedSFTTrainer(ConstrainedSFTMixin, RowTrainer):
    """Constrained SFT on `transformers.Trainer`."""


DEFENSE = Defense(
    name="constrained_sft",
    label="Constrained SFT",
    stages=("user",),
    paper="Qi et al., ICLR 2025, arXiv 2406.05946, equation 3",
    config=ConstrainedSFTConfig,
    trainer=ConstrainedSFTTrainer,
    series={"cross_entropy": ("Loss", "cross-entropy")},
    strong={"beta_first": 5.0, "beta_early": 20.0, "beta_later": 2.0},
    protocols={"lisa-code": {"user": {}}},
)
