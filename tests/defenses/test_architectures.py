"""Any decoder: SFT and Lisa train, and go on from a checkpoint, on ten kinds of model with LoRA everywhere."""

from __future__ import annotations

import pytest
import torch
import trainers
import transformers

from holdfast.weights.model import add_lora, load_model
from holdfast.weights.trained import check_lora

SIZES = {
    "vocab_size": len(trainers.TOKENIZER), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
MODELS = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 16},
    "Qwen2": {**SIZES, "num_key_value_heads": 1},
    "Qwen3": GROUPED,
    "Gemma2": {**GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "Gemma3Text": {**GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "OPT": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.1},
    "Phi3": {**SIZES, "num_key_value_heads": 1},
    "GPT2": {**SIZES, "n_inner": 24},
    "GPTNeoX": SIZES,
}
LORA = {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": "all-linear"}
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    config = getattr(transformers, f"{request.param}Config")(**MODELS[request.param])
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp(request.param)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made)
    return made


@pytest.mark.parametrize("name", ["sft", "lisa"])
def test_trains_and_goes_on(name, folder, tmp_path):
    own = {"alignment_steps": 1, "finetune_steps": 1, "rho": 5.0, "proximal_warmup_ratio": 0.0}

    def make():
        check_lora(folder, LORA)
        torch.manual_seed(3)
        net = add_lora(load_model(folder), LORA, "base")
        options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
        return trainers.trainer(name, tmp_path, net=net, **options, **(own if name == "lisa" else {}))

    whole = make()
    start = trainers.weights(whole)
    whole.train()
    moved = [not torch.equal(a, b) for a, b in zip(start, trainers.weights(whole), strict=True)]
    assert all(moved), "every adapter of every linear layer"
    assert len(moved) >= 2 * 2 * 4, "two matrices in each of two layers' four or more linear ones"
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))
