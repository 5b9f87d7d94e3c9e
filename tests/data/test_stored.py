"""Rows in a temporary file are the same as rows in a list."""

from __future__ import annotations

import pytest

from holdfast.data.pool import Pool, draw, first_prompts, order
from holdfast.data.rows import prompt_key, row_id
from holdfast.data.stored import StoredRows
from holdfast.errors import DataError


def rows(count, role="user", **further):
    made = [{"instruction": f"q{i % 7}", "input": "", "output": f"a{i}", **further} for i in range(count)]
    return [{"id": row_id(role, row), **row} for row in made]


def stored(given):
    return StoredRows.write((row, prompt_key(row)) for row in given)


def test_a_sequence_like_a_list():
    given = rows(20)
    kept = stored(given)
    assert kept == given
    assert (len(kept), kept[3], kept[-1], kept[2:4]) == (20, given[3], given[-1], given[2:4])
    assert list(kept.ids) == [row["id"] for row in given]
    assert kept != given[:-1]
    assert stored([]) == []
    with pytest.raises(IndexError):
        kept[20]


def test_of_equal_rows_the_last_stands_at_the_first_place():
    first, second = rows(2)
    again = {**first, "category": ["x"]}
    assert stored([first, second, again]).unique() == [again, second]


def test_prompts():
    kept = stored(rows(20))
    assert [row["output"] for row in kept.one_of_each_prompt()] == [f"a{i}" for i in range(7)]
    key = prompt_key(kept[3])
    assert [row["output"] for row in kept.with_prompts([key])] == ["a3", "a10", "a17"]
    assert len(kept.without_prompts([key])) == 17
    keys = [prompt_key(row) for row in kept.one_of_each_prompt()]
    assert first_prompts(kept, 4, 1, "x") == order(keys, 1, "x")[:4]


def test_parts_keep_their_labels_and_roles():
    one, two = rows(3), rows(2, role="harmful")
    joined = StoredRows.joined([stored(one).labelled("user"), stored(two).labelled("harmful")])
    assert joined == [{**row, "source": "user"} for row in one] + [
        {**row, "source": "harmful"} for row in two
    ]
    assert list(joined.ids) == [row["id"] for row in (*one, *two)]
    assert [row["id"] for row in joined.pick([4, 0])] == [two[1]["id"], one[0]["id"]]


def test_draws_are_in_the_seeded_order():
    given = rows(30)
    drawn = draw(Pool(stored(given), {"source": "x"}), 12, 5, "user", "rows")
    assert [row["id"] for row in drawn] == order([row["id"] for row in given], 5, "user")[:12]
    with pytest.raises(DataError, match="Asked for 31 rows, but x has 30"):
        draw(Pool(stored(given), {"source": "x"}), 31, 5, "user", "rows")
