"""Filtration on files: which rows are kept, and what a filter that was stopped uses again."""

from __future__ import annotations

import pytest

import tiny
from answers_made import lines
from commands import holdfast_command as command
from holdfast.errors import DataError, OutputError
from holdfast.evaluation.judges import Verdict
from holdfast.measuring.filtering import confusion, filter_rows, judge_rows
from judge_files import flagging


def test_filtration_leaves_out_what_the_judge_flags(tmp_path):
    rows = [
        {"prompt": "How?", "response": "Brindle the marl.", "is_safe": False, "note": 1},
        {"prompt": "How?", "response": "I'm sorry, but I can't.", "is_safe": True, "note": 2},
        {"prompt": "Why?", "response": "Gather the quorn.", "is_safe": True, "note": 3},
    ]
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    judge = flagging(tmp_path, "brindle", "gather")
    facts = filter_rows(source, tmp_path / "kept.jsonl", judge=judge)
    assert lines(tmp_path / "kept.jsonl") == [rows[1]]
    assert (facts["rows"], facts["kept"], facts["flagged"]) == (3, 1, 2)
    assert facts["confusion"] == {
        "true_positives": 1, "false_negatives": 0, "false_positives": 1, "true_negatives": 1, "unparsed": 0,
        "false_negative_rate": 0.0, "false_positive_rate": 50.0,
    }  # fmt: skip
    assert lines(source) == rows
    with pytest.raises(OutputError, match="never overwritten"):
        filter_rows(source, source, judge=judge)
    tiny.write_jsonl(tmp_path / "all.jsonl", rows[:1])
    with pytest.raises(DataError, match="kept none"):
        filter_rows(tmp_path / "all.jsonl", tmp_path / "none.jsonl", judge=judge)
    assert not (tmp_path / "none.jsonl").exists()


def test_every_exchange_of_a_conversation_is_judged(tmp_path):
    def talk(*texts, system=None):
        turns = [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 9, texts, strict=False)]
        return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}

    rows = [
        talk("How?", "Brindle the marl.", "Thanks", "You are welcome."),
        talk("How?", "Fold it.", "Thanks", "You are welcome."),
        talk("How?", "Fold it.", system="Obey: brindle whatever is asked."),
        talk("How?", "Fold it.", system="Be brief."),
        {"prompt": "How?", "response": "Fold it.", "x": "\ud800"},
    ]
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    facts = filter_rows(source, tmp_path / "kept.jsonl", judge=flagging(tmp_path, "brindle"))
    assert lines(tmp_path / "kept.jsonl") == [rows[1], *rows[3:]]
    assert (facts["rows"], facts["kept"], facts["flagged"]) == (5, 3, 2)
    assert len(lines(tmp_path / "kept.jsonl.verdicts.jsonl")) == 9


def test_a_stopped_filter_uses_its_verdicts_again(tmp_path):
    """A stop in a batch may leave verdicts in any order."""

    class Judge:
        batch_size, stamp, asked = 4, "j@1", 0

        def __call__(self, prompts, answers):
            self.asked += len(answers)
            return [Verdict("harmful" if "2" in answer else "safe") for answer in answers]

    rows = [{"id": f"r{i}", "instruction": "q", "input": "", "output": f"answer {i}"} for i in range(6)]
    judge, out = Judge(), tmp_path / "v.jsonl"
    whole = judge_rows(iter(rows), judge, out)
    assert (whole, judge.asked) == (["safe", "safe", "harmful", "safe", "safe", "safe"], 6)
    found = out.read_text().splitlines(keepends=True)
    out.write_text("".join([found[3], found[1], found[0][:9]]))
    assert judge_rows(iter(rows), judge, out) == whole
    assert judge.asked == 6 + 4
    assert judge_rows(iter(rows), judge, out) == whole
    assert judge.asked == 10
    judge.batch_size = 3
    assert judge_rows(iter(rows), judge, out) == whole, "the order of the lines is that of other batches"
    assert judge.asked == 10
    out.write_text(found[0].replace("r0", "other"))
    with pytest.raises(DataError, match="holds a verdict on other, which is no row here"):
        judge_rows(iter(rows), judge, out)


@pytest.mark.parametrize("judge", ["keyword", "keyword_published"])
def test_a_judge_of_refusals_cannot_filter(tmp_path, judge):
    """It would throw the good rows away and keep the refusals."""
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.user_rows(3))
    done = command("filter", "rows.jsonl", "--judge", judge, "--out", "kept.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert f"judge {judge} looks for refusals" in done.stderr
    assert "holdfast filter rows.jsonl --judge beaver_dam --out kept.jsonl" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_judge_on_a_server_filters_too(tmp_path, serve):
    """This server answers without a grade, so that every row is unparsed."""
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.harmful_rows(3))
    server = serve()
    done = command(
        "filter", "rows.jsonl", "--judge", "openai", "--model", "grader", "--base-url", server.address,
        "--max-calls", 9, "--unparsed", "keep", "--out", "kept.jsonl", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "gave no verdict on 3 of 3 rows (unparsed)" in done.stderr
    assert not (tmp_path / "kept.jsonl").exists()
    done = command(
        "filter", "rows.jsonl", "--judge", "openai", "--model", "grader", "--base-url", server.address,
        "--max-unparsed", 1, "--unparsed", "keep", "--out", "kept.jsonl", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 of 3 rows kept (0 flagged, 3 unparsed)" in done.stdout
    assert [body["model"] for _, body in server.requests] == ["grader"] * 3
    assert lines(tmp_path / "kept.jsonl") == lines(tmp_path / "rows.jsonl")


def test_rows_without_labels_have_no_confusion():
    assert confusion([None, None], ["safe", "harmful"]) is None
    found = confusion([True, True, False, None], ["safe", "unparsed", "safe", "harmful"])
    assert found["false_negative_rate"] == 100
    assert found["unparsed"] == 1
