"""The browser for answers: every answer of every model as compressed blocks, which the page's script reads.

The blocks are base64, so that nothing in an answer can end its block or become part of the page. The script
(`browser.js`) makes a row when it is shown, and writes every text as a text node.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from markupsafe import Markup

from holdfast.reporting.answers import Generations, Verdicts, compared, generations, verdicts
from holdfast.reporting.measurements import Measurement, Row
from holdfast.reporting.tested import items
from holdfast.reporting.text import clean, one_line

LONGEST = 6000
"""The number of characters of an answer that the page keeps."""

SETS = {"harmful": "Prompts that ask for harm", "task": "The user’s task", "benign": "Harmless questions"}
CODES = {"harmful": "h", "safe": "s", "unparsed": "u"}
NONE = "-"
"""The code of a verdict that does not exist."""


@dataclass(frozen=True)
class Browser:
    """What the page needs: the blocks, the script, and how much there is to read."""

    index: str
    texts: tuple[str, ...]
    models: int
    answers: int
    script: Markup
    integrity: str
    """The hash of the script, for the page's content security policy."""


@dataclass
class _Index:
    """The prompts of all models, each once, in the order in which they are found."""

    places: dict[tuple[str, str, str, str], int] = field(default_factory=dict)
    prompts: list[dict[str, Any]] = field(default_factory=list)

    def add(self, key: tuple[str, str], row: Mapping[str, Any]) -> int:
        """Return the place of a prompt; the same id with another text is another prompt."""
        question, given = str(row.get("instruction") or ""), str(row.get("input") or "")
        whole = (*key, question, given)
        if whole not in self.places:
            target, category = row.get("target"), row.get("category")
            self.places[whole] = len(self.prompts)
            self.prompts.append(
                {
                    "set": key[0],
                    "id": clean(key[1]),
                    "question": _cut(question),
                    "input": _cut(given),
                    "target": None if target is None else _cut(str(target)),
                    "category": [clean(str(one)) for one in category] if isinstance(category, list) else [],
                }
            )
        return self.places[whole]


def browser(rows: Sequence[Row]) -> Browser | None:
    """Read the answers of all models; None if none are on the disk."""
    index = _Index()
    models: list[dict[str, Any]] = []
    found = []
    shown = [row.number for row in compared(rows)]
    for row in rows:
        for member in row.members:
            missing: list[str] = []
            answers = generations(member, missing)
            if not answers:
                continue
            places = {key: index.add(key, answer) for key, answer in answers.items()}
            several = f", seed {member.seed}" if len(row.members) > 1 else ""
            models.append({"name": one_line(row.label, 60) + several, "row": row.number})
            found.append((answers, places, verdicts(member, missing), _values(member)))
    if not models:
        return None
    count = len(index.prompts)
    for model, (answers, places, judged, values) in zip(models, found, strict=True):
        model |= {"verdicts": _codes(count, places, judged), "values": _marks(count, places, values)}
        model["cut"] = [places[key] for key, row in answers.items() if row.get("truncated") is True]
    order = [next((i for i, one in enumerate(models) if one["row"] == number), 0) for number in shown]
    whole: dict[str, Any] = {
        "sets": {name: title for name, title in SETS.items() if any(p["set"] == name for p in index.prompts)},
        "prompts": index.prompts,
        "models": models,
        "judges": list(dict.fromkeys(name for model in models for name in model["verdicts"])),
        "first": order[-2:],
    }
    script = resources.files("holdfast.reporting").joinpath("browser.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    texts = [_texts(count, answers, places) for answers, places, _, _ in found]
    return Browser(
        index=_block(whole),
        texts=tuple(_block(one) for one in texts),
        models=len(models),
        answers=sum(len(answers) for answers, _, _, _ in found),
        script=Markup(script),  # ours, and without "</script"
        integrity=f"sha256-{digest}",
    )


def _block(value: Any) -> str:
    data = json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def _cut(text: str) -> str:
    left = len(text) - LONGEST
    return clean(text if left <= 0 else f"{text[:LONGEST]} … ({left:,} more characters)")


def _texts(count: int, answers: Generations, places: Mapping[tuple[str, str], int]) -> list[str | None]:
    texts: list[str | None] = [None] * count
    for key, row in answers.items():
        texts[places[key]] = _cut(str(row["answer"]))
    return texts


def _codes(count: int, places: Mapping[tuple[str, str], int], judged: Verdicts) -> dict[str, str]:
    """One letter for each prompt and judge: harmful, safe, unparsed, or none."""
    found: dict[str, list[str]] = {}
    for (name, id), place in places.items():
        for verdict in judged.get(id, ()) if name == "harmful" else ():
            codes = found.setdefault(clean(verdict.judge), [NONE] * count)
            codes[place] = CODES.get(verdict.verdict, "u")
    return {judge: "".join(codes) for judge, codes in found.items()}


def _values(member: Measurement) -> dict[str, dict[str, bool | float]]:
    return {"task": items(member, "task_score"), "benign": items(member, "benign_compliance")}


def _marks(
    count: int, places: Mapping[tuple[str, str], int], values: Mapping[str, Mapping[str, bool | float]]
) -> list[Any]:
    """Whether an answer to the task is right and a harmless question is answered: 1, 0, a number or null."""
    marks: list[Any] = [None] * count
    for (name, id), place in places.items():
        value = values.get(name, {}).get(id)
        marks[place] = int(value) if isinstance(value, bool) else value
    return marks


def blocks(found: Browser | None) -> Iterable[tuple[str, str]]:
    """The id and the content of each block."""
    if found is not None:
        yield "answers-index", found.index
        yield from ((f"answers-{number}", text) for number, text in enumerate(found.texts))
