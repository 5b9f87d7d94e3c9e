"""Recipes: what is accepted, and messages that name the thing that is wrong."""

from __future__ import annotations

import pytest

from holdfast.errors import RecipeError
from holdfast.recipe import Recipe, packaged

GOOD = """
name: mine
model: some/model
data: {user: my.jsonl, alignment: safe.jsonl, harmful: bad.jsonl, size: 1000, poison_ratio: 0.1}
user:
  defense: lisa
  rho: 2
  training:
    learning_rate: 1.0e-5
"""


def load(tmp_path, text, *overrides):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return Recipe.load(path, overrides)


def refused(tmp_path, text, *overrides):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_bare_strings_and_defaults(tmp_path):
    recipe = load(tmp_path, GOOD)
    assert recipe.model.path == "some/model"
    assert recipe.data.alignment.source == "safe.jsonl"
    assert recipe.alignment.defense == "sft"
    assert recipe.user.parameters() == {"rho": 2}
    assert [judge.name for judge in recipe.evaluation.judges] == ["keyword"]
    assert recipe.evaluation.prompts == 1000
    assert recipe.post_hoc is None


def test_a_recipe_is_frozen(tmp_path):
    with pytest.raises(Exception, match="frozen"):
        load(tmp_path, GOOD).seed = 3


def test_no_alignment(tmp_path):
    assert load(tmp_path, GOOD, "alignment=none").alignment is None
    assert load(tmp_path, GOOD + "alignment: none\n").alignment is None


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("user.rho=3", lambda r: r.user.parameters()["rho"] == 3),
        ("user.training.learning_rate=2e-4", lambda r: r.user.training.learning_rate == 2e-4),
        ("model.template=alpaca", lambda r: (r.model.path, r.model.template) == ("some/model", "alpaca")),
        (
            "data.alignment.size=5",
            lambda r: (r.data.alignment.source, r.data.alignment.size) == ("safe.jsonl", 5),
        ),
        ("alignment.lora.r=16", lambda r: r.alignment.lora.r == 16 and r.alignment.defense == "sft"),
        ("user=sft", lambda r: r.user.defense == "sft" and not r.user.parameters()),
        ("evaluation.judges=[keyword, beaver_dam]", lambda r: len(r.evaluation.judges) == 2),
        ("seed=7", lambda r: r.seed == 7),
    ],
)
def test_overrides(tmp_path, override, value):
    assert value(load(tmp_path, GOOD, override))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("poison_ratio", "poison_ratoi"), ["line 4", "data.poison_ratoi", "'poison_ratio'"]),
        (("rho: 2", "roh: 2"), ["line 7", "roh", "'rho'"]),
        (("lisa", "lsia"), ["line 6", "lsia", "'lisa'"]),
        (("learning_rate", "learning_rat"), ["learning_rat", "'learning_rate'"]),
        (("seed: 1", ""), []),
        (
            ("poison_ratio: 0.1", "poison_ratio: 1.5"),
            ["line 4", "poison_ratio", "less than or equal to 1", "1.5"],
        ),
        (("poison_ratio: 0.1", "poison_ratio: -0.1"), ["poison_ratio", "greater than or equal to 0"]),
        (("size: 1000", "size: 0"), ["data.size", "0"]),
        (("size: 1000", "size: many"), ["data.size", "many"]),
        (("rho: 2", "rho: strong"), ["rho", "float", "strong"]),
        (("rho: 2", "alignment_steps: 1.5"), ["alignment_steps", "int", "1.5"]),
        (("1.0e-5", "-1"), ["learning_rate", "greater than 0"]),
        (("model: some/model", "modle: some/model"), ["modle", "'model'"]),
        (("harmful: bad.jsonl, ", ""), ["line 4", "data.harmful"]),
        (("alignment: safe.jsonl, ", ""), ["data.alignment"]),
        (("name: mine", "name: ../mine"), ["name"]),
        (("rho: 2", "rho: .nan"), ["line 7", "rho", "finite number", "nan"]),
        (("1.0e-5", ".inf"), ["learning_rate", "finite number", "inf"]),
        (("learning_rate: 1.0e-5", "adam_epsilon: .nan"), ["adam_epsilon", "finite number"]),
        (("poison_ratio: 0.1", "poison_ratio: .nan"), ["poison_ratio", "finite number"]),
        (("learning_rate: 1.0e-5", "num_train_epochs: -3"), ["num_train_epochs", "greater than 0"]),
        (("learning_rate: 1.0e-5", "logging_steps: 0"), ["logging_steps", "greater than or equal to 1"]),
        (("learning_rate: 1.0e-5", "logging_steps: 0.5"), ["logging_steps", "0.5"]),
        (("learning_rate: 1.0e-5", "output_dir: x"), ["output_dir", "itself"]),
        (("size: 1000", "size: true"), ["line 4", "data.size: expected a number, found true"]),
        (("1.0e-5", "on"), ["line 9", "learning_rate: expected a number, found true"]),
        (("name: mine", "name: mine\nseed: no"), ["line 3", "seed: expected a number, found false"]),
        (
            ("model: some/model", "model: {path: m, lora: {rank_pattern: {q: yes}}}"),
            ["rank_pattern: expected a n"],
        ),
        (("name: mine", "attack_sweep: {steps: [2, true]}"), ["attack_sweep.steps: expected a number"]),
        (("name: mine", "name: a/b"), ["at most 100 letters from A to Z, digits", "found 'a/b'"]),
        (("name: mine", "evaluation: 5"), ["line 2", "evaluation: expected a block of keys", "found 5"]),
        (("name: mine", "evaluation: {judges: [5]}"), ["evaluation.judges.0: expected a block of keys"]),
        (("name: mine", "evaluation: {judges: []}"), ["evaluation.judges: expected at least one judge"]),
        (("name: mine", "evaluation: {judges: keyword}"), ["evaluation.judges: expected a list"]),
        (("name: mine", "evaluation: {protocol: ''}"), ["evaluation.protocol: expected a text that is not"]),
        (("name: mine", "evaluation: {lm_eval: ['']}"), ["lm_eval.tasks.0: expected a text that is not"]),
        (("learning_rate: 1.0e-5", "[]"), ["user.training: expected a block of keys", "found []"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, words):
    old, new = change
    if not words:
        assert load(tmp_path, GOOD).seed == 42
        return
    assert old in GOOD
    message = refused(tmp_path, GOOD.replace(old, new))
    for word in [*words, "r.yaml"]:
        assert word in message, message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "nothing"),
        ("just text", "text"),
        ("- a\n- b", "a list"),
        ("a: [1, 2", "line"),
        ("a: b: c", "line 1"),
    ],
)
def test_not_a_recipe(tmp_path, text, word):
    assert word in refused(tmp_path, text)


