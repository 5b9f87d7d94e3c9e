"""A recipe that extends another, block by block, with messages that name the right file and line."""

from __future__ import annotations

import pytest

from holdfast.errors import RecipeError
from holdfast.recipe import Recipe

BASE = """
name: base
model: {path: some/model, template: alpaca}
data:
  user: my.jsonl
  alignment: safe.jsonl
  harmful: bad.jsonl
  poison_ratio: 0.1
user:
  defense: lisa
  rho: 2
  lora: {r: 16, alpha: 32}
  training: {learning_rate: 1.0e-5, max_steps: 7}
"""


@pytest.fixture
def write(tmp_path):
    def written(**files):
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return tmp_path

    return written


def test_block_by_block(write):
    folder = write(
        base=BASE,
        own="extends: base.yaml\ndata: {poison_ratio: 0.2}\nuser: {lora: {r: 4}, training: {max_steps: 9}}\n",
    )
    own = Recipe.load(folder / "own.yaml")
    assert own.name == "own", "runs are kept apart: the name is not inherited"
    assert (own.model.path, own.model.template) == ("some/model", "alpaca")
    assert (own.data.user, own.data.poison_ratio) == ("my.jsonl", 0.2)
    assert (own.user.defense, own.user.parameters()) == ("lisa", {"rho": 2})
    assert (own.user.lora.r, own.user.lora.alpha) == (4, 32)
    assert own.user.training.given() == {"learning_rate": 1e-5, "max_steps": 9}
    assert Recipe.load(folder / "own.yaml", ["user.rho=5"]).user.parameters() == {"rho": 5}


def test_another_defense_keeps_training_and_lora_only(write):
    folder = write(base=BASE, a="extends: base.yaml\nuser: sft\n", b="extends: base.yaml\nuser: {defense: bso}\n",
                   c="extends: base.yaml\nuser: {defense: lisa}\n", d="extends: a.yaml\nuser: {defense: lisa}\n")  # fmt: skip
    for name in "ab":
        user = Recipe.load(folder / f"{name}.yaml").user
        assert user.parameters() == {}
        assert (user.training.max_steps, user.lora.r) == (7, 16)
    assert Recipe.load(folder / "c.yaml").user.parameters() == {"rho": 2}, "the same defense"
    assert Recipe.load(folder / "d.yaml").user.parameters() == {}, "what the middle one dropped stays dropped"


def test_bare_names_and_none(write):
    folder = write(
        base=BASE,
        own="extends: base.yaml\nmodel: other/model\ndata: {alignment: {size: 5}}\nuser: {lora: none}\n",
        na="extends: own.yaml\nalignment: none\nuser: {lora: {r: 3}}\n",
    )
    own, na = (Recipe.load(folder / f"{name}.yaml") for name in ("own", "na"))
    assert (own.model.path, own.model.template) == ("other/model", "alpaca")
    assert (own.data.alignment.source, own.data.alignment.size) == ("safe.jsonl", 5)
    assert own.trains("user") == "full"
    assert na.alignment is None
    assert (na.user.lora.r, na.user.lora.alpha) == (3, 4), "a stage that is none has no keys to inherit"


def test_a_packaged_recipe_is_extended_by_name(write):
    folder = write(own="extends: lisa-sst2\nmodel: my/model\nuser: {rho: 0.5}\n")
    own, packaged = Recipe.load(folder / "own.yaml"), Recipe.load("lisa-sst2")
    assert own.user.parameters() == {**packaged.user.parameters(), "rho": 0.5}
    assert own.evaluation == packaged.evaluation
    assert Recipe.load({"extends": "lisa-sst2", "name": "x", "model": "my/model"}).data == packaged.data


def test_paths_are_beside_the_file_that_names_them(write):
    folder = write(shared__base=BASE, own="extends: shared/base.yaml\ndata: {harmful: bad.jsonl}\n")
    for place in ("shared", "."):
        for name in ("my.jsonl", "bad.jsonl", "safe.jsonl"):
            (folder / place / name).write_text("{}")
    data = Recipe.load(folder / "own.yaml").data
    assert data.user == str(folder / "shared" / "my.jsonl")
    assert data.alignment.source == str(folder / "shared" / "safe.jsonl")
    assert data.harmful == str(folder / "bad.jsonl")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"base": BASE, "own": "extends: base.yaml\nuser:\n  roh: 3\n"}, ["own.yaml, line 3", "'rho'"]),
        ({"base": BASE.replace("rho", "roh"), "own": "extends: base.yaml\n"}, ["base.yaml, line 11", "'rho'"]),
        (
            {"base": BASE, "own": "extends: base.yaml\nuser: {defense: bso, rho: 1}\n"},
            ["own.yaml, line 2", "unknown parameter of bso"],
        ),
        (
            {"base": BASE.replace("0.1", "2"), "own": "extends: base.yaml\ndata: {size: 3}\n"},
            ["base.yaml, line 8", "poison_ratio"],
        ),
        ({"own": "extends: bsae.yaml\n", "base": BASE}, ["own.yaml, line 1: extends", "bsae.yaml"]),
        ({"own": "extends: lisa-sst3\n"}, ["own.yaml, line 1: extends", "'lisa-sst2'"]),
        ({"own": "\nextends: 3\n"}, ["own.yaml, line 2: extends", "found 3"]),
        ({"own": "extends: own.yaml\n"}, ["circle", "own.yaml extends"]),
        ({"own": "extends: b.yaml\n", "b": "extends: c.yaml\n", "c": "extends: b.yaml\n"}, ["circle", "c.yaml"]),
        ({"own": "extends: b.yaml\n", "b": "- 1\n"}, ["own.yaml, line 1: extends", "b.yaml", "a list"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_named_where_it_stands(write, files, words):
    folder = write(**files)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(folder / "own.yaml")
    for word in words:
        assert word in str(caught.value)
