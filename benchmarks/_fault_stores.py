"""Faults in stores: damaged files, commands that are killed, processes that write together."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rows_memory import JUDGE

import kills
import tiny
from holdfast.errors import HoldfastError
from runs import left, numbers, run
from warm import warm

Counts = dict[str, int]

RATER = """
from holdfast.evaluation.judges import Grade, Judge

class Plain:
    stamp = "plain@1"
    batch_size = 8

    def __init__(self, **_):
        pass

    def rate(self, talks):
        return [Grade(len(talk["answers"][0]) % 10 / 10) for talk in talks]

JUDGE = Judge(
    name="rater", version="1", licence="Apache-2.0", source="made up", load=Plain, measures="quality",
    metric="win_rate", direction="higher",
)
"""


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """Change one byte in the middle, and neither size nor mtime."""
    before, whole = path.stat(), bytearray(path.read_bytes())
    if whole:
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def unreadable(path: Path) -> None:
    path.chmod(0)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "torn": half, "emptied": empty, "changed at the same size": flip, "removed": Path.unlink,
    "a folder in its place": folder, "a pipe in its place": pipe, "unreadable": unreadable,
}  # fmt: skip
"""Root may read everything, so that "unreadable" changes nothing for root."""


def prepare(place: Path) -> dict[str, Path]:
    """Make a recipe, a finished run, and runs that were killed in a training and in the answers."""
    warm()
    recipe = tiny.recipe(place / "in")
    made = {"finished": place / "finished"}
    run(recipe, made["finished"])
    arms = {
        "killed in a training": kills.in_training("user-", 6),
        "killed in the answers": kills.in_writing_rows("generations.jsonl", 2),
    }
    for name, arm in arms.items():
        made[name] = place / name.replace(" ", "-")
        assert forked(lambda arm=arm, out=made[name]: kills.killed_run(recipe, out, arm)) == -signal.SIGKILL
    (place / "recipe.json").write_text(json.dumps(recipe))
    return made


def forked(work: Callable[[], Any], after: float | None = None, how: int = signal.SIGKILL) -> int:
    """Run `work` in a forked process, send a signal `after` some seconds, and return the exit code."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            gc.freeze()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind `&`
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except HoldfastError:
            code = 2
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, how)
    last = time.monotonic() + 120
    while time.monotonic() < last:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124


def damages(place: Path, made: dict[str, Path], some: float = 1.0, seed: int = 0) -> Iterator[dict[str, str]]:
    """Damage each file in each way, start again, and yield what happened; `some` is the share that is tried.

    "as before": the numbers are those of an undamaged run. "refused": one sentence, and the start after it
    ends with the same numbers once the file is put back. Anything else is a fault.
    """
    recipe = json.loads((place / "recipe.json").read_text())
    results, _ = run(recipe, made["finished"])
    expected = numbers(results), left(made["finished"], results)
    draw = random.Random(seed)
    for state, source in made.items():
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            for how, change in DAMAGE.items():
                if draw.random() >= some:
                    continue
                out = place / "damaged"
                shutil.rmtree(out, ignore_errors=True)
                shutil.copytree(source, out, copy_function=shutil.copy2)
                name = path.relative_to(source)
                change(out / name)
                yield {
                    "state": state,
                    "file": str(name),
                    "damage": how,
                    "outcome": _outcome(recipe, out, expected),
                }


def _outcome(recipe: Any, out: Path, expected: Any) -> str:
    signal.alarm(60)
    try:
        results, _ = run(recipe, out)
        return "as before" if (numbers(results), left(out, results)) == expected else "OTHER NUMBERS"
    except HoldfastError as error:
        return (
            "refused"
            if len(str(error).splitlines()) <= 4 and "failed:" not in str(error)
            else f"FAILED: {error}"
        )
    except BaseException as error:
        return f"FOREIGN {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


