"""Reading weights: the same values as torch, shards, links of the Hub cache, and files with false headers."""

from __future__ import annotations

import json
import os
import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

import tiny
from holdfast.errors import ModelError
from holdfast.weights.floats import from_float32, to_float32
from holdfast.weights.folders import find_model
from holdfast.weights.reader import WeightFile, open_weights

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
EDGES = [0.0, -0.0, 1.0, -1.5, 3.4e38, 1e-40, float("inf"), -float("inf"), float("nan"), 65504.0, 6e-8, 1 / 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_model(folder / "whole")
    tiny.llama(len(tiny.tokenizer())).save_pretrained(folder / "sharded", max_shard_size="20KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_every_tensor_of_a_model_is_read(model, kind):
    expected = load_file(model / "whole" / "model.safetensors")
    with open_weights(model / kind) as weights:
        assert set(weights) == set(expected)
        for name, tensor in weights.items():
            assert tensor.shape == tuple(expected[name].shape)
            assert np.array_equal(tensor.read(), expected[name].numpy())
            if len(tensor.shape) == 2:
                assert np.array_equal(tensor.read(3, 7), expected[name].numpy()[3:7])


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_are_those_of_torch(tmp_path, dtype):
    values = torch.cat([torch.tensor(EDGES), torch.randn(500) * torch.logspace(-42, 38, 500)]).to(
        DTYPES[dtype]
    )
    save_file(
        {"x": values, "scalar": values[3].clone(), "empty": values[:0].clone()}, tmp_path / "x.safetensors"
    )
    file = WeightFile(tmp_path / "x.safetensors")
    tensor = file.tensors["x"]
    assert tensor.dtype == dtype
    with np.errstate(over="ignore"):
        assert np.array_equal(tensor.read(), values.float().numpy(), equal_nan=True)
    assert file.tensors["scalar"].read().shape == ()
    assert file.tensors["empty"].read().shape == (0,)
    floats = torch.cat([torch.tensor(EDGES), torch.randn(5000) * torch.logspace(-42, 38, 5000)])
    back = from_float32(floats.numpy(), dtype)
    assert back.nbytes == floats.numel() * DTYPES[dtype].itemsize
    again = to_float32(back, dtype, np.empty(floats.numel(), np.float32))
    assert np.array_equal(again, floats.to(DTYPES[dtype]).float().numpy(), equal_nan=True)


def test_rows_go_into_a_buffer_that_is_used_again(model):
    with open_weights(model / "whole") as weights:
        tensor = weights["model.layers.0.mlp.up_proj.weight"]
        buffer = np.full(1000, 255, np.uint8)
        rows = tensor.raw(2, 4, buffer)
        assert rows.base is buffer
        assert rows.nbytes == 2 * tensor.row_bytes == 2 * 32 * 4
        assert np.array_equal(to_float32(rows, "F32").reshape(2, 32), tensor.read(2, 4))
        assert (buffer[rows.nbytes :] == 255).all()


@pytest.mark.parametrize("positioned", [True, False])
def test_threads_share_a_file(tmp_path, monkeypatch, positioned):
    if not positioned:
        monkeypatch.delattr(os, "preadv")
    save_numpy({str(i): np.full((64, 64), i, np.float32) for i in range(8)}, tmp_path / "x.safetensors")
    file, wrong = WeightFile(tmp_path / "x.safetensors"), []

    def look(i):
        for _ in range(200):
            wrong.extend({i} ^ set(file.tensors[str(i)].read().ravel().tolist()))

    threads = [threading.Thread(target=look, args=[i]) for i in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(first, last, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


LIES = {
    "empty file": (b"", b"", None),
    "header longer than the file": ({"a": entry(0, 4)}, bytes(4), 10**6),
    "header of an absurd length": ({"a": entry(0, 4)}, bytes(4), 2**63),
    "no json": (b"{torn", b"", None),
    "deep json": (b"[" * 100_000, b"", None),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", b"", None),
    "no utf-8": (b'{"\xff": 1}', b"", None),
    "a list": (b"[1]", b"", None),
    "an entry that is a number": ({"a": 3}, b"", None),
    "an unknown dtype": ({"a": entry(0, 4, dtype="F33")}, bytes(4), None),
    "a dtype that is a list": ({"a": entry(0, 4, dtype=["F32"])}, bytes(4), None),
    "beyond the end": ({"a": entry(0, 4000, (1000,))}, bytes(4), None),
    "backwards": ({"a": entry(4, 0)}, bytes(4), None),
    "negative": ({"a": entry(-4, 0)}, bytes(4), None),
    "too few bytes for its shape": ({"a": entry(0, 4, (2,))}, bytes(4), None),
    "a negative dimension": ({"a": entry(0, 4, (-1, -1))}, bytes(4), None),
    "an overlap": ({"a": entry(0, 8, (2,)), "b": entry(4, 12, (2,))}, bytes(12), None),
    "a gap": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), None),
    "bytes too many": ({"a": entry(0, 4)}, bytes(5), None),
    "a name twice": (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
                     b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4), None),
    "a name for the terminal": ({"\x1b[2J": entry(0, 4)}, bytes(4), None),
    "half a surrogate": (b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4), None),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    header, data, length = LIES[lie]
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"") if lie == "empty file" else write(path, header, data, length)
    with pytest.raises(
        ModelError, match=r"damaged or not a safetensors file.*Fetch or save it again"
    ) as caught:
        WeightFile(path)
    assert len(str(caught.value)) < 600
    str(caught.value).encode()


