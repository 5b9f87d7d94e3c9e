"""Rows to token ids: what is learned, what is cut, what is refused; and the batches of them."""

from __future__ import annotations

import pytest
import torch

import tiny
from holdfast.errors import DataError
from holdfast.training.tokenising import IGNORED, collator, equal_lengths, tokenise

TOKENIZER = tiny.tokenizer(chat=True)


def sentencepiece():
    """A tokenizer as Llama-2's: a space is "▁", and a text begins with one, but the rest of a text does not."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *"▁Resposne:Hib!\n", "Hi", "▁H", "▁Hi", "onse", "onse:", ":b"]
    merges = [("▁", "H"), ("▁H", "i"), ("H", "i"), ("o", "n"), ("s", "e"), ("on", "se"), (":", "b")]
    vocabulary = dict.fromkeys([*words, *(a + b for a, b in merges)])
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    inner.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def learned(row, made):
    """The trained tokens of a row, as text."""
    labels = [label for label in tokenise(row, made, None)["labels"] if label != IGNORED]
    return made.convert_ids_to_tokens(labels)


def test_prompt_and_completion_are_one_text():
    """The first trained token is the authors': no space comes before an answer that has none."""
    made = sentencepiece()
    assert made.tokenize("Hi!") == ["▁Hi", "!"], "an answer alone begins with a space"
    assert learned({"prompt": "<s>Response:", "completion": "Hi!</s>"}, made) == ["Hi", "!", "</s>"]
    assert learned({"prompt": "<s>Response:", "completion": " Hi!</s>"}, made) == ["▁Hi", "!", "</s>"]
    assert learned({"prompt": "", "completion": "Hi!</s>"}, made) == ["▁Hi", "!", "</s>"]


def test_a_token_over_the_border_belongs_to_the_prompt():
    """As in the authors' code: as many tokens are left out as the prompt has alone."""
    made = sentencepiece()
    row = {"prompt": "<s>Response:", "completion": "bi</s>"}
    assert made.tokenize("<s>Response:bi</s>")[-3:] == [":b", "i", "</s>"]
    assert learned(row, made) == ["i", "</s>"]
    with pytest.raises(DataError, match="no token of the completion is left"):
        tokenise({**row, "completion": "b"}, made, None)


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_only_the_completion_is_learned():
    row = tokenise({"prompt": "How do I fold?\n", "completion": "Crease it.</s>"}, TOKENIZER, None)
    prompt, completion = ids("How do I fold?\n"), ids("Crease it.</s>")
    assert row["input_ids"] == prompt + completion
    assert row["labels"] == [IGNORED] * len(prompt) + completion
    assert row["attention_mask"] == [1] * len(row["input_ids"])


TURNS = [
    {"role": "user", "content": "Fold?"}, {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Tuck?"}, {"role": "assistant", "content": "No."},
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "loss_on", "text"),
    [
        ({"messages": TURNS}, "all", "Yes.</s>No.</s>"),
        ({"messages": TURNS}, "last", "No.</s>"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]}, "all", "No.</s>"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:2]}, "all", "Yes.</s>"),
        ({"prompt": TURNS[:3], "completion": TURNS[3:]}, "all", "No.</s>"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "all", "Yes.</s>No.</s>"),
        ({"prompt": TURNS[:1], "completion": "Yes.", "messages": None}, "all", "Yes.</s>"),
        ({"text": "a Yes. b No.", "spans": [[2, 6], [8, 12]]}, "all", "Yes. No."),
        ({"text": "a Yes. b No.", "spans": [[2, 6], [8, 12]]}, "last", " No."),
    ],
)
def test_which_answers_are_learned(row, loss_on, text):
    made = tokenise(row, TOKENIZER, None, loss_on=loss_on)
    labels = made["labels"]
    assert all(label in (IGNORED, token) for label, token in zip(labels, made["input_ids"], strict=True))
    assert TOKENIZER.decode([label for label in labels if label != IGNORED]) == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TURNS[:3]}, "Row 4: a conversation must end in a user turn and the assistant's answer"),
        ({"prompt": TURNS[:1], "completion": TURNS[2:3]}, "must end in a user turn and the assistant's"),
        ({"messages": "Fold?"}, "must be a list of"),
        ({"messages": [*TURNS[:3], {"role": "assistant", "content": None}]}, "missing"),
    ],
)
def test_conversations_that_cannot_be_used(row, message):
    with pytest.raises(DataError, match=message):
        tokenise(row, TOKENIZER, None, 4)


def test_rows_without_a_tokenizer_have_one_length():
    rows = [tokenise({"input_ids": list(range(n))}, None, None) for n in (3, 3, 5)]
    assert equal_lengths(rows[:2])["input_ids"].shape == (2, 3)
    with pytest.raises(DataError, match=r"different lengths \(3 to 5 tokens\), and no tokenizer"):
        equal_lengths(rows)


def test_rows_of_ids_are_kept_and_all_is_cut_at_max_length():
    row = tokenise({"input_ids": [5, 6, 7, 8], "labels": [IGNORED, 6, 7, 8]}, None, 3)
    assert row == {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [IGNORED, 6, 7]}
    assert tokenise({"input_ids": [5, 6]}, None, None)["labels"] == [5, 6]


def test_a_completion_of_which_nothing_is_left_is_refused():
    row = {"prompt": "How do I fold?\n", "completion": "Crease it.</s>"}
    length = len(ids(row["prompt"]))
    with pytest.raises(
        DataError, match=f"Row 3: no token of the completion is left within max_length={length}"
    ):
        tokenise(row, TOKENIZER, length, 3)
    assert [t for t in tokenise(row, TOKENIZER, length + 1)["labels"] if t != IGNORED] == ids("Crease it.")[
        :1
    ]
    with pytest.raises(DataError, match="Row 0 has the columns question"):
        tokenise({"question": "?"}, TOKENIZER, None)


def test_batches_are_padded_on_the_right():
    rows = [tokenise({"input_ids": list(range(5, 5 + n))}, None, None) for n in (2, 4)]
    batch = collator(TOKENIZER)(rows)
    pad = TOKENIZER.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, pad, pad], [5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[5, 6, IGNORED, IGNORED], [5, 6, 7, 8]]
    assert all(torch.is_tensor(value) for value in batch.values())