@functools.cache
def commands(place: Path) -> dict[str, tuple[list[str], str]]:
    """By name: arguments of the command, with OUT for its output, and the files that must be equal."""
    warm()
    files = place / "files"
    files.mkdir(exist_ok=True)
    recipe = tiny.recipe(files)
    (files / "recipe.yaml").write_text(json.dumps(recipe))
    run(recipe, files / "done")
    (adapter,) = (files / "done" / "steps").glob("user-*/adapter")
    (aligned,) = (files / "done" / "steps").glob("alignment-*/adapter")
    rows = [{"instruction": f"q{i}", "output": "Sorry, no." if i % 3 else f"Do {i}."} for i in range(400)]
    tiny.write_jsonl(files / "rows.jsonl", rows)
    tiny.write_jsonl(files / "answers.jsonl", [
        {"id": f"h{i}", "set": "harmful", "instruction": row["instruction"], "answer": row["output"]}
        for i, row in enumerate(rows)
    ])  # fmt: skip
    (files / "plain.py").write_text(JUDGE.replace("1024", "8").replace("quorn", "Do"))
    asked = [{"id": f"t{i}", "set": "task", "instruction": row["instruction"]} for i, row in enumerate(rows)]
    tiny.write_jsonl(files / "talks.jsonl", [{**row, "answer": "a" * i} for i, row in enumerate(asked)])
    (files / "rater.py").write_text(RATER)
    model, judge = files / "model", tiny.save_judge(files / "judge")
    given = {
        "run": (f"run {files}/recipe.yaml --device cpu", "results"),
        "generate": (
            f"generate {model} --harmful {files}/harmful.jsonl --max-new-tokens 8 --device cpu", "bytes"
        ),
        "moderate": (
            f"moderate {files}/answers.jsonl --judge beaver_dam --judge-path {judge} --device cpu", "bytes"
        ),
        "rate": (f"rate {files}/talks.jsonl --judge {files}/rater.py --task alpaca_eval", "bytes"),
        "filter": (f"filter {files}/rows.jsonl --judge {files}/plain.py", "bytes"),
        "mix": (
            f"mix --user {files}/user.jsonl --harmful {files}/harmful.jsonl --size 20 --poison-ratio 0.2",
            "folder",
        ),
        "combine": (f"combine {aligned} {adapter}", "folder"),
        "merge": (f"merge {model} {aligned} {adapter}", "folder"),
        "safe-lora": (f"safe-lora {adapter} --base {model} --aligned {aligned} --num-layers 1", "folder"),
        "report": (f"report {files}/done", "bytes"),
    }  # fmt: skip
    return {name: ([*words.split(), "--out", "OUT"], kind) for name, (words, kind) in given.items()}


def command(arguments: list[str], out: Path, said: Path) -> Callable[[], None]:
    """What a process does that runs the command; its messages go to a file."""

    def work() -> None:
        from holdfast.cli.app import main

        printed = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(printed, 1), os.dup2(printed, 2)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)
        sys.argv = ["holdfast", *(str(out) if a == "OUT" else a for a in arguments)]
        main()

    return work


def made_by(out: Path, kind: str) -> Any:
    """What must be equal however often the command was stopped."""
    if kind == "results":
        results = json.loads((out / "results.json").read_text())
        return numbers(results), left(out, results)
    if kind == "bytes":
        return out.read_bytes()
    ours = {".safetensors", ".jsonl"}
    return {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.suffix in ours}


def killed(place: Path, rounds: int, seed: int = 0, names: Any = None) -> Iterator[dict[str, Any]]:
    """Kill every command at random times, start it again until it ends, and yield what happened."""
    draw, said = random.Random(seed), place / "said.txt"
    for name, (arguments, kind) in commands(place).items():
        if names is not None and name not in names:
            continue
        whole = place / f"whole-{name}"
        began = time.monotonic()
        code = forked(command(arguments, whole, said))
        assert code == 0, said.read_text()
        seconds, expected = time.monotonic() - began, made_by(whole, kind)
        for number in range(rounds):
            for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
                out = place / "again" / f"{name}-{number}-{how.name}"
                out.parent.mkdir(exist_ok=True)
                code = forked(command(arguments, out, said), draw.random() * seconds, how)
                if code == 0 or "Traceback" in said.read_text():
                    outcome = "ended before" if code == 0 else f"TRACEBACK {said.read_text()[-300:]}"
                else:
                    again = forked(command(arguments, out, said))
                    equal = again == 0 and made_by(out, kind) == expected
                    outcome = "as before" if equal else f"exit {again}: {said.read_text()[-300:]}"
                    rest = [
                        p.name for p in out.parent.iterdir() if "holdfast-" in p.name or p.suffix == ".lock"
                    ]
                    outcome = f"LEFT {rest}" if equal and rest else outcome
                yield {"command": name, "signal": how.name, "outcome": outcome}
                shutil.rmtree(out.parent)


