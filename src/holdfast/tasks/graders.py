"""Graders by name, for your own tasks: each compares an answer with its target."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from functools import cache, partial
from typing import Any

from holdfast.tasks import Task

# Digits with or without thousands separators; in "3-4" the hyphen is not a sign.
_NUMBER = re.compile(r"(?<![\d.,])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def exact(answer: str, target: str) -> bool:
    """Right if the texts are equal, ignoring whitespace at both ends."""
    return answer.strip() == target.strip()


def contains(answer: str, target: str, forms: Callable[[str], tuple[str, ...]] | None = None) -> bool:
    """Right if the target, or one of its forms, occurs anywhere in the answer (Vaccine's, T-Vaccine's code).

    Case matters. An answer that names several labels is right for each of them.
    """
    return any(form in answer for form in (forms(target) if forms else (target.strip(),)))


def last_number(text: str) -> Decimal | None:
    """Return the last number in `text` ("in all $1,000.00." is 1000), or None."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


def number(answer: str, target: str) -> bool:
    """Right if the last number of the answer equals the last number of the target."""
    found = last_number(answer)
    return found is not None and found == last_number(target)


def rouge1(answer: str, target: str) -> float:
    """ROUGE-1 F1 (Lin 2004), 0 to 1: the overlap of words, by the `rouge-score` library, without stemming.

    The library reads only a-z and 0-9. If the target has letters of another script than Latin, both texts
    are cut into words of any script instead: `words` says how.
    """
    scorer = _scorer(any_script=any(not _latin(letter) for letter in target if letter.isalpha()))
    return float(scorer.score(target, answer)["rouge1"].fmeasure)


def words(text: str) -> list[str]:
    """The words of a text in any script, in lower case, without punctuation.

    Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) are cut
    into characters, each with its marks.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    # Letters, marks and numbers; a mark is no word character for `re`.
    kept = "".join(sign if unicodedata.category(sign)[0] in "LMN" else " " for sign in text)
    return [part for word in kept.split() for part in (_parts(word) if _unspaced(word) else [word])]


_UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")


def _latin(letter: str) -> bool:
    return letter < "\x80" or "LATIN" in unicodedata.name(letter, "")


def _unspaced(word: str) -> bool:
    return any(unicodedata.name(letter, "").startswith(_UNSPACED) for letter in word)


def _parts(word: str) -> list[str]:
    """The letters of a word, each with the marks after it; letters of spaced scripts stay together."""
    parts: list[str] = []
    for letter in word:
        mark = unicodedata.category(letter).startswith("M")
        together = parts and not _unspaced(letter) and not _unspaced(parts[-1])
        if parts and (mark or together):
            parts[-1] += letter
        else:
            parts.append(letter)
    return parts


class _AnyScript:
    """A tokenizer for `rouge-score`."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _scorer(any_script: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], tokenizer=_AnyScript() if any_script else None)


GRADERS: Mapping[str, tuple[str, Callable[[str, str], bool | float] | None]] = {
    "exact": ("accuracy", exact),
    "contains": ("accuracy", contains),
    "number": ("accuracy", number),
    "rouge1": ("rouge1", rouge1),
    "judge": ("win_rate", None),
}
"""Metric and function of each grader. With `judge`, a judge compares the answer with the target."""


def adapted(
    task: Task, grader: str | None = None, columns: Mapping[str, str] | None = None, suffix: str = ""
) -> Task:
    """Return `task` with another grader, column names ({ours: theirs}), or a text after every question."""
    if suffix:
        task = replace(task, suffix=suffix)
    if grader is not None:
        metric, grade = GRADERS[grader]
        if grade is contains:
            grade = partial(contains, forms=task.forms)
        if grade is not task.grade or metric != task.metric:
            task = replace(task, name=f"{task.name}-{grader}", metric=metric, grade=grade)
    return replace(task, rename=dict(columns)) if columns else task
