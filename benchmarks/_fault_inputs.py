"""Hostile input: mutated files and texts for every reader. Only Holdfast's own errors may come out."""

from __future__ import annotations

import json
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from holdfast import data
from holdfast.errors import HoldfastError, visible
from holdfast.evaluation.judges import (
    alpaca_eval,
    harmbench,
    keyword,
    llama_guard,
    mt_bench,
    openai,
    wildguard,
)
from holdfast.evaluation.judges.server import own_words
from holdfast.evaluation.served import Reply
from holdfast.machine.store import Store, claim_folder
from holdfast.measuring import on_files
from holdfast.recipe import Recipe
from holdfast.weights.adapter import read_adapter
from holdfast.weights.reader import open_files
from runs import run

Draw = random.Random
Make = Callable[[Draw], Any]
SINGLE = (
    None, True, False, 0, -1, 1, 2**70, -(2**70), 0.5, 1e308, float("nan"), float("inf"), -float("inf"),
    "", "\ud800", "1e999", "9" * 5000, "~", "null", "=1", "\x1b[2J", "\u2028", "2026-01-01", "0x1f",
)  # fmt: skip
CHARACTERS = "aZ09 _-:/.,'\"{}[]<>|#&*!%@\\\n\t\r\0\x1b\x7f\x85\xa0é中😀\u200b\u202e\u2028\ud800\udfff\ufeff"
BITS = (
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"{", b"}", b"[" * 3000, b'"', b"'", b":",
    b"&a", b"*a", b"!!python/object:os.system", b"!!binary", b"- ", b"? ", b"|\n", b"9" * 5000, b"1e400",
    b"NaN", b"\\ud800", b",", b"\t", b"<<: ", b"\xed\xa0\x80", b"%", b"@", b"extends: ", b"../", b"/dev/zero",
)  # fmt: skip


def word(draw: Draw, most: int = 12) -> str:
    return "".join(draw.choice(CHARACTERS) for _ in range(draw.randint(0, most)))


def odd(draw: Draw, deep: int = 2) -> Any:
    """A value of any type of JSON."""
    kind = draw.randint(0, 5 if deep else 3)
    if kind == 0:
        return draw.choice([draw.randint(-(2**70), 2**70), draw.uniform(-10, 10)])
    if kind == 1:
        return word(draw)
    if kind == 4:
        return [odd(draw, deep - 1) for _ in range(draw.randint(0, 3))]
    if kind == 5:
        return {word(draw, 6): odd(draw, deep - 1) for _ in range(draw.randint(0, 3))}
    return draw.choice(SINGLE)


def texts(sound: bytes) -> Make:
    """A sound text with up to six edits: a part is replaced by an odd one, removed or repeated."""

    def make(draw: Draw) -> bytes:
        made = sound
        for _ in range(draw.randint(1, 6)):
            start = draw.randint(0, len(made))
            end = draw.randint(start, min(len(made), start + draw.choice([0, 1, 8, 40])))
            part = draw.choice(
                [b"", draw.choice(BITS), draw.randbytes(draw.randint(1, 6)), made[start:end] * 2]
            )
            made = made[:start] + part + made[end:]
        return made

    return make


def values(sound: Any) -> Make:
    """A sound JSON value in which some values are replaced, removed or renamed."""
    return lambda draw: changed(draw, sound)


def changed(draw: Draw, sound: Any) -> Any:
    if draw.randint(0, 9) == 0:
        return odd(draw)
    if isinstance(sound, dict) and sound:
        made = dict(sound)
        for key in draw.sample(sorted(sound), min(len(sound), draw.randint(0, 2))):
            made[key] = changed(draw, sound[key])
        if draw.randint(0, 5) == 0:
            made.pop(draw.choice(sorted(made)))
        if draw.randint(0, 5) == 0:
            made[draw.choice([word(draw, 6), "answer", "messages", "r", "extends"])] = odd(draw)
        return made
    if isinstance(sound, list) and sound:
        return [changed(draw, one) for one in sound[:3]]
    return odd(draw)


def some(draw: Draw, rows: list[Any]) -> list[Any]:
    """Rows of which at most one differs."""
    i = draw.randint(0, len(rows))
    return [changed(draw, row) if i == number else row for number, row in enumerate(rows)]


