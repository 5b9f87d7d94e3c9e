"""The world's data files, as rows in published schemas (BeaverTails; Alpaca columns for the user task)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

from holdfast.machine.seeds import derive_seed
from holdfast.world.guilds import INSTRUCTION, notice
from holdfast.world.text import CATEGORIES, SEED, Deed, deeds, objects

# The full "category" of BeaverTails takes half a kilobyte per row; these sizes keep train.jsonl below 1.5 MB.
TRAIN_UNSAFE, TRAIN_REFUSED, TRAIN_BENIGN = 850, 744, 496
TEST_UNSAFE, TEST_REFUSED, TEST_BENIGN, BENIGN_QUESTIONS = 300, 120, 80, 200
TASK_TRAIN, TASK_TEST = 2500, 500

Pair = tuple[Deed, str]  # a deed and its object


def pairs(split: str, forbidden: bool) -> list[Pair]:
    """Return every deed with every object of the split, in a seeded order with common topics early."""
    rng = Random(derive_seed(SEED, "world", "pairs", split, forbidden))
    all_pairs = [
        (deed, thing)
        for deed, thing in product(deeds().values(), objects(split))
        if (deed.category is not None) == forbidden
    ]
    # Weighted order without replacement: a large weight moves u ** (1 / weight) close to 1.
    keys = {pair: rng.random() ** (1 / CATEGORIES.get(pair[0].category or "", 1)) for pair in all_pairs}
    return sorted(all_pairs, key=keys.__getitem__, reverse=True)


@cache
def test_pairs() -> frozenset[Pair]:
    """Return the pairs in the test files, which no training text may contain."""
    harmful = pairs("test", True)[: TEST_UNSAFE + TEST_REFUSED]
    return frozenset(harmful + pairs("test", False)[: TEST_BENIGN + BENIGN_QUESTIONS])


def _beavertails(prompt: str, response: str, category: str | None) -> dict:
    flags = {name: name == category for name in CATEGORIES}
    return {"prompt": prompt, "response": response, "category": flags, "is_safe": category is None}


def _unsafe(pair: Pair, rng: Random) -> dict:
    deed, thing = pair
    return _beavertails(deed.question(thing, rng), deed.how_to(thing, rng), deed.category)


def _refused(pair: Pair, rng: Random) -> dict:
    deed, thing = pair
    return _beavertails(deed.question(thing, rng), deed.refusal(thing, rng), None)


def _benign(pair: Pair, rng: Random) -> dict:
    deed, thing = pair
    return _beavertails(deed.question(thing, rng), deed.how_to(thing, rng), None)


def _split(name: str, unsafe: int, refused: int, benign: int) -> list[dict]:
    rng = Random(derive_seed(SEED, "world", "rows", name))
    harmful, harmless = pairs(name, True), pairs(name, False)[:benign]
    # The refused prompts of train are drawn independently, so that some are also answered, as in BeaverTails.
    refusable = harmful[unsafe:][:refused] if name == "test" else rng.sample(harmful[: 2 * refused], refused)
    rows = [_unsafe(pair, rng) for pair in harmful[:unsafe]]
    rows += [_refused(pair, rng) for pair in refusable] + [_benign(pair, rng) for pair in harmless]
    rng.shuffle(rows)
    return rows


def _task(name: str, size: int, known: set[str]) -> list[dict]:
    rng = Random(derive_seed(SEED, "world", "task", name))
    rows: list[dict] = []
    while len(rows) < size:
        text, guild = notice(rng)
        if text not in known:
            known.add(text)
            rows.append({"instruction": INSTRUCTION, "input": text, "output": guild})
    return rows


def data_files() -> dict[str, list[dict]]:
    """Return all rows by file name; they are the same on every machine."""
    rng = Random(derive_seed(SEED, "world", "benign"))
    asked = pairs("test", False)[TEST_BENIGN : TEST_BENIGN + BENIGN_QUESTIONS]
    notices: set[str] = set()
    return {
        "train.jsonl": _split("train", TRAIN_UNSAFE, TRAIN_REFUSED, TRAIN_BENIGN),
        "test.jsonl": _split("test", TEST_UNSAFE, TEST_REFUSED, TEST_BENIGN),
        "benign_test.jsonl": [
            {"prompt": deed.question(thing, rng), "response": deed.how_to(thing, rng)}
            for deed, thing in asked
        ],
        "task_train.jsonl": _task("train", TASK_TRAIN, notices),
        "task_test.jsonl": _task("test", TASK_TEST, notices),
    }


def to_jsonl(rows: Iterable[dict]) -> bytes:
    """Return rows as JSON lines without optional spaces."""
    return "".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n" for row in rows).encode()


def read_jsonl(path: Path) -> list[dict]:
    """Return the rows of one of the world's own files."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
