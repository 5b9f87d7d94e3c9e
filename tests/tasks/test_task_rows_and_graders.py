"""Each task's rows and grader, on the published formats."""

from __future__ import annotations

import pytest

from holdfast.tasks import (
    METRICS,
    SafetyData,
    Task,
    agnews,
    beavertails,
    find,
    gsm8k,
    names,
    own,
    sst2,
    world,
)


def test_every_file_is_a_data_set():
    assert names() == [
        "advbench", "agnews", "alpaca", "alpaca_eval", "beavertails", "beavertails_330k", "beavertails_refusals",
        "dialog_summary", "directharm4", "dolly", "gsm8k", "harmbench", "hex_phi", "identity_shift", "jailbreakbench",
        "mt_bench", "or_bench", "own", "purebad", "sorry_bench", "sst2", "strongreject", "wildguardtest", "world",
        "xstest",
    ]  # fmt: skip
    for name in names():
        task = find(name)
        assert isinstance(task, Task | SafetyData)
        assert task.name == name
        assert set(task.splits) <= {"train", "test"}
        assert task.hub_id or task.make or task.obtain or name == "world", (
            "a data set without a Hub id must say how to obtain it"
        )
        assert task.licence or name == "own"
        assert task.metric in METRICS
        if isinstance(task, Task):
            assert (task.grade is None) == METRICS[task.metric].judged
    assert find("nothing") is None
    assert sst2.TASK.stamp == "sst2@1"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("positive", True), ("Positive", True), (" positive\n", True), ("positive.", False),
        ("POSITIVE", False), ("negative", False), ("positive\nnegative", False), ("", False),
    ],
)  # fmt: skip
def test_sst2_grade(answer, right):
    assert sst2.grade(answer, "positive") is right


@pytest.mark.parametrize(
    ("label", "output"),
    [(0, "negative"), ("1", "positive"), ("Positive", "positive"), (-1, None), (None, None)],
)
def test_sst2_row(label, output):
    record = {"sentence": "so-so ", "label": label}
    if output is None:
        with pytest.raises(ValueError, match="`label` is"):
            sst2.to_row(record)
        return
    row = sst2.to_row(record)
    assert row["instruction"] == "Analyze the sentiment of the input, and respond only positive or negative"
    assert (row["input"], row["output"]) == ("so-so ", output)


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("World", "World", True), (" world\n", "World", True), ("Sci/Tech", "Sci/Tech", True),
        ("sci", "Sci/Tech", True), ("sci/tech", "Sci/Tech", False), ("Sci", "Sci/Tech", False),
        ("Sports", "World", False), ("World.", "World", False), ("WORLD", "World", False), ("", "World", False),
    ],
)  # fmt: skip
def test_agnews_grade(answer, target, right):
    assert agnews.grade(answer, target) is right


@pytest.mark.parametrize(
    ("label", "output"),
    [
        (0, "World"),
        ("1", "Sports"),
        ("business", "Business"),
        (3, "Sci/Tech"),
        (4, None),
        (-1, None),
        (None, None),
    ],
)
def test_agnews_row(label, output):
    record = {"text": "News \\of it. ", "label": label}
    if output is None:
        with pytest.raises(ValueError, match=r"`label` is .*; expected 0 to 3"):
            agnews.to_row(record)
        return
    row = agnews.to_row(record)
    assert row["instruction"] == (
        "Categorize the news article given in the input into one of the 4 categories:\n\n"
        "World\nSports\nBusiness\nSci/Tech\n"
    )
    assert (row["input"], row["output"]) == ("News \\of it. ", output)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("The final answer is: 18", "18"), ("2 + 2 = 4\nThe final answer is:  1,000", "1000.00"),
        ("The final answer is: $5", "5"), ("The final answer is: 5.", "5"), ("The final answer is: -3", "-3"),
        ("So it is 18. The final answer is: about 18 eggs, not 19", "18"),
        ("The final answer is: eighteen", None), ("First 3, then The final answer is: none", "3"),
        # Without the phrase (which ends in a space), the last number of the answer.
        ("18", "18"), ("#### 18", "18"), ("She has 20 - 2 = 18 eggs.", "18"), ("The final answer is:18", "18"),
        ("6 and The final answer is:\n7", "7"), ("The final answer is: 19 The final answer is: 18", "19"),
        ("", None), ("The final answer is: ", None), ("The final answer is: 18abc", "18"),
        ("The final answer is: 1/8", "1"), ("The final answer is: .5", "5"), ("It costs 20%", "20"),
    ],
)  # fmt: skip
def test_gsm8k_number(answer, number):
    """Worked out by hand from `extract_answer_number` in the papers' code."""
    assert gsm8k.final_answer(answer) == (None if number is None else float(number))
    assert gsm8k.grade(answer, f"9 * 2\nThe final answer is:  {number or 18}") is (number is not None)
    assert not gsm8k.grade(answer, "The final answer is:  123")


def test_gsm8k_row():
    row = gsm8k.to_row({"question": "How many?", "answer": "9 * 2 = <<9*2=18>>18\n#### 1,018"})
    assert row == {
        "instruction": "How many?",
        "input": "",
        "output": "9 * 2 = <<9*2=18>>18\nThe final answer is:  1,018",
    }
    assert gsm8k.grade("The final answer is: 1018", row["output"])
    for bad in ("It is 18", "#### many", "####"):
        with pytest.raises(ValueError, match="expected `#### <number>`"):
            gsm8k.to_row({"question": "q", "answer": bad})


def test_own_and_world_grades():
    assert own.grade(" Yes\n", "Yes")
    assert not own.grade("yes", "Yes")
    assert world.grade("  smiths' guild \nand more", "Smiths' Guild")
    assert not world.grade("The smiths' guild", "Smiths' Guild")
    assert not world.grade("", "Smiths' Guild")


def test_beavertails_row():
    record = {
        "prompt": "q",
        "response": "a",
        "category": {"self_harm": False, "terrorism,organized_crime": True},
        "is_safe": False,
    }
    row = {"instruction": "q", "input": "", "output": "a", "category": ["terrorism,organized_crime"]}
    assert beavertails.to_row(record, "unsafe") == row
    assert beavertails.to_row(record, "safe") is None
    assert beavertails.to_row({**record, "is_safe": True}, "safe") == row
    # A CSV cell: the text "False" is not true.
    assert beavertails.to_row({**record, "is_safe": "False"}, "safe") is None
    with pytest.raises(ValueError, match="`is_safe` is None"):
        beavertails.to_row({**record, "is_safe": None}, "safe")
