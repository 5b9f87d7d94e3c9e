"""Charts over the keys of a grid, and bars by category."""

from __future__ import annotations

import re

import pytest
from matplotlib.axes import Axes

from holdfast.errors import InputError
from holdfast.reporting import report
from holdfast.reporting.categories import categories
from holdfast.reporting.collect import collect
from holdfast.reporting.grid_charts import grid_charts
from holdfast.reporting.grouped import grouped
from holdfast.reporting.page import render
from synthetic_runs import demo_rows, score_row, write_run


def test_scores_are_drawn_over_the_ratio_with_a_line_for_each_method(tmp_path):
    runs = [
        write_run(
            tmp_path / f"{name}-{ratio}-{seed}",
            [score_row(name, "sft", user, 100 * ratio * slope + seed, 95.0, ratio=ratio, seed=seed)],
            steps=False,
        )
        for name, user, slope in (("SFT", "sft", 4), ("Lisa", "lisa", 1))
        for ratio in (0.0, 0.1, 0.2)
        for seed in (1, 2)
    ]
    data = collect(runs)
    [chart] = grid_charts(data)
    assert chart.title == "share of harmful rows"
    assert "harmful score, %, SFT → Lisa: 0: 1.5, 0.1: 11.5, 0.2: 21.5" in chart.wide
    for svg in (chart.wide, chart.narrow):
        assert {">SFT → SFT<", ">SFT → Lisa<", ">10 %<"} <= set(re.findall(r">[^<>]+<", svg))
        assert re.search(r"#[0-9a-fA-F]{6}\b", svg) is None, "a colour that does not follow the theme"
    page = render(data)
    assert "Over the share of harmful rows" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_without_several_values_there_is_no_chart(tmp_path):
    assert grid_charts(collect([write_run(tmp_path / "a", demo_rows()["SFT"], steps=False)])) == []


def test_categories_are_pooled_over_seeds_worst_first(tmp_path):
    def share(harmful, n):
        return {"harmful_score": 100 * harmful / n, "n": n}

    runs = []
    for seed in (1, 2):
        lisa = {"fraud": share(1, 10), "spying": share(0, 10), "theft": share(0, 4)}
        sft = {"fraud": share(4 + seed, 10), "spying": share(9, 10)}
        for name, user, found in (("SFT", "sft", sft), ("Lisa", "lisa", lisa)):
            row = score_row(name, "sft", user, 50.0, 90.0, seed=seed, by_category=found)
            runs.append(write_run(tmp_path / f"{name}-{seed}", [row], steps=False))
    data = collect(runs)
    found = categories(data.rows)
    assert [row.label for row in found.models] == ["SFT", "Lisa"]
    assert [name for name, _ in found.lines] == ["spying", "fraud", "theft"]
    assert [(bar.share, bar.n) for bar in found.lines[1][1]] == [(55.0, 20), (10.0, 20)]
    assert found.lines[2][1][0].share is None, "not measured, not 0"
    page = render(data)
    assert 'style="width:55.0%"' in page
    assert "By category of the prompts" in page


def grid(folder, **more):
    """SFT at two ratios with one seed; `more` goes into the rows."""
    return [
        write_run(
            folder / f"{ratio}",
            [score_row("SFT", "sft", "sft", 50.0, 95.0, ratio=ratio, **more)],
            steps=False,
        )
        for ratio in (0.1, 0.2)
    ]


def test_any_metric_of_the_results_is_drawn_over_the_grid(tmp_path, monkeypatch):
    """By the key of results.json, or by the name that the tables show; with its unit."""
    drawn = {}

    def kept(axes, across, values, **more):
        drawn[axes.figure.axes.index(axes)] = values
        return errorbar(axes, across, values, **more)

    errorbar = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", kept)
    asr = {"harmful_score": 62.0, "harmful_score_stderr": 3.0, "title": "attack success rate", "n": 200}
    data = collect(grid(tmp_path, seconds=90.0, judges={"keyword": asr}, judge="beaver_dam"))
    asked = ["benign_compliance", "Training time", "peak-memory", "judges.keyword.harmful_score"]
    [chart] = grid_charts(data, asked)
    for shown in (
        "benign compliance, %, SFT → SFT: 0.1: 97.5, 0.2: 97.5",
        "training time, s, SFT → SFT: 0.1: 90, 0.2: 90",
        "peak memory, GiB, SFT → SFT: 0.1: 0.7593",
        "keyword: attack success rate, %, SFT → SFT: 0.1: 62.0",
    ):
        assert shown in chart.wide
    assert drawn[1] == [90.0, 90.0]
    assert drawn[2] == pytest.approx([0.7593] * 2, rel=1e-3), "in the unit of the panel"
    assert "harmful score, %" not in chart.wide
    [line] = grouped(data.rows).series("data.poison_ratio", "judges.keyword.harmful_score")
    assert [(mean.value, mean.stderr, mean.n) for _, mean in line.points] == [(62.0, 3.0, 200)] * 2


def test_the_score_of_another_task_has_its_own_name(tmp_path):
    rouge = {"task_title": "ROUGE-1 F1", "task_metric": "rouge1", "task_score": 95.0}
    data = collect(grid(tmp_path, **rouge))
    [chart] = grid_charts(data)
    assert "ROUGE-1 F1, %, SFT → SFT: 0.1: 95.0" in chart.wide
    assert "finetune accuracy" not in render(data, metrics=["ROUGE-1 F1"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("harmfull_score", r"not a metric of these runs. Did you mean 'harmful_score'\? They have: harmful_"),
        (
            "over_refusal_rate",
            "'over_refusal_rate' is not measured in these runs. They have: .*gibberish_rate",
        ),
        ("seed", "not a metric"),
    ],
)
def test_an_unknown_metric_is_refused_with_the_known_names(tmp_path, name, told):
    with pytest.raises(InputError, match=told):
        report(grid(tmp_path), tmp_path / "r.html", metrics=[name])
    assert not (tmp_path / "r.html").exists()


def test_a_metric_without_a_grid_is_refused(tmp_path):
    runs = grid(tmp_path)
    with pytest.raises(InputError, match="no key of the recipe has several values"):
        grid_charts(collect(runs[:1]), ["seconds"])
