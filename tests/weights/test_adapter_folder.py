"""Opening an adapter folder: which subfolder is meant, special files, patterns without end, chains and cards."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from holdfast.errors import ModelError
from holdfast.weights import chains
from holdfast.weights.adapter import read_adapter
from holdfast.weights.adapter_folder import find_adapter, open_adapter
from holdfast.weights.card import name_base, public_name, without_paths
from holdfast.weights.combine import combine
from holdfast.weights.floats import FLOATS, are_finite, from_float32
from holdfast.weights.merge import merge
from holdfast.weights.patterns import check_patterns, matches_end

MODULE = "model.layers.0.self_attn.q_proj"
SETTINGS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 1,
    "lora_alpha": 2,
    "target_modules": ["q_proj"],
}


def write(folder, value=1.0, modules=(MODULE,), **settings):
    """A LoRA of rank 1 on modules of 4 x 4."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    shapes = {"A": (1, 4), "B": (4, 1)}
    tensors = {
        f"base_model.model.{module}.lora_{part}.weight": np.full(shapes[part], value, "f4")
        for module in modules
        for part in shapes
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def write_model(folder, **tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 9}))
    save_file({f"{MODULE}.weight": np.eye(4, dtype="f4"), **tensors}, folder / "model.safetensors")
    return folder


def test_the_subfolder_is_found_or_the_message_names_all(tmp_path):
    for number in (5, 100, 20):
        write(tmp_path / "run" / f"checkpoint-{number}")
    with pytest.raises(ModelError, match=r"checkpoint-5, checkpoint-20, checkpoint-100\. Name one: .*-100$"):
        find_adapter(str(tmp_path / "run"))
    deep = write(tmp_path / "one" / "checkpoint-5" / "mine")
    assert find_adapter(str(tmp_path / "one")) == (deep, [])
    write(tmp_path / "both"), write(tmp_path / "both" / "checkpoint-5")
    assert find_adapter(str(tmp_path / "both")) == (tmp_path / "both", ["checkpoint-5"])
    with read_adapter(tmp_path / "both") as adapter:
        assert "checkpoint-5" in adapter.notes[-1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_a_pipe_in_an_adapter_folder_is_refused(tmp_path, name):
    folder = write(tmp_path / "a")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name} is not a regular file"):
        open_adapter(folder)


def test_a_device_behind_a_link_is_refused(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "special_tokens_map.json").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="not a regular file but a pipe, a socket or a device"):
        open_adapter(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinity_and_nan_are_seen_in_every_dtype(value, dtype):
    numbers = np.array([1.0, -3e38 if dtype in ("BF16", "F32") else -6e4, 0.0, 1e-40], "f4")
    assert are_finite(from_float32(numbers, dtype), dtype)
    numbers[2] = value
    assert not are_finite(from_float32(numbers, dtype), dtype)


def test_patterns_have_limited_time():
    """The names are those of the adapter's tensors, which its author chooses too."""
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"alpha_pattern has .* take longer than 0\.3 seconds"):
        check_patterns("a", {"alpha_pattern": {"(a+)+b": 4}}, [f"{'a' * 60}!"], seconds=0.3)
    assert time.monotonic() - began < 10
    with pytest.raises(ModelError, match=r"rank_pattern has '\(', which is not a valid pattern"):
        check_patterns("a", {"rank_pattern": {"(": 4}}, ["a"])
    known = {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {r"layers\.\d+\.q_proj": 1}}
    check_patterns("a", known, [MODULE])
    assert matches_end(r"layers\.0\..*q_proj", MODULE)
    assert not matches_end("proj", MODULE)


def test_names_alone_need_no_child_process(monkeypatch):
    monkeypatch.setattr("subprocess.run", None)
    check_patterns("a", {"target_modules": ["(a+)+"], "rank_pattern": {"q_proj": 1, "layers.0.v": 2}}, ["a"])


def test_a_user_adapter_needs_the_adapter_below_it(tmp_path):
    below, user = write(tmp_path / "align" / "adapter"), write(tmp_path / "user", 2.0)
    chains.write_below(user, [below])
    record = (user / chains.RECORD).read_text()
    assert "align/adapter" in record
    assert str(tmp_path) not in record
    base = write_model(tmp_path / "base")
    for given in ([user], [user, below], [write(tmp_path / "other", 3.0), user]):
        with pytest.raises(
            ModelError, match=r"trained on top of the adapter align/adapter.* not given before"
        ):
            combine(given, tmp_path / "out")
        with pytest.raises(ModelError, match="Give both, in the order of training"):
            merge(base, given, tmp_path / "out")
    moved = below.rename(tmp_path / "elsewhere")
    combine([moved, user], tmp_path / "out")
    assert not (tmp_path / "out" / chains.RECORD).exists(), "the sum needs nothing below it"
    (user / chains.RECORD).write_text(json.dumps({chains.BELOW: [{"adapter": "a"}]}))
    with pytest.raises(ModelError, match="damaged"):
        combine([moved, user], tmp_path / "again")


