"""A chain of adapters combined into one, or merged into a full model: the same logits as the stacked chain."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from weights.test_adapter import gpt2, save

import tiny
from commands import holdfast_command as command
from commands import refused
from holdfast.errors import ModelError, OutputError
from holdfast.models.loading import load_model
from holdfast.weights import combine as combining
from holdfast.weights.combine import combine
from holdfast.weights.folders import fingerprint
from holdfast.weights.merge import merge
from places import DOCS, blocks

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
TWO = ["q_proj", "v_proj"]
CHAINS = {
    "one": [{"r": 4, "lora_alpha": 3, "target_modules": TWO}],
    "two alike": [{"r": 4, "target_modules": TWO}, {"r": 4, "target_modules": TWO}],
    "ranks and alphas": [
        {"r": 2, "lora_alpha": 7, "target_modules": TWO}, {"r": 5, "lora_alpha": 1, "target_modules": TWO},
    ],
    "disjoint": [{"r": 4, "target_modules": ["q_proj"]}, {"r": 2, "target_modules": ["down_proj"]}],
    "overlapping": [{"r": 3, "target_modules": TWO}, {"r": 2, "target_modules": SEVEN}],
    "rslora and not": [
        {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": TWO}, {"r": 4, "target_modules": TWO},
    ],
    "patterns": [
        {"r": 4, "target_modules": SEVEN, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6}},
        {"r": 2, "target_modules": TWO, "use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 9},
         "alpha_pattern": {"v_proj": 5}},
    ],
    "one layer, all-linear": [
        {"r": 4, "target_modules": TWO, "layers_to_transform": [1]}, {"r": 2, "target_modules": "all-linear"},
    ],
    "three": [
        {"r": 1, "target_modules": TWO}, {"r": 2, "target_modules": r".*\.(q|up)_proj"},
        {"r": 3, "lora_alpha": 2, "target_modules": SEVEN},
    ],
    "whole modules": [{"r": 2, "target_modules": TWO, "modules_to_save": ["norm"]}, {"r": 2, "target_modules": TWO}],
    "gpt2": [
        {"model": gpt2, "r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]},
        {"model": gpt2, "r": 2, "fan_in_fan_out": True, "target_modules": ["attn.c_proj", "c_attn"]},
    ],
    "an untied head": [{"r": 4, "untied": True, "target_modules": ["lm_head", "q_proj"]}, {"r": 2, "target_modules": TWO}],
}  # fmt: skip
IDS = torch.arange(3, 51).reshape(4, 12)


def chain(folder, adapters, dtype=None):
    """The base model's folder and those of the adapters: saved by PEFT, with random factors."""
    options = [dict(a) for a in adapters]
    make = options[0].pop("model", None)
    untied = options[0].pop("untied", False)

    def base():
        made = make() if make else tiny.llama(400)
        if untied:
            made.config.tie_word_embeddings = False
            made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().roll(1, 0))
        return made.to(dtype) if dtype else made

    base().save_pretrained(folder / "base")
    found = []
    for i, given in enumerate(options):
        given.pop("model", None)
        found.append(folder / f"adapter{i}")
        save(found[-1], base(), **given)
        change(found[-1] / "adapter_model.safetensors", lambda t, i=i: t * (1.5 + i / 2))
    return folder / "base", found


def change(path, how):
    """Scale the factors, so that all adapters differ, and change trained copies."""
    tensors = load_file(path)
    save_file({k: how(t) if "lora_B" in k or "norm" in k else t for k, t in tensors.items()}, path)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CHAINS)
def test_one_adapter_gives_the_logits_of_the_stacked_chain(tmp_path, case):
    base, adapters = chain(tmp_path, CHAINS[case])
    before = [fingerprint(folder) for folder in (base, *adapters)]
    made = combine(adapters, tmp_path / "one")
    stacked = logits(load_model(base, adapters))
    plain = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "one")
    assert (logits(loaded.eval()) - stacked).abs().max() < 1e-5
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(base)))
    for i in range(len(adapters)):  # every adapter counts
        fewer = logits(load_model(base, adapters[:i] + adapters[i + 1 :]))
        assert (fewer - stacked).abs().max() > 1e-3
    assert [fingerprint(folder) for folder in (base, *adapters)] == before
    ranks = {
        t.shape[0] for k, t in load_file(made.folder / "adapter_model.safetensors").items() if "lora_A" in k
    }
    assert ranks == {made.rank}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CHAINS)
