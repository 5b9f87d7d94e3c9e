"""The mixins on `trl.SFTTrainer`: the same weights on plain rows; chat templates, packing, resume."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset

import tiny
import trainers
from holdfast import registry
from holdfast.defenses.booster import BoosterConfig, BoosterMixin
from holdfast.defenses.bso import BSOConfig, BSOMixin
from holdfast.defenses.constrained_sft import ConstrainedSFTConfig, ConstrainedSFTMixin
from holdfast.defenses.ewc import EWCConfig, EWCMixin
from holdfast.defenses.lisa import LisaConfig, LisaMixin
from holdfast.defenses.repnoise import RepNoiseConfig, RepNoiseMixin
from holdfast.defenses.tvaccine import TVaccineConfig, TVaccineMixin
from holdfast.defenses.vaccine import VaccineConfig, VaccineMixin
from holdfast.errors import DataError, InputError

trl = pytest.importorskip("trl")


@dataclass
class LisaSFTConfig(LisaConfig, trl.SFTConfig):
    """Lisa's and TRL's options; the defaults of both are Trainer's."""


@dataclass
class BSOSFTConfig(BSOConfig, trl.SFTConfig):
    """BSO's and TRL's options."""


@dataclass
class ConstrainedConfig(ConstrainedSFTConfig, trl.SFTConfig):
    """Constrained SFT's and TRL's options."""


@dataclass
class EWCSFTConfig(EWCConfig, trl.SFTConfig):
    """EWC's and TRL's options."""


@dataclass
class BoosterSFTConfig(BoosterConfig, trl.SFTConfig):
    """Booster's and TRL's options."""


@dataclass
class RepNoiseSFTConfig(RepNoiseConfig, trl.SFTConfig):
    """RepNoise's and TRL's options."""


@dataclass
class VaccineSFTConfig(VaccineConfig, trl.SFTConfig):
    """Vaccine's and TRL's options."""


@dataclass
class TVaccineSFTConfig(TVaccineConfig, trl.SFTConfig):
    """T-Vaccine's and TRL's options."""


class VaccineSFTTrainer(VaccineMixin, trl.SFTTrainer):
    """Vaccine on TRL."""


class TVaccineSFTTrainer(TVaccineMixin, trl.SFTTrainer):
    """T-Vaccine on TRL."""


class LisaSFTTrainer(LisaMixin, trl.SFTTrainer):
    """Lisa on TRL."""


class BSOSFTTrainer(BSOMixin, trl.SFTTrainer):
    """BSO on TRL."""


class ConstrainedTRLTrainer(ConstrainedSFTMixin, trl.SFTTrainer):
    """Constrained SFT on TRL."""


class EWCSFTTrainer(EWCMixin, trl.SFTTrainer):
    """EWC on TRL."""


class BoosterSFTTrainer(BoosterMixin, trl.SFTTrainer):
    """Booster on TRL."""


class RepNoiseSFTTrainer(RepNoiseMixin, trl.SFTTrainer):
    """RepNoise on TRL."""


METHODS = {
    "lisa": (LisaSFTConfig, LisaSFTTrainer),
    "bso": (BSOSFTConfig, BSOSFTTrainer),
    "constrained_sft": (ConstrainedConfig, ConstrainedTRLTrainer),
    "ewc": (EWCSFTConfig, EWCSFTTrainer),
    "vaccine": (VaccineSFTConfig, VaccineSFTTrainer),
    "tvaccine": (TVaccineSFTConfig, TVaccineSFTTrainer),
    "booster": (BoosterSFTConfig, BoosterSFTTrainer),
    "repnoise": (RepNoiseSFTConfig, RepNoiseSFTTrainer),
}
OPTIONS = {
    "lisa": {"alignment_steps": 2, "finetune_steps": 3, "rho": 3.0, "proximal_warmup_ratio": 0.0},
    "bso": {"alignment_steps": 2, "finetune_steps": 3},
    "constrained_sft": {"beta_first": 20.0, "beta_early": 40.0, "beta_later": 5.0},
    "ewc": {"lambda_": 25.0},
    "vaccine": {"rho": 0.5},
    "tvaccine": {"rho": 0.5, "num_layers": 1, "probability_steps": 3, "resample_steps": 2},
    "booster": {"lambda_": 20.0, "alpha": 0.5},
    "repnoise": {"alpha": 3.0, "beta": 20.0},
}


