"""The training loss with logits only for completion tokens, and only for a few of them at a time.

For completion tokens with hidden states h_i and targets y_i, the loss of transformers' language models is

    L = 1/n sum_i CE(f(W h_i), y_i)

where W is the head, f is what the model applies to its logits (Gemma 2's softcap, the scale of Cohere and
Granite), and n is the number of completion tokens in the optimizer step. Plain training also computes the
logits of prompts and padding: [batch, length, vocabulary], several times. Here logits are computed for a
chunk of completion tokens, the chunk's gradient with respect to h (and to the trainable part of W) is
computed immediately, and the logits are freed before the next chunk. So only the logits of one chunk are in
memory, and none is computed twice. The equation and the token count are the same as in plain training.

W is the model's own module in any form (LoRA, modules_to_save, sharded), because everything happens inside
the model's forward. f is not looked up by name: the model's forward runs to its end for one token, the
operations on the logits of that token are recorded, and the same operations are applied to each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_torch_version
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from holdfast.errors import ModelError
from holdfast.training.private import compiles
from holdfast.training.tokenising import IGNORED

LOGITS = 2**24
"""Numbers in a chunk of logits: 64 MiB in float32, of which about three copies exist at a time."""


@contextmanager
def lean_loss(causal_lm: Any, chunk: int = LOGITS) -> Iterator[None]:
    """Make a forward of `causal_lm` with labels return the same loss, but only the logits of one token.

    Args:
        causal_lm: the language model itself, not its wrapper. The forward may be that of a wrapper.
        chunk: numbers in a chunk of logits; a chunk has at least one token.
    """
    head, plain, seen = causal_lm.get_output_embeddings(), causal_lm.loss_function, {}

    def keep_hidden(module: nn.Module, args: Any) -> Any:
        seen["hidden"] = args[0]
        return (args[0][:1, :1].detach(), *args[1:])

    def record(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        return logits.detach().as_subclass(_Recorded)

    def loss(logits: Any, labels: Tensor, *_: Any, num_items_in_batch: Any = None, **options: Any) -> Tensor:
        for hook in hooks:
            hook.remove()
        targets = options.get("shift_labels")
        if targets is None:
            targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        completion = targets != IGNORED
        hidden, targets = seen.pop("hidden")[completion], targets[completion]

        def score(part: Tensor) -> Tensor:
            found = head(part[None])
            for step in logits.steps:
                found = step(found)
            return found[0]

        size = max(1, chunk // logits.shape[-1])
        weights = [p for p in head.parameters() if p.requires_grad]
        total = _Chunked.apply(hidden, targets, score, size, torch.is_grad_enabled(), *weights)
        items = len(targets) if num_items_in_batch is None else num_items_in_batch
        return total / (items.to(total.device) if torch.is_tensor(items) else items)

    hooks = [head.register_forward_pre_hook(keep_hidden), head.register_forward_hook(record)]
    causal_lm.loss_function = loss
    try:
        yield
    finally:
        causal_lm.loss_function = plain
        for hook in hooks:
            hook.remove()


class _Recorded(Tensor):
    """Logits of one token that record the operations on them in `steps`: functions of logits alone."""

    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(made, cls):
            before, *rest = args
            made.steps = (*before.steps, lambda logits: func(logits, *rest, **(kwargs or {})))
        return made


class _Chunked(torch.autograd.Function):
    """The summed cross-entropy of hidden states [N, d] and targets [N], `size` tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        score: Any,
        size: int,
        differentiate: bool,
        *weights: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = [torch.zeros_like(x) for x in (hidden, *weights)] if differentiate else []
        for begin in range(0, len(hidden), size):
            window = slice(begin, begin + size)
            with torch.set_grad_enabled(differentiate):
                part = hidden[window].detach().requires_grad_(differentiate)
                loss = F.cross_entropy(score(part).float(), targets[window], reduction="sum")
                found = torch.autograd.grad(loss, (part, *weights)) if differentiate else ()
            total += loss.detach()
            if not differentiate:
                continue
            gradients[0][window] = found[0]
            for gradient, more in zip(gradients[1:], found[1:], strict=True):
                gradient += more
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise ModelError(
                "The lean loss has no second derivative (create_graph=True). Set lean_loss=False."
            )
        hidden, *weights = (gradient * upstream for gradient in ctx.saved_tensors)
        return hidden, None, None, None, None, *weights


@torch.no_grad()
def is_exact(model: Any, causal_lm: Any, inputs: Mapping[str, Tensor], mixed: bool = False) -> bool:
    """Whether the lean loss of `inputs` equals the plain loss; False if the model does not support it.

    It costs two forward passes, draws no random number, and restores the mode of every module.

    Args:
        model: the model that training calls. Every process of a training calls this function.
        mixed: whether the model computes in lower precision than that of its weights.
    """
    if getattr(causal_lm, "loss_function", None) is not ForCausalLMLoss:
        return False
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        plain = model(**inputs).loss
        with lean_loss(causal_lm):
            lean = model(**inputs).loss
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        return False  # the head is called in another way, or the loss is computed elsewhere
    finally:
        for module, mode in modes.items():
            module.training = mode
    exact = not mixed and all(p.dtype == torch.float32 for p in causal_lm.parameters())
    return bool(torch.isclose(plain.float(), lean.float(), rtol=1e-4 if exact else 2e-2, atol=0))


def few_tokens(row: Mapping[str, Any], device: Any, tokens: int = 32) -> dict[str, Tensor]:
    """Return a tokenised row from just before its first completion token: a batch of [1, up to `tokens`]."""
    first = next(i for i, label in enumerate(row["labels"]) if i and label != IGNORED)
    window = slice(first - 1, first - 1 + tokens)
    return {
        key: torch.tensor([list(row[key])[window]], device=device)
        for key in ("input_ids", "attention_mask", "labels")
    }


class LeanLossMixin:
    """Gives a `Trainer` of tokenised rows the lean loss in training, if the model and arguments allow it."""

    lean = False
    """Whether the lean loss is on; decided when training begins."""

    def decide_lean(self: Any) -> None:
        """Test it on a row of the training data. It stays off if another loss or a wrapped forward is set."""
        args, model = self.args, self.model
        # Before torch 2.13, FSDP2 waits for the head's own forward, and gathers no module of its group again.
        waits = self.is_fsdp_enabled and is_torch_version("<", "2.13")
        others = (
            self.label_smoother,
            self.compute_loss_func,
            compiles(args),
            self.is_deepspeed_enabled,
            waits,
        )
        self.lean = False
        if args.lean_loss and args.n_gpu <= 1 and not any(others):
            few = few_tokens(self.train_dataset[0], args.device)
            self.lean = is_exact(model, _causal_lm(model), few, self.accelerator.mixed_precision != "no")

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's loss. With `return_outputs`, and in evaluation, the plain forward is used."""
        lean = self.lean and not return_outputs
        with lean_loss(_causal_lm(self.model)) if lean else nullcontext():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
