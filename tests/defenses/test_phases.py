"""The phase schedule and the sampler, which are functions of the step."""

from __future__ import annotations

import pytest

from holdfast.defenses.bso import BSOConfig, PhaseBatchSampler, Phases


class Epochs:
    """Batches that say where they are from: [source, place in its sequence]; `size` of them make an epoch."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return self.size

    def __getitem__(self, place):
        return [self.source, place]


def batches(k1, k2, user=6, accumulation=1, epochs=2, **options):
    """The batches of all epochs, as text such as "a0" and "u3"."""
    made = PhaseBatchSampler(
        Epochs("u", user), Epochs("a", 4), accumulation=accumulation, phases=Phases(k1, k2), **options
    )
    found = []
    for epoch in range(epochs):
        made.set_epoch(epoch)
        found += ["".join(map(str, batch)) for batch in made]
        assert len(made) == user
    return found


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


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"k1": 2, "k2": 3}, "a0 a1 u2 u3 u4 a2 a3 u7 u8 u9 a4 a5"),
        ({"k1": 2, "k2": 3, "skip_user_batches": False}, "a0 a1 u0 u1 u2 a2 a3 u3 u4 u5 a4 a5"),
        ({"k1": 0, "k2": 1}, "u0 u1 u2 u3 u4 u5 u6 u7 u8 u9 u10 u11"),
        ({"k1": 1, "k2": 0}, "a0 a1 a2 a3 a4 a5 a6 a7 a8 a9 a10 a11"),
        ({"k1": 1, "k2": 2, "accumulation": 2}, "a0 a1 u2 u3 u4 u5 a2 a3 u8 u9 u10 u11"),
        # Steps of two batches, and one of one batch at the end of each epoch.
        ({"k1": 1, "k2": 1, "accumulation": 2, "user": 5}, "a0 a1 u2 u3 a2 u5 u6 a3 a4 u9"),
        (
            {"k1": 1, "k2": 1, "accumulation": 2, "user": 5, "skip_user_batches": False},
            "a0 a1 u0 u1 a2 u2 u3 a3 a4 u4",
        ),
    ],
)
def test_the_batches_of_two_epochs(setting, expected):
    """A step is in one state, alignment batches go on where they ended, the end of an epoch is Trainer's."""
    assert batches(**setting) == expected.split()


@pytest.mark.parametrize("wrong", [{"alignment_steps": -1}, {"alignment_steps": 0, "finetune_steps": 0}])
def test_impossible_steps_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="steps"):
        BSOConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)
