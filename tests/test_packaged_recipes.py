"""Every packaged recipe is planned, and run tiny, with everything but sizes and sources as it stands."""

from __future__ import annotations

import pytest

import tiny
from holdfast import pipeline, registry
from holdfast.recipe import Recipe

TASK_ROWS = {
    "sst2": [{"sentence": f"film number {i}", "label": i % 2} for i in range(40)],
    "gsm8k": [
        {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(40)
    ],
}
TINY = [
    "data.size=20", "evaluation.prompts=4", "evaluation.task_rows=4", "evaluation.max_new_tokens=4",
    "alignment.training.max_steps=2", "user.training.max_steps=2",
]  # fmt: skip


def sources(name, folder):
    """Files in the published formats instead of the Hub's data and models."""
    if name == "world":
        return []
    task = Recipe.load(name).data.task
    rows = [{**row, "is_safe": False} for row in tiny.harmful_rows(40)]
    safe = [{**row, "category": {}, "is_safe": True} for row in tiny.safe_rows(40)]
    labelled = tiny.write_jsonl(folder / "beavertails.jsonl", rows + safe)
    return [
        f"model.path={tiny.save_model(folder / 'model')}",
        f"data.user={tiny.write_jsonl(folder / 'task.jsonl', TASK_ROWS[task])}",
        f"data.harmful={labelled}",
        f"data.test_harmful={tiny.write_jsonl(folder / 'test.jsonl', rows[:8] + safe[:8])}",
        f"data.alignment.source={labelled}",
        "data.alignment.size=20",
        f"evaluation.judges=[{{name: beaver_dam, path: {tiny.save_judge(folder / 'judge')}}}, keyword]",
    ]


@pytest.mark.parametrize("name", registry.recipes())
def test_planned_and_run(name, tmp_path):
    recipe = Recipe.load(name, [*TINY, *sources(name, tmp_path)])
    planned = pipeline.plan(recipe)
    assert len(planned.steps) == 14
    results = pipeline.run(recipe, out=tmp_path / "out", device="cpu")
    row = results["rows"][-1]
    assert (row["name"], row["user"], row["poison_ratio"]) == (name, recipe.user.defense, 0.1)
    assert row["n_task"] == 4
    assert set(row["judges"]) == {"beaver_dam", "keyword"}


@pytest.mark.parametrize("name", registry.recipes())
def test_each_says_what_it_is(name):
    first = registry.recipes()[name].read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")


def test_the_papers_settings():
    """Lisa's protocol (papers' text and code): the numbers that a reproduction needs."""
    for name, epochs in (("lisa-sst2", None), ("lisa-gsm8k", 50)):
        recipe = Recipe.load(name)
        assert recipe.model.path == "meta-llama/Llama-2-7b-hf"
        assert (recipe.data.size, recipe.data.poison_ratio, recipe.data.alignment.size) == (5000, 0.1, 10000)
        assert recipe.user.parameters() == {"alignment_steps": 100, "finetune_steps": 900, "rho": 1.0}
        assert (recipe.evaluation.prompts, recipe.evaluation.max_new_tokens) == (1000, 512)
        assert recipe.evaluation.mixed_prompts
        assert recipe.user.training.num_train_epochs == epochs
    from holdfast.recipe import ALIGNMENT_TRAINING, USER_TRAINING

    assert (ALIGNMENT_TRAINING["learning_rate"], ALIGNMENT_TRAINING["num_train_epochs"]) == (1e-3, 30)
    assert (USER_TRAINING["learning_rate"], USER_TRAINING["num_train_epochs"]) == (1e-5, 20)
    assert USER_TRAINING["lr_scheduler_type"] == "constant"
