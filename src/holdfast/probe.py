"""SafetyProbe: measures the harmful score during training, in any `transformers.Trainer`.

    Trainer(..., callbacks=[SafetyProbe(prompts, judge="keyword", every=50)])

Before the first optimizer step and after every `every` steps, the model answers a few harmful prompts, a
judge reads the answers, and harmful score and refusal rate are added to `trainer_state.json`. transformers
does not give a callback its trainer. If you give it, the scores also go to the console and to the trackers:

    trainer.add_callback(SafetyProbe(prompts, judge="keyword", every=50, trainer=trainer))

The probe does not change the training: decoding is greedy, no gradient is touched, and the modes of all
modules, all random states, the tokenizer's padding and the model's generation settings are restored. Nor does
it end a training: if it cannot measure (a model that does not generate, a processor without a tokenizer, a
judge that fails), it warns once, and the training continues.

A few prompts and short answers make the probe cheap but rough; each score has its standard error. The probe
shows when a model begins to comply, not how safe the model is in the end.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback

from holdfast.chat.tokenizers import text_tokenizer
from holdfast.data.prompts import render_prompt, resolve_template
from holdfast.errors import ModelError, RecipeError, first_line
from holdfast.evaluation.answering import answer_batch
from holdfast.evaluation.frames import Frame, frame_of
from holdfast.evaluation.judges import LoadedJudge
from holdfast.evaluation.judges.keyword import refusal
from holdfast.evaluation.scoring import share
from holdfast.registry import get

SCORE = "safety/harmful_score"


class SafetyProbe(TrainerCallback):
    """Measures the harmful score while a model trains; can warn or stop the training above a limit.

    Args:
        prompts: harmful questions, as texts.
        judge: the name of a judge (`holdfast list judges`), or a loaded judge.
        every: optimizer steps between two measurements; the first is before training.
        limit: the harmful score in percent above which `action` is taken; None takes no action.
        action: "warn" once, or "stop" the training after the step.
        size: the number of prompts to ask, evenly spaced over `prompts`; None asks all.
        max_new_tokens: the length of an answer; the first words are enough to recognise a refusal.
        template: "chat", "alpaca", or "auto": chat if the tokenizer has a template.
        trainer: the trainer to which the probe is added, as for TRL's callbacks; its other callbacks
            (console, trackers) get each measurement as a log. Without it, the measurements are only in
            `trainer_state.json` and `history`.
        judge_options: arguments of the judge's `load`: path, threshold, max_length.

    Attributes:
        history: one dict for each measurement: step, safety/harmful_score, safety/harmful_score_stderr,
            safety/refusal_rate, safety/n, safety/unparsed; percent.

    Raises:
        RecipeError: when it is made: there are no prompts, an argument is out of range, or no judge has this
            name. During a training it raises nothing.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        judge: str | LoadedJudge = "keyword",
        *,
        every: int = 50,
        limit: float | None = None,
        action: Literal["warn", "stop"] = "warn",
        size: int | None = 16,
        max_new_tokens: int = 16,
        template: str = "auto",
        trainer: Trainer | None = None,
        **judge_options: Any,
    ):
        if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise RecipeError("SafetyProbe needs prompts: a list of harmful questions, as texts.")
        if every < 1 or max_new_tokens < 1 or (size is not None and size < 1):
            raise RecipeError("SafetyProbe: every, size and max_new_tokens must be at least 1.")
        if action not in ("warn", "stop"):
            raise RecipeError(f"SafetyProbe: action is 'warn' or 'stop', found {action!r}.")
        if limit is not None and not 0 <= limit <= 100:
            raise RecipeError(f"SafetyProbe: limit is a percentage, 0 to 100, found {limit}.")
        if isinstance(judge, str):
            get("judges", judge)
        few = len(prompts) if size is None else min(size, len(prompts))
        self.prompts = [prompts[i * len(prompts) // few] for i in range(few)]
        self.judge, self.judge_options = judge, judge_options
        self.every, self.limit, self.action = every, limit, action
        self.max_new_tokens, self.template = max_new_tokens, template
        self.trainer = trainer
        self.history: list[dict[str, Any]] = []
        self._ids: list[list[int]] = []
        self._frame = Frame()
        self._warned: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the judge, tokenize the prompts, and measure the model before the first step."""
        self._warned, self._ids = set(), []
        trackers = [] if args.report_to in (None, "none") else list(args.report_to)
        if trackers and self.trainer is None and state.is_world_process_zero:
            self._warn(
                f"SafetyProbe does not reach {', '.join(trackers)}; its scores are only in "
                "trainer_state.json. Write trainer.add_callback(SafetyProbe(..., trainer=trainer))."
            )
        self.history = [
            {k: v for k, v in entry.items() if k != "epoch"} for entry in state.log_history if SCORE in entry
        ]
        with self._never_in_the_way(state):
            self._prepare(args, kwargs.get("processing_class"), kwargs.get("model"))
            if not self.history or self.history[-1]["step"] != state.global_step:  # else resumed there
                self._measure(args, state, control, **kwargs)

    def _prepare(self, args: Any, processing: Any, model: Any) -> None:
        tokenizer = text_tokenizer(processing)
        if not hasattr(tokenizer, "decode"):
            raise ModelError("it needs the trainer's tokenizer: give processing_class=tokenizer")
        generates = callable(getattr(model, "generate", None))
        if not generates or getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"it needs a causal language model that generates, found {type(model).__name__}")
        if isinstance(self.judge, str):
            with untouched():
                self.judge = get("judges", self.judge).load(
                    **{"path": None, "threshold": None, "max_length": None, **self.judge_options},
                    device=str(args.device),
                )
        template = resolve_template(tokenizer, self.template)
        rows = [{"instruction": text, "input": "", "output": ""} for text in self.prompts]
        texts = [render_prompt(row, tokenizer, template) for row in rows]
        self._frame = frame_of(tokenizer, template)
        self._ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after every `every`-th step, and after the last one."""
        due = state.global_step % self.every == 0 or state.global_step >= state.max_steps
        if due and self._ids:
            with self._never_in_the_way(state):
                self._measure(args, state, control, **kwargs)

    @contextmanager
    def _never_in_the_way(self, state: Any) -> Iterator[None]:
        """Turn an error into one warning: the training is worth more than a measurement of it."""
        try:
            yield
        except Exception as error:
            text = f"SafetyProbe cannot measure at step {state.global_step}: {first_line(error).rstrip('.')}."
            if self.limit is not None:
                text += f" The limit of {self.limit:g} % is not watched."
            self._warn(f"{text} The training continues.", "failed")

    def _warn(self, text: str, once: str = "") -> None:
        """Warn, and also where warnings are errors; a kind named in `once` is said once per training."""
        if once in self._warned:
            return
        self._warned |= {once} - {""}
        try:
            warnings.warn(text, stacklevel=4)
        except Warning:
            logging.getLogger(__name__).warning(text)

    def _measure(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Measure in all processes, so that a sharded model can answer; the main one's scores are used."""
        scores: Any
        try:
            scores = self._judged(model, text_tokenizer(kwargs["processing_class"]))
        except Exception as error:  # the other processes wait for this one
            scores = first_line(error)
        if PartialState().num_processes > 1:
            scores = broadcast_object_list([scores])[0]
        if isinstance(scores, str):
            raise ModelError(scores)
        self.history.append({"step": state.global_step, **scores})
        entry = scores if state.epoch is None else {**scores, "epoch": state.epoch}
        state.log_history.append({**entry, "step": state.global_step})
        if self.trainer is not None:
            # trainer.log would cancel the regular log of this step, and TRL's would reset its metrics
            handler = self.trainer.callback_handler
            handler.call_event("on_log", args, state, control, logs=dict(entry))
        score = scores[SCORE]
        if self.limit is not None and score is not None and score > self.limit:
            self._act(score, state, control)

    def _judged(self, model: Any, tokenizer: Any) -> dict[str, float | int | None]:
        assert not isinstance(self.judge, str)
        with untouched(model, tokenizer):
            answers = answer_batch(model, tokenizer, self._ids, self.max_new_tokens, frame=self._frame)
            texts = [found["answer"] for found in answers]
            verdicts: list[str] = [verdict.verdict for verdict in self.judge(self.prompts, texts)]
        return self._scores(texts, verdicts)

    def _scores(self, texts: list[str], verdicts: list[str]) -> dict[str, float | int | None]:
        judged = [v for v in verdicts if v != "unparsed"]
        found = share("harmful_score", "n", judged.count("harmful"), len(judged))
        refused = sum(refusal(text) is not None for text in texts)
        return {
            SCORE: found["harmful_score"],
            f"{SCORE}_stderr": found["harmful_score_stderr"],
            "safety/refusal_rate": 100 * refused / len(texts),
            "safety/n": len(judged),
            "safety/unparsed": len(verdicts) - len(judged),
        }

    def _act(self, score: float, state: Any, control: Any) -> None:
        text = (
            f"harmful score {score:.1f} % at step {state.global_step} is above the limit of {self.limit:g} %"
        )
        if self.action == "stop":
            control.should_training_stop = True
            logging.getLogger(__name__).warning("SafetyProbe stops the training: %s.", text)
        else:
            self._warn(f"SafetyProbe: {text}.", "limit")


@contextmanager
def untouched(model: Any = None, tokenizer: Any = None) -> Iterator[None]:
    """Use evaluation mode inside; afterwards restore all that generating could leave changed.

    These are every module's mode, all random states, the tokenizer's padding and the generation settings.
    On a GPU, Unsloth's `generate` also turns off gradient checkpointing and turns on fast decoding. It undoes
    both only for a model in training mode, so its `for_training` undoes them here.
    """
    back = getattr(model, "for_training", None) if getattr(model, "training", False) else None
    checkpointing = _checkpointing(model) if callable(back) else False
    settings = getattr(model, "generation_config", None)
    kept = deepcopy(vars(settings)) if settings is not None else {}
    padding = {name: getattr(tokenizer, name, None) for name in ("padding_side", "truncation_side")}
    modes = {module: module.training for module in model.modules()} if model is not None else {}
    python, numbers = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        if model is not None:
            model.eval()
        try:
            yield
        finally:
            if callable(back):
                back(use_gradient_checkpointing=checkpointing)
            for module, mode in modes.items():
                module.training = mode
            if settings is not None:
                vars(settings).clear()
                vars(settings).update(kept)
            for name, side in padding.items():
                if side is not None:
                    setattr(tokenizer, name, side)
            random.setstate(python)
            np.random.set_state(numbers)


def _checkpointing(model: Any) -> Any:
    """Return how the model checkpoints gradients: False, True, or Unsloth's name of the kind."""
    kinds = (getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return next((kind for kind in kinds if kind), False)
