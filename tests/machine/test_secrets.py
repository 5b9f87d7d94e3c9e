"""Keys and passwords, whole and in part, are removed from what is written."""

from __future__ import annotations

import pytest

from holdfast.machine.secrets import password_of, redacted, shown
from holdfast.recipe import Recipe

KEY = "sk-0123456789abcdef"


@pytest.mark.parametrize(
    ("address", "written"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://me:hunter2@host/v1", "http://host/v1"),
        ("https://me:p@ss@host:1/v1?api-key=secret#x", "https://host:1/v1"),
        ("http://token@host", "http://host"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("nonsense", "nonsense"),
    ],
)
def test_what_is_written_of_an_address(address, written):
    assert shown(address) == written


def test_the_password_of_an_address():
    assert password_of("http://me:h%40x@host/v1") == "h@x"
    assert password_of("http://host/v1") is None
    assert password_of("http://[broken/v1") is None


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"key {KEY}.", "key [key]."),
        (f"cut {KEY[:12]}", "cut [key]"),
        (f"end {KEY[-9:]} and {KEY[3:11]}", "end [key] and [key]"),
        (f"{KEY}{KEY}", "[key]"),
        ("sk-0123", "sk-0123"),
        ("at http://me:pw@host/v1 now", "at http://host/v1 now"),
        ("write to me@host, please", "write to me@host, please"),
    ],
)
def test_redacted(text, left):
    assert redacted(text, [KEY, None]) == left
    assert redacted("abcd", ["abcd"]) == "abcd", "too short for a secret"
    assert redacted("a hunter2 b", ["hunter2"]) == "a [key] b"


def test_a_recipe_on_disk_has_no_password():
    judge = {"name": "openai", "model": "m", "base_url": "http://me:hunter2@host/v1"}
    filtered = {"judge": "openai", "model": "m", "base_url": "http://me:hunter2@host/v1"}
    made = Recipe.load(
        {
            "name": "r", "model": "world", "data": {"user": "world", "filter": filtered},
            "alignment": "none", "user": "sft", "evaluation": {"judges": [judge]},
        }
    )  # fmt: skip
    assert "hunter2" not in str(made.to_dict())
    assert "http://host/v1" in str(made.to_dict())
    assert made.evaluation.judges[0].options()["base_url"] == "http://me:hunter2@host/v1"
    assert made.data.filter.judge_recipe.base_url == "http://me:hunter2@host/v1"
