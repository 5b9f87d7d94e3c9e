"""Names, including those of other packages, are found without importing."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import EntryPoint

import pytest

from holdfast import registry, tasks
from holdfast.errors import DataError, RecipeError
from holdfast.plugins import PluginWarning
from holdfast.recipe import Recipe

TOY = '''
"""Toy: a method of another package."""
from dataclasses import dataclass
from holdfast.defenses import Defense
from holdfast.training.trainer import MethodConfig, RowTrainer

@dataclass
class ToyConfig(MethodConfig):
    strength: float = 0.5

class ToyTrainer(RowTrainer):
    pass

DEFENSE = Defense(name="toy", label="Toy", stages=("user",), paper="none", config=ToyConfig, trainer=ToyTrainer)
'''


def test_what_is_there():
    assert {"bso", "lisa", "sft"} <= set(registry.list_defenses())
    aligned = {"booster", "repnoise", "sft", "tar", "tvaccine", "vaccine"}
    assert aligned <= set(registry.list_defenses("alignment"))
    assert {"keyword", "beaver_dam"} <= set(registry.faces("judges"))
    assert {"world", "sst2", "agnews", "gsm8k", "own", "beavertails"} <= set(registry.faces("tasks"))


@pytest.mark.parametrize("group", ["defenses", "attacks", "tasks", "judges"])
def test_every_face_is_told_and_loads(group):
    for name, face in registry.faces(group).items():
        assert face.summary.endswith((".", ":")) or len(face.summary) > 10
        assert registry.get(group, name).name == name


def test_inherited_parameters_come_first():
    assert list(registry.faces("defenses")["lisa"].parameters) == [
        "alignment_steps", "finetune_steps", "skip_user_batches", "rho", "proximal_warmup_ratio",
        "proximal", "fisher_rows",
    ]  # fmt: skip


def test_what_a_method_brings_is_known_without_importing_it():
    for name, face in registry.faces("defenses").items():
        made = registry.get_defense(name)
        for part in ("mix", "prefix", "trainer", "apply"):
            assert (part in face.code) == (getattr(made, part) is not None), (name, part)


def test_training_arguments_are_those_of_transformers():
    import dataclasses

    from transformers import TrainingArguments

    assert set(registry.training_arguments()) == {f.name for f in dataclasses.fields(TrainingArguments)}


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean 'lisa'"):
        registry.get_defense("lissa")


def test_a_method_of_another_package(tmp_path, monkeypatch, install):
    (tmp_path / "toy_defense.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    install(EntryPoint("toy", "toy_defense:DEFENSE", "holdfast.defenses"))
    try:
        face = registry.faces("defenses")["toy"]
        assert face.summary == "Toy: a method of another package."
        assert face.parameters["strength"].default == 0.5
        assert "toy" in registry.list_defenses("user")
        assert "trainer" in face.code
        assert "mix" not in face.code
        assert registry.get_defense("toy").label == "Toy"
    finally:
        sys.modules.pop("toy_defense", None)


def entry(name, value, group="defenses"):
    return EntryPoint(name, value, f"holdfast.{group}")


def the_warning(recwarn):
    """The text of the only warning about plug-ins so far."""
    (warning,) = [w for w in recwarn.list if w.category is PluginWarning]
    recwarn.clear()
    return str(warning.message)


BROKEN = {
    "defenses": ("no_such_module:DEFENSE", "cannot be imported: ModuleNotFoundError", "holdfast.tasks.sst2:TASK"),
    "attacks": ("no_such_module:ATTACK", "cannot be imported: ModuleNotFoundError", "holdfast.tasks.sst2:TASK"),
    "tasks": ("no_such_module:TASK", "cannot be imported: ModuleNotFoundError", "holdfast.defenses.sft:DEFENSE"),
    "judges": ("no_such_module:JUDGE", "cannot be imported: ModuleNotFoundError", "holdfast.tasks.sst2:TASK"),
}  # fmt: skip


@pytest.mark.parametrize("group", list(BROKEN))
def test_a_plug_in_that_cannot_be_used_is_one_warning(group, install, recwarn):
    """A plug-in that is missing or of another kind: a warning names it, using it is an error, the rest works."""
    value, why, other = BROKEN[group]
    known = set(registry.faces(group))
    for torn, reason in ((value, why), (other, "expected a ")):
        install(entry("torn", torn, group))
        assert set(registry.faces(group)) == known
        registry.face(group, min(known))
        with pytest.raises(RecipeError, match=reason):
            registry.face(group, "torn")
        with pytest.raises(RecipeError, match=reason):
            registry.get(group, "torn")
        text = the_warning(recwarn)
        assert f"'torn' ({torn})" in text
        assert reason in text


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("defenses", "lisa", "holdfast.defenses.bso:DEFENSE"),
        ("attacks", "overfitting", "holdfast.attacks.long_training:ATTACK"),
        ("tasks", "sst2", "holdfast.tasks.agnews:TASK"),
        ("judges", "keyword", "holdfast.evaluation.judges.beaver_dam:JUDGE"),
    ],
)
def test_our_name_stays_ours(group, name, value, install, recwarn):
    ours, face = registry.get(group, name), registry.faces(group)[name]
    install(entry(name, value, group))
    assert registry.faces(group)[name] == face
    assert registry.get(group, name) is ours
    if group == "tasks":
        assert tasks.find(name) is ours
    assert "one of Holdfast's own" in the_warning(recwarn)


def test_the_first_of_two_packages_keeps_its_name(tmp_path, monkeypatch, install, recwarn):
    for module, label in (("toy_one", "One"), ("toy_two", "Two")):
        (tmp_path / f"{module}.py").write_text(TOY.replace('label="Toy"', f'label="{label}"'))
    monkeypatch.syspath_prepend(tmp_path)
    install(entry("toy", "toy_one:DEFENSE"), entry("toy", "toy_two:DEFENSE"))
    assert registry.get_defense("toy").label == registry.faces("defenses")["toy"].facts["label"] == "One"
    assert "toy_two:DEFENSE) of another package is not used: the name 'toy' is taken by toy_one:DEFENSE" in (
        the_warning(recwarn)
    )


def test_tasks_ask_by_the_same_rule(install, recwarn):
    assert set(tasks.names()) == set(registry.faces("tasks"))
    install(entry("torn", "no_such_module:TASK", "tasks"))
    registry.faces("tasks")
    assert "torn" not in tasks.names()
    assert tasks.find("sst2") is registry.get("tasks", "sst2")
    with pytest.raises(DataError, match="no_such_module"):
        tasks.find("torn")
    assert "torn" in the_warning(recwarn)


def test_a_recipe_that_names_a_broken_plug_in_says_why(install, recwarn):
    install(entry("torn", "no_such_module:DEFENSE"))
    assert Recipe.load("world").user.defense == "sft"
    with pytest.raises(RecipeError, match=r"'torn' .* is not used: it cannot be imported"):
        Recipe.load("world", ["user=torn"])


def test_the_command_shows_the_warning_as_a_line(install):
    from typer.testing import CliRunner

    from holdfast.cli.app import app

    install(entry("torn", "no_such_module:DEFENSE"))
    with warnings.catch_warnings():
        done = CliRunner().invoke(app, ["list", "defenses"], env={"COLUMNS": "140"})
    assert done.exit_code == 0
    assert "lisa" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("holdfast: warning: The holdfast.defenses entry point 'torn'")
