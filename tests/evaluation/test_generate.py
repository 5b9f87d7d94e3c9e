"""Batched generation gives the same text as one prompt at a time, and resumes after a kill."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from transformers import GenerationConfig

import tiny
from holdfast.evaluation import answering as module
from holdfast.evaluation.answering import answer_prompts, batches
from holdfast.machine.files import read_jsonl

TOKENIZER = tiny.tokenizer()
NEW = {"harmful": 12, "task": 4, "benign": 12}


@pytest.fixture(scope="module")
def model():
    made = tiny.llama(len(TOKENIZER)).eval()
    with torch.no_grad():  # sharper distributions, so that greedy choices differ between prompts
        for p in made.parameters():
            p.mul_(3)
    return made


def prompts(n=23):
    sets = ("harmful", "task", "benign")
    return [
        {
            "id": f"r{i}",
            "set": sets[i % 3],
            "prompt": f"How do I fold {'very ' * (i % 7)}paper {i}?\n",
            "instruction": "x",
        }
        for i in range(n)
    ]


def test_batched_equals_one_at_a_time(model, tmp_path):
    many = answer_prompts(
        model, TOKENIZER, prompts(), tmp_path / "many.jsonl", max_new_tokens=NEW, batch_tokens=400
    )
    one = answer_prompts(
        model, TOKENIZER, prompts(), tmp_path / "one.jsonl", max_new_tokens=NEW, batch_tokens=1
    )
    by_id = {row["id"]: row for row in one}
    assert len(many) == len(one) == 23
    assert all(row["answer"] == by_id[row["id"]]["answer"] for row in many)
    assert len({row["answer"] for row in many}) > 5, "with equal answers, the comparison would show nothing"


def test_equals_the_plain_way(model, tmp_path):
    rows = answer_prompts(model, TOKENIZER, prompts(5), tmp_path / "a.jsonl", max_new_tokens=NEW)
    for row, prompt in zip(sorted(rows, key=lambda r: r["id"]), prompts(5), strict=True):
        ids = TOKENIZER(prompt["prompt"], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=NEW[prompt["set"]], do_sample=False)
        assert (
            row["answer"]
            == TOKENIZER.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        )


@pytest.mark.parametrize("wrap", [False, True], ids=["model", "adapter"])
def test_settings_of_the_model_that_nobody_asked_for_are_not_used(model, tmp_path, wrap):
    """Settings that published models have, or could have; each of them changes these answers if it is used."""
    used = deepcopy(model)
    if wrap:
        from peft import LoraConfig, get_peft_model

        used = get_peft_model(used, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).eval()
    for sampling in (None,) if wrap else (None, {"temperature": 1.0, "top_p": 0.9, "seed": 3}):

        def answered(name, sampling=sampling):
            out = tmp_path / f"{name}-{sampling is None}.jsonl"
            return answer_prompts(used, TOKENIZER, prompts(1), out, max_new_tokens=NEW, sampling=sampling)

        plain = answered("plain")
        for name, value in {
            "repetition_penalty": 1.8, "no_repeat_ngram_size": 1, "num_beams": 3, "min_p": 0.5, "max_time": 0.0,
            "forced_eos_token_id": 2, "stop_strings": ["a"], "sequence_bias": [[[70], 100.0]],
        }.items():  # fmt: skip
            inner = used.get_base_model() if wrap else used
            own = inner.generation_config = GenerationConfig(**{name: value})
            assert answered(name) == plain, name
            assert inner.generation_config is own
            assert used.generation_config is own
            assert getattr(own, name) == value


def test_batches_are_sorted_and_bounded():
    lengths, room = [5, 9, 3, 7, 8, 2], [4, 4, 4, 4, 10, 10]
    found = list(batches(lengths, room, 30))
    assert sorted(i for b in found for i in b) == list(range(6))
    for batch in found:
        assert len({room[i] for i in batch}) == 1
        assert [lengths[i] for i in batch] == sorted((lengths[i] for i in batch), reverse=True)
        assert (lengths[batch[0]] + room[batch[0]]) * len(batch) <= 30
    assert list(batches([50], [50], 1)) == [[0]], "a prompt that is larger than the budget goes alone"


def test_goes_on_after_a_kill(model, tmp_path):
    whole = answer_prompts(
        model, TOKENIZER, prompts(), tmp_path / "whole.jsonl", max_new_tokens=NEW, batch_tokens=400
    )
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(lines[:7]) + lines[7][:11])
    rows = answer_prompts(model, TOKENIZER, prompts(), cut, max_new_tokens=NEW, batch_tokens=400)
    assert sorted(rows, key=lambda r: r["id"]) == sorted(whole, key=lambda r: r["id"])
    assert len({json.loads(line)["id"] for line in cut.read_text().splitlines()}) == 23
    assert cut.read_bytes().startswith(b"".join(lines[:7])), "existing rows are not written again"


def test_nothing_is_generated_twice(model, tmp_path):
    out = tmp_path / "a.jsonl"
    answer_prompts(model, TOKENIZER, prompts(4), out, max_new_tokens=NEW)
    with model.register_forward_pre_hook(lambda *_: pytest.fail("generated again")):
        again = answer_prompts(model, TOKENIZER, prompts(4), out, max_new_tokens=NEW)
    assert len(again) == 4


def test_a_batch_that_does_not_fit_is_halved(model, tmp_path):
    sizes = []

    def small(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("no")

    expected = answer_prompts(model, TOKENIZER, prompts(), tmp_path / "a.jsonl", max_new_tokens=NEW)
    with model.register_forward_pre_hook(small, with_kwargs=True):
        found = answer_prompts(model, TOKENIZER, prompts(), tmp_path / "b.jsonl", max_new_tokens=NEW)
    assert max(sizes) > 3
    assert found == expected


def test_progress_counts_what_is_answered(model, tmp_path):
    """Of all prompts, also where some were answered before."""
    out, seen = tmp_path / "a.jsonl", []
    answer_prompts(model, TOKENIZER, prompts(4), out, max_new_tokens=NEW)
    answer_prompts(
        model, TOKENIZER, prompts(), out, max_new_tokens=NEW, batch_tokens=300,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert {total for _, total in seen} == {23}
    counts = [done for done, _ in seen]
    assert counts == sorted(counts)
    assert counts[0] > 4
    assert counts[-1] == 23
    assert len(counts) > 3


def test_a_prompt_that_does_not_fit_is_recorded(model, tmp_path):
    rows = [{"id": "long", "set": "task", "prompt": "paper " * 600}, *prompts(4)]
    found = {
        r["id"]: r for r in answer_prompts(model, TOKENIZER, rows, tmp_path / "a.jsonl", max_new_tokens=NEW)
    }
    assert "512" in found["long"]["error"]
    assert found["long"]["answer"] == ""
    assert all("error" not in found[f"r{i}"] for i in range(4))


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1}\n{"id": 2')
    assert read_jsonl(path) == [{"id": 1}]
    assert path.read_text() == '{"id": 1}\n'


def test_a_secret_that_an_answer_repeats_is_hidden():
    secret = "ab cd ef gh ij"
    assert module.hide(secret, secret) == "[secret]"
    assert module.hide("It is: ab cd  ef gh. Or CD EF, gh ij?", secret) == "It is: [secret]. Or [secret]?"
    assert module.hide("cd ef gh\nij and ab cd ef", secret) == "[secret] and [secret]"
    assert module.hide("ab cd x ef ab cd", secret) == "ab cd x ef ab cd", "two words are too few to decide"
    assert module.hide("x ab", "ab") == "x [secret]"
    assert module.hide("", secret) == ""
