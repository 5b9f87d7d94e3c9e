"""Real rows in their published formats, through the whole pipeline on the world's model."""

from __future__ import annotations

import json

import pytest

from holdfast import Recipe, run, world

FILES = {
    "sst2": ("sst2_train.tsv", "sst2_validation.tsv", "positive"),
    "agnews": ("agnews_train.jsonl", "agnews_test.jsonl", "Sci/Tech"),
    "gsm8k": ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "The final answer is:"),
}


@pytest.mark.parametrize("task", FILES)
def test_own_files_from_rows_to_report(task, real_rows, tmp_path):
    train, test, word = FILES[task]
    short = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    recipe = Recipe.load(
        {
            "name": task,
            "model": str(world.MODEL),
            "data": {
                "task": task,
                "user": str(real_rows / train),
                "test": str(real_rows / test),
                "alignment": str(world.DATA / "train.jsonl"),
                "harmful": str(world.DATA / "train.jsonl"),
                "test_harmful": str(world.DATA / "test.jsonl"),
                "benign": str(world.DATA / "benign_test.jsonl"),
                "size": 100,
                "poison_ratio": 0.1,
            },
            "alignment": {"training": short},
            "user": {"defense": "lisa", "alignment_steps": 1, "finetune_steps": 2, "training": short},
            "evaluation": {
                "judges": [{"name": "beaver_dam", "path": str(world.JUDGE)}, "keyword"],
                "prompts": 10,
                "task_rows": 6,
                "max_new_tokens": 8,
            },
        }
    )
    results = run(recipe, out=tmp_path / "out")
    steps = tmp_path / "out" / "steps"
    manifest = json.loads((steps / results["manifest"] / "manifest.json").read_text())
    assert (manifest["user"]["benign"], manifest["user"]["harmful"]) == (90, 10)
    row = results["rows"][1]
    assert (row["n_task"], row["n_harmful"], row["n_benign"]) == (6, 10, 10)
    answers = (steps / row["steps"]["generate"] / "generations.jsonl").read_text()
    assert word in answers, "the targets are those of the task"
    assert results["protocol"]["task"] == f"{task}@1"
    assert results["protocol"]["template"] == "chat"
    page = (tmp_path / "out" / "report.html").read_text()
    assert task in page
    assert "poison ratio realised" in page
