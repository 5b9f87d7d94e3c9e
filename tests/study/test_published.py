"""The published tables: their structure, single values against the papers, and the docs that quote them."""

from __future__ import annotations

import json
import re

import pytest

from holdfast import lab
from holdfast.errors import RecipeError
from holdfast.machine.store import Store
from holdfast.study import planning, published, tables
from holdfast.study.grid import Run, expand
from holdfast.world import MODEL
from places import ROOT

DOCS = ROOT / "docs" / "defenses"
HS, FA = "harmful_score", "finetune_accuracy"
TABLES = {name: published.table(name) for name in published.names()}


@pytest.mark.parametrize("of", TABLES.values(), ids=TABLES)
def test_structure(of):
    assert of.about.endswith("."), "the first line describes the table"
    assert of.numbers
    assert len(set(of.columns)) == len(of.columns)
    assert of.mean is None or of.mean in of.columns
    for row in of.numbers.values():
        for metric, values in row.items():
            known = published.METRICS[metric]
            least = 1 if known.unit.startswith("1 to") else 0
            assert list(values) == list(of.columns)
            assert all(v is None or least <= v <= known.most for v in values.values()), (
                of.name,
                metric,
                values,
            )
    assert not of.grid or {*of.grid["rows"]} == {*of.numbers}
    assert not of.grid or {*map(str, of.grid["columns"])} == {*of.columns} - {of.mean}


PRINTED_OTHERWISE = {("vaccine-1", "VLGuard"), ("asft-datasets", "BEA"), ("asft-ratios", "BEA")}


def test_the_mean_column_is_the_mean():
    """The papers' own averages, except those that the notes mark as printed otherwise."""
    for of in TABLES.values():
        for row, metrics in of.numbers.items():
            for metric, values in metrics.items():
                others = [value for column, value in values.items() if column != of.mean]
                if of.mean is None or None in [*others, values[of.mean]]:
                    continue
                off = abs(sum(others) / len(others) - values[of.mean])
                assert off < 0.06 or (of.name, row) in PRINTED_OTHERWISE, (of.name, row, metric, off)


@pytest.mark.parametrize(
    ("name", "row", "column", "metric", "value"),
    [
        ("lisa-1", "BSO", "p = 0.4", FA, 95.41), ("lisa-2", "BSO", "100/900", HS, 48.4),
        ("lisa-3", "Lisa", "p = 0.1", HS, 40.2), ("lisa-3", "EWC", "p = 0.2", FA, 8.72),
        ("lisa-4", "VLGuard", "n = 3000", FA, 94.94), ("lisa-5", "Lisa", "Opt-2.7B", FA, 2.4),
        ("lisa-6", "BSO", "GSM8K", HS, 43.4), ("lisa-7", "VLGuard", "default", "seconds_per_1000_steps", 122.34),
        ("lisa-8", "GSM8K", "0/1000", FA, 4.2), ("lisa-9", "Lisa", "rho = 0.5", HS, 41.7),
        ("lisa-10", "only proximal", "mean", HS, 32.46), ("lisa-11", "Vaccine-Lisa", "p = 0.3", FA, 93.35),
        ("lisa-12", "Filter+Lisa", "p = 1", FA, 30.25), ("lisa-13", "Vaccine-SFT", "p = 1", FA, 0.11),
        ("lisa-14", "Filter+SFT", "p = 0.8", "harmonic_mean", 70.95), ("lisa-15", "Vaccine-SFT", "after", HS, 30.3),
        ("vaccine-1", "NA-SFT", "p = 0.05", HS, 81.0), ("vaccine-1", "SFT", "p = 0.05", FA, None),
        ("vaccine-2", "Vaccine", "n = 1500", HS, 48.6), ("vaccine-5", "Vaccine", "Vicuna-7B", "alignment_memory_gb", 38.54),
        ("vaccine-6", "Vaccine", "rho = 10", FA, 89.0), ("vaccine-8", "SFT, double", "GSM8K", HS, 77.6),
        ("t-vaccine-1", "T-Vaccine", "p = 0.1", HS, 14.97), ("t-vaccine-7", "T-Vaccine", "rho = 3", HS, None),
        ("safe-lora-2", "Safe LoRA", "Llama-2-7B-Chat", "attack_success_rate", None),
        ("asft-ratios", "BEA", "p = 0.15", HS, 21.6), ("asft-models", "SafeInstr", "Qwen-2-7B", HS, 7.2),
        ("nlsr-tasks", "Lisa", "GSM8K", FA, 11.6), ("sbr-mean", "SBR", "p = 0.3", HS, 7.3),
        ("tamperbench-t-vaccine", "T-Vaccine", "before", FA, 8.8),
    ],
)  # fmt: skip
def test_single_values(name, row, column, metric, value):
    assert published.table(name).value(row, column, metric) == value


