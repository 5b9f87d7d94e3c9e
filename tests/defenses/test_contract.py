"""What every defense with a trainer must keep, over whatever the registry lists."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import trainers
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiny
from holdfast import registry
from holdfast.errors import ModelError
from holdfast.weights.model import add_lora

NAMES = [n for n in registry.list_defenses() if registry.get_defense(n).trainer is not None]
PHASES = {"alignment_steps": 3, "finetune_steps": 4}


def options(name: str, **more):
    known = registry.faces("defenses")[name].parameters
    own = {k: v for k, v in {**PHASES, "rho": 5.0, "proximal_warmup_ratio": 0.0}.items() if k in known}
    return {**own, **more}


@pytest.mark.parametrize("name", NAMES)
def test_the_face_tells_what_the_config_has(name):
    """Parameters are read without importing; they must be those of the dataclass, with its defaults."""
    config = registry.get_defense(name).config
    plain = {f.name for f in dataclasses.fields(TrainingArguments)} | {"max_length"}
    own = {f.name: f.default for f in dataclasses.fields(config) if f.name not in plain}
    face = registry.faces("defenses")[name]
    assert {k: p.default for k, p in face.parameters.items()} == own
    assert all(p.help for p in face.parameters.values())
    assert issubclass(registry.get_defense(name).trainer, Trainer)


class Cut(TrainerCallback):
    """Stops after a step, as a kill after its checkpoint would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_one_never_cut(name, accumulation, tmp_path):
    """Cut inside a phase (steps 3 to 6 are the user's), with dropout, shuffling and a cosine schedule."""
    setting = options(
        name, save_strategy="steps", save_steps=5, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // accumulation,
    )  # fmt: skip

    def make(folder):
        torch.manual_seed(0)
        return trainers.trainer(name, folder, net=trainers.model(dropout=0.2), **setting)

    whole = make(tmp_path / "whole")
    whole.train()
    cut = make(tmp_path / "cut")
    cut.add_callback(Cut(5))
    cut.train()
    assert cut.state.global_step == 5
    resumed = make(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))

    def history(made):
        return [
            {k: v for k, v in e.items() if "second" not in k and "runtime" not in k}
            for e in made.state.log_history[:-1]
        ]

    assert history(whole) == history(resumed)


def test_control_a_lost_anchor_is_noticed(tmp_path, monkeypatch):
    """Without the anchor in the checkpoint the resumed run differs: the test above can fail."""
    from holdfast.defenses.bso import BSOMixin

    setting = options("lisa", save_strategy="steps", save_steps=5)
    whole = trainers.trainer("lisa", tmp_path / "whole", **setting)
    whole.train()
    monkeypatch.setattr(BSOMixin, "method_loaded", lambda self, state: None)
    resumed = trainers.trainer("lisa", tmp_path / "whole", **setting)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert not trainers.same(trainers.weights(whole), trainers.weights(resumed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change",
    [{"seed": 12}, {"max_steps": 13}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}],
)
def test_another_runs_checkpoint_is_refused(name, change, tmp_path):
    made = trainers.trainer(name, tmp_path, **options(name, save_strategy="steps", save_steps=6, max_steps=6))
    made.train()
    other = trainers.trainer(name, tmp_path, **{**options(name, max_steps=6), **change})
    with pytest.raises(ModelError, match=next(iter(change))):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("name", NAMES)
def test_resume_with_the_alignment_adapter_stacked_below(name, tmp_path):
    """Trainer alone would train the alignment adapter after a resume, and drop ours."""
    base = tiny.llama(len(trainers.TOKENIZER))
    below = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "o_proj"]))
    torch.manual_seed(8)
    for key, p in below.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.05)
    below.save_pretrained(tmp_path / "alignment")
    tiny.save_model(tmp_path / "model")
    setting = options(name, save_strategy="steps", save_steps=5)

    def make(folder):
        from holdfast.weights.model import load_model

        net = load_model(tmp_path / "model", [tmp_path / "alignment"])
        torch.manual_seed(4)
        net = add_lora(
            net, {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}, "model"
        )
        return trainers.trainer(name, folder, net=net, **setting)

    whole = make(tmp_path / "whole")
    frozen = {k: p.clone() for k, p in whole.model.named_parameters() if "stage0" in k}
    whole.train()
    resumed = make(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert frozen
    for made in (whole, resumed):
        assert made.model.active_adapters == ["stage0", "default"]
        assert all(torch.equal(p, frozen[k]) for k, p in made.model.named_parameters() if "stage0" in k)
        assert all("default" in k for k, p in made.model.named_parameters() if p.requires_grad)
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_nobody_is_refused(name, tmp_path):
    made = trainers.trainer(name, tmp_path, **options(name, save_strategy="steps", save_steps=6, max_steps=6))
    made.train()
    (tmp_path / "checkpoint-6" / "method" / "run.json").unlink()
    with pytest.raises(ModelError, match=r"run\.json is missing"):
        trainers.trainer(name, tmp_path, **options(name, max_steps=6)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-6")
        )


def test_the_private_names_of_trainer_are_still_there():
    for name in (
        "_save_optimizer_and_scheduler",
        "_load_optimizer_and_scheduler",
        "_load_from_checkpoint",
        "_get_train_sampler",
    ):
        assert callable(getattr(Trainer, name)), name