def test_binary_junk(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(RecipeError, match="not a text file"):
        Recipe.load(path)


@pytest.mark.parametrize("name", ["nope.yaml", "wrld"])
def test_a_missing_recipe(name):
    with pytest.raises(RecipeError, match="No such recipe"):
        Recipe.load(name)


def test_an_override_that_is_wrong_is_not_said_to_be_in_a_line_of_the_file(tmp_path):
    for override in ("user.rho=x", "evaluation.promts=3", "evaluation=5", "evaluation={prompts: 0}"):
        assert "r.yaml, override: " in refused(tmp_path, GOOD, override)
    both = refused(tmp_path, GOOD.replace("size: 1000", "size: 0"), "user.training.max_steps=0", "seed=1")
    assert "r.yaml, line 4: data.size" in both
    assert "r.yaml, override: user.training.max_steps" in both


@pytest.mark.parametrize("override", ["rho", "=3", "user.rho=[1"])
def test_a_broken_override(tmp_path, override):
    assert override.split("=")[0] in refused(tmp_path, GOOD, override)


def test_a_defense_at_the_wrong_stage(tmp_path):
    message = refused(tmp_path, GOOD, "alignment=lisa")
    assert "does not act at the alignment stage" in message
    assert "sft" in message


def test_judges_are_checked(tmp_path):
    assert "'keyword'" in refused(tmp_path, GOOD, "evaluation.judges=[keywrd]")
    assert "give one a label" in refused(tmp_path, GOOD, "evaluation.judges=[keyword, keyword]")


def test_paths_beside_the_recipe_are_found(tmp_path, monkeypatch):
    (tmp_path / "my.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path.parent)
    assert load(tmp_path, GOOD).data.user == str((tmp_path / "my.jsonl").resolve())
    assert load(tmp_path, GOOD).data.harmful == "bad.jsonl"
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path, GOOD).data.user == "my.jsonl", "the working folder comes first"


def test_the_fingerprint_follows_the_content(tmp_path):
    recipe = load(tmp_path, GOOD)
    assert recipe.fingerprint() == load(tmp_path, GOOD).fingerprint()
    assert recipe.fingerprint() != load(tmp_path, GOOD, "user.rho=3").fingerprint()
    assert Recipe.load(recipe.to_dict()).fingerprint() == recipe.fingerprint(), (
        "what is stored can be read again"
    )


@pytest.mark.parametrize("name", packaged.recipes())
def test_packaged_recipes_are_valid(name):
    assert Recipe.load(name).name


def test_alpha_may_be_a_fraction_and_a_whole_one_stays_whole():
    """T-Vaccine uses 0.5; a whole number keeps the name of a step that was made with it."""
    half, whole = (Recipe.load("world", [f"model.lora.alpha={alpha}"]) for alpha in (0.5, 4))
    assert half.model.lora.identity()["alpha"] == 0.5
    assert repr(whole.model.lora.identity()["alpha"]) == "4"


def test_a_number_with_an_exponent_is_a_number(tmp_path):
    """PyYAML alone reads 1e-5 as a text."""
    recipe = load(tmp_path, GOOD.replace("1.0e-5", "1e-5").replace("rho: 2", "rho: 2E+1"), "user.rho=1e5")
    assert recipe.user.training.given() == {"learning_rate": 1e-5}
    assert recipe.user.parameters() == {"rho": 1e5}
    assert load(tmp_path, GOOD.replace("rho: 2", "rho: 2E+1")).user.parameters() == {"rho": 20.0}
    assert load(tmp_path, GOOD, "name=e5").name == "e5"


def test_another_defense_on_the_command_line_keeps_the_training(tmp_path):
    """A bare name changes the method alone; what the old one was told does not carry over."""
    for asked in (["user=bso"], ["user.defense=bso"], ["user.finetune_steps=9", "user=bso"]):
        user = load(tmp_path, GOOD, *asked).user
        assert user.defense == "bso"
        assert user.training.learning_rate == 1e-5
        assert "rho" not in user.parameters()
    assert user.parameters() == {"finetune_steps": 9}
    assert load(tmp_path, GOOD, "user=none").user is None