def test_a_sound_file_written_by_hand_is_read(tmp_path):
    """The control for the false headers above."""
    path = write(tmp_path / "x.safetensors", {"a": entry(0, 4), "b": entry(4, 12, (1, 2))}, bytes(12))
    assert WeightFile(path).tensors["b"].read().shape == (1, 2)


def sharded(tmp_path, model):
    import shutil

    return shutil.copytree(model / "sharded", tmp_path / "m")


def test_a_truncated_shard_and_wrong_indices_are_refused(model, tmp_path):
    folder = sharded(tmp_path, model)
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    whole, table = shards[1].read_bytes(), json.loads(index.read_text())
    shards[1].write_bytes(whole[:-10])
    with pytest.raises(ModelError, match=shards[1].name):
        open_weights(folder)
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"{shards[1].name} is missing"):
        open_weights(folder)
    shards[1].write_bytes(whole)
    open_weights(folder).__exit__()
    for change in (
        {"weight_map": {**table["weight_map"], "no.such.tensor": shards[0].name}},
        {"weight_map": {**table["weight_map"], "model.norm.weight": shards[0].name}},
        {"weight_map": {"model.norm.weight": "../whole/model.safetensors"}},
        {"weight_map": {"model.norm.weight": "/etc/passwd"}},
        {"weight_map": {"model.norm.weight": 3}},
        {"weight_map": []},
        [],
    ):
        index.write_text(json.dumps(change))
        with pytest.raises(ModelError, match=r"weight_map|but it is not|plain file name"):
            open_weights(folder)
    index.write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        open_weights(folder)
    index.unlink()
    with pytest.raises(ModelError, match=r"but no model\.safetensors"):
        open_weights(folder)


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path):
    save_numpy({"a": np.ones(1000, np.float32)}, tmp_path / "x.safetensors")
    file = WeightFile(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 1000)
    with pytest.raises(ModelError, match="ended while it was being read"):
        file.tensors["a"].read()


def test_links_lead_within_the_folder_or_into_the_hub_cache(model, tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for path in (model / "sharded").iterdir():
        (blobs / f"sha-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    with open_weights(snapshot) as weights:
        assert len(weights) > 10
    (tmp_path / "short").symlink_to(snapshot)
    with open_weights(tmp_path / "short") as weights:
        assert len(weights) > 10
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").symlink_to(model / "whole" / "model.safetensors")
    with pytest.raises(ModelError, match="outside its folder"):
        open_weights(out)
    (out / "model.safetensors").unlink()
    (out / "here.bin").write_bytes((model / "whole" / "model.safetensors").read_bytes())
    (out / "model.safetensors").symlink_to("here.bin")
    open_weights(out).__exit__()
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"broken link"):
        open_weights(out)


def test_what_is_no_file_or_cannot_be_read_is_refused(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ModelError, match="not a regular file"):
        open_weights(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match="not a regular file"):
        open_weights(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(model, tmp_path):
    folder = sharded(tmp_path, model)
    next(folder.glob("*.safetensors")).chmod(0)
    with pytest.raises(ModelError, match="Cannot read"):
        open_weights(folder)


def test_quantised_weights_are_refused_when_read(tmp_path):
    save_numpy({"q": np.ones((4, 4), np.uint8)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="stored as U8, as in a quantised model"):
        WeightFile(tmp_path / "x.safetensors").tensors["q"].read()


def test_the_embedded_model_has_a_name():
    with open_weights("world") as weights:
        assert weights.folder == find_model("world")
        assert (find_model("world") / "config.json").is_file()
