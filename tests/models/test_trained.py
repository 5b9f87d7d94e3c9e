"""What a stage trains: new adapters of every kind, the adapter below, all weights; quantised bases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from holdfast.errors import ModelError, RecipeError
from holdfast.models import quantization
from holdfast.models.loading import load_model
from holdfast.models.trained import check_lora, check_trained, load_trainable, save_trained
from holdfast.weights.folders import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:.*changes the base weights")
LORA = {"r": 4, "alpha": 6, "dropout": 0.0, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("m") / "model")


def load(folder, tmp_path, lora=LORA, below=(), trains="new", seed=5, **options):
    return load_trainable(
        folder, below, trains, lora, base="base", seed=seed, initial=tmp_path / "initial", **options
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


def far(left, right):
    return float((left - right).abs().max())


def move(model, seed=1, size=0.1):
    """Change every trainable weight, as if it were trained."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * size)
    return model


def save(model, folder, tmp_path) -> Path:
    save_trained(model, tiny.tokenizer(), folder, tmp_path / "initial")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa", "use_rslora": True},
        {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"init_lora_weights": "olora"},
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"exclude_modules": ["down_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
    ],
    ids=str,
)
def test_a_saved_adapter_is_the_trained_one_on_the_untouched_base(folder, options, tmp_path):
    model = load(folder, tmp_path, {**LORA, **options})
    base = logits(load_model(folder))
    assert far(logits(model), base) < 1e-5, "it starts as the base model"
    trained = logits(move(model))
    saved = save(model, tmp_path / "adapter", tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), saved)
    assert far(logits(loaded), trained) < 1e-5
    assert far(trained, base) > 0.05
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_a_mutating_initialisation_works_on_top_of_another_adapter(folder, tmp_path):
    first = save(move(load(folder, tmp_path), seed=2), tmp_path / "first", tmp_path)
    second = load(folder, tmp_path, {**LORA, "init_lora_weights": "pissa"}, below=[first])
    trained = logits(move(second))
    saved = save(second, tmp_path / "second", tmp_path)
    for compose in ("stack", "merge"):
        assert far(logits(load_model(folder, [first, saved], compose=compose)), trained) < 1e-5


def test_patterns_reach_their_layers(folder, tmp_path):
    model = load(folder, tmp_path, {**LORA, "rank_pattern": {"q_proj": 2}, "exclude_modules": ["up_proj"]})
    ranks = {n.split(".")[-4]: p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
    assert ranks == {"q_proj": 2, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 4, "down_proj": 4}


@pytest.mark.parametrize("below", [False, True])
def test_dora_below_a_stacked_lora_is_exact_and_on_top_it_is_refused(folder, below, tmp_path):
    """On top, PEFT would scale the base weights without the adapter below."""
    kinds = [{**LORA, "use_dora": below}, {**LORA, "use_dora": not below}]
    first = save(move(load(folder, tmp_path, kinds[0]), seed=2), tmp_path / "first", tmp_path)
    second = load(folder, tmp_path, kinds[1], below=[first], compose="merge")
    saved = save(move(second), tmp_path / "second", tmp_path)
    assert far(logits(load_model(folder, [first, saved], compose="merge")), logits(second)) < 1e-5
    if below:
        assert far(logits(load_model(folder, [first, saved])), logits(second)) < 1e-5
    else:
        with pytest.raises(ModelError, match=r"a DoRA adapter on top of another one.*adapters: merge"):
            load_model(folder, [first, saved])


def test_single_lora_goes_on_with_a_copy(folder, tmp_path):
    first = save(move(load(folder, tmp_path), seed=2), tmp_path / "first", tmp_path)
    before = fingerprint(first)
    model = load(folder, tmp_path, None, below=[first], trains="continue")
    assert far(logits(model), logits(load_model(folder, [first]))) < 1e-6, "it starts as the aligned model"
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
    trained = logits(move(model))
    saved = save(model, tmp_path / "second", tmp_path)
    assert fingerprint(first) == before
    assert far(logits(load_model(folder, [saved])), trained) < 1e-6, "it replaces the first"


def test_full_fine_tuning_trains_all_weights_with_the_adapter_in_them(folder, tmp_path):
    first = save(move(load(folder, tmp_path), seed=2), tmp_path / "first", tmp_path)
    model = load(folder, tmp_path, None, below=[first], trains="full")
    assert all(p.requires_grad for p in model.parameters())
    assert far(logits(model), logits(load_model(folder, [first]))) < 1e-5
    trained = logits(move(model, size=0.01))
    saved = save(model, tmp_path / "model", tmp_path)
    assert far(logits(AutoModelForCausalLM.from_pretrained(saved)), trained) == 0
    assert AutoTokenizer.from_pretrained(saved).eos_token == "</s>"


def test_a_merged_model_is_a_whole_model_also_with_older_versions_of_peft(folder, tmp_path, monkeypatch):
    """Those leave the adapter's settings on it, by which it would be taken for a model with an adapter."""
    first = save(move(load(folder, tmp_path), seed=2), tmp_path / "first", tmp_path)
    merge = LoraModel.merge_and_unload

    def older(tuner, **options):
        merged = merge(tuner, **options)
        merged.peft_config = tuner.peft_config
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", older)
    model = load(folder, tmp_path, None, below=[first], trains="full")
    assert (save(model, tmp_path / "model", tmp_path) / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["q_prj"]}, ["target_modules", "'q_proj'"]),
        ({"rank_pattern": {"q_prj": 2}}, ["rank_pattern", "q_prj", "'q_proj'"]),
        ({"alpha_pattern": {"layers.7.q_proj": 2}}, ["alpha_pattern", "layers.7.q_proj"]),
        ({"exclude_modules": ["up"]}, ["exclude_modules", "'up'"]),
    ],
)
def test_names_that_mean_no_layer_are_refused(folder, lora, words):
    with pytest.raises(ModelError) as caught:
        check_lora(folder, {**LORA, **lora})
    for word in words:
        assert word in str(caught.value)
    check_lora(folder, {**LORA, "rank_pattern": {r"layers\.1\..*q_proj": 2}, "exclude_modules": ".*up_proj"})


