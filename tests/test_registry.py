"""Names are found without importing, and those of other packages too."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

from holdfast import registry
from holdfast.errors import RecipeError

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


@pytest.mark.parametrize("group", ["defenses", "tasks", "judges"])
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


def test_a_method_of_another_package(tmp_path, monkeypatch):
    (tmp_path / "toy_defense.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("toy", "toy_defense:DEFENSE", "holdfast.defenses")
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [entry] if group == "holdfast.defenses" else []
    )
    registry.faces.cache_clear()
    try:
        face = registry.faces("defenses")["toy"]
        assert face.summary == "Toy: a method of another package."
        assert face.parameters["strength"].default == 0.5
        assert "toy" in registry.list_defenses("user")
        assert "trainer" in face.code
        assert "mix" not in face.code
        assert registry.get_defense("toy").label == "Toy"
    finally:
        registry.faces.cache_clear()
        sys.modules.pop("toy_defense", None)
