"""The contract suite over methods of another package: a sound one passes, broken ones are caught."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from holdfast import plugins, registry
from places import ROOT
from warm import warm

TOY = '''
"""Toy: pulls the weights towards where they began (a method of another package)."""

from dataclasses import dataclass, field

import torch

from holdfast.defenses import Defense
from holdfast.training.parameters import gradient_scale, trainable_parameters
from holdfast.training.trainer import MethodConfig, RowTrainer


@dataclass
class ToyConfig(MethodConfig):
    strength: float = field(default=5.0, metadata={"help": "How hard it pulls."})


class ToyTrainer(RowTrainer):
    start = None

    def weights(self):
        return list(trainable_parameters(self.model).values())

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.start is None:
            self.start = [w.detach().clone() for w in self.weights()]
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.now():
            for w, s in zip(self.weights(), self.start):
                w.grad.add_(w.detach() - s, alpha=self.args.strength * self.scale())
        return loss

    def now(self):
        return self.accelerator.sync_gradients

    def scale(self):
        return gradient_scale(self.accelerator)

    def method_state(self):
        start = self.start or [torch.zeros_like(w) for w in self.weights()]
        return {f"start.{i}": s for i, s in enumerate(start)}

    def method_loaded(self, state):
        self.start = list(state.values())


class EveryMicroBatch(ToyTrainer):
    def now(self):
        return True


class Forgets(ToyTrainer):
    def method_state(self):
        return {}


class NoScale(ToyTrainer):
    def scale(self):
        return 1.0


class InTheLoss(ToyTrainer):
    def now(self):
        return False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        made = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = made[0] if return_outputs else made
        for w, s in zip(self.weights(), self.start):
            loss = loss + self.args.strength / 2 * ((w - s) ** 2).sum()
        return (loss, made[1]) if return_outputs else loss


class Spends(ToyTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.rand(1)


def defense(name, trainer):
    return Defense(name=name, label=name, stages=("user",), paper="none", config=ToyConfig, trainer=trainer)


sound = defense("sound", ToyTrainer)
broken = {
    f"broken_{trainer.__name__}": defense(f"broken_{trainer.__name__}", trainer)
    for trainer in (EveryMicroBatch, Forgets, NoScale, InTheLoss, Spends)
}
globals().update(broken)
'''
CAUGHT = {
    "EveryMicroBatch": {"test_gradient_accumulation_changes_nothing"},
    "Forgets": {"test_a_resumed_run_equals_one_never_cut"},
    "NoScale": {"test_a_loss_scaler_changes_nothing"},
    "InTheLoss": {
        "test_gradient_accumulation_changes_nothing",
        "test_the_eval_loss_is_plain_cross_entropy",
        "test_the_logged_loss_is_true",
    },
    "Spends": {"test_making_a_trainer_draws_no_random_number"},
}


def contract(folder: Path, names: list[str], selected: str) -> dict[str, set[str]]:
    """Run the suite as a third party would, over a package with an entry point for each name.

    Returns:
        which tests ran and failed, by name of the method: "ran NAME" and "failed NAME".
    """
    (folder / "toy_package.py").write_text(TOY)
    info = folder / "toy_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    lines = [f"{name} = toy_package:{name}" for name in names]
    (info / "entry_points.txt").write_text("\n".join(["[holdfast.defenses]", *lines]) + "\n")
    warm()
    process = multiprocessing.get_context("fork").Process(target=_suite, args=(folder, selected))
    process.start()
    process.join(240)
    printed = (folder / "printed.txt").read_text()
    assert process.exitcode == 1, printed
    found: dict[str, set[str]] = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        test, _, about = case.get("name", "").partition("[")
        (name,) = [n for n in names if n in about]
        found.setdefault(f"ran {name}", set()).add(test)
        assert case.find("error") is None, printed
        if case.find("failure") is not None:
            found.setdefault(f"failed {name}", set()).add(test)
    return found


def _suite(folder: Path, selected: str) -> None:
    """pytest in a forked process: imports are loaded only once, but the registry and the suite are read again."""
    os.chdir(ROOT)
    sys.path.insert(0, str(folder))
    printed = os.open(folder / "printed.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1), os.dup2(printed, 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    for name in ("test_contract", "conftest"):
        sys.modules.pop(name, None)
    for cached in (plugins.plugins, registry.faces):
        cached.cache_clear()
    os._exit(
        pytest.main(
            ["-q", "-p", "no:cacheprovider", "tests/defenses/test_contract.py", "-k", selected,
             f"--junitxml={folder / 'report.xml'}"]
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The whole suite over the sound method; over each broken one the tests that are to notice it."""
    some = [f"({kind} and ({' or '.join(tests)}))" for kind, tests in CAUGHT.items()]
    names = ["sound", *(f"broken_{kind}" for kind in CAUGHT)]
    return contract(tmp_path_factory.mktemp("package"), names, " or ".join(["sound", *some]))


def test_a_sound_method_of_another_package_passes(found):
    assert "failed sound" not in found
    assert set.union(*CAUGHT.values()) < found["ran sound"]
    assert len(found["ran sound"]) >= 12


def test_broken_methods_are_caught(found):
    assert {kind: found.get(f"failed broken_{kind}") for kind in CAUGHT} == CAUGHT