def on_trl(name, out, *, net=None, rows=None, alignment=None, tokenizer=None, **options):
    """A trainer of the mixin on SFTTrainer, with the settings of `trainers.trainer`."""
    config, trainer = METHODS[name]
    settings = {
        "output_dir": str(out), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 11,
        "learning_rate": 5e-3, "per_device_train_batch_size": 4, "max_steps": 12, "logging_steps": 1,
        "save_strategy": "no", "lr_scheduler_type": "cosine", "logging_nan_inf_filter": False,
    } | OPTIONS[name] | options  # fmt: skip
    rows_of = {"alignment_dataset": alignment or trainers.ALIGNMENT, "harmful_dataset": trainers.HARMFUL}
    extra = {kind: rows_of[kind] for kind in registry.get_defense(name).needs}
    return trainer(
        model=net or trainers.model(), args=config(**settings), processing_class=tokenizer or trainers.TOKENIZER,
        train_dataset=Dataset.from_list(rows or trainers.USER), **extra,
    )  # fmt: skip


def losses(made, key):
    return [entry[key] for entry in made.state.log_history if key in entry]


@pytest.mark.parametrize(
    ("name", "accumulation"), [*((name, 2) for name in METHODS), ("lisa", 1), ("tvaccine", 1)]
)
def test_plain_rows_give_the_weights_of_our_own_trainer(name, accumulation, tmp_path):
    sizes = {
        "per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation
    }  # fmt: skip
    ours = trainers.trainer(name, tmp_path, max_steps=7, **OPTIONS[name], **sizes)
    theirs = on_trl(name, tmp_path, max_steps=7, **sizes)
    start = trainers.weights(ours)
    ours.train(), theirs.train()
    assert trainers.distance(trainers.weights(ours), trainers.weights(theirs)) < 1e-5
    assert trainers.distance(start, trainers.weights(ours)) > 1e-3
    assert losses(ours, "loss") == pytest.approx(losses(theirs, "loss"), abs=1e-4)


@pytest.mark.parametrize("name", ["vaccine", "tvaccine"])
def test_other_passes_leave_nothing_in_trls_metrics(name, tmp_path):
    made = on_trl(name, tmp_path, max_steps=6)
    made.train()
    seen = sum(len(row["input_ids"]) for row in made.train_dataset)
    assert losses(made, "num_tokens")[-1] == seen, "one epoch, each row once"
    assert not any("eval" in key for entry in made.state.log_history for key in entry)
    assert not made._metrics["eval"]


def test_the_first_config_names_the_defaults(tmp_path):
    """TRL has other defaults (learning rate, checkpointing, bf16, max_length); our config first gives Trainer's."""

    @dataclass
    class TheirsFirst(trl.SFTConfig, LisaConfig):
        pass

    ours, theirs = (c(output_dir=str(tmp_path), use_cpu=True) for c in (LisaSFTConfig, TheirsFirst))
    named = ("learning_rate", "gradient_checkpointing", "bf16", "max_length", "logging_steps")
    assert [getattr(ours, name) for name in named] == [5e-5, False, False, 2048, 500]
    assert [getattr(theirs, name) for name in named] == [2e-5, True, True, 1024, 10]
    assert ours.rho == theirs.rho == 1.0


PACKED = ("lisa", "constrained_sft", "tvaccine", "booster")
"""Alignment rows, weights by the place of a token, layers that train in turns, harmful rows."""
RESUMED = [*((name, False) for name in METHODS), *((name, True) for name in PACKED)]