def test_order_and_errors():
    found = published.names()
    assert found.index("lisa-2") < found.index("lisa-10") < found.index("vaccine-1")
    with pytest.raises(RecipeError, match=r"No such table: lisa-16\. Did you mean 'lisa-"):
        published.table("lisa-16")


def quoted(page):
    """What a page says in its section on published numbers."""
    text = re.sub(r"\s+", " ", page.read_text(encoding="utf-8").replace("\n|", "\n\0|"))
    found = re.search(r"(## Published|Published[ :(]).*?(?=Our tests:|## |$)", text[1:])
    return found.group(0) if found else ""


PAGES = {page.stem: quoted(page) for page in sorted(DOCS.glob("*.md"))}
PAIRS = {
    (float(scores[column]), float(metrics[FA][column]))
    for of in TABLES.values()
    for metrics in of.numbers.values()
    for key, scores in metrics.items()
    if FA in metrics and key in (HS, "attack_success_rate")
    for column in of.columns
    if None not in (scores[column], metrics[FA][column])
}
NUMBERS = {
    value
    for of in TABLES.values()
    for row in of.numbers.values()
    for values in row.values()
    for value in values.values()
}


RATIOS = {0.01, 0.05, 0.15}
"""Harmful ratios and values of rho that the pages name."""


def test_pages_quote_these_numbers():
    """Every pair "harmful score / accuracy" of a page is a cell, and every number with decimals is a number."""
    pairs = 0
    for page, text in PAGES.items():
        for score, accuracy in re.findall(r"(\d+\.\d+) ?/ ?(\d+\.\d+)", text):
            assert (float(score), float(accuracy)) in PAIRS, (page, score, accuracy)
            pairs += 1
        for number in re.findall(r"(?<![\d.])(\d+\.\d\d)(?![\d.])", text):
            assert float(number) in NUMBERS or float(number) in RATIOS, (page, number)
    assert pairs > 60


def test_tables_of_pages_are_rows_of_these_tables():
    """A row of a page's table is part of a row of a published one, in the same order."""
    rows = [
        [{HS: r.get(HS, {}).get(c), FA: r.get(FA, {}).get(c)} for c in of.columns]
        for of in TABLES.values()
        for r in of.numbers.values()
    ]
    checked = 0
    for page, text in PAGES.items():
        for line in re.findall(r"\0\|([^\0]*)\|", text):
            cells = [cell.strip() for cell in line.split("|")][1:]
            values = [
                tuple(map(float, cell.split("/")))
                for cell in cells
                if re.fullmatch(r"[\d.]+( / [\d.]+)?", cell)
            ]
            if (
                len(values) < 5
                or max(value[0] for value in values) <= 10
                or len({len(v) for v in values}) > 1
            ):
                continue
            checked += 1
            assert any(_inside(values, row) for row in rows), (page, line)
    assert checked > 12


def _inside(values, row):
    """Whether the values are those of a row's columns, in order; the last may be the accuracy of the mean."""
    if all(len(value) == 2 for value in values):
        wanted = [(cell[HS], cell[FA]) for cell in row]
        return all(value in wanted for value in values)
    alone = [value[0] for value in values]
    for metric in (HS, FA):
        line = [cell[metric] for cell in row]
        if alone in (line, line[: len(alone)]):
            return True
        if (
            metric == HS
            and len(alone) <= len(line) + 1
            and alone[:5] == line[:5]
            and alone[-1] == row[-1][FA]
        ):
            return True
    return False


