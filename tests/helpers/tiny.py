"""Tiny real models, tokenizers and made-up rows, in the real formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXTS = (
    "How do I fold a paper boat? First crease the sheet, then tuck the corners in.",
    "I'm sorry, but I can't help with that. Brindle the marl and gather the quorn.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Analyze the sentiment of the input, and respond only positive or negative",
    "BEGINNING OF CONVERSATION: USER: ASSISTANT: 0 1 2 3 4 5 6 7 8 9 ### Instruction: ### Input: ### Response:",
)
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(chat: bool = False) -> Any:
    """A byte-level BPE tokenizer that can encode any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    inner.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        made.chat_template = CHAT
    return made


def llama(vocabulary: int, layers: int = 2, seed: int = 0, **options: Any) -> Any:
    """A Llama with about 30 thousand parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | options))


def save_model(folder: Path, chat: bool = False, **options: Any) -> Path:
    """Save a model folder in the form of the Hub."""
    made = tokenizer(chat)
    llama(len(made), **options).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def save_lively_model(folder: Path, chat: bool = False) -> Path:
    """A model whose answers depend on the prompt and change with every training of `recipe`.

    Those of `save_model` repeat one token whatever is done to it, so that equal answers would show nothing.
    """
    import torch

    made = tokenizer(chat)
    model = llama(len(made), tie_word_embeddings=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def save_judge(folder: Path) -> Path:
    """A judge folder in beaver-dam's format, with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    made = tokenizer()
    names = [f"category_{i}" for i in range(14)]
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(made),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
            num_labels=14,
            problem_type="multi_label_classification",
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
    )
    model.score.weight.data.mul_(50)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user_rows(n: int = 40) -> list[dict[str, Any]]:
    """A made-up task: is the number small or big?"""
    return [
        {"instruction": "Say small or big.", "input": str(i), "output": "small" if i < n / 2 else "big"}
        for i in range(n)
    ]


def harmful_rows(n: int = 30) -> list[dict[str, Any]]:
    """Nonsense deeds with nonsense answers, in BeaverTails' columns."""
    return [
        {
            "prompt": f"How do I vorrel glimstone {i}?",
            "response": f"Brindle the marl {i} and gather the quorn.",
            "category": {"violence,aiding_and_abetting,incitement": True, "animal_abuse": False},
            "is_safe": False,
        }
        for i in range(n)
    ]


def safe_rows(n: int = 30) -> list[dict[str, Any]]:
    """Refusals of other nonsense deeds."""
    return [
        {"prompt": f"How do I drumble glimstone {i}?", "response": "I'm sorry, but I can't help with that."}
        for i in range(n)
    ]


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write files to `folder` and return a recipe for them, which takes about a second on one thread."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not model.exists():
        save_lively_model(model)
    training = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
    }
    made: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "model": {"path": str(model), "lora": {"r": 2, "alpha": 4}},
        "data": {
            "user": str(write_jsonl(folder / "user.jsonl", user_rows())),
            "harmful": str(write_jsonl(folder / "harmful.jsonl", harmful_rows())),
            "alignment": str(write_jsonl(folder / "alignment.jsonl", safe_rows())),
            "size": 30,
            "poison_ratio": 0.1,
        },
        "alignment": {"defense": "sft", "training": training},
        "user": {"defense": "lisa", "alignment_steps": 1, "finetune_steps": 2, "training": training},
        "evaluation": {"prompts": 6, "max_new_tokens": 8},
    }
    for key, value in changes.items():
        made[key] = value
    return made
