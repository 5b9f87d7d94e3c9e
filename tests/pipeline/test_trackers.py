"""`training.report_to` sends logs to the trackers that the recipe names, and changes no step's name."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types

import pytest
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations import integration_utils as integrations

import tiny
from holdfast.errors import RecipeError
from holdfast.pipeline import tracking, training
from holdfast.recipe import Recipe
from runs import run


class Tracker(TrainerCallback):
    """A fake tracker of transformers: one is made for each training."""

    made: list[Tracker]

    def __init__(self):
        self.logs, self.name = [], None
        type(self).made.append(self)

    def on_train_begin(self, args, state, control, **kwargs):
        self.name = args.run_name

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.fixture
def installed(monkeypatch):
    """Use the fake as `trackio`, which then appears to be installed."""
    found = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("trackio", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: spec if name == "trackio" else found(name, *a)
    )
    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "trackio", Tracker)
    monkeypatch.setattr(Tracker, "made", [], raising=False)
    monkeypatch.setitem(sys.modules, "trackio", Trackio())
    return Tracker.made


class Trackio(types.ModuleType):
    """The functions of `trackio` that scores are sent with."""

    def __init__(self):
        super().__init__("trackio")
        self.calls = []
        for name in ("init", "log", "finish"):
            setattr(self, name, lambda *a, _call=name, **k: self.calls.append((_call, a, k)))


def recipe(tmp_path, **user):
    made = tiny.recipe(tmp_path / "in")
    made["user"]["training"] = made["user"]["training"] | user
    return made


def test_the_log_goes_to_the_tracker_and_the_step_stays(tmp_path, installed):
    results, first = run(recipe(tmp_path, report_to="trackio"), tmp_path / "out")
    (tracker,) = installed
    assert any("loss" in logs for logs in tracker.logs)
    assert tracker.name in [path.name for path in (tmp_path / "out" / "steps").glob("user-*")]
    assert any(title.startswith("user fine-tuning") for title in first.ran)
    (name, _, named), (_, (values,), _), _ = sys.modules["trackio"].calls
    assert (name, named["name"], named["project"]) == ("init", "tiny", "huggingface")
    row = results["rows"][-1]
    assert values["tiny/harmful_score"] == row["harmful_score"], "the final scores are sent too"
    assert set(values) >= {"aligned/harmful_score", "tiny/finetune_accuracy"}
    for changed in ({}, {"report_to": "none"}, {"report_to": ["trackio"], "run_name": "mine"}):
        _, again = run(recipe(tmp_path, **changed), tmp_path / "out")
        assert not again.ran, changed
    assert len(sys.modules["trackio"].calls) == 3, "a cached run sends nothing"
    card = next((tmp_path / "out" / "steps").glob("user-*/adapter/README.md"))
    assert "report_to" not in card.read_text()


def test_the_name_is_the_users_own(tmp_path, installed):
    run(recipe(tmp_path, report_to=["trackio"], run_name="mine"), tmp_path / "out")
    assert [tracker.name for tracker in installed] == ["mine"]


def test_a_tracker_that_is_not_installed_stops_before_training(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "mlflow" else found(name, *a)
    )
    with pytest.raises(RecipeError, match="mlflow is not installed"):
        run(recipe(tmp_path, report_to="mlflow"), tmp_path / "out")
    assert not list((tmp_path / "out" / "steps").glob("alignment-*"))


@pytest.mark.parametrize("named", ["wandbb", ["trackio", "wandbb"]])
def test_an_unknown_tracker_is_refused_with_the_nearest(tmp_path, named):
    with pytest.raises(RecipeError, match=r"unknown tracker 'wandbb'.*'wandb'"):
        Recipe.load(recipe(tmp_path, report_to=named))


class Stub:
    """The part of a trainer that its trackers need."""

    def __init__(self, report_to, *callbacks):
        self.args = types.SimpleNamespace(report_to=report_to, run_name=None)
        self.callback_handler = types.SimpleNamespace(callbacks=callbacks)


@pytest.mark.parametrize("open_before", [False, True])
def test_wandbs_run_is_closed_unless_it_is_the_users(monkeypatch, tmp_path, open_before):
    wandb = types.SimpleNamespace(run="theirs" if open_before else None)
    wandb.finish = lambda: setattr(wandb, "run", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with contextlib.suppress(KeyboardInterrupt), training.tracked(Stub(["wandb"]), "step", tmp_path):
        wandb.run = wandb.run or "ours"
        raise KeyboardInterrupt
    assert wandb.run == ("theirs" if open_before else None)


def test_tensorboard_writes_where_nothing_is_removed(tmp_path):
    callback = TensorBoardCallback.__new__(TensorBoardCallback)
    callback.logging_dir = None
    with training.tracked(Stub(["tensorboard"], callback), "step", tmp_path / "logs"):
        assert callback.logging_dir == str(tmp_path / "logs")


class Wandb(types.ModuleType):
    """The part of wandb that scores are sent with."""

    def __init__(self, run=None):
        super().__init__("wandb")
        self.run, self.summary, self.finished = run, {}, 0

    def init(self, **given):
        self.given = given
        return self

    def finish(self):
        self.finished += 1


class Mlflow(types.ModuleType):
    """The part of MLflow that scores are sent with."""

    def __init__(self):
        super().__init__("mlflow")
        self.sent = {}

    def active_run(self):
        return None

    def start_run(self, **given):
        self.given = given
        return contextlib.nullcontext()

    def log_metrics(self, values):
        self.sent = values


RESULTS = {"rows": [{"name": "a", "harmful_score": 1.5, "finetune_accuracy": None, "seconds": 3}]}


def test_scores_for_each_tracker(tmp_path, monkeypatch, caplog):
    """A tracker that fails is a warning, and the next one still gets the scores."""
    wandb, mlflow = Wandb(), Mlflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    made = Recipe.load(recipe(tmp_path, report_to=["wandb", "trackio", "mlflow"]))
    tracking.log_scores(tmp_path, made, RESULTS)
    assert wandb.summary == mlflow.sent == {"a/harmful_score": 1.5}
    assert (wandb.given, wandb.finished) == ({"project": "huggingface", "name": "tiny"}, 1)
    assert mlflow.given == {"run_name": "tiny", "nested": False}
    assert "could not be sent to trackio" in caplog.text
    theirs = Wandb(run=wandb)
    monkeypatch.setitem(sys.modules, "wandb", theirs)
    tracking.log_scores(tmp_path, made, RESULTS)
    assert theirs.finished == 0, "the user's own run stays open"
