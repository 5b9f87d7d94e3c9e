"""The files of an evaluation, and the `FILE.json` beside each, which records how the file was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.errors import DataError, HoldfastError, OutputError
from holdfast.evaluation.frames import without_thinking
from holdfast.evaluation.moderation import left_out, stamped
from holdfast.evaluation.rating import talks
from holdfast.machine.files import read_json, read_jsonl, write_json
from holdfast.machine.scratch import Writing
from holdfast.machine.store import identity_hash, provenance
from holdfast.measuring import checks

Rows = list[dict[str, Any]]


def claim(out: Path, made: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Write `FILE.json` beside `out` before rows are appended to `out`, and lock it against other processes.

    Returns:
        the lock, a context manager.

    Raises:
        OutputError: the file exists and was made with other settings, another process writes it, or it cannot
            be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock: AbstractContextManager[Any] = Writing(out)
    except BlockingIOError:
        raise OutputError(
            f"Another process writes {out}. Wait until it ends, or choose another --out."
        ) from None
    except OSError as error:
        if not out.exists():
            raise OutputError(f"Cannot write {out}: {error.strerror}.") from None
        lock = nullcontext()  # a complete file in a folder that is read-only
    with ExitStack() as held:
        held.enter_context(lock)
        _settle(out, made)
        return held.pop_all()


def _settle(out: Path, made: Mapping[str, Any]) -> None:
    """Write `FILE.json`, or compare it. Raises OutputError as in `claim`."""
    if out.exists() or beside(out).exists():
        earlier = made_by(out)
        if earlier is None:
            raise OutputError(
                f"{out} exists, but without a {beside(out).name} that says how it was made. "
                "Choose another --out."
            )
        other = [key for key in {**made, **earlier} if earlier.get(key) != made.get(key)]
        if other:
            what = "; ".join(f"{key}: was {earlier.get(key)}, now {made.get(key)}" for key in sorted(other))
            raise OutputError(
                f"{out} was made with other settings ({what}). Choose another --out, or remove it."
            )
        return
    try:
        write_json(beside(out), {"made": dict(made), "provenance": provenance()})
        out.touch()
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror}.") from None


@contextmanager
def unclaimed_on_error(out: Path) -> Iterator[None]:
    """Remove `out` and its `FILE.json` if the block fails before there is an answer.

    Otherwise a model that cannot be loaded would keep the file's name from the next one.
    """
    try:
        yield
    except HoldfastError:
        if out.is_file() and not out.stat().st_size:
            out.unlink()
            beside(out).unlink(missing_ok=True)
        raise


def learn_refusals(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add the parameters that the server did not accept for these rows to `FILE.json`."""
    names = left_out(rows)
    whole = _json(beside(out))
    if names != whole.get("without", []):
        write_json(beside(out), {**whole, "without": names})


def beside(out: Path) -> Path:
    """The file that records how `out` was made."""
    return out.with_name(f"{out.name}.json")


def made_by(path: Path) -> dict[str, Any] | None:
    """The settings that a file was made with, or None if they are not known."""
    if not beside(path).is_file():
        return None
    made = _json(beside(path)).get("made")
    return made if isinstance(made, dict) else None


def forget_failed(out: Path) -> None:
    """Remove the rows with an `error` from a file of answers, so that they are generated again."""
    rows = read_jsonl(out)
    answered = [row for row in rows if "error" not in row]
    if len(answered) < len(rows):
        datasets.write_rows(out, answered)


def read_answers(path: Path) -> tuple[Rows, list[str]]:
    """Read rows with `id`, `set`, `instruction` and `answer` (or `error`), and the place of each.

    The answers are without the thinking before them.

    Raises:
        DataError: a row lacks one of them, has a wrong value, or repeats an id; the message has its line.
    """
    rows, places = read_whole(path)
    # Exporters write every column in every row: an empty `error` is no failure.
    rows = [{k: v for k, v in row.items() if k != "error" or v not in (None, "")} for row in rows]
    rows = [{**row, "answer": row.get("answer") or ""} if "error" in row else row for row in rows]
    checks.check_answers(path, rows, places)
    return without_thinking(rows), places


def read_whole(path: Path) -> tuple[Rows, list[str]]:
    """Read the rows of a file and the place of each. Raises DataError if there are none."""
    rows, places = datasets.read_placed(path)
    if not rows:
        raise DataError(f"{path} has no rows.")
    return rows, places


def judged_answers(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the hash of the answers to harmful prompts, which verdicts on them are kept with."""
    return identity_hash([[row["id"], row["answer"]] for row in rows if row["set"] == "harmful"])


def rated_answers(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the hash of the answers to a task, which ratings of them are kept with."""
    return identity_hash([[talk["id"], talk["answers"], talk.get("target")] for talk in talks(rows)])


def origin(path: Path) -> dict[str, Any]:
    """Return how a file of verdicts or ratings was made, as far as it is known.

    It is read from the `FILE.json` beside the file, or from `step.json` in the folder of a run's step. The
    keys are those of `FILE.json`: judge, judge_stamp, answers. The stamp names the parameters that the
    judge's server did not accept.
    """
    made = made_by(path)
    step = path.with_name("step.json")
    if made is None and step.is_file():
        record = _json(step)
        return {
            "judge": record.get("judge") or record.get("rater"),
            "judge_stamp": record.get("judge_stamp") or record.get("rater_stamp"),
        }
    if made and made.get("judge_stamp"):
        return {**made, "judge_stamp": stamped(str(made["judge_stamp"]), [_json(beside(path))])}
    return made or {}


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError if it is damaged."""
    try:
        found = read_json(path)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). Make it and its file again.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged (no JSON object). Make it and its file again.")
    return found
