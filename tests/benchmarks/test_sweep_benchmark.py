"""The benchmark of sweeps measures what it says, on few steps."""

from __future__ import annotations

import importlib

from places import BENCHMARKS


def test_planning_listing_and_scheduling(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("sweep")
    monkeypatch.setattr(benchmark.planning, "replan", benchmark.planning.replan)  # the benchmark replaces it
    assert benchmark.planned(72)["runs"] == 12
    assert benchmark.scheduling(48, workers=2)["steps"] > 40
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: None)
    assert benchmark.listed(30)["steps"] == 30
