"""Rows by method and grid keys: which keys vary, means over seeds by Student's t, and the lines of a chart."""

from __future__ import annotations

import math
import statistics

import pytest

from holdfast.evaluation.paired import student_quantile
from holdfast.reporting.collect import collect
from holdfast.reporting.grouped import grouped, key_text, mean, value_text
from synthetic_runs import score_row, write_run


@pytest.mark.parametrize(
    ("freedom", "level", "t"),
    [(1, 0.95, 12.7062), (2, 0.95, 4.302653), (4, 0.95, 2.776445), (10, 0.95, 2.228139), (2, 0.99, 9.924843),
     (1e7, 0.95, 1.959964)],
)  # fmt: skip
def test_student_quantile(freedom, level, t):
    """Against a table of quantiles."""
    assert student_quantile(freedom, level) == pytest.approx(t, abs=1e-4)


def test_mean_over_seeds():
    found = mean([40.0, 43.0, 49.0])
    error = statistics.stdev([40.0, 43.0, 49.0]) / math.sqrt(3)
    assert (found.value, found.seeds) == (44.0, 3)
    assert found.stderr == pytest.approx(error)
    assert found.interval == pytest.approx((44 - 4.302653 * error, 44 + 4.302653 * error), abs=1e-4)


def recipe(user, ratio, alignment="sft", **settings):
    return {
        "model": {"path": "world"},
        "alignment": {"defense": alignment, "training": {"learning_rate": 1e-3 if alignment == "sft" else 2e-3}},
        "user": {"defense": user, **settings},
        "data": {"task": "world", "poison_ratio": ratio, "alignment": {"source": "world"}},
    }  # fmt: skip


def study(folder):
    """SFT and Lisa at two ratios, Lisa with two values of rho, over two seeds; the seed is in every name."""
    runs = []
    for seed in (1, 2):
        for ratio in (0.1, 0.05):
            for user, rho in (("sft", None), ("lisa", 1.0), ("lisa", 0.1)):
                value = 100 * ratio + 10 * (rho or 5) + seed
                name = f"{user}-{rho}-{ratio}-{seed}"
                rows = [
                    score_row("aligned", "sft", None, 5.0 + seed, 80.0, seed=seed),
                    score_row(name, "sft", user, value, 90.0, seed=seed, ratio=ratio),
                ]
                settings = {} if rho is None else {"rho": rho}
                made = recipe(user, ratio, **settings)
                runs.append(write_run(folder / name, rows, name=name, recipe=made, steps=False))
    return grouped(collect(runs).rows)


def test_groups_of_a_study(tmp_path):
    found = study(tmp_path)
    assert found.keys == ("data.poison_ratio", "user.rho")
    told = {(group.method, tuple(group.keys.values())): group for group in found.groups}
    assert set(told) == {("SFT", ()), ("SFT → SFT", (0.1,)), ("SFT → SFT", (0.05,))} | {
        ("SFT → Lisa", (ratio, rho)) for rho in (1.0, 0.1) for ratio in (0.1, 0.05)
    }
    lisa = told["SFT → Lisa", (0.05, 0.1)]
    assert lisa.keys == {"user.rho": 0.1, "data.poison_ratio": 0.05}
    assert (lisa.seeds, lisa.means["harmful_score"].by_seed) == ((1, 2), (7.0, 8.0))
    assert lisa.means["harmful_score"].interval == pytest.approx(
        (7.5 - 12.7062 / 2, 7.5 + 12.7062 / 2), abs=1e-3
    )
    assert lisa.means["harmful_score"].n == 400
    assert told["SFT", ()].seeds == (1, 2)
    assert "task_score" not in lisa.means
    assert "harmful_score" in found.metrics()


def test_lines_of_a_chart(tmp_path):
    found = study(tmp_path)
    lines = found.series("data.poison_ratio", "harmful_score")
    assert [(line.method, line.fixed) for line in lines] == [
        ("SFT → SFT", {}), ("SFT → Lisa", {"user.rho": 1.0}), ("SFT → Lisa", {"user.rho": 0.1}),
    ]  # fmt: skip
    assert [[(x, y.value) for x, y in line.points] for line in lines[1:]] == [
        [(0.05, 16.5), (0.1, 21.5)], [(0.05, 7.5), (0.1, 12.5)],
    ]  # fmt: skip
    assert [line.fixed for line in found.series("user.rho", "harmful_score")] == [
        {"data.poison_ratio": 0.1}, {"data.poison_ratio": 0.05},
    ]  # fmt: skip
    assert found.series("user.rho", "task_score") == ()


def test_a_setting_of_one_method_is_no_grid_key(tmp_path):
    rows = [score_row("a", "sft", "sft", 50.0, 90.0)], [score_row("b", "vaccine", "sft", 30.0, 90.0)]
    runs = [
        write_run(tmp_path / "a", rows[0], name="a", recipe=recipe("sft", 0.1), steps=False),
        write_run(tmp_path / "b", rows[1], name="b", recipe=recipe("sft", 0.1, "vaccine"), steps=False),
    ]
    found = grouped(collect(runs).rows)
    assert found.keys == ()
    assert [group.method for group in found.groups] == ["SFT → SFT", "Vaccine → SFT"]
    one = found.groups[0].means["harmful_score"]
    assert one.seeds == 1
    assert one.interval == pytest.approx(tuple(rows[0][0]["harmful_score_interval"])), (
        "Wilson, as the run wrote it"
    )


def test_the_same_seed_twice_stays_apart(tmp_path):
    runs = [
        write_run(tmp_path / name, [score_row(name, "sft", "sft", value, 90.0)], name=name, steps=False)
        for name, value in (("a", 50.0), ("b", 30.0))
    ]
    found = grouped(collect(runs).rows)
    assert [(group.name, group.means["harmful_score"].value) for group in found.groups] == [
        ("a", 50.0),
        ("b", 30.0),
    ]


def test_texts_of_keys():
    assert key_text("user.rho", ["user.rho", "data.size"]) == "rho"
    assert key_text("user.training.lr", ["user.training.lr", "alignment.training.lr"]) == "user.training.lr"
    assert [value_text(v) for v in (None, True, 0.1, 1e-5, "x", [1, 2])] == [
        "none", "yes", "0.1", "1e-05", "x", "[1, 2]",
    ]  # fmt: skip
