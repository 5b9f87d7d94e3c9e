"""Charts: labels that do not overlap, colours from the page, no external references."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from holdfast.errors import OutputError
from holdfast.reporting.charts import save_png, scores_svg
from holdfast.reporting.collect import collect
from holdfast.reporting.curve_charts import curves_svg, shared_limits
from holdfast.reporting.labels import Box, place
from synthetic_runs import score_row, write_demo, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return collect(write_demo(tmp_path_factory.mktemp("charts")))


@pytest.mark.parametrize(
    "points",
    [
        [(100.0, 100.0)] * 30,
        [(20.0 + 9 * index, 180.0) for index in range(30)],
        [(4.0, 4.0), (396.0, 296.0), (4.0, 296.0), (396.0, 4.0)],
    ],
    ids=["all on one point", "in a row", "in the corners"],
)
def test_labels_never_collide(points):
    inside = Box(0, 0, 400, 300)
    markers = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    placed = place(points, [(18.0, 12.0)] * len(points), markers, inside)
    assert None not in placed
    boxes = [item.box for item in placed]
    assert all(inside.holds(box) for box in boxes)
    assert not any(a.overlaps(b, gap=0) for a, b in combinations(boxes, 2))
    assert not any(box.overlaps(marker, gap=0) for box in boxes for marker in markers)


def test_a_label_without_room_is_left_out():
    assert place([(5.0, 5.0)], [(50.0, 50.0)], [], Box(0, 0, 10, 10)) == [None]


def test_svg_follows_the_theme_and_refers_to_nothing(data):
    svgs = [scores_svg(data), scores_svg(data, narrow=True)]
    svgs += [curves_svg(curves, index, {}) for index, curves in enumerate(data.curves)]
    for svg in svgs:
        assert re.search(r"#[0-9a-fA-F]{6}\b", svg) is None, "a colour that does not follow the theme"
        assert "var(--ink)" in svg
        assert not re.search(r"<script|<!DOCTYPE|<!ENTITY|<\?xml|<style|<image|http", svg)
        assert set(re.findall(r'href="(.)', svg)) <= {"#"}
        ids = set(re.findall(r'\bid="([^"]+)"', svg))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= ids
    ids = [id for svg in svgs for id in set(re.findall(r'\bid="([^"]+)"', svg))]
    assert len(ids) == len(set(ids)), "two charts of a page share an id"


def test_the_plot_names_its_points_in_words(data):
    svg = scores_svg(data)
    assert 'role="img"' in svg
    assert "6 Lisa: harmful score 20.5, finetune accuracy 95.8" in svg
    assert ">Lisa<" in svg
    assert "better: safe and accurate" in svg
    assert ">6<" in scores_svg(data, narrow=True)


@pytest.mark.parametrize("narrow", [False, True])
def test_every_point_of_a_crowd_has_a_label(tmp_path, narrow):
    rows = [score_row(f"method {i}", "sft", "lisa", i % 3 / 2, 97.0 - i % 2 / 2) for i in range(13)]
    svg = scores_svg(collect([write_run(tmp_path / "a", rows, steps=False)]), narrow=narrow)
    shown = re.findall(r">([^<>]+)</text>", svg)
    if narrow:
        assert {
            int(n) for text in shown if re.fullmatch(r"[\d, ]+", text) for n in text.split(",") if n
        } >= set(range(1, 14))
    else:
        assert {text for text in shown if text.startswith("method")} == {f"method {i}" for i in range(13)}


def test_rows_without_both_scores_are_not_drawn(tmp_path):
    rows = [score_row("a", "sft", "sft", None, 90.0), score_row("b", "sft", "lisa", 3.0, None)]
    assert scores_svg(collect([write_run(tmp_path / "a", rows, steps=False)])) is None


def test_names_are_text_not_markup_nor_mathematics(tmp_path):
    rows = [score_row("<b>$x_1$</b> \u202e \U0001f4a1", "sft", "sft", 50.0, 90.0)]
    svg = scores_svg(collect([write_run(tmp_path / "a", rows, steps=False)]))
    assert ">&lt;b&gt;$x_1$&lt;/b&gt;" in svg
    assert "<b>" not in svg
    assert "\u202e" not in svg


def test_curves_mark_states_and_keep_the_losses_apart(data):
    charts = {curves.label: curves_svg(curves, 1, {}) for curves in data.curves if curves.stage == "user"}
    assert "alignment rows" in charts["Lisa"]
    assert "user rows" in charts["Lisa"]
    assert charts["Lisa"].count("var(--band)") > 5
    assert "var(--band)" not in charts["SFT"]
    assert "drift" not in charts["SFT"]


def test_axes_are_shared_only_where_no_curve_is_flattened(data):
    users = [curves for curves in data.curves if curves.stage == "user"]
    assert shared_limits(users)["Loss"] == pytest.approx(
        1.05 * max(max(c.series["loss"][1]) for c in users), rel=0.2
    )
    spike = users[0].__class__(**{**users[0].__dict__, "series": {"loss": ([1.0], [1e6])}})
    assert "Loss" not in shared_limits([*users, spike])


@pytest.mark.parametrize("values", [[], [float("nan")] * 3, [1e14, 1e-14, 0.0], [-3.0, 2.0], [0.0, 0.0]])
def test_odd_logs_never_break_a_chart(data, values):
    curves = data.curves[0]
    odd = curves.__class__(
        **{
            **curves.__dict__,
            "series": {"loss": ([float(i) for i in range(len(values))], values)},
            "max_steps": 0,
        }
    )
    svg = curves_svg(odd, 1, shared_limits([odd]))
    assert (svg is None) == (not values or values[0] != values[0])


def test_png_shows_rows_and_is_a_png(data, tmp_path):
    path = save_png(data, tmp_path / "new" / "demo.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(path.read_bytes()) > 20_000
    assert [item.name for item in path.parent.iterdir()] == ["demo.png"]
    with pytest.raises(OutputError, match="Cannot write"):
        save_png(data, path / "below.png")