def test_a_merged_model_gives_the_logits_of_the_stacked_chain(tmp_path, case):
    base, adapters = chain(tmp_path, CHAINS[case])
    made = merge(base, adapters, tmp_path / "full")
    full = AutoModelForCausalLM.from_pretrained(made.folder)
    assert (logits(full) - logits(load_model(base, adapters))).abs().max() < 1e-5
    theirs = load_model(base, adapters, compose="merge").state_dict()
    source = load_file(base / "model.safetensors")
    changed = 0
    for name, tensor in load_file(made.folder / "model.safetensors").items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6)
        changed += not torch.equal(tensor, source[name])
    assert changed == made.changed


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_reads_r_and_alpha_alone_is_right(tmp_path):
    """Different ranks and scalings, applied as vLLM does: one folder, one rank, one scaling alpha / r."""
    base, adapters = chain(tmp_path, CHAINS["patterns"])
    combine(adapters, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert [config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora")] == [{}, {}, False]
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for name in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert a.shape[0] == b.shape[1] == config["r"]
        model.get_submodule(name).weight.data += config["lora_alpha"] / config["r"] * (b @ a)
    assert (logits(model) - logits(load_model(base, adapters))).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_factors_lose_nothing(tmp_path, dtype):
    base, adapters = chain(tmp_path, CHAINS["ranks and alphas"])
    for folder in adapters:
        path = folder / "adapter_model.safetensors"
        save_file({k: t.to(dtype) for k, t in load_file(path).items()}, path)
    combine(adapters, tmp_path / "one")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "one")
    assert (logits(model.eval()) - logits(load_model(base, adapters))).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_a_merged_model_keeps_shards_dtype_ties_and_files(tmp_path):
    base, adapters = chain(tmp_path, CHAINS["overlapping"], torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base)
    shutil.rmtree(base)
    model.save_pretrained(base, max_shard_size="15kB")
    tiny.tokenizer(chat=True).save_pretrained(base)
    (base / "LICENSE").write_text("terms")
    merge(base, adapters, tmp_path / "full")
    shards = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(p.name for p in (tmp_path / "full").glob("*.safetensors")) == shards
    left = {p.name for p in base.iterdir()} - {p.name for p in (tmp_path / "full").iterdir()}
    assert not left
    full, source = (
        {k: t for s in shards for k, t in load_file(folder / s).items()}
        for folder in (tmp_path / "full", base)
    )
    assert "lm_head.weight" not in full
    exact = load_model(base, adapters, compose="merge", dtype="float32").state_dict()
    for name, tensor in full.items():
        assert tensor.dtype == torch.bfloat16
        if "proj" in name:
            assert torch.equal(tensor, exact[name].bfloat16())  # rounded only once
        else:
            assert torch.equal(tensor, source[name])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    index = json.loads((tmp_path / "full" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in full.values())


@pytest.mark.filterwarnings("ignore")
def test_a_merged_model_in_another_dtype(tmp_path):
    base, adapters = chain(tmp_path, CHAINS["two alike"])
    merge(base, adapters, tmp_path / "half", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    exact = load_model(base, adapters, compose="merge").state_dict()
    for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].bfloat16())
    with pytest.raises(ModelError, match="Expected a dtype"):
        merge(base, adapters, tmp_path / "x", dtype="int8")
    change(adapters[0] / "adapter_model.safetensors", lambda t: t * 1e6)
    with pytest.raises(ModelError, match="does not fit into float16"):
        merge(base, adapters, tmp_path / "x", dtype="float16")
    assert not list(tmp_path.glob("*x*"))


@pytest.mark.filterwarnings("ignore")
def test_a_conv1d_that_is_square_is_transposed(tmp_path):
    """GPT-2's attention output: its shape does not say how it is stored; the configuration does."""
    adapters = [{"model": gpt2, "r": 4, "fan_in_fan_out": True, "target_modules": ["attn.c_proj"]}]
    base, adapters = chain(tmp_path, adapters)
    merge(base, adapters, tmp_path / "full")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert (logits(full) - logits(load_model(base, adapters))).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_a_bare_models_names_lack_the_first_part(tmp_path):
    base, adapters = chain(tmp_path, CHAINS["gpt2"])
    path = base / "model.safetensors"
    bare = {k.removeprefix("transformer."): t for k, t in load_file(path).items()}
    save_file(bare, path, metadata={"format": "pt"})
    merge(base, adapters, tmp_path / "full")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert (logits(full) - logits(load_model(base, adapters))).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_the_card_names_the_chain_and_no_place_on_this_machine(tmp_path):
    base, adapters = chain(tmp_path, CHAINS["two alike"])
    combine(adapters, tmp_path / "one")
    merge(base, adapters, tmp_path / "full")
    for name in ("one", "full"):
        card = (tmp_path / name / "README.md").read_text()
        assert all(f"| {a.name} | `{fingerprint(a)}` |" in card for a in adapters)
        assert str(tmp_path) not in card
        assert "Not measured" in card
    assert fingerprint(base) in card


def edit(folder, **keys):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


MISFITS = {
    "base": (lambda a: edit(a, base_model_name_or_path="someone/else"), "differ in base_model_name_or_path"),
    "revision": (lambda a: edit(a, revision="abc"), "differ in revision"),
    "task": (lambda a: edit(a, task_type="SEQ_CLS"), "differ in task_type"),
    "transposed": (lambda a: edit(a, fan_in_fan_out=True), "differ in fan_in_fan_out"),
    "dora": (lambda a: edit(a, use_dora=True), "use_dora"),
    "bias": (lambda a: edit(a, bias="all"), "bias"),
    "invocation": (lambda a: edit(a, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "tokens": (lambda a: edit(a, trainable_token_indices=[1]), "trainable_token_indices"),
    "torn": (lambda a: (a / "adapter_model.safetensors").write_bytes(b"x" * 20), "damaged"),
    "gone": (lambda a: (a / "adapter_model.safetensors").unlink(), "missing"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    _, adapters = chain(folder, CHAINS["two alike"])
    for adapter in adapters:
        edit(adapter, base_model_name_or_path="someone/model", revision="main")
    return folder


@pytest.fixture
def copies(pair, tmp_path):
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    return tmp_path, tmp_path / "base", [tmp_path / "adapter0", tmp_path / "adapter1"]


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_add_up_is_refused_by_name(copies, case):
    folder, base, adapters = copies
    spoil, message = MISFITS[case]
    spoil(adapters[1])
    for write in (lambda out: combine(adapters, out), lambda out: merge(base, adapters, out)):
        with pytest.raises(ModelError, match=message):
            write(folder / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter0", "adapter1", "base"]


def test_unknown_base_models_may_be_the_same(copies):
    folder, _, adapters = copies
    edit(adapters[1], base_model_name_or_path=None)
    combine(adapters, folder / "out")
    made = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert made["base_model_name_or_path"] == "someone/model"
    assert "base_model: someone/model" in (folder / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_copies_of_whole_modules_do_not_add_up(tmp_path):
    whole = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["v_proj"]}
    _, adapters = chain(tmp_path, [whole, whole, {"r": 2, "target_modules": TWO}])
    combine(adapters[:1], tmp_path / "alone")
    path = adapters[1] / "adapter_model.safetensors"
    save_file({k: t + 1 if "v_proj" in k else t for k, t in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="the two differ; they do not add up"):
        combine(adapters[:2], tmp_path / "out")
    with pytest.raises(ModelError, match=r"v_proj' has LoRA in .*adapter2 and is trained as a whole"):
        combine([adapters[0], adapters[2]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_other_shapes_and_layers_are_refused(tmp_path):
    base, (small,) = chain(tmp_path / "a", CHAINS["one"])
    wide, config = tmp_path / "wide", LoraConfig(task_type="CAUSAL_LM", target_modules=TWO)
    get_peft_model(tiny.llama(400, head_dim=16), config).save_pretrained(wide)
    with pytest.raises(ModelError, match="two architectures"):
        combine([small, wide], tmp_path / "out")
    with pytest.raises(ModelError, match="The adapter is for another model"):
        merge(base, [wide], tmp_path / "out")
    deep = tmp_path / "deep"
    get_peft_model(tiny.llama(400, layers=3), config).save_pretrained(deep)
    with pytest.raises(ModelError, match=r"has no weight 'model\.layers\.2\.self_attn"):
        merge(base, [deep], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_weights_are_not_merged(tmp_path, target):
    base, adapters = chain(tmp_path, [{"r": 2, "target_modules": ["q_proj", target]}])
    with pytest.raises(ModelError, match=r"tied|embeddings"):
        merge(base, adapters, tmp_path / "out")
    config = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    base, adapters = chain(tmp_path / "whole", [config])
    with pytest.raises(ModelError, match="both the embedding and the output head"):
        merge(base, adapters, tmp_path / "out")


def test_a_quantised_model_is_refused(copies):
    folder, base, adapters = copies
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(ModelError, match="quantised"):
        merge(base, adapters, folder / "out")


@pytest.mark.parametrize("place", ["adapter0", "adapter1/inner", "base", "base/../adapter1", "full", "file"])
def test_sources_and_other_peoples_files_are_not_written_into(copies, place):
    folder, base, adapters = copies
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    (folder / "file").write_text("mine")
    before = sorted(p for p in folder.rglob("*"))
    with pytest.raises(OutputError):
        merge(base, adapters, folder / place)
    if place != "base":
        with pytest.raises(OutputError):
            combine(adapters, folder / place)
    assert sorted(p for p in folder.rglob("*")) == before


def test_the_same_adapter_twice_and_none(copies):
    folder, _, adapters = copies
    (folder / "link").symlink_to(adapters[0])
    with pytest.raises(ModelError, match="given twice"):
        combine([adapters[0], folder / "link"], folder / "out")
    with pytest.raises(ModelError, match="at least one"):
        combine([], folder / "out")


@pytest.mark.parametrize("write", ["combine", "merge"])
def test_a_full_disk_and_a_kill_leave_nothing(copies, monkeypatch, write):
    folder, base, adapters = copies

    def go():
        return (
            combine(adapters, folder / "out") if write == "combine" else merge(base, adapters, folder / "out")
        )

    before = sorted(p for p in folder.rglob("*"))
    for error, expected in ((OSError(errno.ENOSPC, "No space left on device"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)):  # fmt: skip

        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(combining, "write_json", fail)
            patch.setattr("holdfast.weights.merge.write_card", fail)
            with pytest.raises(expected, match="No space left" if expected is OutputError else None):
                go()
        assert sorted(p for p in folder.rglob("*")) == before
    (folder / "out").mkdir()  # an empty folder is treated like a missing one
    go()
    assert (folder / "out" / "README.md").exists()


def test_memory_is_one_block(copies, blocks_of):
    """Merging in blocks of one row gives the same model, so no complete tensor has to be in memory."""
    folder, base, adapters = copies
    merge(base, adapters, folder / "whole")
    blocks_of(1)
    merge(base, adapters, folder / "rows")
    one, two = (load_file(folder / name / "model.safetensors") for name in ("whole", "rows"))
    assert all(torch.allclose(one[k], two[k], atol=1e-6) for k in one)


def test_the_commands(copies):
    folder, base, adapters = copies
    done = command("combine", *adapters, "--out", folder / "one")
    assert done.returncode == 0, done.stderr
    assert "rank 8 on 4 modules" in done.stdout
    done = command("merge", base, folder / "one", "--out", folder / "full", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "4 of 20 tensors changed" in done.stdout
    made = load_file(folder / "full" / "model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    refused(command("combine", *adapters, "--out", folder / "one"), "is not empty")
    refused(command("merge", base, folder / "gone", "--out", folder / "x"), "No such adapter folder")


@pytest.mark.filterwarnings("ignore")
def test_the_pages_commands_run(copies, monkeypatch):
    folder, base, (alignment, user) = copies
    for source, name in ((base, "base-model"), (alignment, "alignment"), (user, "user")):
        source.rename(folder / name)
    shutil.copytree(folder / "user", folder / "refusal")
    page = DOCS / "deliver.md"
    for line in "".join(blocks(page, "bash")).splitlines():
        done = command(*line.split()[1:], cwd=folder)
        assert done.returncode == 0, done.stderr
    chained = logits(load_model(folder / "base-model", [folder / "alignment", folder / "user"]))
    for name in ("adapter", "merged", "full-model"):
        (folder / name).rename(folder / f"{name}-1")
    monkeypatch.chdir(folder)
    exec(blocks(page, "python")[0], {})
    for name in ("full-model", "full-model-1"):
        full = AutoModelForCausalLM.from_pretrained(folder / name)
        assert (logits(full) - chained).abs().max() < 1e-5


def test_a_weighted_sum_is_the_dense_one(tmp_path):
    """Each adapter's update times its weight, by PEFT's own dense products; 0 leaves an adapter out."""
    base, folders = chain(tmp_path, CHAINS["ranks and alphas"] + [{"r": 2, "target_modules": SEVEN}])

    def updates(folder):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        found = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
        return {name: module.get_delta_weight("default").double() for name, module in found.items()}

    weights = [0.25, -2.0, 0.0]
    made = combine(folders, tmp_path / "out", weights=weights)
    assert made.rank == 7
    parts, found = [updates(folder) for folder in folders], updates(tmp_path / "out")
    assert set(found) == set(parts[2])
    for name, update in found.items():
        expected = sum(w * part[name] for w, part in zip(weights, parts, strict=True) if name in part)
        assert (update - expected).abs().max() < 1e-6, name
        assert bool(update.any()) == (name in parts[0]), name


def test_whole_tensors_have_no_weight(tmp_path):
    _, folders = chain(tmp_path, CHAINS["whole modules"])
    with pytest.raises(ModelError, match=r"modules_to_save.*cannot be weighted"):
        combine(folders, tmp_path / "out", weights=[0.5, 1.0])
    assert combine(folders, tmp_path / "out", weights=[1.0, 0.5]).modules
