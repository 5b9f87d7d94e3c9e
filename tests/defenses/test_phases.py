"""The phase schedule and the sampler, which are functions of the step."""

from __future__ import annotations

import pytest

from holdfast.defenses.bso import BSOConfig, PhaseBatchSampler, Phases


def sampler(**changes):
    settings = {
        "user_rows": 10, "alignment_rows": 7, "batch_size": 2, "micro_batches": 1, "steps": 12,
        "phases": Phases(2, 3), "seed": 5,
    } | changes  # fmt: skip
    users, alignment = settings.pop("user_rows"), settings.pop("alignment_rows")
    return PhaseBatchSampler(users, alignment, **settings)


def test_starts_in_alignment_and_alternates():
    phases = Phases(2, 3)
    assert [phases.state(s)[0] for s in range(11)] == list("aauuuaauuua")
    assert phases.switch_points(11) == [0, 2, 5, 7, 10]
    assert [phases.start(s) for s in range(6)] == [0, 0, 2, 2, 2, 5]
    assert [phases.alignment_before(s) for s in range(8)] == [0, 1, 2, 2, 2, 2, 3, 4]


@pytest.mark.parametrize(("k1", "k2", "state"), [(0, 4, "user"), (4, 0, "alignment")])
def test_one_state_has_one_switch_point(k1, k2, state):
    phases = Phases(k1, k2)
    assert {phases.state(s) for s in range(9)} == {state}
    assert phases.switch_points(9) == [0]


def test_each_batch_comes_from_its_state():
    batches = list(sampler())
    assert len(batches) == 12
    for step, batch in enumerate(batches):
        aligned = Phases(2, 3).state(step) == "alignment"
        assert len(batch) == 2
        assert all((index >= 10) == aligned for index in batch)


def test_states_never_switch_inside_an_accumulation_window():
    batches = list(sampler(micro_batches=3))
    assert len(batches) == 36
    for step in range(12):
        window = batches[3 * step : 3 * step + 3]
        assert len({index >= 10 for batch in window for index in batch}) == 1


def test_user_batches_of_alignment_steps_are_skipped_or_kept():
    plain = list(sampler(phases=Phases(0, 1)))
    skipping = list(sampler())
    keeping = list(sampler(skip_user_batches=False))
    user_steps = [s for s in range(12) if Phases(2, 3).state(s) == "user"]
    assert [skipping[s] for s in user_steps] == [plain[s] for s in user_steps]
    assert [keeping[s] for s in user_steps] == plain[: len(user_steps)]


def test_an_epoch_holds_every_row_once_and_the_next_is_another_order():
    batches = list(sampler(phases=Phases(0, 1), steps=10))
    first, second = ([i for b in part for i in b] for part in (batches[:5], batches[5:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_alignment_rows_go_on_where_the_last_phase_ended():
    batches = list(sampler(alignment_rows=8, steps=10, phases=Phases(2, 3)))
    drawn = [i for s in (0, 1, 5, 6) for i in batches[s]]
    assert sorted(drawn) == list(range(10, 18))


@pytest.mark.parametrize("wrong", [{"alignment_steps": -1}, {"alignment_steps": 0, "finetune_steps": 0}])
def test_impossible_steps_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="steps"):
        BSOConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)
