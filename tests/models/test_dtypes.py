"""`model.dtype: auto` is the stored dtype, or float32 on a device that is slow in it."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import tiny
from holdfast import Recipe, plan
from holdfast.models import dtypes
from holdfast.models.loading import load_model


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A model that is stored in bfloat16."""
    folder = tiny.save_model(tmp_path_factory.mktemp("half"))
    load_model(folder, dtype="bfloat16").save_pretrained(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["slow", "fast"])
def fast(request, monkeypatch):
    monkeypatch.setattr(dtypes, "_instructions", lambda: frozenset(["avx512_bf16"] if request.param else []))
    return request.param


def test_the_stored_dtype_is_that_of_the_config_or_of_the_weights(half, tmp_path):
    assert dtypes.stored_dtype(half) == "bfloat16"
    config = json.loads((half / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (tmp_path / "model.safetensors").symlink_to(half / "model.safetensors")
    for made, stored in [
        (config, "bfloat16"),
        ({**config, "text_config": {"dtype": "float16"}}, "float16"),
        ({**config, "torch_dtype": "torch.float32"}, "float32"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(made))
        assert dtypes.stored_dtype(tmp_path) == stored
    assert dtypes.stored_dtype(tmp_path / "nowhere") == "float32"


def test_auto_is_float32_where_the_stored_dtype_is_slow(half, fast):
    assert dtypes.used_dtype(half, "auto", "cpu") == ("bfloat16" if fast else "float32")
    assert dtypes.used_dtype(half, "bfloat16", "cpu") == "bfloat16", "as asked for"
    assert not dtypes.computes_fast("float16", "cpu")
    assert load_model(half).dtype == (torch.bfloat16 if fast else torch.float32)
    assert load_model(half, dtype="bfloat16").dtype == torch.bfloat16


def test_it_is_said_in_one_line(half, fast, caplog):
    dtypes._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            load_model(half)
        load_model(half, dtype="bfloat16")
    said = [record.getMessage() for record in caplog.records if record.name == "holdfast.models"]
    if fast:
        assert said == []
    else:
        assert said[0] == f"{half} is stored in bfloat16, which this device computes slowly; float32 is used."
        assert "computes bfloat16 slowly: a product of matrices takes" in said[1]
        assert len(said) == 2
    dtypes._say.cache_clear()


def test_the_steps_are_named_by_the_dtype_that_is_used(half, tmp_path, monkeypatch):
    given = tiny.recipe(tmp_path, alignment=None)
    given["model"] = {"path": str(half)}

    def names(extensions, **model):
        monkeypatch.setattr(dtypes, "_instructions", lambda: frozenset(extensions))
        planned = plan(Recipe.load({**given, "model": {**given["model"], **model}}), device="cpu")
        return [step.id for step in planned.steps if step.kind in ("user", "generate")], planned.dtype

    slow, fast = names([]), names(["amx_bf16"])
    assert (slow[1], fast[1]) == ("float32", "bfloat16")
    assert not set(slow[0]) & set(fast[0])
    assert names([], dtype="float32") == slow
    assert names([], dtype="bfloat16") == fast
