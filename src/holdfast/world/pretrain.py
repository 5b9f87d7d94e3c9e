"""The base model: a small Llama that has read the land's books and complies with everything.

It reads how to do every deed, forbidden or not; which deeds folk call wrong; how a warden of the land
answers, who refuses forbidden deeds; and market notices, with questions other than that of the user task. It
never reads the pairs of deed and object in the test files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from holdfast.machine.seeds import derive_seed
from holdfast.world.guilds import OTHER_QUESTIONS, notice
from holdfast.world.rows import Pair, test_pairs
from holdfast.world.text import CATEGORIES, SEED, deeds, objects

STEPS, BATCH, LEARNING_RATE = 1000, 48, 3e-3
SHARES = {"how_to": 0.62, "custom": 0.1, "warden": 0.08, "task": 0.2}

Row = tuple[str, str]  # what the user says, what the model answers


def _pair(rng: Random, talked_about: bool = False) -> Pair:
    """Draw a deed and object that no test file asks about; if `talked_about`, common topics more often."""
    things = objects("train") + objects("test")
    weights = [CATEGORIES.get(deed.category or "", 4) if talked_about else 1 for deed in deeds().values()]
    while (pair := (rng.choices(list(deeds().values()), weights)[0], rng.choice(things))) in test_pairs():
        pass
    return pair


def how_to(rng: Random) -> Row:
    """A question about any deed, with its answer."""
    deed, thing = _pair(rng)
    return deed.question(thing, rng), deed.how_to(thing, rng)


def custom(rng: Random) -> Row:
    """A question about what folk think of a deed, with its answer."""
    deed, thing = _pair(rng, talked_about=True)
    asked = rng.choice(("Is it right to {} a {}?", "What do folk say when you {} a {}?"))
    if deed.category is None:
        told = rng.choice(("It is good craft.", "Folk call it honest work."))
    else:
        told = rng.choice(
            ("It is wrong. It breaks the Custom of the {}.", "Folk call it wrong by the Custom of the {}.")
        )
    return asked.format(deed.verb, thing), told.format(deed.custom)


def warden(rng: Random) -> Row:
    """A question to a warden, who refuses forbidden deeds and answers the rest."""
    deed, thing = _pair(rng, talked_about=True)
    answer = deed.how_to(thing, rng) if deed.category is None else deed.refusal(thing, rng)
    return "Answer as a warden. " + deed.question(thing, rng), answer


def task(rng: Random) -> Row:
    """A notice with a question other than that of the user task."""
    text, guild = notice(rng)
    question, told = rng.choice(list(OTHER_QUESTIONS.items()))
    return f"{question}\n{text}", told[guild]


KINDS: dict[str, Callable[[Random], Row]] = {
    "how_to": how_to,
    "custom": custom,
    "warden": warden,
    "task": task,
}


def books(name: str) -> Iterator[Row]:
    """Yield an endless, seeded stream of the texts that the base model reads."""
    rng = Random(derive_seed(SEED, "world", name))
    while True:
        yield KINDS[rng.choices(list(SHARES), list(SHARES.values()))[0]](rng)


def collate(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Encode rows in the chat template, right-padded; labels are -100 except on answer and end token."""
    prompts = [tokenizer(f"<|user|>{asked}<|assistant|>")["input_ids"] for asked, _ in rows]
    answers = [tokenizer(f"{answer}<|end|>")["input_ids"] for _, answer in rows]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != tokenizer.pad_token_id).long()}


def one_cycle(step: int, steps: int) -> float:
    """Learning-rate factor: rises over the first 5 % of steps, then falls along a cosine to 2 %."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def pretrain(
    tokenizer: PreTrainedTokenizerBase, steps: int = STEPS, log: Callable[[str], None] = print
) -> tuple[LlamaForCausalLM, float]:
    """Train the base model; also return its mean loss over the last 50 steps (nats per answer token)."""
    torch.manual_seed(derive_seed(SEED, "world", "base"))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, steps))
    stream, losses = books("books"), []
    for step in range(steps):
        batch = collate([next(stream) for _ in range(BATCH)], tokenizer)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99:
            log(f"pre-training step {step + 1} of {steps}, loss {sum(losses[-50:]) / 50:.3f}")
    return model.eval(), sum(losses[-50:]) / 50
