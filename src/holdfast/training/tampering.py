"""The parts of TAR: its losses, the attack with its meta-gradient, and how a trainer simulates an attack.

Notation of the paper (Tamirisa et al., arXiv 2408.00761): theta are the trainable weights, G is the starting
model, and K is the number of adversary steps. Only `SimulatedAttack` needs a trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn

from holdfast.errors import ModelError
from holdfast.machine.seeds import derive_seed
from holdfast.training.fisher import dropout_off
from holdfast.training.parameters import gradient_scale, squared_norm
from holdfast.training.shards import drop_gathered
from holdfast.training.tokenising import IGNORED


def predicted(labels: Tensor) -> Tensor:
    """Whether each position predicts a completion token: labels [B, L] to [B, L - 1]."""
    return labels[:, 1:] != IGNORED


def sequence_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log pi(y | x) of each row, summed over its completion: logits [B, L, V] and labels [B, L] to [B]."""
    there = predicted(labels)
    tokens = -F.cross_entropy(logits[:, :-1][there].float(), labels[:, 1:][there], reduction="none")
    row = torch.arange(len(labels), device=labels.device)[:, None].expand_as(there)[there]
    return tokens.new_zeros(len(labels)).index_add(0, row, tokens)


def dpo_loss(chosen: Tensor, rejected: Tensor, start: Sequence[Tensor], beta: float) -> Tensor:
    """- log sigmoid(beta ((chosen - chosen_G) - (rejected - rejected_G))) of each pair, all of shape [N].

    `chosen` and `rejected` are log pi_theta of a refusal and of a harmful answer; `start` holds the same two
    under the starting model (Rafailov et al. 2023, equation 7).
    """
    return -F.logsigmoid(beta * ((chosen - start[0]) - (rejected - start[1])))


def negative_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """sum_v p_v log p_v in nats at each position that predicts a completion token: to [N]."""
    log_p = logits[:, :-1][predicted(labels)].float().log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1)


def representation_distance(
    hidden: Sequence[Tensor], start: Sequence[Tensor], labels: Tensor, squared: bool
) -> Tensor:
    """||h_theta - h_G||^2 (or its root) at each position that predicts a completion token: to [N].

    It is the mean over layers; `hidden` and `start` hold one tensor [B, L, H] per layer (and the
    embeddings').
    """
    there = predicted(labels)
    total = torch.zeros((), device=labels.device)
    for now, before in zip(hidden, start, strict=True):
        difference = now[:, :-1][there].float() - before[:, :-1][there].float()
        total = total + (difference.square().sum(-1) if squared else difference.norm(dim=-1))
    return total / len(hidden)


