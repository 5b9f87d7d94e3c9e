"""Charts over the keys of a grid, and bars by category."""

from __future__ import annotations

import re

from holdfast.reporting.categories import categories
from holdfast.reporting.collect import collect
from holdfast.reporting.grid_charts import grid_charts
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
    [chart] = grid_charts(data.rows)
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
    assert grid_charts(collect([write_run(tmp_path / "a", demo_rows()["SFT"], steps=False)]).rows) == []


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
