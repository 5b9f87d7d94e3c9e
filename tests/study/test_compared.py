"""Published beside measured: which run measures which cell, means over seeds, changed settings, and the formats."""

from __future__ import annotations

import csv
import io
import json

import pytest
from typer.testing import CliRunner

import holdfast
from holdfast.cli.app import app
from holdfast.errors import InputError, RecipeError
from holdfast.study import published, table_sheets, tables
from holdfast.study.compared import compare, runs_in
from holdfast.study.grid import expand
from places import DOCS, blocks
from synthetic_runs import score_row, write_run

LISA3 = published.table("lisa-3")


def measured(folder, name, model, *keep, seeds=(1,), table="lisa-3", protocol=None, start=None, **changes):
    """Write the runs of a table whose names begin with one of `keep`, with a harmful score of 10 + the seed."""
    runs = [run.recipe for run in expand(tables.grid(table, model)) if run.recipe.name.startswith(keep)]
    for recipe in runs:
        for seed in seeds:
            raw = {**recipe.to_dict(), "seed": seed}
            for key, value in changes.items():
                block, _, last = key.rpartition("__")
                place = raw
                for part in block.split("__"):
                    place = place[part]
                place[last] = value
            methods = [raw[stage] and raw[stage]["defense"] for stage in ("alignment", "user", "post_hoc")]
            ratio = raw["data"]["poison_ratio"]
            rows = [score_row("start", methods[0], None, 1.0, 50.0, seed=seed)]
            rows += [
                score_row(
                    recipe.name, *methods[:2], 10.0 + seed, 90.0, seed=seed, ratio=ratio, post_hoc=methods[2]
                )
            ]
            path = folder / f"{name}-{recipe.name}-{seed}".replace(" ", "-")
            write_run(path, rows, name=recipe.name, recipe=raw, steps=False, protocol=protocol)
    return folder


def cell(found, row, column, metric="harmful_score"):
    return next(c for c in found.cells if (c.row, c.column, c.metric) == (row, column, metric))


@pytest.mark.parametrize(("task_metric", "value"), [("mt_bench", 6.8), ("accuracy", None)])
def test_a_score_of_another_task_is_no_mt_bench(tmp_path, task_metric, value):
    measured(tmp_path, "a", "world", "LoRA", table="safe-lora-2")
    (path,) = tmp_path.glob("*/results.json")
    results = json.loads(path.read_text())
    results["rows"][-1] |= {"task_metric": task_metric, "task_score": 6.8}
    path.write_text(json.dumps(results))
    one = cell(
        compare(published.table("safe-lora-2"), runs_in([tmp_path])), "LoRA", "Llama-2-7B-Chat", "mt_bench"
    )
    assert (one.measured and one.measured.value) == value


def test_cells_are_found_by_their_settings(tmp_path):
    runs = runs_in([measured(tmp_path, "a", "world", "Lisa", seeds=(1, 2))])
    found = compare(LISA3, runs)
    assert found.model == "world"
    assert found.changes == ()
    one = cell(found, "Lisa", "p = 0.1")
    assert (one.published, one.measured.value, one.measured.seeds) == (40.2, 11.5, 2)
    assert one.difference == pytest.approx(-28.7)
    assert one.measured.stderr == pytest.approx(0.5)
    assert cell(found, "Lisa", "mean").measured.by_seed == (11.0, 12.0)
    assert [cell(found, "SFT", column).why for column in LISA3.columns] == ["not measured"] * 6
    assert [stamp["judge"] for stamp in found.stamps] == ["beaver_dam@1/0.5"]
    default = compare(published.table("lisa-9"), runs)
    assert cell(default, "Lisa", "rho = 1").measured.value == 11.5, "the same run is a cell of another table"
    assert cell(default, "Lisa", "rho = 0.1").measured is None


def test_another_parameter_is_another_cell_and_another_setting_is_told(tmp_path):
    folder = measured(tmp_path, "a", None, "Lisa p 0.1", user__rho=5.0)
    assert not any(one.measured for one in compare(LISA3, runs_in([folder])).cells)
    changes = {"evaluation__prompts": 100, "model__path": "tiny"}
    found = compare(LISA3, runs_in([measured(tmp_path / "b", "b", None, "Lisa p 0.1", **changes)]))
    assert cell(found, "Lisa", "p = 0.1").measured.value == 11.0
    assert found.changes == (
        "model.path: tiny instead of meta-llama/Llama-2-7b-hf", "evaluation.prompts: 100 instead of 1000",
    )  # fmt: skip
    assert found.model == "tiny"


def test_the_run_with_the_fewest_changes_is_shown(tmp_path):
    measured(tmp_path, "a", None, "SFT p 0.1", seeds=(3,), evaluation__prompts=100)
    found = compare(LISA3, runs_in([measured(tmp_path, "b", None, "SFT p 0.1", seeds=(1,))]))
    assert cell(found, "SFT", "p = 0.1").measured.by_seed == (11.0,)
    assert found.changes == ()
    assert (
        "1 run measures a cell with more changed settings than the runs shown, and is left out."
        in found.notes
    )


def test_models_are_not_mixed(tmp_path):
    measured(tmp_path, "a", None, "SFT p 0.1")
    runs = runs_in([measured(tmp_path, "b", "world", "SFT p 0.1")])
    with pytest.raises(InputError, match=r"several models: .*world.*--model"):
        compare(LISA3, runs)
    assert compare(LISA3, runs, "world").model == "world"
    assert not any(one.measured for one in compare(LISA3, runs, "smollm2").cells)