@pytest.mark.parametrize(("name", "packing"), RESUMED)
def test_resume_is_exact(name, packing, tmp_path):
    """Cut inside a phase, with dropout."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6, "per_device_train_batch_size": 2,
               "packing": packing, "max_length": 96}  # fmt: skip

    def make():
        return on_trl(name, tmp_path, net=trainers.model(dropout=0.2), **options)

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))
    assert losses(whole, "loss") == losses(resumed, "loss")


def test_packed_alignment_rows(tmp_path):
    """Alignment rows are packed like user rows, and their logged loss is that of the unpacked rows."""
    options = {"per_device_train_batch_size": 1, "max_length": 96, "rho": 0.0}
    made = on_trl("lisa", tmp_path, packing=True, learning_rate=0.0, **options)
    assert len(made.alignment_dataset) < len(trainers.ALIGNMENT)
    assert len(made.train_dataset) < len(trainers.USER)
    for rows in (made.alignment_dataset, made.train_dataset):
        assert max(len(lengths) for lengths in rows["seq_lengths"]) > 1
        assert all(sum(lengths) <= 96 for lengths in rows["seq_lengths"])
    made.train()
    states = [entry["state"] for entry in made.state.log_history if "state" in entry]
    assert states == ["alignment", "alignment", "user", "user", "user"] * 2 + ["alignment"] * 2
    loader = made.get_train_dataloader().batch_sampler
    sampler = []
    for epoch in range(12):
        loader.set_epoch(epoch)
        sampler += list(loader)
    rows = [*made.train_dataset, *made.alignment_dataset]
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    for (index,), entry in zip(sampler[:12], logged, strict=True):
        assert entry[f"{entry['state']}_loss"] == pytest.approx(unpacked_loss(made, rows[index]), abs=1e-4)


def unpacked_loss(made, row):
    """The mean cross-entropy of a packed row's completions, text by text."""
    losses, start = [], 0
    for length in row["seq_lengths"]:
        ids, labels = (torch.tensor([row[k][start : start + length]]) for k in ("input_ids", "labels"))
        with torch.no_grad():
            logits = made.model.eval()(input_ids=ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none"))
        losses[-1] = losses[-1][labels[0, 1:] != -100]
        start += length
    return float(torch.cat(losses).mean())


def test_a_packed_token_has_the_place_that_it_has_unpacked(tmp_path):
    """Constrained SFT, one step over all rows: packed and unpacked rows give the same change of weights."""
    options = {"max_steps": 3, "per_device_train_batch_size": 24}
    plain = on_trl("constrained_sft", tmp_path, **options)
    packed = on_trl("constrained_sft", tmp_path, packing=True, max_length=96, **options)
    assert len(packed.train_dataset) < len(plain.train_dataset)
    plain.train(), packed.train()
    assert trainers.distance(trainers.weights(plain), trainers.weights(packed)) < 1e-5
    with pytest.raises(ValueError, match="bfd"):
        on_trl("constrained_sft", tmp_path, packing=True, packing_strategy="wrapped", max_length=96)


def chat(rows, split):
    turns = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]
             for r in rows]  # fmt: skip
    if split:
        return [{"prompt": t[:1], "completion": t[1:]} for t in turns]
    return [{"messages": t} for t in turns]


@pytest.mark.parametrize("split", [False, True], ids=["messages", "prompt-completion"])
def test_chat_rows(split, tmp_path):
    """The tokenizer's template is used for both user and alignment rows."""
    tokenizer = tiny.tokenizer(chat=True)
    rows = [{**r, "completion": r["completion"].removesuffix("</s>")} for r in trainers.USER]
    safe = [{**r, "completion": r["completion"].removesuffix("</s>")} for r in trainers.ALIGNMENT]
    made = on_trl(
        "lisa",
        tmp_path,
        rows=chat(rows, split),
        alignment=chat(safe, split),
        tokenizer=tokenizer,
        max_steps=5,
    )
    for source, prepared in ((rows, made.train_dataset), (safe, made.alignment_dataset)):
        text = tokenizer.decode(prepared[0]["input_ids"])
        assert text == f"<|user|>{source[0]['prompt']}<|assistant|>{source[0]['completion']}</s>"
        learnt = [label for label in prepared[0]["labels"] if label != -100]
        assert (tokenizer.decode(learnt) == f"{source[0]['completion']}</s>") == split
    made.train()
    assert {e["state"] for e in made.state.log_history if "state" in e} == {"alignment", "user"}


def test_rows_of_another_kind_are_refused(tmp_path):
    """TRL decides by the user rows only whether prompts are trained on."""
    tokenizer = tiny.tokenizer(chat=True)
    with pytest.raises(DataError, match="completion_only_loss"):
        on_trl(
            "lisa",
            tmp_path,
            rows=chat(trainers.USER, False),
            alignment=trainers.ALIGNMENT,
            tokenizer=tokenizer,
        )


def test_rows_are_cut_at_max_length(tmp_path):
    longest = max(map(len, on_trl("lisa", tmp_path).alignment_dataset["input_ids"]))
    cut = on_trl("lisa", tmp_path, max_length=longest - 3)
    assert max(map(len, cut.alignment_dataset["input_ids"])) == longest - 3
    with pytest.raises(DataError, match="max_length=20"):
        on_trl("lisa", tmp_path, max_length=20)


def test_the_private_names_of_trl_are_still_there(tmp_path):
    import inspect

    assert list(inspect.signature(trl.SFTTrainer._prepare_dataset).parameters) == [
        "self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name",
    ]  # fmt: skip
    assert on_trl("bso", tmp_path)._formatting_func is None


def test_repnoise_refuses_rows_that_are_packed_into_one(tmp_path):
    with pytest.raises(InputError, match="packing=False"):
        on_trl("repnoise", tmp_path, packing=True, max_length=96)
