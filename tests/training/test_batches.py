"""The batches of BSO and Lisa obey all options of Trainer's loader, and count epochs and steps like Trainer."""

from __future__ import annotations

import logging

import pytest
from accelerate import skip_first_batches

import trainers
from holdfast import registry
from holdfast.defenses.bso import PhaseBatchSampler
from holdfast.errors import DataError, InputError

LENGTHS = [{"prompt": "x" * (1 + i * 37 % 50), "completion": "yes</s>"} for i in range(22)]
"""As many rows as do not fill their last batch of 4, with prompts of different lengths."""


def numbers(made, epochs=2):
    """The row numbers of each batch of the first epochs, by epoch."""
    loader = made.get_train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        getattr(loader.batch_sampler, "set_epoch", lambda epoch: None)(epoch)
        found.append([list(batch) for batch in loader.batch_sampler])
        assert len(found[-1]) == len(loader)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dataloader_drop_last": True},
        {"train_sampling_strategy": "sequential"},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2},
        {"data_seed": 3},
        {"accelerator_config": {"split_batches": True}},
    ],
    ids=str,
)
def test_user_batches_are_those_of_trainer(options, tmp_path):
    options = {**options, "rows": LENGTHS, "max_steps": -1}
    expected = numbers(trainers.trainer("sft", tmp_path, **options))
    assert numbers(trainers.trainer("bso", tmp_path, alignment_steps=0, **options)) == expected
    mixed = numbers(trainers.trainer("bso", tmp_path, alignment_steps=1, finetune_steps=1, **options))
    for epoch, batches in enumerate(expected):
        users = [batch if max(batch) < len(LENGTHS) else None for batch in mixed[epoch]]
        assert None in users
        assert all(here in (None, batch) for here, batch in zip(users, batches, strict=True))