def test_a_table_over_models(tmp_path):
    lisa5 = published.table("lisa-5")
    measured(tmp_path, "a", None, "SFT", table="lisa-5")
    found = compare(lisa5, runs_in([tmp_path]))
    assert [cell(found, "SFT", column).measured.value for column in lisa5.columns] == [11.0] * 4
    assert cell(found, "SFT", "mean").measured.stderr == pytest.approx(
        cell(found, "SFT", "Opt-2.7B").measured.stderr / 3**0.5
    )
    small = compare(lisa5, runs_in([measured(tmp_path / "w", "w", "world", "SFT", table="lisa-5")]))
    assert [cell(small, "SFT", column).why for column in lisa5.columns] == [
        "no run",
        "",
        "no run",
        "not measured",
    ]


def test_the_model_before_fine_tuning(tmp_path):
    of = published.table("lisa-15")
    found = compare(of, runs_in([measured(tmp_path, "a", "world", "SFT", table="lisa-15")]))
    assert [cell(found, "SFT", column).measured.value for column in ("before", "after")] == [1.0, 11.0]


def test_derived_metrics(tmp_path):
    folder = measured(tmp_path, "a", "world", "SFT", table="lisa-7")
    path = next(folder.glob("*/results.json"))
    raw = json.loads(path.read_text())
    raw["rows"][-1]["cost"] = {"user": {"seconds_per_1000_steps": 60.0, "peak_memory_bytes": 2_000_000_000}}
    path.write_text(json.dumps(raw))
    found = compare(published.table("lisa-7"), runs_in([folder]))
    assert cell(found, "SFT", "default", "seconds_per_1000_steps").measured.value == 60.0
    assert cell(found, "SFT", "default", "peak_memory_gb").measured.value == 2.0


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_the_command(tmp_path):
    folder = measured(tmp_path / "runs", "a", "world", "Lisa")
    text = invoke("table", "lisa-3", "--runs", folder).output
    assert "Lisa         published" in text.replace("measured  ", "published")
    for part in ("-29.20", "11.00 ±", "not measured", "Protocol stamp: ", "arXiv 2405.18641"):
        assert part in text, part
    for form, start in (("markdown", "**Lisa"), ("json", "{")):
        assert invoke("table", "lisa-9", "--runs", folder, "--format", form).output.startswith(start)
    output = invoke("table", "lisa-9", "--runs", folder, "--format", "csv").output
    rows = list(csv.DictReader(io.StringIO(output)))
    assert len(rows) == 7 * 2
    assert [row["difference"] for row in rows if row["column"] == "rho = 1"] == ["-29.9", "-5.07"]
    out = tmp_path / "t.tex"
    assert invoke("table", "lisa-9", "--runs", folder, "--format", "latex", "--out", out).exit_code == 0
    assert r"$\pm$" in out.read_text()
    listed = invoke("table").output
    assert all(name in listed for name in published.names())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["table", "lisa-33"], "No such table: lisa-33"),
        (["table", "--format", "csv"], "Expected the name of a table"),
        (["table", "lisa-3", "--runs", "nothing"], "found none: nothing"),
        (["sweep", "nlsr-tasks"], "nlsr-tasks has no grid"),
        (["sweep", "lisa-5", "--model", "my-model"], "lisa-5 compares models"),
        (["sweep", "safe-lora-4", "--model", "world"], "has no runs on world"),
        (["sweep", "world-study", "--seeds", "3"], "--model and --seeds are for the tables"),
    ],
)
def test_errors(arguments, text):
    found = invoke(*arguments)
    assert isinstance(found.exception, InputError | RecipeError)
    assert text in str(found.exception)


def test_grids_for_a_model_and_seeds():
    runs = expand(tables.grid("lisa-2", "my/model", 2))
    assert len(runs) == 14
    assert {run.recipe.model.path for run in runs} == {"my/model"}
    assert {run.recipe.seed for run in runs} == {42, 43}
    assert runs[0].folder == "BSO-1000-0-seed-42"
    assert [run.folder for run in expand("lisa-7")] == ["SFT", "VLGuard", "BSO", "Lisa"]


def test_a_cell_that_a_small_model_cannot_measure():
    """In the world, the filter keeps none of the rows if all of them are harmful."""
    cells = {(one.row, one.column) for one in tables.cells(published.table("lisa-12"), "world")}
    assert ("Filter+SFT", "p = 0.8") in cells
    assert ("Filter+SFT", "p = 1") not in cells
    assert len(tables.cells(published.table("lisa-12"))) == len(cells) + 2


def test_sheets_of_a_table_that_was_not_measured():
    found = compare(published.table("t-vaccine-7"), [])
    sheet = table_sheets.sheets(found)[0]
    assert sheet.rows == (("T-Vaccine", "published", "", "", "", "", ""),)


def test_the_script_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """The script of docs/tables.md, with three runs instead of its sweep."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(holdfast, "sweep", lambda grid, *, out, workers: expand(grid))
    measured(tmp_path / "lisa-3", "a", "world", "Lisa p 0.1", seeds=(1, 2, 3))
    (script,) = blocks(DOCS / "tables.md", "python")
    exec(compile(script, "tables.md", "exec"), {})
    assert "Lisa p = 0.1 harmful_score 40.2 12.0 -28.2" in capsys.readouterr().out
