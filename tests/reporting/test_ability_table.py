"""The table of general ability: means over seeds, models without it, and runs that measured something else."""

from __future__ import annotations

import pytest

from holdfast.errors import ComparisonError
from holdfast.reporting.ability import ability_table
from holdfast.reporting.collect import collect
from synthetic_runs import PROTOCOL, demo_rows, write_run


def measured(value, stderr=0.02):
    metric = {"metric": "acc", "filter": "none", "value": value, "stderr": stderr, "higher_is_better": True}
    loss = {"metric": "loss", "filter": "none", "value": 2.5, "stderr": None, "higher_is_better": False}
    return {"lm_eval": {"tea": {"version": 1.0, "n": 50, "num_fewshot": 5, "metrics": [metric, loss]}}}


def test_values_of_one_seed_and_their_mean_over_seeds(tmp_path):
    second = demo_rows(43)["SFT"][-1] | measured(0.6)
    runs = [
        write_run(tmp_path / "a", [demo_rows()["SFT"][-1] | measured(0.5)], name="SFT", steps=False),
        write_run(tmp_path / "b", [second], name="SFT", steps=False),
        write_run(tmp_path / "c", [demo_rows()["Lisa"][-1] | measured(0.25, None)], name="Lisa", steps=False),
        write_run(tmp_path / "d", [demo_rows()["BSO"][-1]], name="BSO", steps=False),
    ]
    data = collect(runs)
    accuracy, loss = ability_table(data.rows)
    assert (accuracy.title, accuracy.explain) == ("tea", "acc")
    assert (accuracy.better, loss.better) == ("higher", "lower")
    shown = {row.user: (cell.text, cell.details) for row, cell in zip(data.rows, accuracy.cells, strict=True)}
    assert shown["sft"] == ("0.5500", ("mean of 2 seeds", "n = 50"))
    assert shown["lisa"] == ("0.2500", ("n = 50",))
    assert shown["bso"] == ("not measured", ())
    assert ability_table(collect(runs[3:]).rows) == ()


def test_the_same_measurement_with_and_without_it_is_shown_with_it(tmp_path):
    plain = demo_rows()["SFT"][-1]
    runs = [
        write_run(tmp_path / "a", [plain], name="SFT", steps=False),
        write_run(tmp_path / "b", [plain | measured(0.5)], name="SFT", steps=False),
    ]
    rows = collect(runs).rows
    assert len(rows) == 1
    assert ability_table(rows)[0].cells[0].text == "0.5000"


def test_runs_with_other_tasks_or_versions_are_not_compared(tmp_path):
    rows = demo_rows()
    plain, one, other = (
        write_run(tmp_path / name, rows[name], name=name, steps=False, protocol={**PROTOCOL, **used})
        for name, used in (
            ("SFT", {}),
            ("Lisa", {"lm_eval": {"tasks": ["tea@1.0"]}}),
            ("BSO", {"lm_eval": {"tasks": ["tea@2.0"]}}),
        )
    )
    assert not collect([plain, one]).differences
    with pytest.raises(ComparisonError, match=r"lm_eval: absent \(SFT\);.*tea@1\.0.*\(Lisa\);.*tea@2\.0"):
        collect([plain, one, other])
