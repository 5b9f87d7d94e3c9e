"""Safe LoRA: the files it writes, the inputs it refuses, and that it changes or leaves nothing else."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import tiny
from holdfast.errors import ModelError, OutputError
from holdfast.weights.adapter import read_adapter
from pairs import SEVEN, TWO, digest, gpt2, llama, save_adapter, weights_of
from repairs import close, dense, run, updates


def test_what_is_not_chosen_is_byte_identical_and_sources_are_untouched(three, tmp_path):
    before = [digest(folder) for folder in three]
    result = run(three, tmp_path / "out", num_layers=4)
    assert [digest(folder) for folder in three] == before
    chosen = {f"base_model.model.{m.name}.lora_B.weight" for m in result.projected}
    with read_adapter(three[2]) as old, read_adapter(tmp_path / "out") as new:
        assert len(chosen) == 4
        assert list(old.file.tensors) == list(new.file.tensors)
        for name, tensor in old.file.tensors.items():
            same = np.array_equal(tensor.raw(), new.file.tensors[name].raw())
            assert same == (name not in chosen)
        assert old.config == new.config
        head = old.file.size - sum(t.nbytes for t in old.file.tensors.values())
    files = [folder / "adapter_model.safetensors" for folder in (three[2], tmp_path / "out")]
    assert files[0].read_bytes()[:head] == files[1].read_bytes()[:head]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapter_keeps_its_dtype(three, tmp_path, dtype):
    adapter = save_adapter(tmp_path / "a", dtype=dtype, target_modules=TWO)
    run((*three[:2], adapter), tmp_path / "out", threshold=1.0)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    after, expected = updates(tmp_path / "out", llama), dense(*three[:2], adapter)
    assert all(close(after[n], expected[n]["approx"], 0.01) for n in after)


def test_the_result_loads_in_peft_and_acts_as_it_says(three, tmp_path):
    run(three, tmp_path / "out", threshold=1.0)
    model = PeftModel.from_pretrained(llama(), tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        plain = llama()
        for name, e in dense(*three).items():
            plain.get_submodule(name).weight += e["approx"].float()
        assert torch.allclose(logits, plain(input_ids=ids).logits, atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "did not measure" in card
    assert "21 of 21 modules" in card
    assert str(three[0].parent) not in card, "a path of this machine"
    assert "base: base (fingerprint `" in card
    assert "base_model" not in card


@pytest.mark.parametrize(
    ("options", "title", "done"),
    [
        ({"threshold": 1.0}, "LoRA adapter repaired by Safe LoRA", "The updates of 21 of 21 modules were"),
        ({"threshold": -1.0}, "LoRA adapter, not changed by Safe LoRA", "Nothing was changed"),
        ({"threshold": 1.0, "control": "drop"}, "a control of Safe LoRA", "21 modules were set to zero"),
        (
            {"num_layers": 2, "control": "random"},
            "a control of Safe LoRA",
            "A control: the updates of 2 of 21",
        ),
    ],
)
def test_the_card_says_what_was_done(three, tmp_path, options, title, done):
    result = run(three, tmp_path / "out", **options)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{title}\n" in card
    assert done in card
    assert ("repaired" in card.lower()) is (title.endswith("repaired by Safe LoRA"))
    assert len(result.changed) == len(result.projected)
    base = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base is None or "/" not in base


def test_the_record_says_everything(three, tmp_path):
    result = run(three, tmp_path / "out", num_layers=3, control="random", seed=1)
    record = json.loads((tmp_path / "out" / "safe_lora.json").read_text())
    assert record == json.loads(json.dumps(result.to_json()))
    assert record["options"]["num_layers"] == 3
    assert record["sources"]["base"]["path"] == three[0].name, "no path of this machine"
    assert len({s["fingerprint"] for s in record["sources"].values()}) == 3
    assert set(record["modules"][0]) == {
        "name", "kind", "layer", "cosine", "projected", "norm_before", "norm_after", "direction_norm",
        "lora_rank", "direction_rank", "note",
    }  # fmt: skip
    assert {(m["layer"], m["kind"]) for m in record["modules"]} == {(l, k) for l in range(3) for k in SEVEN}


def test_an_adapter_for_another_model_is_refused(three, tmp_path):
    base, aligned, adapter = three
    tiny.llama(400, layers=2).save_pretrained(tmp_path / "short")
    gpt2().save_pretrained(tmp_path / "gpt2")
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaConfig(vocab_size=400, hidden_size=64, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    for one, two, message in (
        (tmp_path / "short", aligned, r"no weight 'model\.layers\.2"),
        (base, tmp_path / "short", r"no weight 'model\.layers\.2"),
        (tmp_path / "gpt2", tmp_path / "gpt2", "another architecture"),
        (tmp_path / "wide", aligned, r"adapts a weight of shape \[32, 48\].*has \[64, 48\]"),
        (base, tmp_path / "wide", "must have the same architecture"),
        (adapter, aligned, "an adapter folder"),
        (base, tmp_path / "nothing", "No such model folder"),
    ):
        with pytest.raises(ModelError, match=message):
            run((one, two, adapter), tmp_path / "out", threshold=1.0)
        assert not (tmp_path / "out").exists()


def test_how_a_square_weight_is_stored_is_not_guessed(three, tmp_path):
    adapter = shutil.copytree(three[2], tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
    with pytest.raises(ModelError, match="fan_in_fan_out is set, but a model of type 'llama'"):
        run((*three[:2], adapter), tmp_path / "out", threshold=1.0)


def test_weights_that_are_not_finite_are_refused(three, tmp_path):
    base, aligned, adapter = three
    for what in ("aligned", "adapter"):
        folder = shutil.copytree(three[1 if what == "aligned" else 2], tmp_path / what)
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        key = "model.layers.1.self_attn.v_proj.weight" if what == "aligned" else "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"  # fmt: skip
        tensors[key][1, 1] = float("inf")
        save_file(tensors, path, {"format": "pt"})
        pair = (base, folder, adapter) if what == "aligned" else (base, aligned, folder)
        with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.v_proj(\.lora_A\.weight)?'.*not finite"):
            run(pair, tmp_path / "out", threshold=1.0)
        assert sorted(p.name for p in tmp_path.iterdir() if p.name not in ("aligned", "adapter")) == []


def test_what_overflows_fp16_is_refused(three, tmp_path):
    adapter = save_adapter(tmp_path / "a", std=20.0, dtype=torch.float16, target_modules=TWO)
    shutil.copytree(three[1], tmp_path / "far")
    first, second = weights_of(three[0]), weights_of(three[1])
    save_file({k: first[k] + 1e5 * (second[k] - first[k]) for k in first}, tmp_path / "far" / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(ModelError, match="does not fit into F16"):
        run((three[0], tmp_path / "far", adapter), tmp_path / "out", threshold=1.0)
    assert not (tmp_path / "out").exists()


def test_no_source_is_written_to(three, tmp_path):
    folders = [
        shutil.copytree(f, tmp_path / n) for f, n in zip(three, ("base", "aligned", "adapter"), strict=True)
    ]
    before = [digest(f) for f in folders]
    (tmp_path / "link").symlink_to(folders[2])
    places = [*folders, folders[2] / "inner", folders[0] / ".." / "adapter", tmp_path / "link", tmp_path]
    for place in places:
        with pytest.raises(OutputError, match="overlaps"):
            run(folders, place, threshold=1.0)
    assert [digest(f) for f in folders] == before


def test_only_a_folder_of_ours_is_replaced(three, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in (own, tmp_path / "file"):
        with pytest.raises(OutputError, match=r"not made by this command|found a file"):
            run(three, place, threshold=1.0)
    assert (own / "thesis.txt").read_text() == "mine"
    out = tmp_path / "deep" / "out"
    for k in (2, 3):
        run(three, out, num_layers=k)
        assert json.loads((out / "safe_lora.json").read_text())["projected"] == k
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    again = run((*three[:2], out), tmp_path / "twice", num_layers=1)
    assert len(again.projected) == 1


@pytest.mark.parametrize("when", ["copy", "put", "text"])
def test_a_full_disk_leaves_nothing(three, tmp_path, monkeypatch, when):
    from holdfast.defenses import safe_lora

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    where = {
        "copy": (safe_lora.shutil, "copyfile"),
        "put": (safe_lora, "overwrite"),
        "text": (safe_lora, "write_json"),
    }
    monkeypatch.setattr(*where[when], full)
    with pytest.raises(OutputError, match="No space left on device"):
        run(three, tmp_path / "out", threshold=1.0)
    assert not list(tmp_path.iterdir())


def test_stopped_half_way_nothing_is_left_and_an_earlier_result_stays(three, tmp_path):
    run(three, tmp_path / "out", num_layers=2)
    before = digest(tmp_path / "out")

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(three, tmp_path / "out", threshold=1.0, progress=stop)
    assert digest(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_threads_do_not_change_the_result(three, tmp_path):
    digests = []
    for workers in (1, 4):
        run(three, tmp_path / str(workers), threshold=0.9, workers=workers)
        digests.append(digest(tmp_path / str(workers)))
    assert digests[0] == digests[1]


def test_the_file_beside_the_weights_come_along(three, tmp_path):
    adapter = shutil.copytree(three[2], tmp_path / "a")
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "training_args.bin").write_bytes(b"x")
    run((*three[:2], adapter), tmp_path / "out", num_layers=1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "safe_lora.json", "tokenizer.json",
    ]  # fmt: skip
    (adapter / "leak.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match=r"leak\.json is a link to .* outside its folder"):
        run((*three[:2], adapter), tmp_path / "more", num_layers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]