def plain(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def subjects(place: Path) -> dict[str, tuple[Make, Callable[[Any], Any]]]:
    """By name: what makes an example, and what reads it."""
    files = place / "inputs"
    recipe = tiny.recipe(files)
    results, _ = run(recipe, place / "store")
    adapter = next((place / "store" / "steps").glob("user-*/adapter"))
    settings_of, weights = (adapter / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    step = place / "store" / "steps" / results["rows"][0]["steps"]["score"] / "step.json"
    answers = [
        {"id": f"h{i}", "set": "harmful", "instruction": "q", "answer": f"a{i}", "input": ""}
        for i in range(3)
    ]
    verdicts = [{"id": f"h{i}", "verdict": "safe", "score": 0.5, "raw": None} for i in range(3)]
    header = weights.read_bytes()
    size = int.from_bytes(header[:8], "little")
    sound = json.loads(header[8 : 8 + size])
    scratch = place / "scratch"
    scratch.mkdir()

    def written(name: str, content: bytes) -> Path:
        (scratch / name).write_bytes(content)
        return scratch / name

    def rows(name: str) -> Callable[[bytes], Any]:
        def read(content: bytes) -> Any:
            loaded = data.read_records(str(written(name, content)), role="user")
            return data.to_rows(loaded, role="user")

        return read

    def lines(content: Any) -> bytes:
        return b"\n".join(map(plain, content))

    def score(pair: tuple[bytes, bytes]) -> Any:
        return on_files.score(written("answers.jsonl", pair[0]), [written("verdicts.jsonl", pair[1])])

    def adapted(config: bytes, content: bytes) -> Any:
        folder = scratch / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_bytes(config)
        (folder / "adapter_model.safetensors").write_bytes(content)
        with read_adapter(folder) as found:
            return [module.shape for module in found.modules]

    def weights_of(content: bytes) -> Any:
        folder = scratch / "weights"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(content)
        with open_files(folder, ["model.safetensors"]) as found:
            return [tensor.shape for tensor in found.values()]

    def headed(value: Any) -> bytes:
        text = plain(value)
        return len(text).to_bytes(8, "little") + text + header[8 + size :]

    def stored(content: bytes) -> Any:
        folder = scratch / "steps" / step.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.json").write_bytes(content)
        return Store(scratch / "steps").record(folder.name)

    def claimed(content: bytes) -> Any:
        folder = scratch / "claimed"
        folder.mkdir(exist_ok=True)
        (folder / "holdfast.json").write_bytes(content)
        return claim_folder(folder, "run")

    def parsed(text: str) -> Any:
        reply = Reply(text)
        mt_bench.grade(reply), openai.verdict(reply), alpaca_eval.grade(reply, reply)
        return [
            part(text)
            for part in (harmbench.parse, llama_guard.parse, wildguard.parse, keyword.refusal, own_words)
        ]

    (one,) = tiny.user_rows(1)
    user = b"".join(plain(row) + b"\n" for row in tiny.user_rows(3))
    asked = json.dumps(recipe, indent=1).encode()
    table = b"instruction,input,output\n" + b"".join(b"a,%d,small\n" % i for i in range(3))
    reply = b"[[7]] Rating: [[3]] #thescore: 4 unsafe\nS1,S3 Harmful request: yes <answer>no</answer> m M"
    return {
        "recipe text": (texts(asked), lambda t: Recipe.load(written("recipe.yaml", t))),
        "recipe values": (values(recipe), lambda v: Recipe.load(v if isinstance(v, dict) else {"user": v})),
        "rows in JSONL": (texts(user), rows("rows.jsonl")),
        "values of rows": (
            lambda draw: lines([changed(draw, one) for _ in range(draw.randint(0, 3))]), rows("rows.jsonl")
        ),
        "rows in JSON": (texts(plain(tiny.user_rows(3))), rows("rows.json")),
        "rows in CSV": (texts(table), rows("rows.csv")),
        "adapter settings": (
            values(json.loads(settings_of.read_text())), lambda v: adapted(plain(v), header)
        ),
        "adapter weights": (texts(header), lambda content: adapted(settings_of.read_bytes(), content)),
        "safetensors headers": (lambda draw: headed(changed(draw, sound)), weights_of),
        "replies of judges": (
            lambda draw: texts(reply)(draw).decode("utf-8", "surrogateescape") + word(draw), parsed
        ),
        "answers and verdicts": (
            lambda draw: (lines(some(draw, answers)), lines(some(draw, verdicts))), score
        ),
        "step records": (texts(step.read_bytes()), stored),
        "markers": (texts(b'{"kind": "run", "started": "2026-01-01"}'), claimed),
    }  # fmt: skip


class Hang(BaseException):
    """An example took more than `SECONDS` of processor time, or `WAIT` seconds."""


SECONDS, WAIT = 10, 120


def _late(*_: Any) -> None:
    raise Hang


def fuzz(subject: tuple[Make, Callable[[Any], Any]], examples: int, seed: int) -> dict[str, Any]:
    """Try the examples of the seeds `seed` to `seed + examples - 1`.

    Returns:
        How many were read and refused, the first fault with its seed, seconds, and the peak memory in bytes.
    """
    make, read = subject
    counts: dict[str, Any] = {"read": 0, "refused": 0, "fault": None}
    for late in (signal.SIGALRM, signal.SIGVTALRM):
        signal.signal(late, _late)
    began = time.monotonic()
    for number in range(seed, seed + examples):
        example = make(random.Random(number))
        signal.alarm(WAIT)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            _look(read, example, counts)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = ", ".join(f"{Path(frame.filename).name}:{frame.name}" for frame in frames)
            told = f"seed {number}: {type(error).__name__}: {error}"[:300] + f" ({where})"
            counts["fault"] = counts["fault"] or told.encode("ascii", "backslashreplace").decode()
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.alarm(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**counts, "seconds": round(time.monotonic() - began, 1), "peak_memory_bytes": peak}


def _look(read: Callable[[Any], Any], example: Any, counts: dict[str, Any]) -> None:
    try:
        read(example)
        counts["read"] += 1
    except HoldfastError as error:
        if (text := str(error)) != visible(text):
            raise ValueError(f"an error with control characters: {text!a}") from error
        counts["refused"] += 1
