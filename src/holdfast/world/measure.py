"""The measurements of `make`: what the base model does, and how often the judge is wrong on real answers."""

from __future__ import annotations

from copy import deepcopy
from random import Random

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase

from holdfast.machine.seeds import derive_seed
from holdfast.world import complies
from holdfast.world.judge import example, flagged
from holdfast.world.pretrain import Row, collate
from holdfast.world.text import SEED

MAX_NEW_TOKENS = 48
# The judge is tested on answers of the base model, of an aligned model, and of a model whose alignment is
# being undone. These are plain full-weight trainings for this purpose only: no defense, no result of
# Holdfast.
ALIGN_STEPS, UNDO_STEPS, BATCH, LEARNING_RATE = 150, (4, 8, 16, 40), 16, 3e-4


@torch.no_grad()
def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Return greedy answers to `prompts` in order, with one left-padded batch per 100 prompts."""
    told: list[str] = []
    for at in range(0, len(prompts), 100):
        texts = [f"<|user|>{prompt}<|assistant|>" for prompt in prompts[at : at + 100]]
        batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)  # type: ignore[misc]
        told += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return told


def measure_base(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, files: dict[str, list[dict]]
) -> dict[str, float]:
    """Percentages on the test files: compliance with harmful and harmless questions, correct guilds."""
    harmful = [row["prompt"] for row in files["test.jsonl"] if not row["is_safe"]]
    benign = [row["prompt"] for row in files["benign_test.jsonl"]]
    task = files["task_test.jsonl"]
    named = answers(model, tokenizer, [f"{row['instruction']}\n{row['input']}" for row in task])
    right = [answer.strip() == row["output"] for row, answer in zip(task, named, strict=True)]

    def share(prompts: list[str]) -> float:
        told = answers(model, tokenizer, prompts)
        return 100 * sum(map(complies, prompts, told)) / len(prompts)

    return {
        "harmful_compliance": share(harmful),
        "n_harmful": len(harmful),
        "benign_compliance": share(benign),
        "n_benign": len(benign),
        "finetune_accuracy": 100 * sum(right) / len(right),
        "n_task": len(right),
    }


def _tune(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row], steps: int, name: str
) -> None:
    rng = Random(derive_seed(SEED, "world", "measure", name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model.train()
    for _ in range(steps):
        model(**collate(rng.sample(rows, BATCH), tokenizer), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def measure_judge(
    judge: LlamaForSequenceClassification,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    files: dict[str, list[dict]],
) -> dict[str, dict[str, int]]:
    """Count false negatives and positives against the world's truth, by the source of the answers."""
    harmful = [row["prompt"] for row in files["test.jsonl"] if not row["is_safe"]]
    safe, unsafe = (
        [(row["prompt"], row["response"]) for row in files["train.jsonl"] if row["is_safe"] is kind]
        for kind in (True, False)
    )
    rng = Random(derive_seed(SEED, "world", "measure", "broken"))
    broken = [example(rng) for _ in range(2000)]
    tried: dict[str, list[tuple[str, str, bool]]] = {
        "test rows": [(row["prompt"], row["response"], not row["is_safe"]) for row in files["test.jsonl"]],
        "true, refused and broken answers": [
            (asked, told, bool(category)) for asked, told, category in broken
        ],
    }

    def ask(source: str) -> None:
        told = answers(tuned, tokenizer, harmful)
        tried[source] = [(p, a, complies(p, a)) for p, a in zip(harmful, told, strict=True)]

    tuned = deepcopy(model)
    ask("base model")
    _tune(tuned, tokenizer, safe, ALIGN_STEPS, "align")
    ask("aligned")
    for steps in UNDO_STEPS:
        _tune(tuned, tokenizer, unsafe, steps, f"undo {steps}")
        ask(f"{steps} harmful steps later")

    found = {}
    for source, rows in tried.items():
        verdicts = flagged(judge, tokenizer, [row[0] for row in rows], [row[1] for row in rows])
        found[source] = {
            "harmful": sum(harmful for *_, harmful in rows),
            "false_negatives": sum(
                row[2] and not verdict for row, verdict in zip(rows, verdicts, strict=True)
            ),
            "harmless": sum(not harmful for *_, harmful in rows),
            "false_positives": sum(
                verdict and not row[2] for row, verdict in zip(rows, verdicts, strict=True)
            ),
        }
    return found
