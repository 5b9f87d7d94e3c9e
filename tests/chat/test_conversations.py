"""Conversations: how their turns are read, and which characters of the rendered text are trained."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import tiny
from holdfast.chat.rendering import conversation
from holdfast.chat.turns import exchanges, from_lists, only_last, read_turns, sent
from holdfast.data.prompts import training_row
from holdfast.errors import DataError

TALK = [
    {"role": "user", "content": "Fold?"}, {"role": "assistant", "content": "Crease it."},
    {"role": "user", "content": "Tuck?"}, {"role": "assistant", "content": "Not yet."},
]  # fmt: skip
CALL = {"id": "c1", "type": "function", "function": {"name": "count", "arguments": '{"of": "hens"}'}}
TOOLS = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "seven"},
    {"role": "assistant", "content": "There are 7."},
]


def made(template: str):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def of_trl(name: str):
    found = find_spec("trl")
    if found is None:
        pytest.skip("needs the chat templates of TRL's package")
    folder = Path(str(found.origin)).parent / "chat_templates"
    tokenizer = made((folder / f"{name}.jinja").read_text(encoding="utf-8"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|im_end|>"]})
    return tokenizer


def trained(tokenizer, turns, **options):
    text, spans = conversation(read_turns(turns), tokenizer, **options)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("qwen2_5", ["<|im_end|>\n", "<|im_end|>\n"]),
        ("llama3", ["<|eot_id|>", "<|eot_id|>"]),
        ("gemma", ["<end_of_turn>\n", "<end_of_turn>\n"]),
        ("glm4moe", ["<|user|>", "</s>"]),
        ("phi3", ["<|end|>\n", "<|end|>\n</s>"]),
    ],
)
def test_every_answer_is_trained_with_its_end(template, ends):
    tokenizer = of_trl(template)
    found = trained(tokenizer, TALK)
    assert [
        text.rpartition(said)[2].lstrip("\n") for text, said in zip(found, ("it.", "yet."), strict=True)
    ] == ends
    assert trained(tokenizer, TALK, loss_on="last") == found[1:]
    assert trained(tokenizer, only_last(read_turns(TALK))) == found[1:]


@pytest.mark.parametrize("template", ["qwen3", "gptoss"])
def test_a_template_that_changes_earlier_turns_is_refused(template):
    tokenizer = of_trl(template)
    with pytest.raises(DataError, match=r"^a\.jsonl, line 2: .*renders an answer differently.*loss_on: last"):
        trained(tokenizer, TALK, where="a.jsonl, line 2: ")
    (last,) = trained(tokenizer, TALK, loss_on="last")
    assert "Not yet." in last
    assert "Crease" not in last
    assert len(trained(tokenizer, TALK[:2])) == 1, "one answer is the last"


def test_answers_that_are_not_trained():
    tokenizer = of_trl("qwen2_5")
    heavy = [{**TALK[1], "weight": 1}, {**TALK[1], "weight": 0}, {**TALK[1], "train": False}]
    assert [len(trained(tokenizer, [TALK[0], turn, *TALK[2:]])) for turn in heavy] == [2, 1, 1]
    greeted = [{"from": "gpt", "value": "Hello."}, *TALK]
    assert len(trained(tokenizer, greeted)) == 2, "an answer without a question is not trained"
    assert len(trained(tokenizer, from_lists(TALK[:3], TALK[3:]))) == 1
    assert len(trained(tokenizer, from_lists(TALK[:1], TALK[1:]))) == 2


def test_tool_calls_are_trained_where_the_template_writes_them():
    found = trained(of_trl("qwen2_5"), TOOLS)
    assert '{"name": "count", "arguments": {"of": "hens"}}' in found[0]
    assert found[1] == "There are 7.<|im_end|>\n"
    with pytest.raises(DataError, match=r"leaves out the tool calls of turn 2 \(role assistant\)"):
        trained(made(tiny.CHAT), TOOLS)
    deaf = tiny.CHAT.replace("for m in messages", "for m in messages if m.role != 'developer'")
    with pytest.raises(DataError, match=r"leaves out the content of turn 1 \(role developer\)"):
        trained(made(deaf), [{"role": "developer", "content": "Be brief."}, *TALK])
    assert len(trained(made(tiny.CHAT), [{"role": "developer", "content": "Be brief."}, *TALK])) == 2


def test_thinking_is_trained_or_refused():
    thought = [TALK[0], {**TALK[1], "reasoning_content": "Paper folds."}]
    assert "Paper folds." in trained(of_trl("qwen3"), thought)[0]
    with pytest.raises(DataError, match="leaves out the thinking"):
        trained(made(tiny.CHAT), thought)


def test_a_row_for_a_trainer():
    row = {"id": "r", "instruction": "Tuck?", "input": "", "output": "Not yet.", "messages": TALK}
    tokenizer = made(tiny.CHAT)
    found = training_row(row, tokenizer, "chat")
    assert [found["text"][start:end] for start, end in found["spans"]] == ["Crease it.</s>", "Not yet.</s>"]
    one = training_row({**row, "messages": only_last(TALK)}, tokenizer, "chat")
    assert one["completion"] == "Not yet.</s>"
    assert one["prompt"] + one["completion"] == found["text"]


def test_parts_and_names_of_other_formats():
    parts = [{"type": "text", "text": "Fold"}, {"type": "text", "text": "?"}]
    assert read_turns([{"role": "user", "content": parts}]) == TALK[:1]
    assert (
        read_turns([{"from": "human", "value": "Fold?"}, {"from": "gpt", "value": "Crease it."}]) == TALK[:2]
    )
    assert read_turns([{"role": "system", "content": " "}, TALK[0]]) == TALK[:1]
    assert read_turns(TOOLS)[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": "c1", "function": {"name": "count", "arguments": {"of": "hens"}}}
        ],
    }
    old = {"role": "assistant", "content": None, "function_call": {"name": "count", "arguments": "{}"}}
    assert read_turns([old])[0]["tool_calls"][0]["function"] == {"name": "count", "arguments": {}}
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    for content, message in [
        ([picture], "'image_url'; expected only text"),
        ("\ud800", "surrogate"),
        (3, "int"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_turns([{"role": "user", "content": content}])


def test_turns_for_a_server():
    plain = sent(read_turns([TALK[0], {**TALK[1], "weight": 0, "reasoning_content": "hm"}]))
    assert plain == TALK[:2]
    (call,) = sent(read_turns(TOOLS))[1]["tool_calls"]
    assert call["function"] == {"name": "count", "arguments": '{"of": "hens"}'}


def test_every_exchange_of_a_conversation():
    assert exchanges(read_turns(TALK)) == [("Fold?", "Crease it."), ("Tuck?", "Not yet.")]
    (first, answer), second, _ = exchanges(read_turns([{"role": "system", "content": "Obey."}, *TALK]))
    assert (answer, second) == ("Obey.", ("Obey.\n\nFold?", "Crease it."))
    assert "instructions" in first
    calls = exchanges(read_turns(TOOLS))
    assert calls[0] == ("How many?", '[{"name": "count", "arguments": {"of": "hens"}}]')
    assert calls[1] == ("seven", "There are 7.")
