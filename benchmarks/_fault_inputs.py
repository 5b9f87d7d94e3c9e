"""Hostile input: mutated files and texts for every reader. Only Holdfast's own errors may come out."""

from __future__ import annotations

import json
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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

ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
    | st.sampled_from(["", "\ud800", "1e999", "9" * 5000, "~", "null", "=1", "\x1b[2J", "\u2028", 0, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
BITS = st.sampled_from([
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"{", b"}", b"[" * 3000, b'"', b"'", b":",
    b"&a", b"*a", b"!!python/object:os.system", b"!!binary", b"- ", b"? ", b"|\n", b"9" * 5000, b"1e400",
    b"NaN", b"\\ud800", b",", b"\t", b"<<: ", b"\xed\xa0\x80", b"%", b"@", b"extends: ", b"../", b"/dev/zero",
])  # fmt: skip


@st.composite
def texts(draw: Any, sound: bytes) -> bytes:
    """A sound text with up to six edits: a part is replaced by an odd one, removed or repeated."""
    made = sound
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(made)))
        end = draw(st.integers(start, min(len(made), start + 40)))
        part = draw(BITS | st.binary(max_size=6) | st.just(made[start:end] * 2))
        made = made[:start] + part + made[end:]
    return made


@st.composite
def values(draw: Any, sound: Any) -> Any:
    """A sound JSON value in which some values are replaced, removed or renamed."""
    if draw(st.integers(0, 9)) == 0:
        return draw(ODD)
    if isinstance(sound, dict) and sound:
        made = dict(sound)
        for key in draw(st.lists(st.sampled_from(sorted(sound)), max_size=2, unique=True)):
            made[key] = draw(values(sound[key]))
        if draw(st.integers(0, 5)) == 0:
            made.pop(draw(st.sampled_from(sorted(made))))
        if draw(st.integers(0, 5)) == 0:
            made[draw(st.text(max_size=6) | st.sampled_from(["answer", "messages", "r", "extends"]))] = draw(
                ODD
            )
        return made
    if isinstance(sound, list) and sound:
        return [draw(values(one)) for one in sound[:3]]
    return draw(ODD)


def some(rows: list[Any]) -> Any:
    """Strategies for rows of which at most one differs."""
    odd = st.sampled_from(range(len(rows)))
    return st.just(rows) | odd.flatmap(
        lambda i: values(rows[i]).map(lambda v: [*rows[:i], v, *rows[i + 1 :]])
    )


def plain(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def subjects(place: Path) -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """By name: a strategy, and what reads its examples."""
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

    user = b"".join(plain(row) + b"\n" for row in tiny.user_rows(3))
    asked = json.dumps(recipe, indent=1).encode()
    table = b"instruction,input,output\n" + b"".join(b"a,%d,small\n" % i for i in range(3))
    reply = b"[[7]] Rating: [[3]] #thescore: 4 unsafe\nS1,S3 Harmful request: yes <answer>no</answer> m M"
    return {
        "recipe text": (texts(asked), lambda t: Recipe.load(written("recipe.yaml", t))),
        "recipe values": (values(recipe), lambda v: Recipe.load(v)),
        "rows in JSONL": (texts(user), rows("rows.jsonl")),
        "values of rows": (st.lists(values(tiny.user_rows(1)[0]), max_size=3).map(lines), rows("rows.jsonl")),
        "rows in JSON": (texts(plain(tiny.user_rows(3))), rows("rows.json")),
        "rows in CSV": (texts(table), rows("rows.csv")),
        "adapter settings": (
            values(json.loads(settings_of.read_text())), lambda v: adapted(plain(v), header)
        ),
        "adapter weights": (texts(header), lambda content: adapted(settings_of.read_bytes(), content)),
        "safetensors headers": (values(sound).map(headed), weights_of),
        "replies of judges": (
            texts(reply).map(lambda t: t.decode("utf-8", "surrogateescape")) | st.text(), parsed
        ),
        "answers and verdicts": (
            st.tuples(some(answers).map(lines), some(verdicts).map(lines)), score
        ),
        "step records": (texts(step.read_bytes()), stored),
        "markers": (texts(b'{"kind": "run", "started": "2026-01-01"}'), claimed),
    }  # fmt: skip


class Hang(BaseException):
    """An example took more than `SECONDS` of processor time, or `WAIT` seconds."""


SECONDS, WAIT = 10, 120


def _late(*_: Any) -> None:
    raise Hang


def fuzz(subject: tuple[Any, Callable[[Any], Any]], examples: int, seed: int) -> dict[str, Any]:
    """Try examples; return how many were read and refused, the first fault, and the peak memory in bytes."""
    strategy, read = subject
    counts: dict[str, Any] = {"read": 0, "refused": 0, "fault": None}
    for late in (signal.SIGALRM, signal.SIGVTALRM):
        signal.signal(late, _late)

    @hypothesis.seed(seed)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def look(example: Any) -> None:
        signal.alarm(WAIT)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            read(example)
            counts["read"] += 1
        except HoldfastError as error:
            if (text := str(error)) != visible(text):
                raise ValueError(f"an error with control characters: {text!a}") from error
            counts["refused"] += 1
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.alarm(0)

    try:
        look()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = ", ".join(f"{Path(frame.filename).name}:{frame.name}" for frame in frames)
        counts["fault"] = f"{type(error).__name__}: {error}"[:300] + f" ({where})"
    return {**counts, "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
