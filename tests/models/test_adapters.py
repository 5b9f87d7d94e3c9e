"""Adapters on a model: what PEFT, Unsloth and axolotl save is loaded as it was trained, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from holdfast.errors import ModelError
from holdfast.models.loading import check_vocabulary, load_model, load_tokenizer
from holdfast.weights import patterns
from holdfast.weights.folders import find_model, holds_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = len(tiny.tokenizer())
IDS = torch.arange(3, 20)[None]
KEY = "base_model.model.model.layers.0.self_attn"
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:k_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:k_proj|q_proj)))"
)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def save(folder, tied=False, words=WORDS, **options):
    """An adapter folder whose weights have an effect, and the logits of the model with it."""
    settings = {"target_modules": ["q_proj"], **options}
    base = tiny.llama(WORDS, tie_word_embeddings=tied)
    if words != WORDS:
        base.resize_token_embeddings(words, mean_resizing=False)
    made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, **settings))
    torch.manual_seed(5)
    for p in made.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    made.save_pretrained(folder)
    return logits(made.eval())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, one with tied embeddings, and a plain adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny.save_model(folder / "model", tie_word_embeddings=False)
    tiny.save_model(folder / "tied")
    save(folder / "plain")
    return folder


def edited(place, tmp_path, change=None, **config):
    """A copy of the plain adapter with changed tensors or settings."""
    folder = Path(shutil.copytree(place / "plain", tmp_path / "a"))
    path, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if change is not None:
        save_file(change(load_file(path)), path, {"format": "pt"})
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))
    return folder


KINDS = {
    "unsloth": (False, {"target_modules": UNSLOTH}),
    "dora": (False, {"use_dora": True}),
    "rslora and patterns": (False, {"use_rslora": True, "target_modules": "all-linear", "rank_pattern": {"q_proj": 3}}),
    "trained biases": (False, {"bias": "all"}),
    "whole modules": (False, {"modules_to_save": ["norm", "lm_head", "embed_tokens"]}),
    "tied, whole embedding": (True, {"modules_to_save": ["embed_tokens"]}),
    "some tokens": (True, {"trainable_token_indices": [5, 6]}),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_adapters_of_every_kind_act_as_trained(place, tmp_path, case):
    tied, options = KINDS[case]
    trained = save(tmp_path / "a", tied, **options)
    for compose in ("stack", "merge"):
        loaded = load_model(place / ("tied" if tied else "model"), [tmp_path / "a"], compose=compose)
        assert torch.allclose(logits(loaded), trained, atol=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_lora_on_tied_weights_stacks_but_does_not_merge(place, tmp_path, target):
    """PEFT's merge would change the other end of the model too."""
    trained = save(tmp_path / "a", True, target_modules=["q_proj", target])
    assert torch.allclose(logits(load_model(place / "tied", [tmp_path / "a"])), trained, atol=1e-5)
    with pytest.raises(ModelError, match=r"share their weights.*adapters: stack"):
        load_model(place / "tied", [tmp_path / "a"], compose="merge")


def moved(tensors, old, new):
    return {key.replace(old, new): tensor.clone() for key, tensor in tensors.items()}


