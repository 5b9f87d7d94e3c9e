"""The plan of a grid: each step once, and what the missing ones take."""

from __future__ import annotations

import json

import pytest

from holdfast import data
from holdfast.machine.store import Store
from holdfast.study import planning
from holdfast.study.grid import expand


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    grid = {"user": ["sft", "lisa"], "data.poison_ratio": [0, 0.1]}
    runs = expand({"extends": "world", "name": "study", "grid": grid})
    return planning.plan(runs, Store(tmp_path_factory.mktemp("store")))


def test_a_step_comes_once_and_after_those_that_it_reads(study):
    kinds = [step.kind for step in study.steps.values()]
    assert (kinds.count("alignment"), kinds.count("user")) == (1, 4)
    assert sum(len(plan.steps) for plan in study.plans.values()) > len(study.steps)
    order = list(study.steps)
    for name, parents in study.parents.items():
        assert all(order.index(parent) < order.index(name) for parent in parents), name
    uses = {study.steps[name].kind: count for name, count in study.uses.items()}
    assert (uses["alignment"], uses["user"]) == (4, 1)


def test_the_time_comes_from_steps_of_the_same_detail_or_kind(study, tmp_path):
    store = Store(tmp_path)
    names = {
        kind: [n for n, step in study.steps.items() if step.kind == kind] for kind in ("user", "generate")
    }

    def took(name, seconds):
        store.path(name).mkdir()
        (store.path(name) / "step.json").write_text(json.dumps({"seconds": seconds}))

    took(names["user"][0], 10.0)  # SFT
    took("user-0123456789ab", 30.0)  # of another grid
    took("generate-0123456789ab", 5.0)
    done = {names["user"][0]}
    found = planning.cost(study, store, done)
    alike = sum(study.steps[n].detail == study.steps[names["user"][0]].detail for n in names["user"][1:])
    assert alike == 1
    assert found.by_kind["user"] == (4, 0, 1, 10.0 + 20.0 + 20.0), "SFT as before, Lisa as the median"
    assert found.by_kind["generate"][3] == 5.0 * len(names["generate"])
    assert "alignment" in found.unknown
    assert found.seconds == 50.0 + 5.0 * len(names["generate"])


def test_plans_of_a_grid_read_the_files_of_a_source_once(tmp_path, monkeypatch):
    read = []
    fingerprint = data.fingerprint

    def counted(place, *, role):
        read.append((place, role))
        return fingerprint(place, role=role)

    monkeypatch.setattr(data, "fingerprint", counted)
    ratios = [i / 100 for i in range(20)]
    runs = expand({"extends": "world", "name": "study", "grid": {"data.poison_ratio": ratios}})
    together = planning.plan(runs, Store(tmp_path))
    assert len(read) == len(set(read))
    alone = [planning.plan([run], Store(tmp_path)) for run in runs[:3]]
    for one in alone:
        assert one.steps.keys() <= together.steps.keys(), "the names are those of single runs"
