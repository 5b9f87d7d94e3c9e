"""The pages of the founding guides: every row of their tables is a line of a recipe, and every command is known."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import yaml

from holdfast import registry
from holdfast.recipe import Recipe
from holdfast.recipe.named import differences
from holdfast.recipe.reading import Loader
from places import DOCS, ROOT

GUIDES = {
    "lisa": "lisa-guide-sst2",
    "t-vaccine": "tvaccine-guide-sst2",
    "safe-lora": "safe-lora-dialog-summary",
}
"""By page, the recipe of its table of settings."""
PROTOCOLS = {
    "lisa-guide": "lisa-guide-sst2",
    "lisa-paper": "lisa-paper-sst2",
    "lisa-code": "lisa-sst2",
    "t-vaccine-guide": "tvaccine-guide-sst2",
    "t-vaccine": "tvaccine-sst2",
    "safe-lora-llama-2": "safe-lora-dialog-summary",
    "safe-lora-code": "safe-lora-code-dialog-summary",
}
ROW = re.compile(r"^\|[^|]*\|[^|]*\| `([\w.]+)`(?: in `([\w-]+)`)? \| `([^`]+)` \|$", re.MULTILINE)
PAGES = [DOCS / "guides" / f"{name}{tongue}.md" for name in GUIDES for tongue in ("", ".zh")]


def text(page):
    return page.read_text(encoding="utf-8")


def name_of(page):
    return page.name.partition(".")[0]


def value(recipe, key):
    """The value of a key: as the recipe sets it, else the default of its method."""
    found = recipe.to_dict()
    stage, _, last = key.rpartition(".")
    for part in key.split("."):
        if part not in found:
            method = recipe.to_dict()[stage]["defense"]
            return registry.faces("defenses")[method].parameters[last].default
        found = found[part]
    return found


def read(written):
    return yaml.load(written, Loader)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_row_of_the_guides_table_is_a_line_of_a_recipe(page):
    rows = ROW.findall(text(page))
    assert len(rows) >= 15
    for key, named, written in rows:
        assert value(Recipe.load(named or GUIDES[name_of(page)]), key) == read(written), key


@pytest.mark.parametrize("page", [p for p in PAGES if "t-vaccine" in p.name], ids=lambda page: page.name)
def test_the_total_steps_follow_from_the_recipe(page):
    recipe = Recipe.load(GUIDES["t-vaccine"])
    sizes = {"alignment": recipe.data.alignment.size, "user": recipe.data.size}
    written = re.findall(r"^\| [^`]* \| (\d+) \| [^`|]*/[^`|]* \| `(\d+)` \|$", text(page), re.MULTILINE)
    for (guide, ours), (stage, size) in zip(written, sizes.items(), strict=True):
        training = getattr(recipe, stage).training
        steps = size / training.per_device_train_batch_size * training.num_train_epochs
        assert (int(guide), int(ours)) == (steps, steps)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_table_of_disagreements_is_right_and_complete(page):
    header = re.search(r"^\| [^`|]+ \|((?: `[\w-]+` \|)+) \|$", text(page), re.MULTILINE)
    recipes = [Recipe.load(PROTOCOLS[name]) for name in re.findall(r"`([\w-]+)`", header[1])]
    table = text(page)[header.end() :].partition("\n\n")[0]
    found = {}
    for line in table.strip().splitlines()[1:]:
        key, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[key.strip("`")] = [read(cell.strip("`")) for cell in cells[: len(recipes)]]
    for key, written in found.items():
        shown = [value(recipe, key) if key in _keys(recipe) else None for recipe in recipes]
        assert shown == written, key
    first, *others = (recipe.to_dict() for recipe in recipes)
    differ = {key for other in others for key in (*differences(first, other), *differences(other, first))}
    assert set(found) == differ


def _keys(recipe):
    """The keys of a recipe, and the parameters of its training methods, which have defaults."""
    keys = set(_flat(recipe.to_dict()))
    for stage in ("alignment", "user"):
        part = getattr(recipe, stage)
        names = registry.faces("defenses")[part.defense].parameters if part else ()
        keys |= {f"{stage}.{name}" for name in names}
    return keys


def _flat(block, place=()):
    for key, part in block.items():
        yield from _flat(part, (*place, key)) if isinstance(part, dict) else [".".join((*place, key))]


@pytest.mark.parametrize("name", GUIDES)
def test_both_languages_say_the_same(name):
    english, chinese = (DOCS / "guides" / f"{name}{tongue}.md" for tongue in ("", ".zh"))
    assert ROW.findall(text(english)) == ROW.findall(text(chinese))
    assert _commands(english) == _commands(chinese)
    numbers = [re.findall(r"\d+\.\d+", text(page)) for page in (english, chinese)]
    assert sorted(numbers[0]) == sorted(numbers[1])


def _commands(page):
    lines = "\n".join(re.findall(r"```\n(.*?)```", text(page), re.DOTALL)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip().startswith("holdfast")]


@pytest.mark.parametrize("page", [p for p in PAGES if ".zh" not in p.name], ids=lambda page: page.name)
def test_every_recipe_of_the_commands_is_known(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    commands = [command for command in _commands(page) if command[1] in ("run", "plan")]
    assert len(commands) >= 5
    for _, _, recipe, *rest in commands:
        changes = [word for word in rest if "=" in word]
        assert Recipe.load(recipe, changes).protocol, recipe
        assert [word for word in rest if "=" not in word] in ([], ["--store", "runs/steps"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_world_shows_the_run_that_is_stored(page):
    """`benchmarks/results/guides.json` is the table of the commands above it."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "guides.json").read_text())["rows"]
    shown = {}
    for line in text(page).rpartition("```")[2].splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0] in rows:
            shown[cells[0]] = cells[1:]
    assert shown
    for name, cells in shown.items():
        keys = ("harmful_score", "finetune_accuracy", "benign_compliance")
        assert cells == [f"{rows[name][key]:.1f}" for key in keys]
