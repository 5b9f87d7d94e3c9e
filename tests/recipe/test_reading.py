"""Recipe files that people and programs write wrongly: each is one sentence with its line, and takes no time."""

from __future__ import annotations

import contextlib
import os
import time

import pytest

from holdfast import Recipe
from holdfast.errors import RecipeError
from holdfast.recipe.reading import parse, shorten

BASE = "model: world\ndata: {task: world, harmful: world, alignment: {source: world, kind: safe}}\n"
LAUGHS = "x: &l0 [a,a,a,a,a,a,a,a,a]\n" + "".join(
    f"x{i}: &l{i} [{','.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
WRONG = {
    "an impossible date": ("name: 2024-13-45\n", "line 1: .*'2024-13-45' cannot be read as a value"),
    "thousands of digits": ("seed: " + "9" * 5000 + "\n", "line 1: .*cannot be read as a value"),
    "a hexadecimal number without digits": ("seed: 0x_\n", "line 1: .*cannot be read"),
    "a word that is no truth value": ("seed: !!bool x\n", "line 1: .*cannot be read"),
    "a tag that runs code": ("seed: !!python/object/apply:os.getcwd []\n", "line 1: .*could not determine"),
    "a number as key": ("seed: 1\n1: 2\n", "line 2: .*expected a text as key, found '1'"),
    "a truth value as key": ("yes: 2\n", "line 1: .*expected a text as key, found 'yes'"),
    "a list as key": ("? [a, b]\n: 2\n", "line 1: .*found a list or a mapping"),
    "a key twice": ("seed: 1\nseed: 2\n", "line 2: .*'seed' appears twice, first in line 1"),
    "a key twice in a block": ("user:\n  rho: 1\n  rho: 2\n", "line 3: .*'rho' appears twice"),
    "many brackets": ("name: " + "[" * 5000 + "\n", "nested too deeply|not valid YAML"),
    "aliases without end": (LAUGHS + "name: *l8\n", r"line \d+: .*more than 10,000 values"),
    "an alias of itself": ("name: &a [*a]\n", "line 1: .*contains itself"),
    "a tab": ("user:\n\trho: 1\n", "line 2: .*Indent with spaces"),
    "a control character": ("seed: 1\nname: a\x07b\n", "line 2: .*special characters"),
    "an open bracket": ("seed: [1\n", "line 2: not valid YAML"),
    "not a number": ("user: {defense: lisa, rho: .nan}\n", "line 1: user.rho: expected a finite number, found nan"),
    "infinity": (
        "user: {defense: sft, training: {learning_rate: .inf}}\n",
        "line 1: user.training.learning_rate: expected a finite number, found inf",
    ),
    "a value that is too long to show": ("seed: [" + "1," * 900 + "1]\n", "line 1: seed: .*found "),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_sentence_with_its_line(name, tmp_path):
    text, message = WRONG[name]
    path = tmp_path / "r.yaml"
    path.write_text(text + BASE, encoding="utf-8")
    with pytest.raises(RecipeError, match=message) as found:
        Recipe.load(path)
    assert str(path) in str(found.value)
    assert len(str(found.value)) < 400


@pytest.mark.parametrize(
    "text", ["1" * 200_000 + "x", "1" * 200_000 + "e", "_" * 200_000, "a: " * 2000 + "1"]
)
def test_a_long_text_takes_no_time(text):
    began = time.process_time()
    with contextlib.suppress(RecipeError):
        parse(text, "r.yaml")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("name=2024-13-45", "cannot be read as a value"),
        ("seed=" + "9" * 5000, "cannot be read as a value"),
        ("user.rho=[1", "not valid YAML"),
        ("user={defense: lisa, rho: .inf}", "user.rho: expected a finite number, found inf"),
    ],
)
def test_a_wrong_value_on_the_command_line_is_one_sentence(value, message):
    with pytest.raises(RecipeError, match=message) as found:
        Recipe.load("world", [value])
    assert len(str(found.value)) < 300


def test_a_text_that_no_file_can_hold_is_refused():
    with pytest.raises(RecipeError, match="alignment: expected a text, found half of a surrogate pair"):
        Recipe.load({"name": "a", "model": "world", "alignment": "x\udfff"})


def test_a_number_that_is_not_finite_is_refused_from_python_too():
    given = {"model": "world", "data": {"task": "world", "alignment": "world"}}
    with pytest.raises(RecipeError, match=r"user\.rho: expected a finite number, found nan"):
        Recipe.load({**given, "user": {"defense": "lisa", "rho": float("nan")}})
    with pytest.raises(RecipeError, match=r"user\.training\.learning_rate: .*finite"):
        Recipe.load({**given, "user": {"defense": "sft", "training": {"learning_rate": "inf"}}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BASE.encode("utf-16"), "is UTF-16. Save it as UTF-8"),
        (b"seed: 1\n# \xe9t\xe9\n" + BASE.encode(), "line 2: this is not a text file in UTF-8"),
        (b"#" * (2**20 + 1), "more than 1,048,576 bytes"),
        (b"", "found nothing"),
    ],
)
def test_another_encoding_or_no_text_is_refused(content, message, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="found a folder"):
        Recipe.load(tmp_path)
    with pytest.raises(RecipeError, match="found a pipe or a device"):
        Recipe.load(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="No such recipe file"):
        Recipe.load("a" * 300)
    path = tmp_path / "r.yaml"
    path.write_text("extends: " + "a" * 300 + "\n")
    with pytest.raises(RecipeError, match="line 1: extends: No such recipe file"):
        Recipe.load(path)


def test_what_is_right_is_read(tmp_path):
    path = tmp_path / "r.yaml"
    text = "x: &base {num_train_epochs: 1, learning_rate: 1e-3}\n"
    text = BASE + "user: {defense: sft, training: &t {learning_rate: 1e-3}}\n"
    path.write_bytes(b"\xef\xbb\xbf" + (text + "alignment: {training: {<<: *t, max_steps: 3}}\n").encode())
    recipe = Recipe.load(path)
    assert recipe.alignment.training.learning_rate == recipe.user.training.learning_rate == 1e-3
    assert recipe.alignment.training.max_steps == 3


def test_a_shown_value_is_short():
    assert len(shorten("a" * 10_000)) < 100
    assert len(shorten([[["a" * 100] * 100] * 100] * 100)) < 300
    assert shorten(10**5000).startswith(("a number", "<int", "1000"))
