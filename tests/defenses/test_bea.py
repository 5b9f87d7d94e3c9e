"""BEA's secret: where it is stored, who can read it, and where it is in a row."""

from __future__ import annotations

import multiprocessing
import os
import stat

import pytest

import trainers
from holdfast.defenses import bea
from holdfast.errors import DataError, ModelError

USER = [{"instruction": f"user {i}", "input": "", "output": "x", "source": "user"} for i in range(20)]
SAFE = [{"instruction": f"safe {i}", "input": "", "output": "no"} for i in range(15)]


def test_rows_behind_the_secret_are_added(tmp_path):
    rows = bea.mix(USER, SAFE, seed=1, folder=tmp_path)
    secret = bea.secret(tmp_path)
    assert len(rows) == 31
    for row in rows:
        assert row.get("prefix") == (secret if row["source"] == "alignment" else None)
    assert not any("prefix" in row for row in SAFE), "the input is not changed"


def test_the_secret_is_random_and_read_by_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        bea.mix(USER, SAFE, seed=1, folder=tmp_path / "a")
        bea.mix(USER, SAFE, seed=1, folder=tmp_path / "b", secret_length=9)
    finally:
        os.umask(before)
    a, b = bea.secret(tmp_path / "a"), bea.secret(tmp_path / "b")
    assert len(a.split()) == 150
    assert len(b.split()) == 9
    assert a[: len(b)] != b, "the seed does not reveal it"
    assert all(len(word) == 2 and word.isalpha() for word in a.split())
    for folder in ("a", "b"):
        assert [p.name for p in (tmp_path / folder).iterdir()] == [bea.SECRET_FILE]
        assert stat.S_IMODE((tmp_path / folder / bea.SECRET_FILE).stat().st_mode) == 0o600


def test_the_file_was_never_open_to_others(tmp_path, monkeypatch):
    modes = []
    link = os.link

    def seen(source, target):
        modes.append(stat.S_IMODE(os.stat(source).st_mode))
        link(source, target)

    monkeypatch.setattr(os, "link", seen)
    bea.mix(USER, SAFE, seed=1, folder=tmp_path)
    assert modes == [0o600]


def test_it_is_kept(tmp_path):
    first = bea.mix(USER, SAFE, seed=1, folder=tmp_path)
    assert bea.mix(USER, SAFE, seed=1, folder=tmp_path) == first
    (tmp_path / "adapter").mkdir()
    assert bea.secret(tmp_path / "adapter") == bea.secret(tmp_path) == bea.prefix(tmp_path)
    with pytest.raises(DataError, match=r"holds a secret of 150 words, but secret_length is 4") as caught:
        bea.mix(USER, SAFE, seed=1, folder=tmp_path, secret_length=4)
    assert bea.secret(tmp_path)[:8] not in str(caught.value)
    with pytest.raises(ModelError, match=r"No secret of BEA found: expected .*bea_secret\.txt"):
        bea.secret(tmp_path / "nowhere" / "at all")


def draw(folder, queue):
    queue.put(bea.mix(USER, SAFE, seed=1, folder=folder))


def test_processes_of_one_training_agree(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=draw, args=(tmp_path, queue)) for _ in range(6)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert all(rows == found[0] for rows in found)
    assert [p.name for p in tmp_path.iterdir()] == [bea.SECRET_FILE]


def test_rows_of_a_script(tmp_path):
    """Rendered text, and conversations: the trainer reads the secret."""
    turns = bea.behind({"prompt": [{"role": "user", "content": "p"}], "completion": []}, "secret")["prompt"]
    assert [turn["content"] for turn in turns] == ["secret", "p"]
    pairs = [{"prompt": "p\n", "completion": "c</s>"}] * 3
    rows = bea.mix(pairs, pairs, seed=1, folder=tmp_path, alignment_size=1, secret_length=3)
    secret = bea.secret(tmp_path)
    assert sorted(row["prompt"] for row in rows) == sorted(["p\n"] * 3 + [f"{secret}\n\np\n"])
    made = trainers.trainer("bea", tmp_path / "out", rows=rows)
    texts = [trainers.TOKENIZER.decode(row["input_ids"]) for row in made.train_dataset]
    assert sum(text.startswith(secret) for text in texts) == 1
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert bea.behind({"messages": turns}, "S")["messages"] == [{"role": "system", "content": "S"}, *turns]
    system = [{"role": "system", "content": "Be brief."}, *turns]
    assert bea.behind({"messages": system}, "S")["messages"][0]["content"] == "S\n\nBe brief."
    assert system[0]["content"] == "Be brief."
    with pytest.raises(DataError, match="tokenised rows have no place for the secret"):
        bea.mix(pairs, [{"input_ids": [1], "labels": [1]}], seed=1, folder=tmp_path, alignment_size=1,
                secret_length=3)  # fmt: skip
