"""Results as files: CSV, JSON, LaTeX and Markdown, and the formats of single tables."""

from __future__ import annotations

import csv
import json

import pytest
from typer.testing import CliRunner

from holdfast.cli.app import app
from holdfast.errors import ComparisonError, OutputError
from holdfast.reporting import export, sheets
from holdfast.reporting.sheets import Sheet
from synthetic_runs import PROTOCOL, score_row, write_run


def recipe(user, ratio):
    return {
        "model": {"path": "world"}, "alignment": {"defense": "sft"}, "user": {"defense": user},
        "data": {"task": "world", "poison_ratio": ratio, "alignment": {"source": "world"}},
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """SFT over two seeds at two ratios, Lisa with one seed at one ratio."""
    made = []
    for user, ratio, seed, value in (
        ("sft", 0.1, 1, 50.0), ("sft", 0.1, 2, 54.0), ("sft", 0.2, 1, 60.0), ("sft", 0.2, 2, 62.0), ("lisa", 0.1, 1, 40.0),
    ):  # fmt: skip
        name = f"{user} {ratio}"
        rows = [score_row(name, "sft", user, value, 90.0, seed=seed, ratio=ratio, task_score=90.0)]
        path = tmp_path / f"{user}-{ratio}-{seed}"
        made.append(write_run(path, rows, name=name, recipe=recipe(user, ratio), steps=False))
    return made


def test_one_row_for_each_method_and_ratio(runs, tmp_path):
    names = {"csv": "a.csv", "json": "a.json", "latex": "a.tex", "markdown": "a.md"}
    export(runs, {kind: tmp_path / name for kind, name in names.items()})
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["data.poison_ratio"], row["seeds"]) for row in rows] == [
        ("SFT → SFT", "0.1", "2"), ("SFT → SFT", "0.2", "2"), ("SFT → Lisa", "0.1", "1"),
    ]  # fmt: skip
    first, last = rows[0], rows[-1]
    assert (first["harmful_score"], first["harmful_score_stderr"], first["harmful_score_n"]) == (
        "52.0",
        "2.0",
        "400",
    )
    assert float(first["harmful_score_low"]) == pytest.approx(52 - 12.7062 * 2, abs=1e-3), (
        "Student's t, one degree"
    )
    assert float(last["harmful_score_low"]) == pytest.approx(33.4, abs=0.1), "Wilson's interval of one seed"
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["keys"] == ["data.poison_ratio"]
    assert found["rows"][1]["harmful_score"] == 61.0
    assert found["protocols"][0]["judge"] == PROTOCOL["judge"]
    latex = (tmp_path / "a.tex").read_text()
    assert r"SFT $\rightarrow$ Lisa & 0.1 & 1 & 40.0" in latex
    assert "Task score" not in latex, "it is the finetune accuracy"
    assert latex.count("\\\\\n") == 4
    assert "| SFT → SFT | 0.2 | 2 | 61.0 [48.3, 73.7] |" in (tmp_path / "a.md").read_text()


def test_the_command_writes_the_files(runs, tmp_path):
    arguments = ["report", *map(str, runs), "-o", str(tmp_path / "r.html"), "--csv", str(tmp_path / "r.csv")]
    arguments += ["--metric", "benign_compliance", "--metric", "seconds"]
    assert CliRunner().invoke(app, [*arguments, "--latex", str(tmp_path / "r.tex")]).exit_code == 0
    assert (
        (tmp_path / "r.csv").read_text().startswith("method,name,role,data.poison_ratio,seeds,harmful_score,")
    )
    assert "training time, s, SFT → SFT" in (tmp_path / "r.html").read_text()
    assert "Benign compliance" in (tmp_path / "r.tex").read_text()
    assert not (tmp_path / "r.json").exists()


def test_refusals(runs, tmp_path):
    results, same = runs[0] / "results.json", tmp_path / "same"
    before = results.read_bytes()
    for files, words in (
        ({"csv": tmp_path}, "found a folder"),
        ({"csv": results}, "results.json is read here and is never overwritten"),
        ({"csv": same, "json": same}, "same is given for two results"),
    ):
        with pytest.raises(OutputError, match=words):
            export(runs, files)
    done = CliRunner().invoke(app, ["report", str(runs[0]), "-o", str(same), "--latex", str(same)])
    assert "same is given for two results" in str(done.exception)
    assert not same.exists()
    assert results.read_bytes() == before
    other = write_run(
        tmp_path / "other",
        [score_row("x", "sft", "sft", 1.0, 1.0)],
        protocol={**PROTOCOL, "max_new_tokens": 7},
        steps=False,
    )
    with pytest.raises(ComparisonError, match="max_new_tokens"):
        export([*runs, other], {"csv": tmp_path / "no.csv"})
    assert not (tmp_path / "no.csv").exists()
    export([*runs, other], {"json": tmp_path / "forced.json"}, force=True)
    assert len(json.loads((tmp_path / "forced.json").read_text())["protocols"]) == 2


WIDE = Sheet("A_title", ("", "first|", "second"), (("a%", "1.0 ± 0.1", "2"), ("b", "", "$3")), ("a note",))


def test_formats_of_a_table():
    assert sheets.markdown([WIDE]).splitlines() == [
        "**A_title**", "", r"|  | first\| | second |", "|---|---:|---:|", "| a% | 1.0 ± 0.1 | 2 |", "| b |  | $3 |", "",
        "- a note",
    ]  # fmt: skip
    latex = sheets.latex([WIDE])
    assert r"\caption{A\_title}" in latex
    assert r"a\% & 1.0 $\pm$ 0.1 & 2 \\" in latex
    assert r"b &  & \$3 \\" in latex
    assert sheets.text([WIDE], 80).splitlines()[2:] == [
        "       first|  second", "---------------------", "a%  1.0 ± 0.1       2", "b                  $3", "", "a note",
    ]  # fmt: skip
    assert sheets.text([WIDE], 16).splitlines()[2:9] == [
        "       first|", "-------------", "a%  1.0 ± 0.1", "b", "", "    second", "----------",
    ]  # fmt: skip


def test_a_spreadsheet_reads_no_formula():
    assert (
        sheets.csv_text([{"a": "=1+1", "b": None, "c": -2.5, "d": "x,y"}]) == 'a,b,c,d\n\'=1+1,,-2.5,"x,y"\n'
    )
