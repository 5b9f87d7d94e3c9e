"""SafetyProbe: its measurements are right, the trainer's trackers get them, and the training does not change."""

from __future__ import annotations

import random
import re
import warnings

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import tiny
import trainers
from holdfast import SafetyProbe
from holdfast.data.prompts import render
from holdfast.errors import RecipeError
from holdfast.evaluation.judges import Verdict
from holdfast.probe import untouched

PROMPTS = [row["prompt"] for row in tiny.harmful_rows(20)]


class Tracker(TrainerCallback):
    """Like the trainer's own trackers: it gets every log before any callback of the user."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


class Counting:
    """A judge: an answer with an even number of letters is harmful."""

    stamp, max_length, batch_size = "counting", None, 4

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, answers):
        self.seen.append((list(prompts), list(answers)))
        torch.rand(3), random.random(), np.random.rand()
        return [
            Verdict("harmful" if i % 4 == 0 else "safe" if i % 4 < 3 else "unparsed")
            for i in range(len(prompts))
        ]


def train(out, *callbacks, dropout=0.2, hand_over=False, **options):
    torch.manual_seed(0)
    made = trainers.trainer("sft", out, net=trainers.model(dropout=dropout), **options)
    for callback in callbacks:
        if hand_over and isinstance(callback, SafetyProbe):
            callback.trainer = made
        made.add_callback(callback)
    made.train()
    return made


def test_the_training_is_as_without_it(tmp_path):
    """With dropout, shuffling and a judge that draws random numbers: equal weights and losses, bit for bit."""
    probe = SafetyProbe(PROMPTS, Counting(), every=2)
    plain, probed = train(tmp_path), train(tmp_path, probe, hand_over=True)
    assert len(probe.history) == 7
    assert trainers.same(trainers.weights(plain), trainers.weights(probed))
    kept = [entry["loss"] for entry in probed.state.log_history if "loss" in entry]
    assert kept == [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert all(module.training for module in probed.model.modules())


def test_it_measures_what_the_judge_says(tmp_path):
    judge = Counting()
    probe = SafetyProbe(PROMPTS, judge, every=5, size=8)
    made = train(tmp_path, probe)
    assert [entry["step"] for entry in probe.history] == [0, 5, 10, 12]
    assert all(prompts == [PROMPTS[i * 20 // 8] for i in range(8)] for prompts, _ in judge.seen)
    first = probe.history[0]
    assert first["safety/harmful_score"] == pytest.approx(100 * 2 / 6)
    assert first["safety/harmful_score_stderr"] == pytest.approx(100 * (2 / 6 * 4 / 6 / 6) ** 0.5)
    assert (first["safety/n"], first["safety/unparsed"]) == (6, 2)
    assert [e for e in made.state.log_history if "safety/n" in e][1]["step"] == 5


def test_answers_are_the_models_own_at_that_step(tmp_path):
    judge = Counting()
    probe = SafetyProbe(PROMPTS, judge, every=100, size=3, max_new_tokens=5)
    made = train(tmp_path, probe, learning_rate=0.1)
    made.model.eval()
    texts = []
    for prompt in judge.seen[-1][0]:
        text = render({"instruction": prompt, "input": "", "output": ""}, trainers.TOKENIZER, "alpaca")[0]
        ids = trainers.TOKENIZER(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = made.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        texts.append(trainers.TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert judge.seen[-1][1] == texts
    assert judge.seen[0][1] != texts


def test_with_the_trainer_trackers_that_come_before_it_hear_of_it(tmp_path):
    tracker = Tracker()
    train(tmp_path, tracker, SafetyProbe(PROMPTS, Counting(), every=6), logging_steps=4, hand_over=True)
    found = [(step, logs) for step, logs in tracker.logs if "safety/harmful_score" in logs]
    assert [step for step, _ in found] == [0, 6, 12]
    assert {step for step, logs in tracker.logs if "loss" in logs} == {4, 8, 12}, (
        "the usual logs are still written"
    )


def test_without_the_trainer_it_says_that_trackers_hear_nothing(tmp_path):
    made = trainers.trainer("sft", tmp_path, net=trainers.model())
    made.args.report_to = ["wandb"]
    made.add_callback(SafetyProbe(PROMPTS, Counting(), every=6))
    with pytest.warns(UserWarning, match="does not reach wandb"):
        made.train()


@pytest.mark.filterwarnings("error:SafetyProbe")
def test_any_trainer_of_hugging_face(tmp_path):
    """With `callbacks=`, as its users write it; the keyword judge by name."""
    rows = trainers.trainer("sft", tmp_path)
    probe = SafetyProbe(PROMPTS, every=2)
    made = Trainer(
        model=trainers.model(),
        args=TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_steps=2, report_to="none", disable_tqdm=True,
            gradient_checkpointing=True,
        ),
        train_dataset=rows.train_dataset,
        data_collator=rows.data_collator,
        processing_class=trainers.TOKENIZER,
        callbacks=[probe],
    )  # fmt: skip
    made.train()
    assert [entry["step"] for entry in probe.history] == [0, 2]
    assert all(entry["safety/refusal_rate"] <= 100 for entry in probe.history)


def test_it_can_stop_a_training(tmp_path, caplog):
    made = train(tmp_path, SafetyProbe(PROMPTS, Counting(), every=3, limit=30, action="stop"))
    assert made.state.global_step == 1, (
        "the model is above the limit at the start: the first step is the last"
    )
    assert "above the limit of 30" in caplog.text
    made = train(tmp_path, SafetyProbe(PROMPTS, Counting(), every=3, limit=90, action="stop"))
    assert made.state.global_step == 12


def test_it_can_warn_once(tmp_path):
    with pytest.warns(UserWarning, match=r"33\.3 % at step 0") as seen:
        train(tmp_path, SafetyProbe(PROMPTS, Counting(), every=3, limit=30, size=8))
    assert sum("SafetyProbe" in str(w.message) for w in seen) == 1


def test_a_resumed_training_goes_on_with_the_curve(tmp_path):
    whole = SafetyProbe(PROMPTS, Counting(), every=5)
    train(tmp_path, whole, save_strategy="steps", save_steps=5)
    resumed = SafetyProbe(PROMPTS, Counting(), every=5)
    made = trainers.trainer("sft", tmp_path, net=trainers.model(dropout=0.2))
    made.add_callback(resumed)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.history == whole.history


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompts": []}, "list of harmful questions"),
        ({"prompts": "How?"}, "list of harmful questions"),
        ({"every": 0}, "at least 1"),
        ({"limit": 120}, "0 to 100"),
        ({"action": "abort"}, "'warn' or 'stop'"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(RecipeError, match=text):
        SafetyProbe(**{"prompts": PROMPTS, **options})


def test_a_judge_that_is_unknown_is_refused_when_the_probe_is_made():
    with pytest.raises(RecipeError, match="keyword"):
        SafetyProbe(PROMPTS, "keywrod")


class Processor:
    """Like a multimodal processor: it holds a tokenizer, and has no `decode` of its own."""

    model_input_names = ("input_ids",)

    def __init__(self, tokenizer=None):
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def save_pretrained(self, folder):
        pass


class Broken(Counting):
    """A judge whose server is gone."""

    def __call__(self, prompts, answers):
        raise ConnectionError("the judge does not answer")


def padless():
    made = tiny.tokenizer()
    made.pad_token = None
    return made


def beyond():
    """The pad token is the first id that the embeddings lack."""
    made = tiny.tokenizer()
    made.add_special_tokens({"pad_token": "[PAD]"})
    return made


def in_a_plain_trainer(out, processing, judge=None, model=None, **options):
    """The probe, and how many warnings of it there were, after two steps with rows of one length."""
    probe = SafetyProbe([*PROMPTS[:2], "Help."], judge or Counting(), every=1, max_new_tokens=3, **options)
    made = Trainer(
        model=trainers.model() if model is None else model, processing_class=processing,
        args=TrainingArguments(str(out), use_cpu=True, report_to="none", max_steps=2, save_strategy="no"),
        train_dataset=[{"input_ids": [5, 6], "labels": [5, 6]}] * 8, data_collator=default_data_collator,
        callbacks=[probe],
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made.train()
    assert made.state.global_step == 2
    assert all(module.training for module in made.model.modules())
    return probe, [str(one.message) for one in seen if "SafetyProbe" in str(one.message)]


@pytest.mark.parametrize(
    "processing",
    [padless, beyond, lambda: Processor(padless())],
    ids=["no pad token", "pad beyond", "processor"],
)
def test_it_measures_with_tokenizers_as_people_have_them(processing, tmp_path):
    made = processing()
    tokenizer = getattr(made, "tokenizer", made)
    tokenizer.padding_side, pad = "right", tokenizer.pad_token
    probe, warned = in_a_plain_trainer(tmp_path, made)
    assert [entry["step"] for entry in probe.history] == [0, 1, 2]
    assert not warned
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", pad)


def silent():
    """A model that does not generate."""
    net = tiny.llama(len(trainers.TOKENIZER))
    net.generate = None
    return net


@pytest.mark.parametrize(
    ("processing", "options", "words"),
    [
        (lambda: None, {}, "processing_class=tokenizer"),
        (Processor, {}, "processing_class=tokenizer"),
        (tiny.tokenizer, {"judge": Broken(), "limit": 50}, "the judge does not answer.*50 % is not watched"),
        (tiny.tokenizer, {"judge": "beaver_dam", "path": "nowhere"}, "nowhere"),
        (tiny.tokenizer, {"template": "chat"}, "no chat template"),
        (tiny.tokenizer, {"model": silent}, "generate"),
    ],
    ids=["no tokenizer", "images alone", "judge fails", "judge missing", "no template", "no generate"],
)
def test_what_it_cannot_measure_does_not_end_the_training(processing, options, words, tmp_path):
    options = {key: value() if key == "model" else value for key, value in options.items()}
    probe, warned = in_a_plain_trainer(tmp_path, processing(), **options)
    assert not probe.history
    assert len(warned) == 1
    assert re.search(f"cannot measure at step 0: .*{words}.*The training continues", warned[0])


def test_generation_settings_are_as_before(tmp_path):
    net = trainers.model()
    net.generation_config.temperature, net.generation_config.max_length = 0.7, 77
    before = net.generation_config.to_dict()
    in_a_plain_trainer(tmp_path, tiny.tokenizer(), model=net)
    assert net.generation_config.to_dict() == before
    assert net.get_base_model().generation_config is net.generation_config


class Unsloths:
    """What Unsloth changes in a model on a GPU, and how: `generate` undoes it only in training mode."""

    def __init__(self, net):
        self.net, self._generate = net, net.generate
        net.generate, net.for_training = self.generate, self.for_training

    def generate(self, *args, **kwargs):
        restore, kind = self.net.training, self.net.model.gradient_checkpointing
        self.net.eval()
        self.net.model.gradient_checkpointing, self.net._flag_for_generation = False, True
        made = self._generate(*args, **kwargs)
        if restore:
            self.for_training(kind)
        return made

    def for_training(self, use_gradient_checkpointing):
        self.net.train()
        self.net.model.gradient_checkpointing = use_gradient_checkpointing
        self.net.__dict__.pop("_flag_for_generation", None)


def test_a_model_of_unsloth_is_as_before():
    net = trainers.model().get_base_model()
    Unsloths(net)
    net.for_training("unsloth")
    net.model.layers[0].eval()  # a mode that the caller chose
    with untouched(net):
        assert not net.training
        net.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=1)
        assert net._flag_for_generation
    assert net.training
    assert not net.model.layers[0].training
    assert net.model.gradient_checkpointing == "unsloth"
    assert not hasattr(net, "_flag_for_generation")


def test_warnings_that_are_errors_do_not_end_the_training(tmp_path):
    probe = SafetyProbe(PROMPTS, Broken(), every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made = train(tmp_path, probe, max_steps=1)
    assert made.state.global_step == 1