@contextmanager
def hidden_states(model: Any) -> Iterator[list[Sequence[Tensor]]]:
    """Collect the hidden states of each forward inside that asks for them (`output_hidden_states=True`).

    They are read from the decoder's output, because a trainer may compute its loss from them and not return
    them (TRL's does).
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    seen: list[Sequence[Tensor]] = []
    hook = model.get_decoder().register_forward_hook(lambda *call: seen.append(call[-1].hidden_states))
    try:
        yield seen
    finally:
        hook.remove()


def meta_gradient(
    weights: Sequence[Tensor],
    adversary: Callable[[int, float], None],
    tamper_resistance: Callable[[int, float], None],
    *,
    steps: int,
    subsample: int,
    learning_rate: float,
    schedule_lambda: float,
    scale: float = 1.0,
) -> list[Tensor]:
    """sum over k of exp(schedule_lambda (k - K)) grad L_TR(theta_k), for every `subsample`-th k up to K.

    theta_1 ... theta_K are the weights after each step of an attack with AdamW. They are changed in place;
    use `borrowed` to restore them. First order: the gradient at theta_k replaces that with respect to theta.

    Args:
        adversary: `adversary(k, scale)` adds scale times the gradient of the adversary's loss of step k (from
            1), at theta_(k-1), to every `w.grad`.
        tamper_resistance: the same for L_TR, at theta_k.
        scale: the loss scale of fp16; a gradient that overflows is computed again with half the scale.

    Returns:
        One tensor for each weight, in float32 (sharded like the weight).
    """
    total = [torch.zeros_like(w.detach(), dtype=torch.float32) for w in weights]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate)
    try:
        for k in range(1, steps + 1):
            take_gradient(weights, partial(adversary, k), scale)
            optimizer.step()
            if k % subsample == 0:
                take_gradient(weights, partial(tamper_resistance, k), scale)
                for sum_, weight in zip(total, weights, strict=True):
                    if weight.grad is not None:
                        sum_.add_(weight.grad.float(), alpha=math.exp(schedule_lambda * (k - steps)))
    finally:
        clear(weights)
    return total


def take_gradient(weights: Sequence[Tensor], backward: Callable[[float], None], scale: float = 1.0) -> None:
    """Leave the gradient of a loss in every `w.grad`; `backward(scale)` computes scale times the gradient."""
    clear(weights)
    backward(scale)
    while scale > 1 and not finite([w.grad for w in weights if w.grad is not None]):
        scale /= 2
        clear(weights)
        backward(scale)
    if scale != 1:
        for weight in weights:
            if weight.grad is not None:
                weight.grad = weight.grad / scale


@contextmanager
def borrowed(
    model: nn.Module, weights: Sequence[Tensor], values: Sequence[Tensor] | None = None
) -> Iterator[None]:
    """Let the weights change inside the block, starting from `values`, and restore them bit for bit."""
    kept = [w.detach().clone() for w in weights]
    try:
        put(model, weights, kept if values is None else values)
        yield
    finally:
        put(model, weights, kept)


@torch.no_grad()
def put(model: nn.Module, weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write `values` into the weights, so that the next forward sees them, also under FSDP2."""
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
    drop_gathered(model)


def partners(harmful: Sequence[Any], refusals: Sequence[Any], seed: int) -> tuple[list[int], int]:
    """Return the position of a refusal for each harmful row, and how many answer the same question."""
    answered: dict[tuple[int, ...], int] = {}
    for i in range(len(refusals)):
        answered.setdefault(question(refusals[i]), i)
    answered.pop((), None)
    same = [answered.get(question(harmful[j])) for j in range(len(harmful))]
    found = [
        derive_seed(seed, "refusal", j) % len(refusals) if place is None else place
        for j, place in enumerate(same)
    ]
    return found, sum(place is not None for place in same)


def question(row: Any) -> tuple[int, ...]:
    """Return the tokens before the completion of a tokenised row."""
    labels = row["labels"]
    end = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    return tuple(row["input_ids"][:end])


def clear(weights: Sequence[Tensor]) -> None:
    """Remove the gradients of the weights."""
    for weight in weights:
        weight.grad = None


def finite(tensors: list[Tensor]) -> bool:
    """Whether no tensor holds an infinity or a NaN."""
    return not tensors or bool(torch.isfinite(squared_norm(tensors)))