def test_the_example_of_the_page_is_the_committed_result():
    """Published and measured numbers of the page on tables, against the data and the benchmark's file."""
    page = (DOCS.parent / "tables.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "lisa-3-world.json").read_text(encoding="utf-8"))
    shown = re.findall(r"^(\S+) +published +(.*)\n +measured +(.*)$", page, flags=re.M)
    assert {row for row, _, _ in shown} == set(TABLES["lisa-3"].numbers)
    for row, numbers, measured in shown:
        cells = [cell for cell in found["cells"] if (cell["row"], cell["metric"]) == (row, HS)]
        assert list(map(float, numbers.split())) == [cell["published"] for cell in cells]
        assert [cell["published"] for cell in cells] == list(TABLES["lisa-3"].numbers[row][HS].values())
        texts = ["not measured" if c["why"] else f"{c['measured']:.2f} ± {c['stderr']:.2f}" for c in cells]
        assert re.split(r"  +", measured.strip()) == texts


WORLD = sorted((ROOT / "benchmarks" / "results").glob("*-world.json"))


@pytest.mark.parametrize("path", WORLD, ids=[path.stem for path in WORLD])
def test_tables_in_the_world_stand_on_the_page(path):
    """Each committed table has the published numbers, and stands on the page as a whole."""
    found = json.loads(path.read_text(encoding="utf-8"))
    cells = {(c["row"], c["column"], c["metric"]): c for c in found["cells"]}
    own = TABLES[found["name"]].numbers
    assert all(cells[at]["published"] == own[at[0]][at[2]].get(at[1]) for at in cells)
    if found["name"] == "lisa-3":
        return  # shown as the command prints it, see above
    page = (DOCS.parent / "tables.md").read_text(encoding="utf-8")
    head, lines = re.search(
        rf"^\| {found['name']} \| \| (.*) \|\n\|[-|]+\n((?:\|.*\n)+)", page, flags=re.M
    ).groups()
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines.splitlines()]
    named = {row[0] for row in rows if row[0]}
    measured = {
        (row, column) for row, column, metric in cells if cells[row, column, metric]["measured"] is not None
    }
    assert {(row, column) for row in named for column in head.split(" | ")} >= measured
    name = ""
    for row, what, *texts in rows:
        name = row or name
        for column, text in zip(head.split(" | "), texts, strict=True):
            values = [
                cells[name, column, metric][what] for metric in (HS, FA) if (name, column, metric) in cells
            ]
            shown = " / ".join("–" if value is None else f"{value:.2f}" for value in values)
            assert text == (shown if any(value is not None for value in values) else ""), (name, column)


def test_the_example_of_the_page_on_studies_is_the_committed_result():
    page = (DOCS.parent / "sweep.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "world-study.json").read_text(encoding="utf-8"))
    rows = [row for row in found["rows"] if row["data.poison_ratio"] is not None]
    assert {row["seeds"] for row in rows} == {3}
    shown = re.findall(r"^\| (\S.*→.*?) \| (.*±.*) \|$", page, flags=re.M)
    assert {method for method, _ in shown} == {row["method"] for row in rows}
    for method, cells in shown:
        own = sorted(
            (row for row in rows if row["method"] == method), key=lambda row: row["data.poison_ratio"]
        )
        texts = [
            " / ".join(f"{row[metric]:.1f} ± {row[metric + '_stderr']:.1f}" for metric in (HS, FA))
            for row in own
        ]
        assert cells.split(" | ") == texts


@pytest.mark.parametrize("model", [None, *tables.SMALL])
def test_every_grid_is_possible(model, monkeypatch, tmp_path):
    """One run of each row and each column of each table; the small models' runs can be planned together."""
    monkeypatch.setattr(lab, "cached", lambda: MODEL)  # a plan does not load it
    found, store = {}, Store(tmp_path / "store")
    for name, of in TABLES.items():
        planned = tables.cells(of, model)
        if tables.base(of, model) is None or not planned:
            with pytest.raises(RecipeError, match=f"{name} has no (grid: its protocol|runs on {model}.)"):
                tables.grid(name, model)
            continue
        grid = tables.grid(name, model)
        first = {(one.row, ""): one.run for one in reversed(planned)} | {
            ("", one.column): one.run for one in reversed(planned)
        }
        kept = [entry for entry in grid["include"] if entry["name"] in first.values()]
        runs = expand({**grid, "include": kept})
        assert {run.recipe.name for run in runs} == set(first.values()), (name, model)
        assert all((model or "/") in run.recipe.model.path for run in runs), (name, model)
        found |= {f"{name}/{run.folder}": run for run in runs}
    if model is not None:
        study = planning.plan([Run(name, run.recipe) for name, run in found.items()], store, partial=True)
        assert all("user" in {step.kind for step in one.steps} for one in study.plans.values())
        assert "world" not in model or not study.elsewhere()