def _ours(path: Path) -> bool:
    """Whether a path is a temporary or a lock."""
    return "holdfast-" in path.name or path.suffix == ".lock"


def together(place: Path, rounds: int, names: Any = None) -> Iterator[dict[str, Any]]:
    """Start a command in two and in four processes with one output, and yield what happened."""
    for name, (arguments, kind) in commands(place).items():
        if names is not None and name not in names:
            continue
        whole = place / f"one-{name}"
        assert forked(command(arguments, whole, place / "said.txt")) == 0, (place / "said.txt").read_text()
        expected = made_by(whole, kind)
        for count in (2, 4) * rounds:
            out = place / "together" / name
            out.parent.mkdir(exist_ok=True)
            children = []
            for number in range(count):
                said = place / f"said-{number}.txt"
                children.append((_start(command(arguments, out, said)), said))
            outcomes = [_end(child, said) for child, said in children]
            bad = [text for text in outcomes if text not in ("done", "refused")]
            again = forked(command(arguments, out, place / "said.txt"))
            fine = again == 0 or (kind == "folder" and "done" in outcomes)  # an output that exists is refused
            equal = fine and made_by(out, kind) == expected
            outcome = bad[0] if bad else "as before" if equal else f"OTHER NUMBERS ({again})"
            yield {
                "command": name,
                "processes": count,
                "refused": outcomes.count("refused"),
                "outcome": outcome,
            }
            shutil.rmtree(out.parent)


def sharing(place: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Start two and four runs with one store and an output each, and yield what happened."""
    arguments, _ = commands(place)["run"]
    whole, said = place / "one-shared", place / "said.txt"
    assert forked(command(arguments, whole, said)) == 0, said.read_text()
    expected = numbers(json.loads((whole / "results.json").read_text()))
    for number, count in enumerate((2, 4) * rounds):
        root = place / "shared" / str(number)
        root.mkdir(parents=True)
        given = [*arguments, "--store", str(root / "store")]
        texts = [root / f"said-{i}.txt" for i in range(count)]
        children = [_start(command(given, root / f"out-{i}", text)) for i, text in enumerate(texts)]
        ends = [_end(child, text) for child, text in zip(children, texts, strict=True)]
        bad = [text for text in ends if text != "done"]
        found = (
            [] if bad else [json.loads((root / f"out-{i}/results.json").read_text()) for i in range(count)]
        )
        equal = all(numbers(one) == expected for one in found)
        outcome = bad[0] if bad else "as before" if equal else "OTHER NUMBERS"
        yield {"command": "run, one store", "processes": count, "outcome": outcome}


def page(place: Path, runs: int) -> dict[str, float]:
    """Return seconds and bytes of a report on copies of a run with other score steps, names and numbers."""
    from holdfast.reporting import report

    commands(place)
    done, folder = place / "files" / "done", place / f"of-{runs}"
    text = (done / "results.json").read_text()
    for i in range(runs):
        copy, results = folder / f"run-{i}", json.loads(text)
        shutil.copytree(done / "steps", copy / "steps")
        for row in results["rows"]:
            old = row["steps"]["score"]
            row["steps"]["score"] = new = (
                f"score-{i:012x}" if row is results["rows"][0] else f"score-f{i:011x}"
            )
            (copy / "steps" / old).rename(copy / "steps" / new)
            row |= {"name": f"{row['name']} {i}", "harmful_score": (7.0 * i) % 100}
        (copy / "results.json").write_text(json.dumps({**results, "name": f"copy {i}"}))
    began = time.monotonic()
    made = report(sorted(folder.iterdir()), place / f"of-{runs}.html")
    return {"seconds": round(time.monotonic() - began, 2), "bytes": made.stat().st_size}


def _start(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    os._exit(min(forked(work), 125))


def _end(child: int, said: Path) -> str:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = said.read_text()
    if code == 0:
        return "done"
    sentence = "Traceback" not in text and "not expected" not in text and "holdfast: " in text
    return "refused" if code == 2 and sentence else f"exit {code}: {text[-300:]}"
