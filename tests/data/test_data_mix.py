"""`mix` writes a complete folder with rows and their manifest, or nothing."""

from __future__ import annotations

import json
import os

import pytest

from holdfast import data
from holdfast.errors import DataError, HoldfastError, OutputError
from made_up_rows import beaver, question


@pytest.fixture
def sources(jsonl):
    return {
        "user": jsonl("user.jsonl", [question(i) for i in range(40)]),
        "harmful": jsonl("bad.jsonl", [beaver(i, safe=False) for i in range(20)]),
        "poison_ratio": 0.2,
    }


def test_files(sources, tmp_path):
    out = data.mix(tmp_path / "new" / "out", seed=1, size=30, **sources)
    rows = data.read_rows(out / "user.jsonl")
    manifest = json.loads((out / "manifest.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "test.jsonl", "user.jsonl"]
    assert {row["source"] for row in rows} == {"user", "harmful"}
    assert set(rows[0]) >= {"id", "instruction", "input", "output", "source"}
    assert manifest["user"]["harmful"] == sum(row["source"] == "harmful" for row in rows) == 6
    assert manifest["overlaps"]["harmful_in_test"] == 0
    assert len(data.read_rows(out / "test.jsonl")) == manifest["test"]["task"] + manifest["test"]["harmful"]
    # The rows can be used again as a user file, and are the same rows.
    again = data.to_rows(data.read_records(out / "user.jsonl"), role="user")
    assert [row["output"] for row in again] == [row["output"] for row in rows]


def test_conversations_survive(jsonl, tmp_path):
    turns = [{"role": r, "content": f"{r} {i}"} for i in range(2) for r in ("user", "assistant")]
    user = jsonl("talk.jsonl", [{"messages": turns}, question(1), question(2)])
    out = data.mix(tmp_path / "out", seed=1, user=user, test=jsonl("t.jsonl", [question(3)]))
    again = data.to_rows(data.read_records(out / "user.jsonl"), role="user")
    assert [row["messages"] for row in again if "messages" in row] == [turns]


def test_earlier_output_is_replaced_at_once(sources, tmp_path):
    out = data.mix(tmp_path / "out", seed=1, **sources)
    before = (out / "user.jsonl").read_text()
    with pytest.raises(DataError):
        data.mix(out, seed=2, size=10_000, **sources)
    assert (out / "user.jsonl").read_text() == before
    data.mix(out, seed=2, **sources)
    assert (out / "user.jsonl").read_text() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "out", "user.jsonl"]


def test_places_that_are_refused(sources, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"contains other files \(thesis.tex\)"):
        data.mix(other, seed=1, **sources)
    with pytest.raises(OutputError, match="is a file"):
        data.mix(tmp_path / "bad.jsonl", seed=1, **sources)
    out = data.mix(tmp_path / "out", seed=1, **sources)
    with pytest.raises(OutputError, match="contains the source"):
        data.mix(out, seed=1, user=out / "user.jsonl")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        data.mix(out, seed=1, **sources)
    (tmp_path / "empty").mkdir()
    assert data.mix(tmp_path / "empty", seed=1, **sources).is_dir()
    assert (other / "thesis.tex").read_text() == "x"


def test_a_source_behind_a_link_is_not_overwritten(sources, tmp_path):
    out = data.mix(tmp_path / "out", seed=1, **sources)
    before = (out / "user.jsonl").read_bytes()
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "mine.jsonl").symlink_to(out / "user.jsonl")
    for source, place in [
        (tmp_path / "link" / "user.jsonl", out), (tmp_path / "mine.jsonl", out),
        (out / "user.jsonl", tmp_path / "link"), (out, tmp_path / "link"), (tmp_path / "link", out),
    ]:  # fmt: skip
        with pytest.raises(OutputError, match="contains the source"):
            data.mix(place, seed=2, user=source)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "rows.jsonl").symlink_to(tmp_path / "user.jsonl")
    again = data.mix(tmp_path / "new", seed=1, user=tmp_path / "far" / "rows.jsonl")
    assert again.is_dir(), "a link to another place is fine"
    assert (out / "user.jsonl").read_bytes() == before


@pytest.mark.parametrize(("code", "kind"), [(28, HoldfastError), (13, OutputError)])
def test_a_failed_write_leaves_nothing(sources, tmp_path, monkeypatch, code, kind):
    out = data.mix(tmp_path / "out", seed=1, **sources)
    before = (out / "user.jsonl").read_text()

    def fails(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(HoldfastError) as caught:
        data.mix(out, seed=2, **sources)
    assert type(caught.value) is kind
    assert (out / "user.jsonl").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "out", "user.jsonl"]