TENSORS = {
    "wrapped": (lambda t: moved(t, "model.layers", "language_model.layers"), r"lacks .*q_proj\.lora_A"),
    "prefix": (lambda t: moved(t, "base_model.model.", ""), "lacks the prefix"),
    "unexpected": (lambda t: t | moved(t, "q_proj", "v_proj"), r"has .*v_proj\.lora_A.*would not use"),
    "empty": (lambda t: {}, "holds no tensors"),
    "nan": (lambda t: t | {f"{KEY}.q_proj.lora_A.weight": torch.full((2, 32), torch.nan)}, "not finite"),
    "inf": (lambda t: {k: v.half() / 0 for k, v in t.items()}, "not finite"),
    "integers": (lambda t: {k: v.int() for k, v in t.items()}, "stored as I32"),
    "shape": (lambda t: t | {f"{KEY}.q_proj.lora_A.weight": torch.ones(2, 16)}, r"size mismatch .*\[2, 16\]"),
    "rank": (lambda t: {k: torch.cat([v, v], int("lora_B" in k)) for k, v in t.items()}, r"size mismatch .*\[4, 32\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(place, tmp_path, case):
    change, message = TENSORS[case]
    with pytest.raises(ModelError, match=message):
        load_model(place / "model", [edited(place, tmp_path, change)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_of_tomorrow": True}, "does not know: use_of_tomorrow"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"init_lora_weights": "pissa"}, "may change the base weights"),
        ({"peft_type": "IA3"}, "expected a LoRA adapter"),
        ({"target_modules": ["c_attn"]}, "not found in the base model"),
        ({"target_modules": "("}, "not a valid pattern"),
        ({"rank_pattern": {"(.*.*.*)*!": 2}}, r"rank_pattern has .* take longer than 0\.5 seconds"),
        ({"target_modules": 5}, "a name or a list of names"),
        ({"base_model_name_or_path": 5}, "expected text for base_model_name_or_path, found '5'"),
        ({"auto_mapping": float("nan")}, "cannot be written as JSON"),
        ({"revision": "\ud800"}, "cannot be written as JSON"),
    ],
)
def test_settings_that_are_not_what_peft_would_load_are_refused(
    place, tmp_path, config, message, monkeypatch
):
    if "rank_pattern" in config:
        monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(ModelError, match=message):
        load_model(place / "model", [edited(place, tmp_path, **config)])


def test_a_setting_of_a_later_peft_that_is_off_does_no_harm(place, tmp_path):
    load_model(place / "model", [edited(place, tmp_path, use_of_tomorrow=False, another=None)])


def test_embeddings_of_added_tokens_come_with_the_adapter(place, tmp_path):
    """As axolotl trains ChatML on a base model: two tokens more, and both tables in the adapter."""
    trained = save(tmp_path / "both", words=WORDS + 2, modules_to_save=["embed_tokens", "lm_head"])
    loaded = load_model(place / "model", [tmp_path / "both"])
    assert torch.allclose(logits(loaded), trained, atol=1e-5)
    words = tiny.tokenizer(chat=True)
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    check_vocabulary(loaded, words, tmp_path)
    save(tmp_path / "one", words=WORDS + 2, modules_to_save=["embed_tokens"])
    with pytest.raises(ModelError, match="size mismatch"):  # the rows of the head would be random
        load_model(place / "model", [tmp_path / "one"])
    with pytest.raises(ModelError, match=r"beyond the \d+ embeddings of the model: <\|im_end\|>"):
        check_vocabulary(load_model(place / "model"), words, tmp_path)


def test_the_last_adapter_with_a_tokenizer_gives_it(place, tmp_path):
    chat, plain = (Path(shutil.copytree(place / "plain", tmp_path / name)) for name in ("chat", "plain"))
    tiny.tokenizer(chat=True).save_pretrained(chat)
    assert load_tokenizer(place / "model").chat_template is None
    assert load_tokenizer(place / "model", adapters=[plain]).chat_template is None
    assert load_tokenizer(place / "model", adapters=[chat, plain]).chat_template == tiny.CHAT
    (plain / "chat_template.jinja").write_text("another")
    assert load_tokenizer(place / "model", adapters=[plain]).chat_template == "another"
    assert load_tokenizer(place / "model", adapters=[plain, chat]).chat_template == tiny.CHAT
    (plain / "chat_template.jinja").unlink()
    (plain / "tokenizer_config.json").write_text(json.dumps({"chat_template": "in the configuration"}))
    assert load_tokenizer(place / "model", adapters=[plain]).chat_template == "in the configuration"


def test_a_tokenizer_that_lost_the_models_template_is_refused(place, tmp_path):
    tiny.tokenizer(chat=True).save_pretrained(tmp_path / "model")
    adapter = Path(shutil.copytree(place / "plain", tmp_path / "a"))
    tiny.tokenizer().save_pretrained(adapter)
    with pytest.raises(ModelError, match="has no chat template, but that of"):
        load_tokenizer(tmp_path / "model", adapters=[adapter])
    (adapter / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="Cannot load a tokenizer from"):
        load_tokenizer(tmp_path / "model", adapters=[adapter])


def test_a_folder_is_a_model_or_an_adapter(place, tmp_path):
    """transformers would load the adapter of such a folder on a base model of its own choice."""
    adapter = Path(shutil.copytree(place / "plain", tmp_path / "axolotl"))
    shutil.copy(place / "model" / "config.json", adapter)
    assert holds_adapter(adapter)
    with pytest.raises(ModelError, match="found an adapter folder; give its base model"):
        find_model(str(adapter))
    shutil.copy(place / "model" / "model.safetensors", adapter)
    with pytest.raises(ModelError, match="holds a model and an adapter"):
        find_model(str(adapter))


def changed(place, tmp_path, change, **config):
    """A copy of the model with changed tensors or settings."""
    folder = Path(shutil.copytree(place / "model", tmp_path / "m"))
    path, settings = folder / "model.safetensors", folder / "config.json"
    save_file(change(load_file(path)), path, {"format": "pt"})
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))
    return folder


def first_nan(tensors):
    tensors["model.norm.weight"][0] = torch.nan
    return tensors


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (dict, {"num_hidden_layers": 1}, r"have model\.layers\.1\..* and 6 more, which Llama.*would not use"),
        (dict, {"vocab_size": 500}, r"has the shape \[\d+, 32\] .* asks for \[500, 32\] \(1 more"),
        (first_nan, {}, r"'model\.norm\.weight' in .* not finite"),
        (lambda t: t | {"score.weight": torch.ones(2)}, {}, r"have score\.weight, which"),
    ],
)
def test_a_model_whose_weights_do_not_fit_is_refused(place, tmp_path, change, config, message):
    with pytest.raises(ModelError, match=message):
        load_model(changed(place, tmp_path, change, **config))


def test_layers_that_predict_further_tokens_are_left_out(place, tmp_path):
    assert load_model(changed(place, tmp_path, dict, num_hidden_layers=1, num_nextn_predict_layers=1))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("name", ["x.safetensors", "generation_config.json"])
def test_a_pipe_beside_the_weights_is_refused(place, tmp_path, name):
    folder = Path(shutil.copytree(place / "model", tmp_path / "m"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name} is not a regular file"):
        find_model(str(folder))
