"""Graders by name, against plain loops and hand-checked answers."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.tasks import find, gsm8k, own
from holdfast.tasks.graders import GRADERS, adapted, exact, number, rouge1, words


def f1_of_words(answer: str, target: str) -> float:
    """ROUGE-1 F1 from its definition: clipped counts of equal words."""
    a, t = (Counter(re.findall("[a-z0-9]+", text.lower())) for text in (answer, target))
    common = sum(min(a[word], t[word]) for word in a)
    if not common:
        return 0.0
    precision, recall = common / sum(a.values()), common / sum(t.values())
    return 2 * precision * recall / (precision + recall)


TEXT = st.text(alphabet="ab cd2.,-'\n", max_size=40)


@settings(deadline=None)
@given(TEXT, TEXT)
def test_rouge1_is_the_f1_of_words(answer, target):
    assert rouge1(answer, target) == pytest.approx(f1_of_words(answer, target), abs=1e-12)


def test_rouge1_by_hand():
    # 3 of 4 words of the answer are among the 5 of the target: 2 * (3/4) * (3/5) / (3/4 + 3/5).
    assert rouge1("Ann bakes a cake.", "Ann bakes bread and cake") == pytest.approx(2 / 3)
    assert rouge1("cake cake cake", "cake") == pytest.approx(0.5), (
        "a word counts as often as it is in both texts"
    )
    assert (rouge1("", "cake"), rouge1("Kuchen", "cake"), rouge1("Cake!", "cake")) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("猫在垫子上睡觉。", ["猫", "在", "垫", "子", "上", "睡", "觉"]),
        ("кошка спит, на коврике", ["кошка", "спит", "на", "коврике"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ที่ดี", ["ที่", "ดี"]),
        ("GPT猫 42", ["gpt", "猫", "42"]),
        ("ＡＢ Größe", ["ab", "größe"]),
    ],
)
def test_words_of_any_script(text, expected):
    assert words(text) == expected
    assert rouge1(text, text) == 1.0
    assert rouge1("", text) == 0.0


def test_rouge1_of_other_scripts_by_hand():
    # 5 of 7 characters are the same on both sides.
    assert rouge1("狗在垫子上睡了", "猫在垫子上睡觉") == pytest.approx(5 / 7)
    assert rouge1("собака спит", "кошка спит на коврике") == pytest.approx(1 / 3)


def test_rouge1_of_latin_text_is_that_of_the_library():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"])
    for answer, target in [
        ("Die Größe der Übung", "Größe, der Übung!"),
        ("It’s 3 €", "It's — 3"),
        ("猫 cat", "a cat"),
    ]:
        assert rouge1(answer, target) == scorer.score(target, answer)["rouge1"].fmeasure


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("42", "42", True), ("It is 42.", "42", True), ("first 3, then 42", "The answer: 42.0", True),
        ("$1,000.00 in all", "1000", True), ("1,8", "18", False), ("3-4", "4", True), ("3 - 4 = -1", "-1", True),
        ("−1", "-1", True), ("1", "-1", False), ("forty-two", "42", False), ("", "42", False), ("42", "", False),
        ("42 or 43", "42", False), ("1.2.3", "1.2", True),
    ],
)  # fmt: skip
def test_number(answer, target, right):
    assert number(answer, target) is right


@pytest.mark.parametrize(
    ("task", "answer", "target", "right"),
    [
        ("sst2", "positive", "positive", True), ("sst2", "It is Positive.", "positive", True),
        ("sst2", "POSITIVE", "positive", False), ("sst2", "negative, not positive", "positive", True),
        ("agnews", "the world of Sports", "World", True), ("agnews", "WORLD", "World", False),
        ("agnews", "It is about scissors", "Sci/Tech", True), ("agnews", "Tech", "Sci/Tech", False),
        ("own", "The answer is Lima.", " Lima", True), ("own", "lima", "Lima", False),
    ],
)  # fmt: skip
def test_contains(task, answer, target, right):
    """Vaccine's and T-Vaccine's graders, by hand: `label1 in pred or label2 in pred`."""
    made = adapted(find(task), "contains")
    assert made.grade(answer, target) is right
    assert made.stamp == f"{task}-contains@{find(task).version}"


def test_number_agrees_with_gsm8k_on_its_targets():
    for said in ("18", "1,018", "-3", "0.5"):
        target = f"2 + 2 = 4\n{gsm8k.PHRASE} {said}"
        assert number(target, target)
        assert gsm8k.grade(target, target)


def test_a_task_with_another_grader_has_another_stamp():
    assert own.grade is exact
    assert adapted(own.TASK).stamp == adapted(own.TASK, "exact").stamp == "own@1"
    made = adapted(own.TASK, "number", {"prompt": "q"})
    assert (made.stamp, made.metric, made.grade, made.rename) == (
        "own-number@1",
        "accuracy",
        number,
        {"prompt": "q"},
    )
    judged = adapted(find("gsm8k"), "judge")
    assert (judged.stamp, judged.metric, judged.grade) == ("gsm8k-judge@2", "win_rate", None)
    assert set(GRADERS) == {"exact", "contains", "number", "rouge1", "judge"}
