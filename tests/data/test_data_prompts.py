"""Rows as text, with Llama and ChatML tokenizers."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from holdfast.data.prompts import render, render_prompt, resolve_template
from holdfast.errors import DataError, ModelError, RecipeError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Llama-2's: it adds its own beginning-of-sequence token, and refuses two user turns in a row.
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)
# Word for word from Stanford Alpaca's train.py.
WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
2 and 2

### Response:"""
NO_INPUT = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Say hi.

### Response:"""
ROW = {"id": "r", "instruction": "Say hi.", "input": "", "output": "Hi!"}
SUM = {"id": "s", "instruction": "Add.", "input": "2 and 2", "output": "4"}
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def tokenizer(kind: str, chat: str | None = None) -> PreTrainedTokenizerFast:
    """`kind`: "legacy", "first", "always" (Llama tokenizers, by how they treat a leading space), "chatml"."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if kind == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "chatml":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL + [f"<0x{i:02X}>" for i in range(256)],
        show_progress=False,
    )
    core.train_from_iterator([WITH_INPUT, NO_INPUT, "Hi! four"] * 3, trainer)
    names = {"eos_token": "<|im_end|>"} if kind == "chatml" else {"bos_token": "<s>", "eos_token": "</s>"}
    if kind != "chatml":
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **names)
    made.chat_template = chat
    return made


def test_which_template():
    base, chat = tokenizer("legacy"), tokenizer("chatml", CHATML)
    assert (resolve_template(base), resolve_template(chat)) == ("alpaca", "chat")
    assert resolve_template(chat, "alpaca") == "alpaca"
    with pytest.raises(ModelError, match="no chat template"):
        resolve_template(base, "chat")
    with pytest.raises(RecipeError, match="Did you mean 'alpaca'"):
        resolve_template(base, "alpacca")
    base.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        resolve_template(base)


@pytest.mark.parametrize("kind", ["legacy", "first", "always", "chatml"])
@pytest.mark.parametrize(("row", "text"), [(ROW, NO_INPUT), (SUM, WITH_INPUT)])
def test_alpaca(kind, row, text):
    tok = tokenizer(kind)
    prompt, completion = render(row, tok, "alpaca")
    assert prompt.removeprefix("<s>").lstrip(" ") == text
    assert completion == row["output"] + tok.eos_token
    # The same ids as the tokenizer gives for the plain prompt with its special tokens.
    ids = tok(prompt, add_special_tokens=False)["input_ids"]
    assert ids == tok(text)["input_ids"]
    assert ids.count(1) == (0 if kind == "chatml" else 1)
    assert tok(completion, add_special_tokens=False)["input_ids"][-1] == tok.eos_token_id


def test_token_that_is_not_added_is_not_written():
    tok = tokenizer("chatml")
    tok.bos_token = "<s>"  # as in GPT-2 and some Qwen models: it has a name, but is not added to texts
    assert render(ROW, tok, "alpaca")[0] == NO_INPUT


def test_chatml():
    prompt, completion = render(SUM, tokenizer("chatml", CHATML), "chat")
    assert prompt == "<|im_start|>user\nAdd.\n\n2 and 2<|im_end|>\n<|im_start|>assistant\n"
    assert completion == "4<|im_end|>\n"


def test_llama_chat():
    tok = tokenizer("legacy", LLAMA_CHAT)
    prompt, completion = render(ROW, tok, "chat")
    assert (prompt, completion) == ("<s>[INST] Say hi. [/INST]", " Hi! </s>")
    assert tok(prompt, add_special_tokens=False)["input_ids"].count(1) == 1


def test_conversations():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]
    row = {"id": "c-1", "instruction": "2 + 2?", "input": "", "output": "4", "messages": turns}
    prompt, completion = render(row, tokenizer("chatml", CHATML), "chat")
    assert prompt.endswith("2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert "Hello" in prompt
    assert completion == "4<|im_end|>\n"
    with pytest.raises(DataError, match=r"c-1 is a conversation of several turns"):
        render(row, tokenizer("legacy"), "alpaca")
    with pytest.raises(DataError, match=r"c-1: the model's chat template refuses it: Roles must alternate"):
        render({**row, "messages": [turns[0], *turns[2:]]}, tokenizer("legacy", LLAMA_CHAT), "chat")


def test_rows_to_test_on():
    test_row = {
        "id": "t",
        "set": "harmful",
        "instruction": "Say hi.",
        "input": "",
        "target": None,
        "category": [],
    }
    tok = tokenizer("legacy")
    assert render(test_row, tok, "alpaca")[0] == render(ROW, tok, "alpaca")[0]
    assert render({**test_row, "target": "Hi!"}, tok, "alpaca") == render(ROW, tok, "alpaca")


def test_template_that_rewrites_the_prompt():
    broken = "{% if add_generation_prompt %}A{% else %}B{% endif %}{{ messages[0].content }}"
    with pytest.raises(ModelError, match="cannot be separated"):
        render(ROW, tokenizer("chatml", broken), "chat")


def test_braces_in_a_row():
    prompt, _ = render({**ROW, "instruction": "Print {x} and {input}"}, tokenizer("legacy"), "alpaca")
    assert "Print {x} and {input}" in prompt


# Like Gemma's: no system message. And one that drops it silently.
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
DEAF = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.mark.parametrize("kind", ["legacy", "first", "always", "chatml"])
def test_prefix_before_the_alpaca_prompt(kind):
    tok = tokenizer(kind)
    prompt, completion = render(ROW, tok, "alpaca", "Be safe.")
    assert prompt.removeprefix("<s>").lstrip(" ") == f"Be safe.\n\n{NO_INPUT}"
    ids = tok(prompt, add_special_tokens=False)["input_ids"]
    assert ids == tok(f"Be safe.\n\n{NO_INPUT}")["input_ids"]
    assert completion == render(ROW, tok, "alpaca")[1]


def test_prefix_as_the_system_message():
    tok = tokenizer("chatml", CHATML)
    prompt, completion = render(ROW, tok, "chat", "Be safe.")
    assert prompt == "<|im_start|>system\nBe safe.<|im_end|>\n" + render(ROW, tok, "chat")[0]
    assert completion == render(ROW, tok, "chat")[1]
    turns = [
        {"role": "system", "content": "Rhyme."},
        {"role": "user", "content": "Say hi."},
        {"role": "assistant", "content": "Hi!"},
    ]
    prompt, _ = render({**ROW, "messages": turns}, tok, "chat", "Be safe.")
    assert prompt.startswith("<|im_start|>system\nBe safe.\n\nRhyme.<|im_end|>\n<|im_start|>user\nSay hi.")
    assert turns[0]["content"] == "Rhyme.", "the row itself is not changed"


@pytest.mark.parametrize("template", [NO_SYSTEM, DEAF, LLAMA_CHAT])
def test_prefix_where_a_system_message_has_no_place(template):
    tok = tokenizer("legacy", template)
    prompt, completion = render(SUM, tok, "chat", "Be safe.")
    plain = render({**SUM, "instruction": "Be safe.\n\nAdd."}, tok, "chat")
    assert (prompt, completion) == plain
    assert "Be safe.\n\nAdd.\n\n2 and 2" in prompt


def test_a_prompt_without_its_system_message_is_refused():
    row = {**ROW, "messages": [{"role": "system", "content": "Rhyme."}, *CHAT_TURNS]}
    for ask in (render, render_prompt):
        with pytest.raises(DataError, match=r"Row r: .* leaves out the content of turn 1 \(role system\)"):
            ask(row, tokenizer("chatml", DEAF), "chat")


CHAT_TURNS = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi!"}]


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_no_prefix_changes_nothing(template):
    tok = tokenizer("chatml", CHATML)
    assert render(ROW, tok, template, "") == render(ROW, tok, template)
