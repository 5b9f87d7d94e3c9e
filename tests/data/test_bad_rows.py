"""Rows that cannot be used: all of them are listed at once, or dropped and counted."""

from __future__ import annotations

import json

import pytest

from commands import holdfast_command as command
from holdfast import data
from holdfast.data.bad_rows import SHOWN
from holdfast.errors import DataError
from made_up_rows import question


def broken(count, good=3):
    return [*(question(i) for i in range(good)), *({"instruction": "q", "output": i} for i in range(count))]


def test_all_bad_rows_are_listed_at_once(jsonl):
    path = jsonl("a.jsonl", [*broken(2), {"text": "q"}])
    path.write_text(path.read_text() + '{"instruction": "torn\n')
    with pytest.raises(DataError) as caught:
        data.to_rows(data.read_records(path), role="user")
    lines = str(caught.value).split("\n")
    assert lines[0] == f"{path}: 4 of 7 rows cannot be used:"
    assert lines[1] == "  line 4: the answer is of the type int; expected text"
    assert lines[3] == "  line 6: no prompt and answer found. Columns seen: text"
    assert lines[4].startswith("  line 7: not complete JSON")
    assert lines[5].startswith("Accepted: messages")
    assert "data.skip_bad: true" in lines[5]


def test_twenty_are_shown_and_the_rest_is_counted(jsonl):
    with pytest.raises(DataError) as caught:
        data.to_rows(data.read_records(jsonl("a.jsonl", broken(SHOWN + 5))), role="user")
    assert str(caught.value).count("line ") == SHOWN
    assert "\n  and 5 more\n" in str(caught.value)


def test_bad_rows_are_dropped_and_counted(jsonl):
    path = jsonl("a.jsonl", broken(2, good=20))
    loaded = data.read_records(path)
    assert len(data.to_rows(loaded, role="user", skip_bad=True)) == 20
    made = data.user_rows(seed=1, user=path, skip_bad=True)
    assert (made.manifest["sources"][0]["rows"], made.manifest["sources"][0]["bad_rows_dropped"]) == (22, 2)
    assert made.manifest["sources"][0]["first_bad_rows"] == ["line 21", "line 22"]
    with pytest.raises(DataError, match="2 of 22 rows cannot be used"):
        data.user_rows(seed=1, user=path)
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        data.to_rows(data.read_records(jsonl("b.jsonl", broken(2, good=0))), role="user", skip_bad=True)


def test_the_commands_say_how_many(jsonl, tmp_path):
    jsonl("rows-of-mix.jsonl", broken(2, good=20))
    done = command("mix", "--user", "rows-of-mix.jsonl", "--out", "out", "--skip-bad", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert "rows-of-mix.jsonl: 2 of 22 rows cannot be used and are dropped." in told
    assert told.count("are dropped") == 1
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["user"]["size"] == 18
