"""A checkpoint is refused if an option that changes the weights differs, and read if only others differ."""

from __future__ import annotations

import pytest
import torch

import trainers
from holdfast.errors import ModelError

SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
CHANGES = {
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {"num_cycles": 0.7},
    "warmup_steps": 1,
    "max_grad_norm": 0.3,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "optim": "sgd",
    "optim_args": "momentum=0.5",
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-4,
    "weight_decay": 0.1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "num_train_epochs": 2,
    "seed": 12,
    "data_seed": 12,
    "bf16": True,
    "dataloader_drop_last": True,
    "train_sampling_strategy": "sequential",
    "max_length": 1000,
    "lean_loss": False,
    "even_batches": {"accelerator_config": {"even_batches": False}},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    made = trainers.trainer("sft", folder, **SAVES)
    made.train()
    return folder / "checkpoint-2", trainers.weights(made)


def resume(checkpoint, out, net=None, optimizers=None, **options):
    made = trainers.trainer("sft", out, net=net, **SAVES | options)
    if optimizers:
        made.optimizer, made.lr_scheduler = optimizers(made.model)
    made.train(resume_from_checkpoint=str(checkpoint[0]))
    return trainers.weights(made)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_option_is_named_with_both_values(name, checkpoint, tmp_path):
    value = CHANGES[name]
    nested = isinstance(value, dict) and "accelerator_config" in value
    with pytest.raises(ModelError) as caught:
        resume(checkpoint, tmp_path, **value if nested else {name: value})
    now = False if nested else value
    assert f"{name}: " in str(caught.value)
    assert f"in the checkpoint, {now} now" in str(caught.value)


def test_options_that_change_no_weight_are_free(checkpoint, tmp_path):
    found = resume(
        checkpoint, tmp_path, logging_steps=3, save_steps=4, save_total_limit=1, dataloader_num_workers=1,
        per_device_eval_batch_size=3, run_name="other", gradient_checkpointing=True,
    )  # fmt: skip
    assert trainers.same(found, checkpoint[1])


@pytest.mark.parametrize(
    "option", [{"ignore_data_skip": True}, {"accelerator_config": {"use_seedable_sampler": False}}], ids=str
)
def test_options_that_lose_the_order_of_rows_are_refused(option, checkpoint, tmp_path):
    with pytest.raises(ModelError, match="cannot resume exactly: with"):
        resume(checkpoint, tmp_path, **option)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"lora_alpha": 8}, "adapter default.lora_alpha"),
        ({"lora_dropout": 0.1}, "adapter default.lora_dropout"),
    ],
)
def test_another_adapter_is_refused(change, name, checkpoint, tmp_path):
    net = trainers.model()
    for key, value in change.items():
        setattr(net.peft_config["default"], key, value)
    with pytest.raises(ModelError, match=name):
        resume(checkpoint, tmp_path, net=net)


def test_an_optimizer_or_scheduler_of_the_script_is_refused(checkpoint, tmp_path):
    """Their state would replace the settings that the script gives."""

    def own(model):
        weights = [p for p in model.parameters() if p.requires_grad]
        made = torch.optim.AdamW(weights, lr=5e-3, betas=(0.5, 0.6))
        return made, torch.optim.lr_scheduler.StepLR(made, 1)

    with pytest.raises(ModelError) as caught:
        resume(checkpoint, tmp_path, optimizers=own)
    for words in ("scheduler: LambdaLR in the checkpoint, StepLR now", "betas", "[0.5, 0.6] now"):
        assert words in str(caught.value)


def test_a_script_with_its_own_optimizer_resumes(tmp_path):
    def make():
        made = trainers.trainer("sft", tmp_path, net=trainers.model(dropout=0.2), **SAVES)
        weights = [p for p in made.model.parameters() if p.requires_grad]
        made.optimizer = torch.optim.AdamW(weights, lr=5e-3, betas=(0.5, 0.6))
        made.lr_scheduler = torch.optim.lr_scheduler.StepLR(made.optimizer, 1, 0.5)
        return made

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))
