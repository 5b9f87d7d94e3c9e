"""A chat template that writes today's date writes one fixed date instead."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from datetime import datetime
from pathlib import Path

import pytest

import tiny
from holdfast import Recipe, plan
from holdfast.errors import RecipeError
from holdfast.machine.files import write_json
from holdfast.machine.store import Store, claim_folder
from holdfast.models.dates import FIXED, fix_date
from holdfast.models.loading import load_tokenizer
from holdfast.weights.folders import writes_date

DATED = "Today is {{ strftime_now('%d %b %Y') }}." + tiny.CHAT


def shown(tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_date_is_the_given_one(tmp_path):
    tokenizer = tiny.tokenizer(chat=True)
    plain = shown(tokenizer)
    fix_date(tokenizer, "2026-03-01")
    assert shown(tokenizer) == plain, "this template writes no date"
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path)
    assert writes_date(tmp_path)
    loaded = load_tokenizer(tmp_path, date="2026-03-01")
    assert shown(loaded).startswith("Today is 01 Mar 2026.")
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert shown(copied) == shown(loaded), "as workers of a data loader get it"
    assert FIXED == "2024-07-26"
    assert shown(load_tokenizer(tmp_path)).startswith("Today is 26 Jul 2024.")
    loaded.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/chat_template.jinja").read_text() == DATED
    assert not writes_date(tmp_path / "nowhere")


def dated_templates():
    folder = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
    return [p for p in sorted(folder.glob("*.jinja")) if "strftime_now" in p.read_text(encoding="utf-8")]


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_templates_of_the_field_render_as_they_do_on_that_day():
    assert dated_templates()
    for path in dated_templates():
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        plain = shown(tokenizer)
        fix_date(tokenizer, datetime.now().date().isoformat())
        assert shown(tokenizer) == plain, path.name


def test_a_run_has_one_date_and_its_steps_are_named_by_it(tmp_path):
    recipe = tiny.recipe(tmp_path, alignment=None)
    tiny.save_model(tmp_path / "chat", chat=True)
    recipe["model"] = str(tmp_path / "chat")

    def names(today, **model):
        asked = Recipe.load({**recipe, "model": {"path": recipe["model"], **model}})
        planned = plan(asked, today=today)
        return [step.id for step in planned.steps], planned.recipe.model.template_date

    assert names("2026-03-01") == names("2026-03-02"), "this template writes no date"
    assert names("2026-03-01", template_date="2026-01-01")[1] is None
    (tmp_path / "chat" / "chat_template.jinja").write_text(DATED, encoding="utf-8")
    first, day = names("2026-03-01")
    assert day == "2026-03-01"
    assert names("2026-03-02")[0] != first
    assert names("2026-03-02", template_date="2026-03-01") == (first, day)
    assert names("2026-03-01", template="alpaca") == names("2026-03-02", template="alpaca")
    store = Store(tmp_path / "store")
    claim_folder(store.root, "store")
    marker = json.loads((store.root / "holdfast.json").read_text())
    write_json(store.root / "holdfast.json", {**marker, "started": "2026-03-01T10:00:00Z"})
    assert store.started() == "2026-03-01"


def test_a_date_in_a_recipe_is_a_date(tmp_path):
    path = tmp_path / "r.yaml"
    text = "model: {path: world, template_date: DATE}\ndata: {task: world, alignment: world}\n"
    path.write_text(text.replace("DATE", "2026-03-01"))
    assert Recipe.load(path).model.template_date == "2026-03-01"
    path.write_text(text.replace("DATE", "tomorrow"))
    with pytest.raises(RecipeError, match=r"line 1: .*expected a date such as"):
        Recipe.load(path)
