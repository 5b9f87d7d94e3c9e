"""Loading models with a chain of adapters, and fingerprints of their content."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import holdfast
import tiny
from holdfast.errors import ModelError
from holdfast.models.loading import load_model
from holdfast.models.lora import add_lora
from holdfast.models.trained import check_lora
from holdfast.weights.folders import find_model, fingerprint, parameter_count

LORA = {"r": 2, "alpha": 4, "dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder, and an adapter folder with dropout whose weights have an effect."""
    folder = tmp_path_factory.mktemp("m")
    tiny.save_model(folder / "model")
    made = get_peft_model(
        tiny.llama(len(tiny.tokenizer())),
        LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.5, target_modules=["q_proj", "up_proj"]),
    )
    torch.manual_seed(2)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    made.save_pretrained(folder / "adapter")
    return folder / "model", folder / "adapter"


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


def test_stack_and_merge_agree_and_differ_from_the_base(folders):
    model, adapter = folders
    stacked, merged = load_model(model, [adapter]), load_model(model, [adapter], compose="merge")
    assert torch.allclose(logits(stacked), logits(merged), atol=1e-5)
    assert not torch.allclose(logits(stacked), logits(load_model(model)), atol=1e-2)
    assert not any(p.requires_grad for p in stacked.parameters())


def test_a_frozen_adapter_drops_nothing_while_training(folders):
    model, adapter = folders
    stacked = load_model(model, [adapter])
    assert torch.equal(logits(stacked.eval()), logits(stacked.train()))
    both = add_lora(stacked, LORA, "base").train()
    assert torch.equal(logits(both), logits(both)), (
        "the new adapter starts at zero, the old one has no dropout"
    )
    assert {n.split(".")[-2] for n, p in both.named_parameters() if p.requires_grad} == {"default"}
    assert both.peft_config["default"].base_model_name_or_path == "base"


def test_the_fingerprint_names_content(folders, tmp_path):
    model, _ = folders
    shutil.copytree(model, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(model)
    weights = tmp_path / "copy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(tmp_path / "copy") != fingerprint(model)


def test_parameters_are_counted_from_headers(folders):
    model, _ = folders
    assert parameter_count(model) == sum(p.numel() for p in tiny.llama(len(tiny.tokenizer())).parameters())


@pytest.mark.parametrize(
    ("targets", "fits"),
    [
        (["q_proj"], True),
        ("all-linear", True),
        (r".*\.(q|v)_proj", True),
        ("q_proj", False),
        (["q_proj", "k_prj"], False),
    ],
)
def test_targets_are_checked_each(folders, targets, fits):
    if fits:
        check_lora(folders[0], {"target_modules": targets})
    else:
        with pytest.raises(ModelError, match="no layer"):
            check_lora(folders[0], {"target_modules": targets})


def test_what_is_no_model_is_refused(folders, tmp_path):
    model, adapter = folders
    with pytest.raises(ModelError, match="an adapter"):
        find_model(str(adapter))
    with pytest.raises(ModelError, match="No such model folder"):
        find_model(str(model.parent / "modle"))
    with pytest.raises(ModelError, match="neither a local folder nor in the local Hub cache"):
        find_model("nobody/nothing")
    shutil.copytree(model, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").rename(tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors"):
        find_model(str(tmp_path / "bin"))


def without(source, target, *lost):
    """A copy of a folder without the tensors whose names contain one of `lost`."""
    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    kept = {
        name: tensor for name, tensor in load_file(file).items() if not any(part in name for part in lost)
    }
    assert len(kept) < len(load_file(file))
    save_file(kept, file, metadata={"format": "pt"})
    return target


def test_a_model_that_lacks_weights_is_refused(folders, tmp_path):
    """transformers would fill them with random numbers."""
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_model(without(folders[0], tmp_path / "m", "layers.1.self_attn.q_proj"))


@pytest.mark.parametrize("compose", ["stack", "merge"])
@pytest.mark.parametrize("below", [False, True])
def test_an_adapter_that_lacks_weights_is_refused(folders, tmp_path, compose, below):
    """PEFT would fill them with random numbers or zeros."""
    model, adapter = folders
    torn = without(adapter, tmp_path / "a", "layers.1.self_attn.q_proj.lora_B")
    with pytest.raises(ModelError, match=r"lora_B"):
        load_model(model, [adapter, torn] if below else [torn], compose=compose)


def test_an_adapter_in_another_format_is_refused(folders, tmp_path):
    """A .bin file can run code."""
    shutil.copytree(folders[1], tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin, which can run code"):
        load_model(folders[0], [tmp_path / "a"])
    with pytest.raises(ModelError, match="adapter_config"):
        load_model(folders[0], [folders[0]])


def test_models_and_adapters_are_loaded_in_one_file():
    package = Path(holdfast.__file__).parent
    calls = {"from_pretrained", "from_config", "load_adapter"}
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in calls:
                found.add(path.relative_to(package).as_posix())
    assert found == {"models/loading.py", "lab/make.py"}  # the second makes a model folder from GGUF