def test_olora_on_transposed_layers_is_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Conv1D"):
        check_lora(tmp_path, {**LORA, "init_lora_weights": "olora"})


def test_all_weights_need_float32(folder, tmp_path):
    check_trained(folder, None, "auto", False)
    with pytest.raises(RecipeError, match=r"bfloat16.*model\.dtype: float32"):
        check_trained(folder, None, "bfloat16", False)
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(half)
    with pytest.raises(RecipeError, match="bfloat16"):
        check_trained(half, None, "auto", False)
    check_trained(half, None, "float32", False)


# Quantised bases: bitsandbytes is an extra.


@pytest.fixture
def nf4():
    pytest.importorskip("bitsandbytes")
    return {"quantization": "nf4"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_base_carries_stacked_adapters(folder, kind, dtype, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"quantization": kind, "dtype": dtype}
    plain, bits = logits(load_model(folder)), load_model(folder, **options)
    assert 0 < far(logits(bits), plain) < 0.2
    assert {p.dtype for p in bits.parameters()} <= {getattr(torch, dtype), torch.uint8, torch.int8}
    assert not bits.get_input_embeddings()._forward_hooks
    first = save(move(load(folder, tmp_path, **options), seed=2), tmp_path / "first", tmp_path)
    second = load(folder, tmp_path, below=[first], **options)
    trained = logits(move(second))
    saved = save(second, tmp_path / "second", tmp_path)
    assert far(logits(load_model(folder, [first, saved], **options)), trained) < 1e-5


def test_a_missing_bitsandbytes_is_said(folder, monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        load_model(folder, quantization="nf4")


def test_what_runs_before_training_takes_no_gradient_away(folder, nf4, tmp_path, monkeypatch):
    """bitsandbytes packs 4-bit weights for a CPU with AVX512-BF16 in evaluation mode: no gradients then."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)

    def gradients():
        model.train().zero_grad()
        model(input_ids=torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    model = move(load(folder, tmp_path, **nf4))
    before = gradients()
    logits(model)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_a_folder_that_is_quantised_already(folder, nf4, tmp_path):
    load_model(folder, **nf4).save_pretrained(tmp_path / "nf4")
    assert quantization.is_quantized(tmp_path / "nf4")
    again = load_model(tmp_path / "nf4")
    assert far(logits(again), logits(load_model(folder, **nf4))) < 1e-5
    with pytest.raises(ModelError, match="already"):
        load_model(tmp_path / "nf4", **nf4)
    with pytest.raises(ModelError, match="quantised"):
        check_trained(tmp_path / "nf4", None, "float32", False)
