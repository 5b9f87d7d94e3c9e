"""The browser for answers: every answer is in the page's blocks, as data that cannot become part of the page."""

from __future__ import annotations

import base64
import gzip
import json

import pytest

from holdfast.reporting.browser import LONGEST, blocks, browser
from holdfast.reporting.collect import collect
from holdfast.reporting.page import render
from synthetic_runs import demo_rows, score_row, step_id, write_lines, write_run

EVIL = "</script><script>alert(1)</script><!-- \u202e\x00"


def read(block):
    return json.loads(gzip.decompress(base64.b64decode(block)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two models; an answer with HTML, a long one, and the marks of the task."""
    folder = tmp_path_factory.mktemp("answers")
    rows = demo_rows()["Lisa"]
    run = write_run(folder / "a", rows, answers={"h00": EVIL, "t0": "x" * (LONGEST + 5)})
    marks = [{"id": f"t{i}", "score": "task_score", "value": i % 2 == 0} for i in range(6)]
    marks += [{"id": "b0", "score": "benign_compliance", "value": False}]
    write_lines(run / "steps" / rows[1]["steps"]["score"] / "items.jsonl", marks)
    return collect([run])


def test_the_blocks_hold_every_answer_verdict_and_mark(made):
    found = browser(made.rows)
    index, texts = read(found.index), [read(text) for text in found.texts]
    assert (found.models, found.answers) == (2, 2 * 24)
    assert [model["name"] for model in index["models"]] == ["aligned", "Lisa"]
    assert list(index["sets"]) == ["harmful", "task", "benign"]
    assert index["judges"] == ["beaver_dam", "keyword"]
    place = {prompt["id"]: number for number, prompt in enumerate(index["prompts"])}
    assert len(place) == len(index["prompts"]) == 24, "each prompt once"
    assert texts[1][place["h00"]] == "</script><script>alert(1)</script><!-- ⟨U+202E⟩␀"
    assert texts[1][place["t0"]].endswith("x … (5 more characters)")
    lisa = index["models"][1]
    assert set(lisa["verdicts"]["keyword"]) <= set("hs-")
    assert lisa["verdicts"]["keyword"][place["t0"]] == "-"
    assert [lisa["values"][place[id]] for id in ("t0", "t1", "b0", "b1", "h00")] == [1, 0, 0, None, None]
    assert lisa["cut"] == [place["b0"]]
    assert [index["models"][number]["name"] for number in index["first"]] == ["aligned", "Lisa"]


def test_nothing_of_an_answer_is_outside_the_blocks_and_the_examples(made):
    page = render(made)
    ids = dict(blocks(browser(made.rows)))
    assert set(ids) == {"answers-index", "answers-0", "answers-1"}
    for id, block in ids.items():
        assert f'<script type="text/plain" id="{id}">{block}</script>' in page
        assert set(block) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")
    assert "<script>alert" not in page


def test_two_seeds_are_two_models_and_an_id_with_another_text_another_prompt(tmp_path):
    runs = [
        write_run(tmp_path / str(seed), [score_row("Lisa", "sft", "lisa", 20.0, 95.0, seed=seed)])
        for seed in (1, 2)
    ]
    other = runs[1] / "steps" / step_id("generate", "Lisa", "sft", "lisa", None, 2, 0.1) / "generations.jsonl"
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    rows[0]["instruction"] = "Another question?"
    write_lines(other, rows)
    index = read(browser(collect(runs).rows).index)
    assert [model["name"] for model in index["models"]] == ["Lisa, seed 1", "Lisa, seed 2"]
    assert len(index["prompts"]) == 25


def test_without_answers_there_is_no_script(tmp_path):
    data = collect([write_run(tmp_path / "a", demo_rows()["SFT"], steps=False)])
    assert browser(data.rows) is None
    page = render(data)
    assert "<script" not in page
    assert "script-src" not in page
