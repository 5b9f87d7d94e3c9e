"""For any content of an adapter folder: a Holdfast error and nothing written, or the right result."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import holdfast
from holdfast.errors import HoldfastError
from holdfast.weights.adapter import read_adapter
from holdfast.weights.reader import open_weights
from pairs import save_adapter, save_pair

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["LORA", "none", "q_proj", "gaussian", 0, 1, 2, 8, [0], 16]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "r", "lora_alpha", "peft_type", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "bias",
        "fan_in_fan_out", "init_lora_weights", "use_dora", "modules_to_save", "layer_replication", "lora_bias",
    ]
)  # fmt: skip
PATTERNS = st.sampled_from(["rank_pattern", "alpha_pattern"])
PATTERN = st.dictionaries(st.sampled_from(["q_proj", ".*", "(", "layers.0.*", "*", "a{9999999999}"]), VALUES, max_size=2)  # fmt: skip
ENTRY_KEYS = st.sampled_from(["dtype", "shape", "data_offsets"])
ENTRY = (
    st.sampled_from(["F32", "F16", "BF16", "U8", "F64"])
    | st.lists(st.integers(-2, 2**40) | st.sampled_from([0, 2, 8, 32, 64, 256]), max_size=3)
    | VALUES
)
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Sound(tuple):
    """Folder, configuration and bytes of the weights; printed in short form when a test fails."""

    def __repr__(self):
        return "sound"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    save_pair(folder)
    save_adapter(folder / "adapter", r=2, target_modules=["q_proj"])
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return Sound((folder, config, (folder / "adapter" / "adapter_model.safetensors").read_bytes()))


def look(sound, config, weights):
    """Run on a folder with this configuration (JSON value or bytes) and these bytes of weights."""
    folder, _, _ = sound
    fuzzed, out = folder / "fuzzed", folder / "out"
    shutil.rmtree(fuzzed, ignore_errors=True), shutil.rmtree(out, ignore_errors=True)
    fuzzed.mkdir()
    text = config if isinstance(config, bytes) else json.dumps(config).encode("utf-8", "surrogatepass")
    (fuzzed / "adapter_config.json").write_bytes(text)
    (fuzzed / "adapter_model.safetensors").write_bytes(weights)
    tracemalloc.start()
    try:
        result = holdfast.safe_lora(
            fuzzed, base=folder / "base", aligned=folder / "aligned", out=out, threshold=0.7, workers=1
        )
    except HoldfastError as error:
        result, message = None, str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 30e6
    if result is not None:
        right(result, folder)
        return result
    assert len(message) < 2000
    message.encode()
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "aligned", "base", "fuzzed"]
    return None


def right(result, folder):
    """Compare with the dense formula in float64, computed from the tensors as read."""
    with (
        read_adapter(folder / "fuzzed") as before,
        read_adapter(folder / "out") as after,
        open_weights(folder / "base") as base,
        open_weights(folder / "aligned") as aligned,
    ):
        for m, old, new in zip(result.modules, before.modules, after.modules, strict=True):
            name = f"{m.name}.weight"
            v = aligned[name].read().astype(np.float64) - base[name].read()
            a, b = old.a.read().astype(np.float64), old.b.read().astype(np.float64)
            c = v @ v.T / np.linalg.norm(v)
            moved, delta = c @ b @ a, b @ a
            if m.cosine is not None:
                lengths = np.linalg.norm(moved) * np.linalg.norm(delta)
                assert lengths == 0 or abs((moved * delta).sum() / lengths - m.cosine) < 1e-3
            expected = c @ b if m.projected else b
            assert np.allclose(
                new.b.read(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max(initial=1e-30)
            )


def test_the_sound_folder_passes(sound):
    """The control: without it, code that always raises an error would pass the tests."""
    assert len(look(sound, sound[1], sound[2]).modules) == 3


@FUZZ
@given(st.data())
def test_any_configuration(sound, data):
    config = {**sound[1], **data.draw(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))}
    if data.draw(st.booleans()):
        config[data.draw(PATTERNS)] = data.draw(PATTERN)
    look(sound, config, sound[2])


@FUZZ
@given(VALUES | st.binary(max_size=40))
def test_any_json_or_bytes_as_configuration(sound, config):
    look(sound, config, sound[2])


@FUZZ
@given(st.data())
def test_any_header(sound, data):
    whole = sound[2]
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=2)):
        kind = data.draw(st.sampled_from(["entry", "field", "rename", "gone", "twin"]))
        if name not in header:
            continue
        if kind == "entry":
            header[name] = data.draw(VALUES)
        elif kind == "field" and isinstance(header[name], dict):
            header[name] = {**header[name], data.draw(ENTRY_KEYS): data.draw(ENTRY)}
        elif kind == "rename":
            header[data.draw(st.text(max_size=5)) + name] = header.pop(name)
        elif kind == "gone":
            del header[name]
        else:
            header[name.replace("lora_A", "lora_B")] = header[name]
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    look(sound, sound[1], len(text).to_bytes(8, "little") + text + whole[8 + length :])


@FUZZ
@given(st.data())
def test_any_bytes(sound, data):
    whole = bytearray(sound[2])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 40) | st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    look(sound, sound[1], bytes(whole[: data.draw(st.none() | st.integers(0, len(whole)))]))
