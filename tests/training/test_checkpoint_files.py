"""A checkpoint runs no code when a training resumes from it, whatever its files contain."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import tiny
import trainers
from holdfast.errors import ModelError
from holdfast.training.method_files import read_tensors, write_tensors
from holdfast.training.private import WEIGHTS_ONLY, only_tensors

OPTIONS = {"alignment_steps": 2, "finetune_steps": 2, "proximal_warmup_ratio": 0.0}
SAVES = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4, **OPTIONS}


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainers.trainer("lisa", folder, **SAVES).train()
    return folder / "checkpoint-3"


@pytest.fixture
def checkpoint(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "checkpoint-3")


def resume(checkpoint, scaler=None):
    made = trainers.trainer("lisa", checkpoint.parent / "again", **SAVES)
    made.accelerator.scaler = scaler
    made.train(resume_from_checkpoint=str(checkpoint))
    return made


def test_the_state_of_a_method_is_plain_tensors(checkpoint):
    assert {path.name for path in (checkpoint / "method").iterdir()} == {"run.json", "state.safetensors"}
    state = load_file(checkpoint / "method" / "state.safetensors")
    assert any(float(tensor.abs().max()) > 0 for name, tensor in state.items() if name.startswith("anchor."))
    assert resume(checkpoint).state.global_step == 4


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_no_file_of_trainer_runs_code(file, how, checkpoint, tmp_path):
    if how == "torch":
        torch.save({"a": Evil(tmp_path / "ran")}, checkpoint / file)
    else:
        (checkpoint / file).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    scaler = torch.amp.GradScaler("cpu") if file == "scaler.pt" else None
    with pytest.raises(pickle.UnpicklingError, match=r"[wW]eights.only"):
        resume(checkpoint, scaler)
    assert not (tmp_path / "ran").exists()


def test_control_the_file_runs_code_if_it_is_unpickled(tmp_path):
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "optimizer.pt")
    torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir()


def test_the_random_numbers_of_numpy_are_read(checkpoint):
    kept = torch.load(checkpoint / "rng_state.pth", weights_only=False)
    assert kept["numpy"][0] == "MT19937"
    assert resume(checkpoint).state.global_step == 4


@pytest.mark.parametrize("change", ["missing", "torn", "other names", "other shape", "other dtype"])
def test_a_damaged_state_is_one_sentence(change, checkpoint):
    path = checkpoint / "method" / "state.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.startswith("anchor."))
    if change == "missing":
        path.unlink()
    elif change == "torn":
        path.write_bytes(path.read_bytes()[:500])
    else:
        tensor = state.pop(name)
        changed = {"other shape": tensor[:1], "other dtype": tensor.double()}.get(change)
        save_file(state if changed is None else state | {name: changed.contiguous()}, path)
    with pytest.raises(ModelError, match="another checkpoint"):
        resume(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_damaged_fingerprint_is_one_sentence(text, checkpoint):
    (checkpoint / "method" / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match="is damaged"):
        resume(checkpoint)


@pytest.mark.parametrize(("saves", "adapter"), [("steps", False), ("no", False), ("steps", True)])
def test_settings_that_transformers_does_not_save_are_found_before_the_training(
    saves, adapter, tmp_path, caplog
):
    """As in the folders of Llama-2 and Vicuna; the save at the end would fail."""
    net = trainers.model() if adapter else tiny.llama(len(trainers.TOKENIZER))
    net.generation_config.temperature = 0.9
    made = trainers.trainer("sft", tmp_path, net=net, save_strategy=saves, max_steps=1)
    if adapter or saves == "no":
        made.train()
        assert ("do_sample = True" in caplog.text) != adapter
        return
    with pytest.raises(ModelError, match=r"temperature.*do_sample = True"):
        made.train()
    assert made.state.global_step == 0


def test_tensors_come_back_bit_for_bit(tmp_path):
    shared = torch.randn(4, 3)
    state = {
        "a": shared, "b": shared, "c": shared.t(), "step": torch.tensor(7), "none": torch.zeros(0),
        "half": torch.randn(3).bfloat16(), "flag": torch.tensor([True, False]),
    }  # fmt: skip
    write_tensors(tmp_path / "x.safetensors", state, main=True)
    read = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    read_tensors(tmp_path / "x.safetensors", read)
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    write_tensors(tmp_path / "other.safetensors", state, main=False)
    assert not (tmp_path / "other.safetensors").exists()


def sharded(folder, value):
    """A folder of `torch.distributed.checkpoint`, as FSDP's SHARDED_STATE_DICT writes it."""
    state = {"weight": torch.ones(3), "lr": value}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "optimizer_0"), no_dist=True)


def read_back(folder):
    state = {"weight": torch.zeros(3), "lr": 0.0}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder / "optimizer_0"), no_dist=True)
    return state


def test_sharded_files_of_plain_values_are_read(tmp_path):
    sharded(tmp_path, (0.5, None, True))
    with only_tensors(tmp_path):
        state = read_back(tmp_path)
    assert state["lr"] == (0.5, None, True)
    assert torch.equal(state["weight"], torch.ones(3))
    assert WEIGHTS_ONLY not in os.environ


@pytest.mark.parametrize("guarded", [True, False])
def test_a_hostile_value_among_sharded_files_runs_no_code(guarded, tmp_path):
    """Without the guard it does, which shows that the test can fail."""
    sharded(tmp_path, Evil(tmp_path / "ran"))
    if guarded:
        with pytest.raises(ModelError, match="cannot be loaded"), only_tensors(tmp_path):
            read_back(tmp_path)
    else:
        read_back(tmp_path)
    assert (tmp_path / "ran").exists() != guarded


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_metadata_of_sharded_files_runs_no_code(protocol, tmp_path):
    sharded(tmp_path, 0.5)
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol))
    with pytest.raises(ModelError, match="mkdir"), only_tensors(tmp_path):
        read_back(tmp_path)
    assert not (tmp_path / "ran").exists()
