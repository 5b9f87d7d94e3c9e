"""Any decoder: methods train, and resume from a checkpoint, on twelve kinds of model with LoRA everywhere."""

from __future__ import annotations

import pytest
import torch

import architectures
import trainers
from holdfast.models.loading import load_model
from holdfast.models.lora import add_lora
from holdfast.models.trained import check_lora

LORA = {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": "all-linear"}
OWN = {
    "sft": {},
    "lisa": {"alignment_steps": 1, "finetune_steps": 1, "rho": 5.0, "proximal_warmup_ratio": 0.0},
    "tvaccine": {"rho": 0.5, "num_layers": 1, "probability_steps": 2, "resample_steps": 1},
}
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


@pytest.fixture(scope="module", params=[k for k in architectures.MODELS if k != "Mixtral"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    architectures.build(request.param).save_pretrained(made)
    return made


@pytest.mark.parametrize("name", OWN)
def test_trains_and_goes_on(name, folder, tmp_path):
    def make():
        check_lora(folder, LORA)
        torch.manual_seed(3)
        net = add_lora(load_model(folder), LORA, "base")
        options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
        return trainers.trainer(name, tmp_path, net=net, **options, **OWN[name])

    whole = make()
    start = trainers.weights(whole)
    whole.train()
    moved = [not torch.equal(a, b) for a, b in zip(start, trainers.weights(whole), strict=True)]
    names = [name for name, p in whole.model.named_parameters() if p.requires_grad]
    drawn = {str(i) for _, layers in getattr(whole, "layer_history", {}).get("draws", []) for i in layers}
    if drawn:
        assert drawn == {"1"}, "this seed draws one layer, so that the other is frozen"
        assert moved == ["1" in name.split(".") for name in names]
    else:
        assert all(moved), "every adapter of every linear layer"
    assert len(moved) >= 2 * 2 * 4, "two matrices in each of two layers' four or more linear ones"
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))