def test_alignment_batches_obey_the_loaders_options(tmp_path):
    def drawn(**options):
        return numbers(trainers.trainer("bso", tmp_path, alignment_steps=1, finetune_steps=0, **options), 3)

    batches = [[i - 24 for i in batch] for epoch in drawn(alignment=LENGTHS) for batch in epoch]
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 2] * 3
    epochs = [[i for batch in batches[at : at + 6] for i in batch] for at in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    dropped = drawn(alignment=LENGTHS, dataloader_drop_last=True)
    assert {len(batch) for epoch in dropped for batch in epoch} == {4}
    in_order = drawn(alignment=LENGTHS[:4], train_sampling_strategy="sequential")
    assert {tuple(batch) for epoch in in_order for batch in epoch} == {(24, 25, 26, 27)}
    alike = drawn(alignment=LENGTHS * 8, train_sampling_strategy="group_by_length")
    lengths = [[len(LENGTHS[(i - 24) % 22]["prompt"]) for i in batch] for epoch in alike for batch in epoch]
    assert sum(max(batch) - min(batch) for batch in lengths) / len(lengths) < 10


def test_alignment_rows_that_do_not_fill_a_batch_are_not_repeated(tmp_path):
    few = {"alignment": trainers.ALIGNMENT[:3], "alignment_steps": 1, "finetune_steps": 0}
    for batch in numbers(trainers.trainer("bso", tmp_path, **few))[0]:
        assert sorted(batch) == [24, 25, 26]
    with pytest.raises(DataError, match=r"3 rows do not fill one batch of 4.*dataloader_drop_last"):
        trainers.trainer("bso", tmp_path, dataloader_drop_last=True, **few)


def test_rows_that_do_not_give_a_batch_are_refused(tmp_path):
    made = trainers.trainer("sft", tmp_path, rows=trainers.USER[:3], dataloader_drop_last=True)
    with pytest.raises(DataError, match="3 rows do not fill one batch of 4"):
        made.train()


def test_no_rows_are_refused(tmp_path):
    sft = registry.get_defense("sft")
    with pytest.raises(DataError, match="train_dataset has no rows"):
        sft.trainer(
            model=trainers.model(), args=sft.config(str(tmp_path), use_cpu=True), train_dataset=[],
            processing_class=trainers.TOKENIZER,
        )  # fmt: skip


@pytest.mark.parametrize(
    "option",
    ["dispatch_batches=True", "use_seedable_sampler=False", "even_batches=False", "ignore_data_skip=True"],
)
def test_loaders_whose_rows_are_not_known_by_step_are_refused(option, tmp_path):
    name, value = option.split("=")
    given = {name: value == "True"}
    with pytest.raises(InputError, match=f"BSOTrainer.*{option}"):
        trainers.trainer("bso", tmp_path, **given if name[0] == "i" else {"accelerator_config": given})


def test_epochs_and_steps_are_those_of_trainer(tmp_path):
    """22 rows in batches of 4, the last of which is dropped: 5 steps an epoch."""
    options = {
        "rows": LENGTHS, "dataloader_drop_last": True, "max_steps": -1, "num_train_epochs": 3,
        "logging_strategy": "epoch", "save_strategy": "epoch", "alignment_steps": 2, "finetune_steps": 2,
    }  # fmt: skip
    made = trainers.trainer("lisa", tmp_path, **options)
    made.train()
    assert (made.state.global_step, made.state.max_steps, made.state.epoch) == (15, 15, 3.0)
    logged = [(entry["step"], entry["epoch"]) for entry in made.state.log_history if "loss" in entry]
    assert logged == [(5, 1.0), (10, 2.0), (15, 3.0)]
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-10", "checkpoint-15"}
    assert made.args.max_steps == -1, "the caller's arguments can be used again on other rows"


def test_the_epoch_reaches_the_phases_after_a_resume_in_older_versions_of_trainer(tmp_path):
    """Those call `set_epoch` of the loader only, around which a resume puts a sampler that skips batches."""
    made = trainers.trainer("bso", tmp_path, alignment_steps=1, finetune_steps=2)
    loader = skip_first_batches(made.get_train_dataloader(), 1)
    loader.set_epoch(2)
    inner = loader.batch_sampler
    while not isinstance(inner, PhaseBatchSampler):
        inner = inner.batch_sampler
    assert inner.epoch == 2


@pytest.mark.parametrize("accumulation", [1, 3])
def test_resume_in_a_later_epoch_of_rows_grouped_by_length(accumulation, tmp_path):
    """The order of transformers' own sampler depends on torch's global generator, and is lost in a resume."""
    options = {
        "rows": LENGTHS, "train_sampling_strategy": "group_by_length", "save_strategy": "steps", "save_steps": 9,
        "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation,
    }  # fmt: skip
    for name in ("sft", "bso"):
        whole = trainers.trainer(name, tmp_path / name, net=trainers.model(dropout=0.2), **options)
        whole.train()
        resumed = trainers.trainer(name, tmp_path / name, net=trainers.model(dropout=0.2), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-9"))
        assert trainers.same(trainers.weights(whole), trainers.weights(resumed)), name


@pytest.mark.parametrize(
    ("name", "phases", "steps", "words"),
    [
        ("lisa", {"alignment_steps": 200, "finetune_steps": 900}, 60,
         ["60 optimizer steps", "alignment phase takes 200", "alignment_steps=1", "finetune_steps=4"]),
        ("bso", {"alignment_steps": 12, "finetune_steps": 4}, 12, ["alignment_steps=1", "finetune_steps=1"]),
        ("bso", {"alignment_steps": 0, "finetune_steps": 4}, 12, []),
        ("bso", {"alignment_steps": 12, "finetune_steps": 0}, 12, []),
        ("bso", {"alignment_steps": 3, "finetune_steps": 30}, 12, []),
    ],
)  # fmt: skip
def test_a_run_without_a_user_step_is_refused(name, phases, steps, words, tmp_path, caplog):
    if not words:
        with caplog.at_level(logging.WARNING):
            trainers.trainer(name, tmp_path, max_steps=steps, **phases)
        assert not caplog.records
        return
    with pytest.raises(InputError) as caught:
        trainers.trainer(name, tmp_path, max_steps=steps, **phases)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("steps", "used"), [(60, (1, 9)), (100, (1, 9)), (2, (1, 9)), (101, (100, 900))])
def test_the_papers_phases_are_scaled_to_a_short_run(steps, used, tmp_path, caplog):
    """The line that says so comes before the training, and the facts of the training hold both values."""
    with caplog.at_level(logging.WARNING):
        made = trainers.trainer("lisa", tmp_path, max_steps=steps, alignment_steps=100, finetune_steps=900)
    assert (made.phases.alignment_steps, made.phases.finetune_steps) == used
    short = steps <= 100
    adjusted = {"alignment_steps": [100, 1], "finetune_steps": [900, 9]}
    assert made.reported(steps)["adjusted"] == (adjusted if short else None)
    assert ("100 alignment and 900 user steps are scaled to 1 and 9" in caplog.text) == short
    assert (made.args.alignment_steps, made.args.finetune_steps) == (100, 900)
    with pytest.raises(InputError, match="no user row"):
        trainers.trainer("bso", tmp_path, max_steps=1, alignment_steps=100, finetune_steps=900)


def test_a_run_with_few_user_steps_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainers.trainer("bso", tmp_path, alignment_steps=11, finetune_steps=99)
    assert "only 1 of the run's 12 optimizer steps" in caplog.text
