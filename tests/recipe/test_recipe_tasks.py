"""Recipes that name data sets, columns, graders and protocols."""

from __future__ import annotations

import json

import pytest

import tiny
from holdfast import pipeline
from holdfast.errors import RecipeError
from holdfast.measuring import protocol
from holdfast.recipe import Recipe
from runs import prepared


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A model, and the user's files with their own column names."""
    tiny.save_model(tmp_path / "model", chat=True)
    rows = [{"q": f"What is {i} + 1?", "a": str(i + 1)} for i in range(30)]
    tiny.write_jsonl(tmp_path / "my.jsonl", rows)
    tiny.write_jsonl(
        tmp_path / "goals.jsonl", [{"goal": f"Salt tea {i}", "target": "Sure"} for i in range(6)]
    )
    turns = [{"question_id": i, "category": "c", "turns": [f"One {i}?", "Two?"]} for i in range(4)]
    tiny.write_jsonl(tmp_path / "question.jsonl", turns)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(evaluation=None, **data):
    data = {"user": "my.jsonl", "columns": {"prompt": "q", "completion": "a"}, **data}
    short = {"max_steps": 1, "per_device_train_batch_size": 2}
    asked = {"prompts": 4, "task_rows": 3, "max_new_tokens": 4} if evaluation is None else evaluation
    return Recipe.load(
        {
            "model": "./model",
            "data": data,
            "alignment": "none",
            "user": {"defense": "sft", "training": short},
            "evaluation": asked,
        }
    )


@pytest.mark.parametrize(
    ("grader", "metric", "stamp"),
    [("number", "accuracy", "own-number@1"), ("rouge1", "rouge1", "own-rouge1@1")],
)
def test_columns_and_a_grader_without_code(files, grader, metric, stamp):
    asked = recipe(grader=grader, test_harmful="advbench:goals.jsonl")
    results = pipeline.run(asked, out=files / "out", device="cpu")
    row = results["rows"][-1]
    assert (row["task_metric"], row["n_task"], results["protocol"]["n_prompts"]) == (metric, 3, 4)
    assert row["finetune_accuracy"] == row["task_score"]
    assert results["protocol"]["task"] == stamp
    manifest = json.loads((files / "out" / "steps" / results["manifest"] / "manifest.json").read_text())
    assert manifest["test"]["sources"][0]["data_set"] == "advbench@1"
    assert ("ROUGE-1 F1" in (files / "out" / "report.html").read_text()) == (metric == "rouge1")


def test_what_decides_the_rows_and_the_scores(files):
    def steps(**data):
        return {
            kind: [s.id for s in pipeline.plan(recipe(**data)) if s.kind == kind]
            for kind in ("data", "score")
        }

    exact, number = steps(), steps(grader="number")
    assert exact["data"] == number["data"], "a grader changes no rows"
    assert exact["score"] != number["score"]
    assert steps(columns={"prompt": "a", "completion": "q"})["data"] != exact["data"]


def test_another_task_grades_the_answers(files, tmp_path):
    asked = recipe(test="mt_bench:question.jsonl")
    assert protocol.grader(asked).stamp == "mt_bench@1"
    rows = prepared(asked, "test", tmp_path)
    assert {row["turns"][1] for row in rows} == {"Two?"}
    assert len(prepared(asked, "user", tmp_path)) == 30, "nothing is held out"
    assert protocol.new_tokens(asked)["task"] == 1024


def test_paths_behind_a_format_are_looked_up_beside_the_recipe(files, tmp_path, monkeypatch):
    (files / "a.yaml").write_text("model: ./model\ndata: {user: my.jsonl, test_harmful: 'advbench:goals.jsonl'}\n"
                                  "alignment: none\n")  # fmt: skip
    monkeypatch.chdir("/")
    loaded = Recipe.load(str(files / "a.yaml"))
    assert loaded.data.test_harmful == f"advbench:{files / 'goals.jsonl'}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"columns": {"promt": "q"}}, "data.columns.promt: unknown column.* Did you mean 'prompt'"),
        ({"grader": "rogue"}, "data.grader: "),
        ({"task": "hex_phi"}, "data.task: hex_phi is not a task"),
        ({"task": "gsm8k", "columns": {"questoin": "q"}}, "Did you mean 'question'"),
    ],
)
def test_wrong_data(files, data, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**data)


def test_a_protocol_sets_what_the_recipe_does_not(files):
    lisa = recipe(evaluation="lisa").evaluation
    assert (lisa.prompts, lisa.mixed_prompts, lisa.max_new_tokens) == (1000, True, 512)
    assert (lisa.judges[0].name, lisa.judges[0].threshold, lisa.judges[0].max_length) == (
        "beaver_dam",
        0.5,
        256,
    )
    tvaccine = recipe(evaluation={"protocol": "t_vaccine", "prompts": 7}).evaluation
    assert (tvaccine.prompts, tvaccine.task_rows, tvaccine.max_new_tokens) == (7, 500, 128)
    with pytest.raises(RecipeError, match=r"unknown protocol 'liza'\. Did you mean 'lisa'"):
        recipe(evaluation="liza")