class SimulatedAttack:
    """One adversary against a trainer's current weights, before optimizer step `step`.

    It runs in every process of the training, outside any `no_sync`. Gradients are averaged over the
    processes, so the adversary has the same weights in all of them. Dropout is off, and no random number is
    drawn.

    Attributes:
        losses: the last L_TR that was computed, and the mean cross-entropy of the same harmful rows at that
            step and before the attack. The mean over processes is the mean over all rows.
    """

    def __init__(self, trainer: Any, model: Any, step: int):
        config = trainer.args
        rates = config.learning_rates()
        self.trainer, self.model, self.step = trainer, model, step
        self.learning_rate = rates[derive_seed(config.seed, "adversary", step) % len(rates)]
        self.losses: dict[str, Tensor] = {}
        size = config.train_batch_size
        order = trainer.harmful_indices(
            step, size * config.gradient_accumulation_steps * config.world_size, "tamper_resistance"
        )
        rows = [trainer.harmful_dataset[j] for j in order]
        self.pairs = len(rows)
        self.tokens = sum(label != IGNORED for row in rows for label in row["labels"][1:])
        mine = order[config.process_index :: config.world_size]
        # A forward holds as many rows as a forward of the training: half as many pairs.
        size = max(1, size // 2) if config.tamper_resistance == "dpo" else size
        self.batches = [self._batch(mine[i : i + size]) for i in range(0, len(mine), size)]
        self.start: list[tuple[Tensor, ...]] = []

    def _batch(self, chosen: list[int]) -> dict[str, Any]:
        """Build a batch of harmful rows; for DPO, as many refusals come before them."""
        trainer = self.trainer
        rows = [trainer.harmful_dataset[j] for j in chosen]
        if trainer.args.tamper_resistance == "dpo":
            rows = [trainer.train_dataset[trainer.partners[j]] for j in chosen] + rows
        return send_to_device(trainer.data_collator(rows), trainer.args.device)

    def gradient(self, weights: list[Tensor], anchor: list[Tensor]) -> list[Tensor]:
        """Return the meta-gradient at `weights`, which are restored afterwards; `anchor` are those of G.

        Raises:
            ModelError: a gradient is not finite.
        """
        config = self.trainer.args
        with dropout_off(self.model):
            if config.tamper_resistance == "dpo":
                with borrowed(self.model, weights, anchor), torch.no_grad():
                    self.start = [self._log_probs(batch)[0].chunk(2) for batch in self.batches]
            with borrowed(self.model, weights):
                with torch.no_grad():
                    before = torch.stack([self._resistance(i) for i in range(len(self.batches))]).sum(0)
                total = meta_gradient(
                    weights, self.adversary, self.tamper_resistance, steps=config.inner_steps,
                    subsample=config.inner_subsample, learning_rate=self.learning_rate,
                    schedule_lambda=config.schedule_lambda, scale=gradient_scale(self.trainer.accelerator),
                )  # fmt: skip
        if not finite(total):
            raise ModelError(
                f"The attack simulated before step {self.step + 1}, with a learning rate of "
                f"{self.learning_rate:g}, diverged: its gradients are not finite. Lower "
                "adversary_learning_rates, or use bf16 or float32 if this is fp16."
            )
        self.losses["harmful_loss_before"] = before[1]
        return total

    def adversary(self, k: int, scale: float) -> None:
        """Backward of adversary step k: cross-entropy on harmful rows."""
        trainer = self.trainer
        place = self.step * trainer.args.inner_steps + k - 1
        batches, items = trainer.harmful_batches(place, "attack")
        share = 1 if items is not None else 1 / len(batches)  # without a count each loss is a mean of its own

        def loss(i: int) -> Tensor:
            return share * trainer.compute_loss(self.model, batches[i], num_items_in_batch=items).mean()[None]

        self._backward(loss, len(batches), scale)

    def tamper_resistance(self, k: int, scale: float) -> None:
        """Backward of L_TR."""
        total = self._backward(self._resistance, len(self.batches), scale)
        self.losses = {"tamper_resistance_loss": total[0], "harmful_loss_after": total[1]}

    def _backward(self, loss: Callable[[int], Tensor], number: int, scale: float) -> Tensor:
        """Run backward on the first element of each `loss(i)` and return the sum of `loss(i)`."""
        total = torch.zeros((), device=self.trainer.args.device)
        for i in range(number):
            last = i == number - 1
            with nullcontext() if last else self.trainer.accelerator.no_sync(self.model):
                with self.trainer.compute_loss_context_manager():
                    found = loss(i)
                (found[0] * scale).backward()
            total = total + found.detach()
        return total

    def _resistance(self, i: int) -> Tensor:
        """L_TR and the harmful rows' cross-entropy, [2]: batch i's share of the means of the whole step."""
        config = self.trainer.args
        log_probs, logits, labels = self._log_probs(self.batches[i])
        if config.tamper_resistance == "dpo":
            chosen, harmful = log_probs.chunk(2)
            loss = dpo_loss(chosen, harmful, self.start[i], config.dpo_beta).sum() / self.pairs
        else:
            harmful = log_probs
            loss = negative_entropy(logits, labels).sum() / self.tokens
        shares = torch.stack([loss, -harmful.detach().sum() / self.tokens])
        return shares * self.trainer.accelerator.num_processes  # the processes' gradients are averaged

    def _log_probs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        inputs = dict(batch)
        labels = inputs.pop("labels")
        logits = self.model(**inputs).logits
        return sequence_log_probs(logits, labels), logits, labels
