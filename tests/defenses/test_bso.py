"""BSO: its reduction to SFT, and the losses that it logs."""

from __future__ import annotations

import pytest

import trainers


@pytest.mark.parametrize("length", [{"max_steps": 12}, {"max_steps": -1, "num_train_epochs": 2}])
def test_bso_without_alignment_steps_is_sft(tmp_path, length):
    bso = trainers.trainer("bso", tmp_path, alignment_steps=0, finetune_steps=1, **length)
    sft = trainers.trainer("sft", tmp_path, **length)
    bso.train(), sft.train()
    assert bso.state.global_step == sft.state.global_step == 12
    assert trainers.same(trainers.weights(bso), trainers.weights(sft))


def test_bso_differs_from_sft(tmp_path):
    bso = trainers.trainer("bso", tmp_path, alignment_steps=2, finetune_steps=3)
    sft = trainers.trainer("sft", tmp_path)
    bso.train(), sft.train()
    assert not trainers.same(trainers.weights(bso), trainers.weights(sft))


def test_the_drift_grows_within_a_phase_and_restarts_at_a_switch(tmp_path):
    made = trainers.trainer("bso", tmp_path, alignment_steps=2, finetune_steps=4)
    made.train()
    drift = [entry["drift"] for entry in made.state.log_history if "drift" in entry]
    assert len(drift) == 12
    assert 0 < drift[2] < drift[3] < drift[5]
    assert drift[6] < drift[5]


def test_the_true_alignment_loss_is_logged_whatever_the_user_answers(tmp_path):
    """The reference implementations log a loss 60 times too large if user answers have one word."""
    short = trainers.trainer("bso", tmp_path, alignment_steps=1, finetune_steps=1, max_steps=2)
    long = trainers.trainer(
        "bso", tmp_path, alignment_steps=1, finetune_steps=1, max_steps=2,
        rows=trainers.pairs(trainers.tiny.user_rows(24), long_answers=True),
    )  # fmt: skip
    short.train(), long.train()
    first = [made.state.log_history[0]["alignment_loss"] for made in (short, long)]
    assert first[0] == first[1]
    assert 4 < first[0] < 8, "close to the log of the vocabulary for a random model"


def test_without_max_length_no_row_is_cut(tmp_path):
    long = [{"prompt": "How do I fold? " * 40, "completion": "First crease." + "</s>"}] * 4
    made = trainers.trainer("bso", tmp_path, rows=long, alignment=long, max_length=None)
    assert {len(row["input_ids"]) for row in made.train_dataset} == {
        len(made.alignment_dataset[0]["input_ids"])
    }
    assert len(made.train_dataset[0]["input_ids"]) > 200


def test_an_anchor_is_taken_of_sharded_weights(tmp_path):
    """After an evaluation, FSDP2's outermost weights are unsharded; an anchor of them would not fit the shards."""
    made, seen = trainers.trainer("bso", tmp_path), []
    made.model.reshard = lambda: seen.append(made.anchor)
    made.keep_anchor()
    assert seen == [None]
    assert made.anchor
    made.keep_anchor()
    assert len(seen) == 1, "only at a switch point"
