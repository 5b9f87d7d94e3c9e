"""Render the report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from holdfast import __version__
from holdfast.reporting import record
from holdfast.reporting.ability import ability_table
from holdfast.reporting.agreement import agreement_table
from holdfast.reporting.attack_sweeps import sweep_charts
from holdfast.reporting.browser import blocks, browser
from holdfast.reporting.categories import categories
from holdfast.reporting.charts import plotted, scores_svg
from holdfast.reporting.collect import ReportData
from holdfast.reporting.costs import cost_tables
from holdfast.reporting.curve_charts import curves_svg, shared_limits
from holdfast.reporting.differences import differences_table
from holdfast.reporting.grid_charts import grid_charts
from holdfast.reporting.layer_charts import layer_table, layers_svg
from holdfast.reporting.measurements import harm_title, stages_text, sweeps
from holdfast.reporting.summary import summary_table
from holdfast.reporting.table import judge_table, result_table, task_title
from holdfast.reporting.tested import baselines, differences
from holdfast.reporting.text import clean, one_line, shorten, small
from holdfast.reporting.training import Curves

GENERATOR = f"Holdfast {__version__}"


@dataclass(frozen=True)
class CurveChart:
    """A chart of one training stage; `svg` is None if its log holds no numbers.

    `layers` is the table of a chart of drawn layers.
    """

    title: str
    note: str
    svg: Markup | None
    layers: tuple[tuple[str, ...], ...] = ()


def render(data: ReportData, notes: Sequence[str] = (), metrics: Sequence[str] = ()) -> str:
    """Return the page; `metrics` are drawn over the grid keys.

    All text passes `_shown` and Jinja's escaping; only our own SVG and script are not escaped.
    """
    grids = grid_charts(data, metrics)
    table = result_table(data)
    scores = [svg for narrow in (False, True) if (svg := scores_svg(data, narrow=narrow)) is not None]
    tested = () if data.differences else differences_table(data.rows)
    harm = {} if data.differences else differences(data.rows, baselines(data.rows), "harmful_score")
    read = browser(data.rows)
    context = {
        "title": _title(data),
        "data": data,
        "notes": notes,
        "table": table,
        "summary": summary_table(data, harm),
        "over_seeds": any(one.over_seeds for one in harm.values()),
        "judges": judge_table(data),
        "agreement": agreement_table(data.rows),
        "ability": ability_table(data.rows),
        "costs": cost_tables(data.rows),
        "paired": tested,
        "stages_text": stages_text,
        "scores": [Markup(svg) for svg in scores],
        "grids": [(chart.title, Markup(chart.wide), Markup(chart.narrow)) for chart in grids],
        "categories": categories(data.rows),
        "swept": list(dict.fromkeys(name for name, _ in sweeps(plotted(data.rows)))),
        "unplotted": [row.label for row in data.rows if row not in plotted(data.rows)],
        "attack_sweeps": sweep_charts(data.runs),
        "charts": _charts(data.curves),
        "browser": read,
        "blocks": list(blocks(read)),
        "shorten": shorten,
        "unbroken": lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%"),
        "one_line": one_line,
        "words": record.words,
        "stamp": record.stamp_facts(data.runs),
        "versions": record.version_facts(data.runs),
        "hardware": record.hardware_facts(data.runs),
        "run_facts": record.run_facts,
        "steps": record.step_lines(data.runs),
        "recipe": record.recipe_text(data.runs[0]),
        "recipe_changes": [(run, record.recipe_changes(data.runs[0], run)) for run in data.runs[1:]],
        "manifests": [(manifest, record.manifest_parts(manifest)) for manifest in data.manifests],
        "generator": GENERATOR,
    }
    return _environment().get_template("page.html.j2").render(context)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("holdfast", "reporting"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """Make control characters visible in every value that the template prints, before escaping."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value)


def _title(data: ReportData) -> str:
    """The name of a single run, else what the page compares."""
    if len(data.runs) == 1:
        return one_line(data.runs[0].name, 60)
    return (
        f"{harm_title(data.rows).capitalize()} and {small(task_title(data.rows))} of {len(data.rows)} models"
    )


def _charts(curves: Sequence[Curves]) -> list[CurveChart]:
    limits = {
        stage: shared_limits([one for one in curves if one.stage == stage]) for stage in ("user", "alignment")
    }
    charts = []
    for index, one in enumerate(curves, start=1):
        svg = curves_svg(one, index, limits[one.stage])
        stage = "User stage" if one.stage == "user" else "Alignment stage"
        seed = "" if one.seed is None else f", seed {one.seed}"
        charts.append(
            CurveChart(f"{stage}: {one.label}{seed}", _note(one), None if svg is None else Markup(svg))
        )
        layers = layers_svg(one, index)
        if one.layers is not None and layers is not None:
            table = tuple(layer_table(one.layers, one.max_steps))
            note = (
                f"probabilities computed {len(one.layers.probabilities)} times, {len(one.layers.draws)} draws"
            )
            charts.append(CurveChart(f"Layers drawn: {one.label}{seed}", note, Markup(layers), table))
    return charts


def _note(curves: Curves) -> str:
    notes = []
    states = curves.states()
    if states:
        notes.append(f"{len(states) - 1} switch points")
    if curves.not_finite:
        notes.append(f"{curves.not_finite} logged values are not finite and leave gaps")
    return "; ".join(notes)
