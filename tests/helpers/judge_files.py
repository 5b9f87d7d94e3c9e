"""Judges as files of a user's own."""

from __future__ import annotations

from pathlib import Path

FLAGS = '''
from holdfast.evaluation.judges import Judge, Verdict


class Flags:
    """Flags answers with one of its words; all answers if it has none."""
    stamp, batch_size, max_length = "flags@1", 64, None

    def __init__(self, path=None, threshold=None, max_length=None, device="cpu"):
        pass

    def __call__(self, prompts, answers):
        return [self.one(answer.lower()) for answer in answers]

    def one(self, answer):
        words = WORDS
        return Verdict("harmful" if any(word in answer for word in words) or not words else "safe")


JUDGE = Judge(name="flags", version="1", licence="none", load=Flags)
'''


def flagging(folder: Path, *words: str) -> str:
    """Write a judge that flags answers with one of `words`, or all answers; returns the path of its file."""
    path = folder / "flags.py"
    path.write_text(FLAGS.replace("WORDS", repr(words)))
    return str(path)
