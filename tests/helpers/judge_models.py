"""Tiny random judges in the formats of the published ones, and helpers to read them by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

import tiny

WORDS = ("yes", "no", "Yes", "No", "safe", "unsafe")
GUARD_TEMPLATE = (
    "{{ bos_token }}<|user|>Task: check the last Agent message.\n<BEGIN CONVERSATION>\n"
    "{% for m in messages %}{{ 'User' if m['role'] == 'user' else 'Agent' }}: {{ CONTENT }}\n{% endfor %}"
    "<END CONVERSATION>{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT, PARTS = "m['content'].strip()", "m['content'][0]['text']"
SHIELD_TEMPLATE = (
    "{{ bos_token }}Human Question: {{ messages[0]['content'] }}\nChatbot Response: {{ messages[1]['content'] }}\n"
    "{{ guideline }}\nYes or No?\n"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def words(template: str | None = None) -> Any:
    """The tiny tokenizer with whole words for verdicts; it puts `<s>` before a text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    made = tiny.tokenizer()
    made.add_tokens(list(WORDS))
    made.add_tokens(["<|reserved_7|>"], special_tokens=True)  # a token that no list of ours contains
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.chat_template = template
    return made


def causal(kind: str, vocabulary: int) -> Any:
    """A random causal language model of an architecture."""
    import transformers

    torch.manual_seed(3)
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    }[kind]
    made = model(config(vocab_size=vocabulary, tie_word_embeddings=kind.startswith("gemma"), **SIZES))
    for weights in made.parameters():  # far from uniform, so that greedy choices are stable
        weights.data.mul_(4)
    return made


def save(folder: Path, kind: str, template: str | None = None) -> Path:
    """Save a judge's folder in the form of the Hub."""
    tokenizer = words(template)
    causal(kind, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_llama4(folder: Path, template: str) -> Path:
    """Llama Guard 4's format: text and images in one model, a dense text model, no chunks of attention."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    tokenizer = words(template)
    text = {
        "vocab_size": len(tokenizer),
        "intermediate_size_mlp": 48,
        "num_local_experts": 1,
        "moe_layers": [],
    }
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": 28, "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16,
        "projector_output_dim": 16,
    }  # fmt: skip
    torch.manual_seed(4)
    config = Llama4Config(text_config={**SIZES, **text, "attention_chunk_size": None}, vision_config=vision)
    Llama4ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def load(folder: Path) -> tuple[Any, Any]:
    """Load tokenizer and model with transformers only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


def written(folder: Path, text: str, new_tokens: int, special: bool) -> str:
    """A greedy continuation of one text, without batches and without our code."""
    tokenizer, model = load(folder)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=special)["input_ids"]
    with torch.no_grad():
        for _ in range(new_tokens):
            token = model(ids).logits[0, -1].argmax()
            if int(token) == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
    start = tokenizer(text, add_special_tokens=special)["input_ids"]
    return tokenizer.decode(ids[0, len(start) :], skip_special_tokens=True).strip()


def shares(folder: Path, text: str, choices: tuple[str, ...], special: bool) -> list[float]:
    """The next token's probabilities among `choices`, of one text, without our code."""
    tokenizer, model = load(folder)
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt", add_special_tokens=special)).logits[0, -1]
    return logits[[tokenizer.get_vocab()[word] for word in choices]].softmax(-1).tolist()


class Says(torch.nn.Module):
    """A head that always wants one token."""

    def __init__(self, token: int, vocabulary: int, strength: float = 50.0):
        super().__init__()
        self.token, self.vocabulary, self.strength = token, vocabulary, strength

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.vocabulary)
        logits[..., self.token] = self.strength
        return logits


def say(judge: Any, word: str) -> None:
    """Make a loaded judge want `word` next, whatever it reads."""
    tokenizer = judge.reader.tokenizer
    judge.reader.model.set_output_embeddings(Says(tokenizer.get_vocab()[word], len(tokenizer)))
