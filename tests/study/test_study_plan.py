"""The plan of a grid: each step once, and what the missing ones take."""

from __future__ import annotations

import json

import pytest

import tiny
from holdfast import data
from holdfast.errors import InputError
from holdfast.machine.store import Store
from holdfast.pipeline import dry_run, rows_checked
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


def test_checks_of_a_grid_do_the_same_work_once(tmp_path, monkeypatch):
    """Two ratios and two seeds: one trainer is built for each stage, and each row is rendered once."""
    built, rendered = [], []
    build, render = dry_run.build_trainer, rows_checked.training_row

    def counted(method, config, model, tokenizer, rows, folders):
        built.append(rows)
        build(method, config, model, tokenizer, rows, folders)

    def row_of(row, *rest):
        rendered.append(row["id"])
        return render(row, *rest)

    monkeypatch.setattr(dry_run, "build_trainer", counted)
    monkeypatch.setattr(rows_checked, "training_row", row_of)
    axes = {"data.poison_ratio": [0.1, 0.2], "seed": [1, 2]}
    runs = expand({**tiny.recipe(tmp_path / "in"), "grid": axes})
    store = Store(tmp_path / "store")
    study = planning.plan(runs, store)
    planning.rehearse(study, store, "cpu")
    assert not (tmp_path / "store").exists(), "a rehearsal writes nothing"
    kinds = [step.kind for step in study.steps.values()]
    assert (kinds.count("alignment"), kinds.count("user")) == (2, 4)
    assert len(built) == 2
    assert len(rendered) == len(set(rendered)) > 20


def test_a_rehearsal_names_the_problems_of_each_run_once(tmp_path):
    recipe = tiny.recipe(tmp_path / "in")
    rows = tiny.user_rows(40)
    for number, row in enumerate(rows):
        row["input"] = f"{number} " + "small " * 400
    tiny.write_jsonl(tmp_path / "bad.jsonl", rows)
    recipe["user"]["training"] = {**recipe["user"]["training"], "max_length": 400}
    places = [recipe["data"]["user"], str(tmp_path / "bad.jsonl")]
    runs = expand({**recipe, "grid": {"data.user": places, "user.rho": [0.1, 1.0]}})
    store = Store(tmp_path / "store")
    with pytest.raises(InputError, match=r"bad\.jsonl, line \d+: the prompt alone has") as found:
        planning.rehearse(planning.plan(runs, store), store, "cpu")
    assert str(found.value).count("user rows cannot be used") == 1
    assert "user.jsonl, line" not in str(found.value)


def test_a_shared_check_hides_no_problem(tmp_path):
    """The runs differ only in parameters of the method, and one of them cannot be trained."""
    runs = expand({**tiny.recipe(tmp_path / "in"), "grid": {"user.alignment_steps": [1, 1000]}})
    store = Store(tmp_path / "store")
    with pytest.raises(InputError, match="it would train on no user row") as found:
        planning.rehearse(planning.plan(runs, store), store, "cpu")
    assert str(found.value).count("no user row") == 1
