"""The costs of each part of a run, as tables of the report."""

from __future__ import annotations

import pytest

from holdfast.reporting.collect import collect
from holdfast.reporting.costs import cost_tables
from holdfast.reporting.page import render
from synthetic_runs import score_row, write_run

CPU = {
    "seconds": 30.0, "device_seconds": 50.0, "device_time": "cores computing", "peak_memory_bytes": 2**30,
    "peak_memory_kind": "resident", "peak_reserved_bytes": None, "energy_joules": None, "tokens": 9000,
    "tokens_per_second": 300.0, "seconds_per_1000_steps": 150.0, "device_seconds_per_1000_steps": 250.0,
}  # fmt: skip
ANSWERS = {key: value for key, value in CPU.items() if not key.endswith("1000_steps")}


def rows(folder, *costs, user="lisa"):
    """One model with a seed for each cost."""
    made = [score_row(user, "sft", user, 5.0, 95.0, seed=i, cost=cost) for i, cost in enumerate(costs)]
    return collect([write_run(folder / f"{user}{row['seed']}", [row], store="../steps") for row in made])


def shown(data):
    return {
        part: {column.title: column.cells[0].text for column in columns}
        for part, columns in cost_tables(data.rows)
    }


def test_each_part_has_the_columns_that_were_measured(tmp_path):
    data = rows(tmp_path, {"user": CPU, "generate": ANSWERS, "moderate": {"keyword": ANSWERS, "mine": None}})
    tables = shown(data)
    assert list(tables) == ["Fine-tuning", "Answers", "Verdicts of keyword"]
    assert tables["Fine-tuning"] == {
        "Time": "30.0 s", "Time per 1000 steps": "2 min 30 s", "Device time": "50.0 s",
        "Device time per 1000 steps": "4 min 10 s", "Tokens per second": "300", "Peak memory": "1.00 GiB",
    }  # fmt: skip
    assert "Time per 1000 steps" not in tables["Answers"]
    explained = {column.title: column.explain for column in dict(cost_tables(data.rows))["Fine-tuning"]}
    assert (explained["Device time"], explained["Peak memory"]) == ("cores computing", "resident")
    page = render(data)
    assert "<summary>Fine-tuning, Answers, Verdicts of keyword</summary>" in page


def test_a_gpu_also_tells_reserved_memory_and_energy(tmp_path):
    gpu = CPU | {"peak_reserved_bytes": 3 * 2**30, "energy_joules": 12_345.0}
    found = shown(rows(tmp_path, {"user": gpu}))["Fine-tuning"]
    assert (found["Reserved memory"], found["Energy"]) == ("3.00 GiB", "12.3 kJ")


def test_seeds_are_means_and_the_largest_memory(tmp_path):
    other = CPU | {"seconds": 50.0, "peak_memory_bytes": 2**31, "energy_joules": 1.0}
    found = shown(rows(tmp_path, {"user": CPU}, {"user": other}))["Fine-tuning"]
    assert (found["Time"], found["Peak memory"]) == ("40.0 s", "2.00 GiB")
    assert "Energy" not in found, "a value of one seed would look like a value of both"


@pytest.mark.parametrize("cost", [{}, None, {"user": None}, {"user": "fast", "moderate": 3}])
def test_results_without_costs_have_no_tables(tmp_path, cost):
    data = rows(tmp_path, cost)
    assert cost_tables(data.rows) == []
    assert "<h3>Cost</h3>" not in render(data)


def test_a_model_without_the_part_shows_a_dash(tmp_path):
    tuned = score_row("lisa", "sft", "lisa", 5.0, 95.0, cost={"user": CPU})
    aligned = score_row("aligned", "sft", None, 0.0, 9.0, cost={})
    data = collect([write_run(tmp_path / "run", [aligned, tuned])])
    [(_, columns)] = cost_tables(data.rows)
    assert [cell.text for cell in columns[0].cells] == ["–", "30.0 s"]
