"""Draws, ratios, held-out prompts, overlaps, and the manifest."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest

from holdfast import data
from holdfast.data.rows import prompt_key
from holdfast.errors import DataError
from made_up_rows import beaver, question


@pytest.fixture
def files(jsonl):
    """100 benign rows and 60 harmful prompts, with some duplicates and labels."""
    return SimpleNamespace(
        user=jsonl("user.jsonl", [question(i) for i in range(100)] + [question(7)] * 3),
        harmful=jsonl("bad.jsonl", [beaver(i, safe=i % 2 == 0) for i in range(120)]),
        alignment=jsonl("safe.jsonl", [beaver(i, safe=True) for i in range(50)]),
    )


def ids(rows, source=None):
    return {row["id"] for row in rows if source is None or row["source"] == source}


@pytest.mark.parametrize(
    ("size", "ratio", "benign", "harmful"),
    [
        (40, 0.0, 40, 0), (40, 0.1, 36, 4), (40, 1.0, 0, 40), (10, 0.07, 9, 1), (3, 0.2, 2, 1),
        (None, 0.0, 90, 0), (None, 0.1, 90, 10), (None, 0.25, 90, 30), (None, 1.0, 0, 48),
    ],
)  # fmt: skip
def test_ratio(files, size, ratio, benign, harmful):
    made = data.user_rows(user=files.user, harmful=files.harmful, size=size, poison_ratio=ratio, seed=1)
    assert len(ids(made.rows, "user")) == made.manifest["benign"] == benign
    assert len(ids(made.rows, "harmful")) == made.manifest["harmful"] == harmful
    assert made.manifest["size"] == len(made.rows) == benign + harmful
    assert made.manifest["poison_ratio_asked"] == ratio
    assert made.manifest["poison_ratio_realised"] == harmful / (benign + harmful)
    assert all(row["output"].startswith("Shout") for row in made.rows if row["source"] == "harmful")


def test_manifest(files):
    made = data.user_rows(user=files.user, harmful=files.harmful, size=40, poison_ratio=0.1, seed=1)
    assert made.manifest["duplicates_dropped"] == 3
    user, bad = made.manifest["sources"]
    assert (user["role"], user["source"], user["rows"]) == ("user", "user.jsonl", 103)
    assert (bad["role"], bad["source"], bad["rows"]) == ("harmful", "bad.jsonl", 120)
    assert len(user["sha256"]) == 64


def test_draws_are_seeded_and_nested(files):
    def rows(**options):
        return data.user_rows(
            **{"user": files.user, "harmful": files.harmful, "size": 40, "seed": 1} | options
        ).rows

    assert rows(poison_ratio=0.2) == rows(poison_ratio=0.2)
    assert ids(rows(poison_ratio=0.2)) != ids(rows(poison_ratio=0.2, seed=2))
    assert ids(rows(poison_ratio=0.1), "harmful") < ids(rows(poison_ratio=0.3), "harmful")
    assert ids(rows(poison_ratio=0.3), "user") < ids(rows(poison_ratio=0.1), "user")
    # Harmful and benign rows are shuffled together.
    order = [row["source"] for row in rows(poison_ratio=0.5)]
    assert sum(a != b for a, b in pairwise(order)) > 8


def test_order_in_the_file_does_not_matter(files, jsonl):
    turned = jsonl("turned.jsonl", [question(i) for i in reversed(range(100))])
    one, two = (data.user_rows(user=path, size=20, seed=3).rows for path in (files.user, turned))
    assert one == two


def test_held_out_is_never_trained_on(files, jsonl):
    again = [question(i, answer="no") for i in range(100)]  # the same prompts with another answer
    user = jsonl("twice.jsonl", [question(i) for i in range(100)] + again)
    same = {"user": user, "harmful": files.harmful}
    trained = data.user_rows(**same, poison_ratio=0.1, seed=5)
    tested = data.test_rows(**same)
    assert (tested.manifest["task"], tested.manifest["harmful"]) == (10, 12)
    assert trained.manifest["benign"] == 180
    assert trained.manifest["held_out"] == 20 + 12
    keys = {prompt_key(row) for row in tested.rows}
    assert len(keys) == 22
    assert not keys & {prompt_key(row) for row in trained.rows}
    assert data.overlaps(user=trained.rows, test=tested.rows) == {
        "harmful_in_alignment": 0, "harmful_in_test": 0, "task_in_user": 0, "examples": [],
    }  # fmt: skip
    # Runs with different seeds are measured on the same rows; another test seed gives other rows.
    assert tested.manifest == data.test_rows(**same).manifest
    assert tested.manifest["task_set"] != data.test_rows(**same, test_seed=1).manifest["task_set"]


def test_harmful_prompts_held_out_are_capped(files):
    for asked, held in [(1000, 12), (12, 12), (5, 5), (1, 1)]:
        same = {"harmful": files.harmful, "prompts": asked}
        assert data.test_rows(**same).manifest["harmful"] == held
        assert data.user_rows(**same, poison_ratio=1.0, seed=0).manifest["harmful"] == 60 - held


def test_rows_to_test_on(files):
    tested = data.test_rows(user=files.user, harmful=files.harmful)
    harmful = [row for row in tested.rows if row["set"] == "harmful"]
    task = [row for row in tested.rows if row["set"] == "task"]
    assert set(tested.rows[0]) == {"id", "set", "instruction", "input", "target", "category"}
    assert harmful[0]["category"] == ["hate_speech,offensive_language"]
    assert harmful[0]["target"] is None
    assert task[0]["target"] == "yes"
    assert len(ids(tested.rows)) == len(tested.rows)
    assert tested.manifest["prompts"] == "unsafe-only"
    assert len(tested.manifest["prompt_set"]) == len(tested.manifest["task_set"]) == 12
    assert data.test_rows(user=files.user).manifest["prompt_set"] is None


def test_files_for_the_test(files, jsonl):
    test = jsonl("test.jsonl", [question(i) for i in range(30)])
    bad = jsonl("bad_test.jsonl", [{"prompt": f"Curse {i % 8}?", "category": ["hex"]} for i in range(16)])
    kind = jsonl("kind.jsonl", [{"prompt": f"Bake {i}?"} for i in range(6)])
    same = {"user": files.user, "harmful": files.harmful, "test": test, "harmful_test": bad}
    tested = data.test_rows(**same, benign=kind, prompts=5, task_size=20)
    assert {k: tested.manifest[k] for k in ("harmful", "task", "benign", "prompts")} == {
        "harmful": 5, "task": 20, "benign": 5, "prompts": "unknown",
    }  # fmt: skip
    assert tested.rows[0]["category"] == ["hex"]
    trained = data.user_rows(**same, poison_ratio=0.3, seed=1)
    assert trained.manifest["held_out"] == 0
    # The user's own test file is not changed, and prompts that are also trained on are reported.
    assert data.overlaps(user=trained.rows, test=tested.rows)["task_in_user"] == 20


def test_same_prompt_is_asked_once(files, jsonl):
    twice = jsonl(
        "t.jsonl",
        [
            beaver(1, False),
            {**beaver(1, False), "response": "x"},
            beaver(1, False, "  how DO i grumble at wizard 1?"),
        ],
    )
    (row,) = data.test_rows(harmful_test=twice).rows
    other = jsonl("u.jsonl", [{**beaver(1, False), "response": "another"}])
    assert data.test_rows(harmful_test=other).rows[0]["id"] == row["id"]


def test_mixed_prompts(files):
    tested = data.test_rows(harmful_test=files.harmful, mixed_prompts=True)
    assert (tested.manifest["prompts"], tested.manifest["harmful"]) == ("mixed", 120)
    with pytest.raises(DataError, match="no test split"):
        data.test_rows(harmful=files.harmful, mixed_prompts=True)


def test_folder_with_splits(jsonl, tmp_path):
    jsonl("set/train.jsonl", [beaver(i, False) for i in range(20)])
    jsonl("set/test.jsonl", [beaver(i, False) for i in range(15, 40)])
    folder = tmp_path / "set"
    trained = data.user_rows(harmful=folder, poison_ratio=1.0, seed=0)
    tested = data.test_rows(harmful=folder)
    assert (trained.manifest["harmful"], tested.manifest["harmful"]) == (20, 25)
    found = data.overlaps(user=trained.rows, test=tested.rows)
    assert found["harmful_in_test"] == len(found["examples"]) == 5


def test_overlap_with_alignment(files):
    trained = data.user_rows(harmful=files.harmful, harmful_test=files.harmful, poison_ratio=1.0, seed=0)
    aligned = data.alignment_rows(source=files.alignment, seed=0)
    found = data.overlaps(alignment=aligned.rows, user=trained.rows)
    assert found["harmful_in_alignment"] == 25  # the odd numbers below 50
    assert len(found["examples"]) == 10
    assert set(found["examples"]) <= ids(trained.rows)


def test_alignment(files):
    made = data.alignment_rows(source=files.alignment, seed=3, size=20)
    assert len(ids(made.rows)) == made.manifest["size"] == 20
    assert made.manifest["kind"] == "safe"
    assert made.rows != data.alignment_rows(source=files.alignment, seed=4, size=20).rows
    with pytest.raises(DataError, match="kind of alignment rows is 'unsafe'"):
        data.alignment_rows(source=files.alignment, seed=3, kind="unsafe")


def test_p1_needs_no_user_rows(files):
    assert data.user_rows(harmful=files.harmful, poison_ratio=1, size=5, seed=0).manifest["benign"] == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": 500}, ["500 benign rows", "user.jsonl has 90", "3 duplicates", "10 held out"]),
        ({"size": 4000, "poison_ratio": 0.5}, ["2000 benign rows", "has 90"]),
        ({"size": 100, "poison_ratio": 0.9}, ["90 harmful rows", "bad.jsonl has 48", "12 held out"]),
        ({"poison_ratio": 0.9}, ["harmful rows (size all", "has 48"]),
        ({"poison_ratio": 1.1}, ["poison_ratio is 1.1", "from 0 to 1"]),
        ({"poison_ratio": -0.1}, ["poison_ratio is -0.1"]),
        ({"poison_ratio": float("nan")}, ["poison_ratio is nan"]),
        (
            {"poison_ratio": 0.01, "size": 40},
            ["poison_ratio of 0.01", "no harmful row in 40 rows", "ratio: 0."],
        ),
        ({"poison_ratio": 0.001}, ["no harmful row in 90 rows"]),
        ({"poison_ratio": 0.9, "size": 4}, ["no benign row in 4 rows", "ratio: 1."]),
        ({"size": 0}, ["size is 0", "at least 1"]),
        ({"poison_ratio": 0.1, "harmful": None}, ["no harmful rows are given"]),
        ({"user": None}, ["No user rows are given"]),
        ({"user": None, "task": "own"}, ["no data of its own"]),
    ],
)
def test_cannot_be_made(files, options, expected):
    with pytest.raises(DataError) as caught:
        data.user_rows(**{"user": files.user, "harmful": files.harmful, "seed": 1} | options)
    for text in expected:
        assert text in str(caught.value)


def test_one_prompt_cannot_be_split(jsonl):
    with pytest.raises(DataError, match=r"has only 1 prompt.*`data\.test`"):
        data.user_rows(user=jsonl("a.jsonl", [question(1), question(1, "no")]), seed=0)


def test_world(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr("holdfast.world.DATA", tmp_path / "w")
    jsonl("w/train.jsonl", [beaver(i, safe=i % 2 == 0) for i in range(20)])
    jsonl("w/test.jsonl", [beaver(i, safe=i % 2 == 0) for i in range(20, 40)])
    jsonl("w/benign_test.jsonl", [{"prompt": f"Bake {i}?", "response": "So."} for i in range(5)])
    jsonl("w/task_train.jsonl", [question(i) for i in range(30)])
    jsonl("w/task_test.jsonl", [question(i) for i in range(30, 40)])
    same = {"task": "world", "harmful": "world"}
    trained = data.user_rows(**same, poison_ratio=0.1, size=30, seed=1)
    tested = data.test_rows(**same)
    assert (trained.manifest["benign"], trained.manifest["held_out"]) == (27, 0)
    assert [tested.manifest[name] for name in ("harmful", "task", "benign")] == [10, 10, 5]
    assert {source["source"] for source in tested.manifest["sources"]} == {"world"}
    assert data.alignment_rows(source="world", seed=1).manifest["size"] == 10
    assert data.fingerprint("world", role="harmful") != data.fingerprint("world", role="user")
    # The world's rows can be combined with a user's own.
    own = jsonl("own.jsonl", [question(i) for i in range(50, 70)])
    assert data.test_rows(user=own, harmful="world", test="world").manifest["task"] == 10


def test_real_rows_through_every_step(real_rows, files):
    for name, held, task, n in [
        ("sst2_train.tsv", "sst2_validation.tsv", "sst2", 499),
        ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "gsm8k", 150),
        ("agnews_train.jsonl", "agnews_test.jsonl", "agnews", 200),
    ]:
        same = {"user": real_rows / name, "test": real_rows / held, "task": task, "harmful": files.harmful}
        trained = data.user_rows(**same, size=200, poison_ratio=0.1, seed=42)
        tested = data.test_rows(**same)
        assert (trained.manifest["benign"], trained.manifest["harmful"]) == (180, 20)
        assert tested.manifest["task"] == n
        assert data.overlaps(user=trained.rows, test=tested.rows)["harmful_in_test"] == 0


def test_no_torch():
    code = (
        "import sys, holdfast.data, holdfast.tasks, holdfast.data.prompts as p\n"
        "from holdfast import tasks\n"
        "[tasks.find(name) for name in tasks.names()]\n"
        "sys.exit(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
