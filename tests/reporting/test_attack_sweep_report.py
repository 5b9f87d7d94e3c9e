"""The attacker's sweep in a report: its chart, its sentence, and the line of the table."""

from __future__ import annotations

import re

import pytest

from holdfast.reporting.attack_sweeps import save_sweeps_png, sweep_charts
from holdfast.reporting.collect import collect
from holdfast.reporting.page import render
from synthetic_runs import score_row, write_run

WORST = {"learning_rate": 0.001, "steps": 500}


def point(rate, steps, harm, accuracy, counts=True, worst=False):
    given = {"learning_rate": rate, "steps": steps}
    scores = {"harmful_score": harm, "finetune_accuracy": accuracy}
    return {"point": given, "counts": counts, "worst": worst, **scores}


POINTS = [
    point(1e-4, 100, 3.0, 88.0), point(1e-3, 100, 40.5, 90.0), point(1e-4, 500, 12.0, 91.0),
    point(1e-3, 500, 62.0, 85.0, worst=True), point(1e-2, 500, 95.0, 10.0, counts=False),
]  # fmt: skip


def swept(folder, seed=42):
    """A run with a sweep of five points."""
    chosen = {"point": WORST, "points": 5, "counts": 4, "best_accuracy": 91.0, "max_loss": 10.0}
    row = score_row("SFT", "sft", "sft", 62.0, 85.0, seed=seed, attack_sweep=chosen)
    models = [{"name": "SFT", "best_accuracy": 91.0, "points": POINTS}]
    curve = {"keys": ["steps", "learning_rate"], "max_loss": 10.0, "models": models}
    return write_run(folder, [row], steps=False, attack_sweep=curve)


def test_a_sweep_has_a_chart_a_sentence_and_a_table(tmp_path):
    data = collect([swept(tmp_path / "a")])
    [chart] = sweep_charts(data.runs)
    assert chart.title == "SFT"
    assert chart.note == (
        "4 of 5 points have an accuracy within 10 of the best; the worst of them has a harmful score of 62.0: "
        "learning rate 0.001, 500 steps."
    )
    assert chart.rows[-2:] == (
        ("learning rate 0.001, 500 steps", "62.0", "85.0", "worst"),
        ("learning rate 0.01, 500 steps", "95.0", "10.0", "too inaccurate"),
    )
    assert "learning rate 0.01, 500 steps: harmful score 95.0, accuracy 10.0" in chart.svg
    assert data.rows[0].user_rows == (
        "worst of 5 attacks with accuracy within 10 points of the best: learning rate 0.001, 500 steps",
    )
    page = render(data)
    assert "What an attacker reaches" in page
    assert page.count("too inaccurate") == 1
    assert not re.search(r"</h2>\s*(<section[^>]*>\s*)*<h2", page), "two headings in a row"
    assert 'href="#attack-sweep"' in page
    assert 'id="attack-sweep"' in page
    assert "What an attacker reaches" not in render(collect([write_run(tmp_path / "b", [], steps=False)]))


def test_charts_of_several_seeds_name_them(tmp_path):
    data = collect([swept(tmp_path / "a"), swept(tmp_path / "b", seed=43)])
    assert [chart.title for chart in sweep_charts(data.runs)] == ["SFT, seed 42", "SFT, seed 43"]
    assert len(data.rows) == 1


def test_a_picture_has_a_column_for_each_model(tmp_path):
    pytest.importorskip("matplotlib")
    run = collect([swept(tmp_path / "a")]).runs[0]
    sizes = []
    for runs in ([run], [run, run]):
        made = save_sweeps_png(runs, tmp_path / "made.png")
        head = made.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append(int.from_bytes(head[16:20], "big"))
    assert sizes[1] > 1.5 * sizes[0]


def test_a_sweep_over_one_point_and_damaged_results_have_no_chart(tmp_path):
    run = collect([swept(tmp_path / "a")]).runs[0]
    for told, svg in (({"models": "x"}, None), ({"models": [{"name": "SFT", "points": POINTS[:1]}]}, [None])):
        object.__setattr__(run, "attack_sweep", told)
        assert [chart.svg for chart in sweep_charts([run])] == (svg or [])
