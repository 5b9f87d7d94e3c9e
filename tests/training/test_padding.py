"""Tokenizers whose pad token is missing, or beyond the model's embeddings, and processors that hold one."""

from __future__ import annotations

import types

import pytest

import tiny
import trainers
from holdfast import registry
from holdfast.chat.tokenizers import padding_id, text_tokenizer


@pytest.mark.parametrize(
    ("pad", "end", "rows", "expected"),
    [
        (0, 2, 400, 0),
        (None, 2, 400, 2),
        (400, 2, 400, 2),
        (400, 2, None, 400),
        (400, 401, 400, 0),
        (None, None, 9, 0),
    ],
)
def test_the_id_to_pad_with_is_one_of_the_model(pad, end, rows, expected):
    tokenizer = types.SimpleNamespace(pad_token_id=pad, eos_token_id=end)
    assert padding_id(tokenizer, rows) == expected


@pytest.mark.parametrize("kind", ["none", "beyond", "processor"])
def test_padding_changes_no_weight(kind, tmp_path):
    """Rows of different lengths, beside a tokenizer with a pad token of its own."""
    tokenizer = tiny.tokenizer()
    if kind == "beyond":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id == len(tokenizer) - 1 == 400
    else:
        tokenizer.pad_token = None
    processing = types.SimpleNamespace(tokenizer=tokenizer) if kind == "processor" else tokenizer
    assert text_tokenizer(processing) is tokenizer

    def trained(with_what):
        sft = registry.get_defense("sft")
        config = sft.config(str(tmp_path), use_cpu=True, report_to="none", max_steps=2, save_strategy="no")
        made = sft.trainer(
            model=trainers.model(), args=config, train_dataset=trainers.USER, processing_class=with_what
        )
        made.train()
        return trainers.weights(made)

    assert trainers.same(trained(processing), trained(trainers.TOKENIZER))
    assert tokenizer.pad_token_id == 2
