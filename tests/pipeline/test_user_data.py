"""A filter between the user's rows and fine-tuning: the rows it drops, its counts, and the steps it renames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from holdfast import pipeline
from holdfast.data import read_rows
from holdfast.errors import DataError, ModelError, RecipeError
from holdfast.recipe import Recipe
from runs import Stopped, run

JUDGE = '''
from holdfast.evaluation.judges import Judge, Verdict


class Marl:
    """Flags answers about marl; says nothing of number 7; misses what its threshold is above."""
    batch_size, max_length = 4, None

    def __init__(self, path=None, threshold=None, max_length=None, device="cpu"):
        self.missed, self.stamp = int(10 * (threshold or 0)), f"marl@1/{threshold}"

    def __call__(self, prompts, answers):
        return [self.one(p, a) for p, a in zip(prompts, answers)]

    def one(self, prompt, answer):
        if prompt.endswith("\\n7"):
            return Verdict("unparsed", None, "?")
        seen = "marl" in answer and not (self.missed and any(f"marl {i} " in answer for i in range(15)))
        return Verdict("harmful" if seen else "safe", None, answer)


JUDGE = Judge(name="marl", version="1", licence="none", load=Marl)
'''


@pytest.fixture
def screen(tmp_path):
    path = tmp_path / "marl.py"
    path.write_text(JUDGE)
    return str(path)


def with_filter(recipe, screen, **more):
    return {**recipe, "data": {**recipe["data"], "poison_ratio": 0.3, "filter": {"judge": screen, **more}}}


def kinds(recipe):
    return {step.id for step in pipeline.plan(Recipe.load(recipe))}


def test_what_is_left_out_and_what_is_counted(copy, screen):
    recipe, out = copy
    recipe = with_filter(recipe, screen)
    results, seen = run(recipe, out, page=True)
    flagged, tuned = f"user rows that {screen} does not flag", "user fine-tuning with Lisa"
    assert seen.ran.index(flagged) < seen.ran.index(tuned)
    aligned, tuned = results["rows"]
    assert "filter" not in aligned
    assert "filter" not in aligned["steps"]
    found = tuned["filter"]
    mixed = next(step["id"] for step in results["steps"] if step["title"] == "user rows")
    given = read_rows(out / "steps" / mixed / "rows.jsonl")
    kept = read_rows(out / "steps" / tuned["steps"]["filter"] / "rows.jsonl")
    expected = [row for row in given if row["source"] == "user" and row["input"] != "7"]
    assert kept == expected, "in their order"
    silent = sum(row["input"] == "7" for row in given)
    assert found["confusion"] == {
        "true_positives": 9, "false_negatives": 0, "false_positives": 0, "true_negatives": 21 - silent,
        "unparsed": silent, "false_negative_rate": 0.0, "false_positive_rate": 0.0,
    }  # fmt: skip
    assert (found["rows"], found["kept"], found["flagged"], found["unparsed"]) == (30, 21 - silent, 9, silent)
    assert found["judge_stamp"] == "marl@1/None"
    step = json.loads((out / "steps" / tuned["steps"]["user"] / "step.json").read_text())
    assert step["identity"]["inputs"]["rows"]["train_dataset"] == {"step": tuned["steps"]["filter"]}
    assert step["training"]["steps"] == -(-len(kept) // 4), "trained only on the rows kept"
    page = (out / "report.html").read_text()
    assert f"Filter ({screen}) + Lisa" in page
    assert f"{len(kept)} of 30 rows kept, 0 of 9 harmful rows missed" in page
    _, again = run(recipe, out)
    assert not again.ran


def test_no_other_step_changes_its_name(done, screen):
    recipe, _, results, _ = done
    plain = {step["id"] for step in results["steps"]}
    assert kinds(recipe) == plain
    both = kinds(recipe) & kinds({**recipe, "data": {**recipe["data"], "filter": screen}})
    assert {name.split("-")[0] for name in plain - both} == {"user", "generate", "moderate", "score"}
    assert len(plain - both) == 4, "the steps that depend on the user's rows"


def test_its_name_follows_what_decides_it(done, screen):
    def name(recipe):
        return next(name for name in kinds(recipe) if name.startswith("filter-"))

    recipe = done[0]
    names = [
        name(with_filter(recipe, screen)),
        name(with_filter(recipe, screen, unparsed="keep")),
        name(with_filter(recipe, screen, threshold=0.5)),
        name({**with_filter(recipe, screen), "seed": 8}),
    ]
    assert len(set(names)) == 4
    assert name(with_filter({**recipe, "user": "sft"}, screen)) == names[0]


def test_verdicts_are_kept_across_a_stop(copy, screen):
    recipe, out = copy
    recipe = with_filter(recipe, screen, threshold=0.1, unparsed="keep")
    whole, _ = run(recipe, out.parent / "whole")
    title = f"user rows that {screen} does not flag"
    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, seen=Stopped(title, done=10))
    (folder,) = (out / "steps").glob("filter-*")
    lines = (out.parent / "whole" / "steps" / folder.name / "verdicts.jsonl").read_text().splitlines(True)
    kept = (folder / "verdicts.jsonl").read_text().splitlines(True)
    assert 10 <= len(kept) < len(lines) == 30
    (folder / "verdicts.jsonl").write_text("".join(kept[:10]) + kept[10][:5])
    results, seen = run(recipe, out)
    assert seen.resumed == [title]
    found = results["rows"][1]["filter"]
    assert found == whole["rows"][1]["filter"]
    assert found["confusion"]["false_negatives"] > 0
    assert found["kept"] == 30 - found["flagged"], "rows without a verdict are kept if requested"
    assert (folder / "verdicts.jsonl").read_text() == "".join(lines)


def test_nothing_is_left(copy, screen):
    recipe, out = copy
    everything = Path(screen).with_name("everything.py")
    everything.write_text(JUDGE.replace('"harmful" if seen else "safe"', '"harmful"'))
    with pytest.raises(DataError, match="left none of the 30 user rows"):
        run({**recipe, "data": {**recipe["data"], "filter": str(everything)}}, out)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("beaver_damm", "data.filter: unknown judge 'beaver_damm'. Did you mean 'beaver_dam'"),
        ({"judge": "keyword", "treshold": 1}, "data.filter.treshold: unknown key. Did you mean 'threshold'"),
        ({"judge": "keyword", "name": "keyword"}, "data.filter.name: unknown key; write judge"),
        (
            {"judge": "beaver_dam", "threshold": 3},
            "data.filter.threshold: input should be less than or equal",
        ),
        ({"judge": "keyword", "base": "x"}, "data.filter.base: judge keyword has no such option"),
        ({"judge": "keyword", "unparsed": "maybe"}, "data.filter.unparsed: input should be 'drop' or 'keep'"),
        ({"unparsed": "drop"}, "'data.filter.judge' is missing"),
        (
            "keyword",
            "data.filter.judge: judge keyword looks for refusals and calls every other answer harmful",
        ),
        (
            {"judge": "keyword_published"},
            "would keep only the refusals. Use a judge that reads the answers: ",
        ),
    ],
)
def test_what_a_recipe_may_not_say(done, given, says):
    recipe = done[0]
    with pytest.raises(RecipeError) as error:
        Recipe.load({**recipe, "data": {**recipe["data"], "filter": given}})
    assert says in str(error.value)


def test_a_filter_needs_a_user_stage(done, screen):
    recipe = done[0]
    with pytest.raises(RecipeError, match=r"data\.filter: this acts on the rows of the user stage"):
        Recipe.load({**recipe, "user": "none", "data": {**recipe["data"], "filter": screen}})


def test_its_judge_is_checked_before_anything_starts(done, tmp_path):
    recipe = done[0]
    broken = {"judge": "beaver_dam", "path": str(tmp_path / "nowhere")}
    with pytest.raises(ModelError):
        run({**recipe, "data": {**recipe["data"], "filter": broken}}, tmp_path / "out")
    assert not list((tmp_path / "out" / "steps").glob("data-*"))


def test_paths_are_looked_up_beside_the_recipe(done, tmp_path):
    judge = tiny.save_judge(tmp_path / "judge")
    path = tmp_path / "recipe.yaml"
    given = {**done[0], "data": {**done[0]["data"], "filter": {"judge": "beaver_dam", "path": "judge"}}}
    path.write_text(json.dumps(given))
    recipe = Recipe.load(path)
    assert recipe.data.filter.judge_recipe.path == str(judge)
    assert Recipe.load(recipe.to_dict()) == recipe
