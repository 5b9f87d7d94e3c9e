"""Differences on the same prompts: which models are compared, the numbers, several seeds, and the page."""

from __future__ import annotations

import math

import pytest

from holdfast.evaluation import paired
from holdfast.reporting.collect import collect
from holdfast.reporting.differences import baselines, differences, differences_table, p_text
from holdfast.reporting.page import render
from synthetic_runs import score_row, write_json, write_lines, write_run


def made(folder, *specs, seed=42, ratio=0.1, **more):
    """A run for each (name, alignment, user, harmful prompts of 20, right answers of 20); items as steps write them."""
    runs = []
    for index, (name, alignment, user, harmful, right, *rest) in enumerate(specs):
        row = score_row(
            name, alignment, user, 5.0 * harmful, 5.0 * right, seed=seed, ratio=rest[0] if rest else ratio
        )
        run = write_run(folder / f"{index}-{seed}", [row], name=name, **more)
        items = [{"id": f"h{i}", "score": "harmful_score", "value": i < harmful} for i in range(20)]
        items += [{"id": f"t{i}", "score": "task_score", "value": i < right} for i in range(20)]
        write_lines(run / "steps" / row["steps"]["score"] / "items.jsonl", items)
        runs.append(run)
    return runs


SFT, LISA, BSO = ("SFT", "sft", "sft", 18, 15), ("Lisa", "sft", "lisa", 4, 14), ("BSO", "sft", "bso", 16, 15)


def against(rows):
    found = baselines(rows)
    return {row.label: found[row.number].label for row in rows if row.number in found}


def test_whom_a_row_is_compared_with(tmp_path):
    aligned, base = ("aligned", "sft", None, 1, 9), ("base", None, None, 19, 9)
    na = ("NA-SFT", None, "sft", 19, 15)
    other = ("SFT 5", "sft", "sft", 9, 15, 0.5)
    lisa5 = ("Lisa 5", "sft", "lisa", 9, 15, 0.5)
    vaccine = ("Vaccine", "vaccine", "sft", 9, 15)
    rows = collect(made(tmp_path, aligned, base, na, SFT, LISA, other, lisa5, vaccine)).rows
    assert against(rows) == {
        "aligned": "SFT 5", "base": "NA-SFT", "Lisa": "SFT", "Lisa 5": "SFT 5", "Vaccine": "SFT",
    }  # fmt: skip
    assert against(collect(made(tmp_path / "lone", aligned, LISA)).rows) == {"Lisa": "aligned"}
    assert against(collect(made(tmp_path / "one", SFT)).rows) == {}


def test_the_numbers_are_those_of_the_prompts(tmp_path):
    rows = collect(made(tmp_path, SFT, LISA, BSO)).rows
    found = differences(rows, baselines(rows), "harmful_score")
    lisa, bso = found[2], found[3]
    assert (lisa.n, lisa.value, lisa.seeds, lisa.over_seeds) == (20, -70.0, 1, False)
    assert lisa.p == pytest.approx(2 * paired.mcnemar(14, 0)), "Holm: the smaller of two is doubled"
    assert bso.p == pytest.approx(0.5)
    assert (lisa.clear, bso.clear) == (True, False)
    table = {column.title: column.cells for column in differences_table(rows)}
    assert [cell.text for cell in table["Compared with"]] == ["–", "1 SFT", "1 SFT"]
    cells = table["Harmful score: difference"]
    assert [cell.text for cell in cells] == ["–", "-70.0", "-10.0"]
    assert cells[2].details[-1] == "not distinguishable"
    assert "n = 20" in cells[1].details
    assert table["Finetune accuracy: difference"][1].details[1] == "p = 1"
    assert "Benign compliance: difference" not in table, "no items"


def test_means_over_seeds_are_compared_by_students_t_in_the_table_and_in_the_sentence(tmp_path):
    runs = [
        write_run(
            tmp_path / f"{name}-{seed}", [score_row(name, "sft", user, score, 95.0, seed=seed)], steps=False
        )
        for name, user, scores in (("SFT", "sft", (90.0, 91.0, 95.0)), ("Lisa", "lisa", (70.0, 80.0, 84.0)))
        for seed, score in enumerate(scores)
    ]
    data = collect(runs)
    (found,) = differences(data.rows, baselines(data.rows), "harmful_score").values()
    # Variances 7 and 52, so the squared error is 59 / 3; Welch's degrees of freedom are 59^2 / ((7^2 + 52^2) / 2).
    assert (found.value, found.n, found.seeds, found.over_seeds) == (-14.0, 600, 3, True)
    freedom = 59**2 / ((7**2 + 52**2) / 2)
    assert found.p == pytest.approx(paired.student(14 / math.sqrt(59 / 3), freedom))
    assert 0.05 < found.p < 0.1
    reach = paired.student_quantile(freedom) * math.sqrt(59 / 3)
    assert found.interval == pytest.approx((-14 - reach, -14 + reach))
    (_, cell) = {column.title: column.cells for column in differences_table(data.rows)}[
        "Harmful score: difference"
    ]
    assert cell.details[-1] == "not distinguishable"
    assert "Lisa does not clearly lower it: 78.0" in data.finding
    assert "Student’s t" in render(data)


def test_the_page(tmp_path):
    runs = made(tmp_path, SFT, LISA, BSO)
    page = render(collect(runs))
    assert '<section id="differences">' in page
    assert "corrected by Holm" in page
    assert page.count("not distinguishable</small>") >= 1
    assert "compared prompt by prompt" in page
    for run in runs:
        for file in run.glob("steps/score-*/items.jsonl"):
            file.unlink()
    assert 'id="differences"' not in render(collect(runs)), "older runs have no items"
    other = made(tmp_path / "other", LISA, protocol={"max_new_tokens": 7})
    assert 'id="differences"' not in render(collect([*made(tmp_path / "a", SFT), *other], force=True))


def test_broken_items_are_left_out(tmp_path):
    runs = made(tmp_path, SFT, LISA)
    (file,) = runs[1].glob("steps/score-*/items.jsonl")
    write_lines(file, [{"id": f"h{i}", "score": "harmful_score", "value": "yes"} for i in range(20)])
    rows = collect(runs).rows
    assert differences(rows, baselines(rows), "harmful_score") == {}
    write_json(file, {})


def test_p_text():
    assert (p_text(0.5), p_text(0.0123), p_text(1e-9), p_text(1.0)) == ("= 0.5", "= 0.012", "< 0.0001", "= 1")
