"""Several alignment methods in one report: their labels, their costs, and the drawn layers."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from holdfast.reporting.collect import collect
from holdfast.reporting.layer_charts import drawn_steps, layer_table, layers_svg
from holdfast.reporting.page import render
from holdfast.reporting.table import result_table
from holdfast.reporting.training import Layers
from synthetic_runs import score_row, write_run

LABELS = {"labels": {"sft": "SFT", "vaccine": "Vaccine", "tvaccine": "T-Vaccine"}}


def runs(folder):
    return [
        write_run(
            folder / name,
            [
                score_row("aligned", name, None, 2.0, 30.0, **LABELS),
                score_row(f"attack on {name}", name, "sft", hs, 95.0, **LABELS),
            ],
            store="../steps",
        )
        for name, hs in (("sft", 80.0), ("vaccine", 60.0), ("tvaccine", 40.0))
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return collect(runs(tmp_path_factory.mktemp("alignments")))


def layers_of(data):
    return next(curves for curves in data.curves if curves.layers is not None)


def test_models_of_one_name_are_told_apart_by_what_aligned_them(data):
    assert [row.label for row in data.rows][:3] == ["aligned, SFT", "aligned, Vaccine", "aligned, T-Vaccine"]
    assert "T-Vaccine (attack on tvaccine) lowers it to 40.0" in data.finding


def test_the_cost_of_each_alignment_stands_beside_the_scores(data, tmp_path):
    columns = {column.title: column.cells for column in result_table(data).columns}
    assert [cell.text for cell in columns["Alignment time"]] == ["13.0 s", "17.0 s", "18.0 s"] * 2
    assert columns["Alignment memory"][5].text == "1.02 GiB"
    one = collect(runs(tmp_path)[:1])
    assert "Alignment time" not in {column.title for column in result_table(one).columns}
    none = write_run(tmp_path / "none", [score_row("NA-SFT", None, "sft", 99.0, 95.0)])
    cells = {c.title: c.cells for c in result_table(collect([*runs(tmp_path), none])).columns}
    assert cells["Alignment time"][-1].details == ("not aligned",)


def test_only_the_stage_that_draws_has_a_chart_of_layers(data):
    page = render(data)
    assert page.count("Layers drawn: T-Vaccine, seed 42") == 2  # the heading, and the name of its table
    assert page.count("Layers drawn: ") == 2 + 1  # the legend
    assert "probabilities computed 4 times, 20 draws" in page
    assert page.count("of steps</td>") == 4


def test_a_stage_that_draws_layers_is_shown_however_many_others_are(tmp_path):
    many = [score_row(f"user {i}", "tvaccine", "sft", 40.0, 95.0, **LABELS) for i in range(14)]
    data = collect([write_run(tmp_path / "many", many)])
    assert (len(data.curves), data.curves_left_out) == (12 + 1, 2)
    assert layers_of(data).stage == "alignment"


def test_shares_of_the_steps_are_those_of_the_history():
    layers = Layers(
        3, ((0, (0.5, 0.25, 0.25)), (50, (0.2, 0.2, 0.6))), ((0, (0, 1)), (30, (1, 2)), (60, (1,)))
    )
    assert drawn_steps(layers, 100) == [30, 100, 30]
    assert layer_table(layers, 100) == [
        ("0", "0.500", "0.200", "30 %"),
        ("1", "0.250", "0.200", "100 %"),
        ("2", "0.250", "0.600", "30 %"),
    ]
    assert drawn_steps(layers, 60) == [30, 60, 30], "a draw at the end of the training has no effect"


def test_the_chart_draws_each_layer_where_it_was_drawn(data):
    """The strokes of the draws, read from the SVG: consecutive draws of a layer form one stroke."""
    layers = Layers(3, ((0, (0.5, 0.25, 0.25)),), ((0, (0, 1)), (50, (1,))))
    svg = layers_svg(replace(layers_of(data), layers=layers, max_steps=100), 1)
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--ink\); stroke-width: 3', svg)[:1]
    strokes = [tuple(map(float, s.split())) for s in re.findall(r"[ML] ([\d.]+ [\d.]+)", path)]
    (a, b), (c, d) = [(strokes[i], strokes[i + 1]) for i in (0, 2)]
    assert (b[0] - a[0]) * 2 == pytest.approx(d[0] - c[0])
    assert a[1] > c[1], "layer 0 is at the bottom"


def test_the_chart_follows_the_theme_and_says_what_it_shows(data):
    svg = layers_svg(layers_of(data), 7)
    assert re.search(r"#[0-9a-fA-F]{6}\b", svg) is None
    assert "var(--mark)" in svg
    assert not re.search(r"<image|<script|http", svg)
    assert all(id.startswith("layers-7-") for id in re.findall(r'\bid="([^"]+)"', svg))
    assert "4 layers, probabilities computed 4 times, 20 draws. Drawn for most steps: 1 (75 %)" in svg


def test_many_layers_and_draws_stay_small(data):
    many = Layers(
        80,
        tuple((step, tuple([1 / 80] * 80)) for step in range(0, 8000, 200)),
        tuple((step, (step % 79, step % 79 + 1)) for step in range(0, 8000, 20)),
    )
    assert len(layers_svg(replace(layers_of(data), layers=many, max_steps=8000), 1)) < 300_000


@pytest.mark.parametrize(
    "history",
    [
        None, [], {"layers": 0}, {"layers": "four"}, {"layers": 4}, {"layers": 4, "probabilities": 3, "draws": "x"},
        {"layers": 4, "probabilities": [[0, [0.5, 0.5]], [0, [2, 0, 0, 0]], ["a", [1]], [5]], "draws": [[0, [4]]]},
        {"layers": 1e9, "probabilities": [[0, [1.0]]]}, {"layers": 2, "draws": [[0, [float("nan")]], [0, [0.5]]]},
    ],
)  # fmt: skip
def test_a_history_that_makes_no_sense_is_not_drawn(history, tmp_path):
    folder = runs(tmp_path)[2]
    row = json.loads((folder / "results.json").read_text())["rows"][0]
    path = tmp_path / "steps" / row["steps"]["alignment"] / "step.json"
    path.write_text(json.dumps({"training": {"layer_history": history}}))
    data = collect([folder])
    assert all(curves.layers is None for curves in data.curves)
    assert "Layers drawn" not in render(data)


@pytest.mark.parametrize("values", [(0.0, 0.0), (1.0, 0.0)])
def test_one_sided_probabilities_are_drawn(data, values):
    layers = Layers(2, ((0, values),), ())
    assert "var(--ink)" in layers_svg(replace(layers_of(data), layers=layers, max_steps=10), 1)
    draws = Layers(2, (), ((0, (1,)),))
    assert layer_table(draws, 10)[1] == ("1", "–", "–", "100 %")
    assert layers_svg(replace(layers_of(data), layers=draws, max_steps=10), 1)
