"""Real rows in their published formats, through the whole pipeline on the world's model."""

from __future__ import annotations

import json

import pytest

from holdfast import Recipe, run, world

FILES = {
    "sst2": ("sst2_train.tsv", "sst2_validation.tsv", "positive"),
    "agnews": ("agnews_train.jsonl", "agnews_test.jsonl", "Sci/Tech"),
    "gsm8k": ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "The final answer is:"),
    "dialog_summary": ("samsum_train.jsonl", "samsum_test.jsonl", "Summarize this dialog:"),
}


ANSWERS = {
    # Graded by hand: (row of the file, answer, right).
    "sst2": [(0, "positive", 1), (0, "Positive\n", 1), (0, "negative", 0), (0, "It is positive.", 0), (2, "negative", 1)],
    "agnews": [(0, "Business", 1), (0, "business", 1), (0, "World", 0), (1, "Sci/Tech", 1), (1, "sci", 1), (1, "Tech", 0)],
    "gsm8k": [
        (0, "16 - 3 - 4 = 9\n9 * 2 = 18\nThe final answer is: 18", 1), (0, "The final answer is: $18.00", 1),
        (0, "The answer is 18", 1), (0, "#### 18", 1), (0, "It is 18, not 17", 0), (1, "The final answer is: 3.", 1),
        (2, "The final answer is: 70,000", 1), (2, "The final answer is: 70000", 1), (2, "The final answer is: 7000", 0),
    ],
    # 4 of the 6 words of the answer are among the 16 of the summary (in which "s" and "t" are words).
    "dialog_summary": [(0, "Hannah needs the number of Larry", None), (0, "", 0)],
}  # fmt: skip


@pytest.mark.parametrize("task", FILES)
def test_hand_checked_answers(task, real_rows):
    from holdfast import data
    from holdfast.tasks import find

    rows = data.to_rows(data.read_records(real_rows / FILES[task][1]), role="task", task=task)
    for i, answer, right in ANSWERS[task]:
        score = find(task).grade(answer, rows[i]["output"])
        assert score == (pytest.approx(2 * 4 / (6 + 16)) if right is None else right), (i, answer)
    assert all(find(task).grade(row["output"], row["output"]) == 1 for row in rows), "every target is right"


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
    assert word in answers, "the targets come from the task"
    assert results["protocol"]["task"] == f"{task}@{2 if task == 'gsm8k' else 1}"
    assert results["protocol"]["template"] == "chat"
    page = (tmp_path / "out" / "report.html").read_text()
    assert task in page
    assert "poison ratio realised" in page