def test_what_is_not_finite_is_not_written(tmp_path):
    """NaN and infinity in an adapter, in the base model, or made by the sum."""
    base, fine = write_model(tmp_path / "base"), write(tmp_path / "fine")
    wrong = write_model(tmp_path / "wrong", **{"model.norm.weight": np.array([1, np.nan], "f4")})
    nan, huge = write(tmp_path / "nan", np.nan), write(tmp_path / "huge", 2e38, lora_alpha=4)
    cases = {
        "nan": lambda out: combine([fine, nan], out),
        "scaled": lambda out: combine([huge], out),
        "adapter": lambda out: merge(base, [nan], out),
        "sum": lambda out: merge(base, [huge], out),
        "base": lambda out: merge(wrong, [fine], out),
        "other dtype": lambda out: merge(wrong, [fine], out, dtype="bfloat16"),
    }
    for case, make in cases.items():
        with pytest.raises(ModelError, match=r"not finite|too large for float32"), np.errstate(all="ignore"):
            make(tmp_path / "out")
        assert not (tmp_path / "out").exists(), case


def test_a_mask_of_infinity_is_no_weight(tmp_path):
    """GPT-J's old checkpoints keep one number, which is -inf in fp16."""
    base = write_model(tmp_path / "base", **{"attn.masked_bias": np.array(-np.inf, "f2")})
    merge(base, [write(tmp_path / "a")], tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["attn.masked_bias"] == -np.inf


def test_cards_and_configurations_have_no_paths(tmp_path):
    base = tmp_path / "my-base"
    paths = [str(base), f"{base}/", r"C:\models\my-base", "/gone/my-base"]
    assert {public_name(path) for path in paths} == {"my-base"}
    assert public_name("someone/model") == "someone/model"
    adapters = [write(tmp_path / "a", base_model_name_or_path=str(base))]
    adapters.append(write(tmp_path / "b", 2.0, base_model_name_or_path="my-base"))
    combine(adapters, tmp_path / "out")
    for name in ("adapter_config.json", "README.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "my-base" in text
        assert str(tmp_path) not in text
    name_base(adapters[0])
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    assert config == {**SETTINGS, "base_model_name_or_path": "my-base"}
    given = {"deepspeed": "/home/me/zero.json", "steps": [1, "~/x/y.py", "C:\\z.bin"], "optim": "adamw_torch"}
    assert without_paths(given) == {
        "deepspeed": "zero.json",
        "steps": [1, "y.py", "z.bin"],
        "optim": "adamw_torch",
    }


def test_a_chains_tokenizer_comes_along(tmp_path):
    """`combine` and `merge` write the tokenizer that the adapters were trained with."""
    base, first, second = write_model(tmp_path / "base"), write(tmp_path / "a"), write(tmp_path / "b", 2.0)
    (base / "tokenizer.json").write_text("the base model's")
    (base / "special_tokens_map.json").write_text("{}")
    (second / "chat_template.jinja").write_text("a template")
    merge(base, [first, second], tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "the base model's"
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "a template"
    tokens = {"added_tokens": [{"id": 8, "content": "<|im_start|>"}]}
    (first / "tokenizer.json").write_text(json.dumps(tokens))
    (second / "chat_template.jinja").unlink()
    for out in ("combined", "full"):
        combine([first, second], tmp_path / out) if out == "combined" else merge(
            base, [first, second], tmp_path / out
        )
        assert json.loads((tmp_path / out / "tokenizer.json").read_text()) == tokens
        assert not (tmp_path / out / "special_tokens_map.json").exists()
        assert not (tmp_path / out / "chat_template.jinja").exists()
    tokens["added_tokens"][0]["id"] = 9
    (first / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ModelError, match=r"beyond the 9 embeddings of the model: <\|im_start\|>"):
        merge(base, [first], tmp_path / "beyond")


def test_weights_of_a_pickle_are_not_read(tmp_path):
    folder = Path(shutil.copytree(write(tmp_path / "a"), tmp_path / "b"))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"can run code when it is loaded\. Convert it: .*save_pretrained"):
        open_adapter(folder)
