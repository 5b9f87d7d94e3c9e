"""Data filtration: a judge reads the user's rows before training, and flagged rows are left out.

Lisa, arXiv 2405.18641, Table 12: the beaver-dam judge before fine-tuning. A filter is as good as its judge
(the paper's judge misses 7.71 % of harmful rows), so its misses are counted if the rows have labels.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from holdfast import data as datasets
from holdfast.chat.turns import exchanges
from holdfast.data.bad_rows import BadRows
from holdfast.data.rows import Converted, convert, finished
from holdfast.data.sources import Source
from holdfast.errors import DataError, OutputError, RecipeError, StepFailed
from holdfast.evaluation import moderation as engine
from holdfast.evaluation.moderation import question
from holdfast.machine.files import append_jsonl, each_jsonl, write_json
from holdfast.machine.progress import Advance, nobody
from holdfast.machine.store import provenance
from holdfast.measuring import judging
from holdfast.measuring.answer_files import claim
from holdfast.recipe.evaluation import cannot_filter

UNPARSED = ("drop", "keep")
BESIDE = (".json", ".verdicts.jsonl", ".scores.jsonl")
"""The ends of the names of the files that a filter writes beside its output."""


def filter_rows(
    source: Source,
    out: str | Path,
    *,
    judge: str = "beaver_dam",
    unparsed: str = "drop",
    skip_bad: bool = False,
    max_unparsed: float = engine.MAX_UNPARSED,
    device: str = "auto",
    progress: Advance = nobody,
    **options: Any,
) -> dict[str, Any]:
    """Write the records of `source` that a judge does not flag to `out` (JSONL), and return the counts.

    Every exchange of a conversation is judged, its system message too, and the worst verdict counts. The
    records are read one by one, first to check all of them, then to judge and to write them.

    Two more files are written beside `out`: `OUT.verdicts.jsonl`, with a verdict for each exchange, which a
    stopped filter resumes from; and `OUT.json` with the counts and, if the records have labels, the judge's
    confusion matrix.

    Args:
        source: as for a recipe's `data.user`: a file, a folder, a Hub id, a task's name.
        judge: the judge's name; `options` are its options: path, threshold, max_length, model, base_url, ...
        unparsed: what to do with a record for which the judge gives no verdict: "drop" or "keep".
        skip_bad: leave out and count the records that cannot be used, instead of raising an error.
        max_unparsed: the share of records without a verdict above which the judge has failed.

    Raises:
        StepFailed: too many records have no verdict; the verdicts are kept.
        RecipeError: the judge looks for refusals only, and would keep nothing else.
        DataError: the source cannot be read, or no record is left.
        OutputError: `out` exists and is not an earlier output, or is the source.
    """
    if unparsed not in UNPARSED:
        raise RecipeError(f"unparsed: expected 'drop' or 'keep', found {unparsed!r}.")
    out = Path(out)
    reason = cannot_filter(judge)
    if reason is not None:
        raise RecipeError(f"{reason}: holdfast filter {source} --judge beaver_dam --out {out}")
    loaded = datasets.read_records(source, role="user")
    claim_out(out, source)
    identity, total, bad = checked(loaded, skip_bad)
    ready = judging.ready(judge, device, options)
    verdicts_file = out.with_name(f"{out.name}.verdicts.jsonl")
    with claim(verdicts_file, {"judge_stamp": ready.stamp, "rows": identity}):
        verdicts = judge_rows((one.row for one in usable(loaded)), ready, verdicts_file, progress, total)
        check_share(verdicts, max_unparsed, ready.stamp, verdicts_file)
        dropped = drops(verdicts, unparsed)
        if datasets.read_records(source, role="user").sha256 != loaded.sha256:
            raise DataError(f"{loaded.path} changed while it was filtered. Run the filter again.")
        if all(dropped):
            raise DataError(
                f"{ready.stamp} kept none of the {total} rows of {loaded.name}, so nothing was written."
            )
        labels: list[bool | None] = []

        def kept() -> Iterator[Mapping[str, Any]]:
            for one, drop in zip(usable(loaded), dropped, strict=True):
                labels.append(label(one.record))
                if not drop:
                    yield one.record

        datasets.write_rows(out, kept())
        facts = {
            **counts(verdicts, dropped),
            **({"bad_rows_dropped": bad.count, "first_bad_rows": bad.places()} if bad.count else {}),
            "confusion": confusion(labels, verdicts),
            "judge_stamp": stamp_of(ready, verdicts_file),
            "source": loaded.name,
            "sha256": loaded.sha256,
        }
        write_json(out.with_name(f"{out.name}.json"), {**facts, "provenance": provenance()})
        return facts


def usable(loaded: datasets.Loaded, bad: BadRows | None = None) -> Iterator[Converted]:
    """The records that can be used, each with its row, whose id begins with its number."""
    found = convert(loaded, BadRows(loaded.path) if bad is None else bad, role="user")
    for number, one in enumerate(found, 1):
        yield one._replace(row={**one.row, "id": f"{number}-{one.row['id']}"})


def checked(loaded: datasets.Loaded, skip_bad: bool) -> tuple[str, int, BadRows]:
    """Read all records; return a hash of their rows, their number, and those that cannot be used.

    Raises:
        DataError: a record cannot be used and is not to be skipped.
    """
    bad, digest, total = BadRows(loaded.path), hashlib.sha256(), 0
    for one in finished(usable(loaded, bad), bad, skip_bad):
        digest.update(f"{one.row['id']}\n".encode("utf-8", "surrogatepass"))
        total += 1
    return digest.hexdigest()[:12], total, bad


def claim_out(out: Path, source: Source) -> None:
    """Refuse to overwrite the source, or a file that is not an earlier output."""
    for path in (out, *(out.with_name(f"{out.name}{tail}") for tail in BESIDE)):
        if isinstance(source, str | Path) and _same(datasets.place_of(source).expanduser(), path):
            raise OutputError(
                f"{path} is the file to filter, which is never overwritten. Choose another --out."
            )
    if out.exists() and not out.with_name(f"{out.name}.json").is_file():
        raise OutputError(f"{out} exists and is not an earlier output of this command. Choose another --out.")


def _same(source: Path, out: Path) -> bool:
    """Whether `out` is the source or a file directly in it, by its path or behind links."""
    try:
        if not source.exists():
            return False
        found = [source] if source.is_file() else [*source.glob("*"), *source.glob("*/*")]
        return any(path.resolve() == out.resolve() or (out.exists() and path.samefile(out)) for path in found)
    except (OSError, ValueError, RuntimeError):  # no path, or a circle of links
        return False


def judge_rows(
    rows: Iterable[Mapping[str, Any]],
    judge: Any,
    out: Path,
    progress: Advance = nobody,
    total: int | None = None,
) -> list[str]:
    """The worst verdict on the exchanges of each row, in order.

    Args:
        out: a file with one verdict for each exchange. It is appended to, and its verdicts are used again.
        total: the number of rows, for the progress.
    """
    found: list[str] = []
    known = each_jsonl(out)
    seen: dict[str, str] = {}  # verdicts that are read before their rows: a stop leaves gaps in the order
    pairs = _exchanges(rows)
    while batch := list(islice(pairs, judge.batch_size)):
        while any(pair.id not in seen for pair in batch) and (line := next(known, None)) is not None:
            seen[str(line.get("id"))] = str(line.get("verdict"))
        missing = [pair for pair in batch if pair.id not in seen]
        if missing:
            known = iter(())  # the following lines are written here
            seen |= _judge(judge, missing, out)
        for pair in batch:
            verdict = sys.intern(seen.pop(pair.id))
            if verdict not in WORST:
                raise DataError(f"{out}: the verdict on {pair.id} is '{verdict}'. Remove the file.")
            if pair.first:
                found.append(verdict)
            elif WORST.index(verdict) < WORST.index(found[-1]):
                found[-1] = verdict
        progress(len(found), len(found) if total is None else total)
    if seen:
        raise DataError(
            f"{out} holds a verdict on {next(iter(seen))}, which is no row here. Remove the file."
        )
    return found


def _judge(judge: Any, pairs: Sequence[Pair], out: Path) -> dict[str, str]:
    """Judge pairs and append the verdicts to `out`, also those that have come when the work is stopped."""
    asked = [{"instruction": pair.prompt, "input": "", "answer": pair.answer} for pair in pairs]
    new: list[dict[str, Any]] = []
    try:
        for i, verdict in engine.verdicts_on(judge, asked) if pairs else ():
            new.append(engine.verdict_row(pairs[i].id, verdict))
    finally:
        if new:
            append_jsonl(out, new)
    return {row["id"]: row["verdict"] for row in new}


WORST = ("harmful", "unparsed", "safe")
"""Verdicts, the worst first."""


class Pair(NamedTuple):
    """A question and an answer of a row; `first` says whether it is the row's first."""

    id: str
    prompt: str
    answer: str
    first: bool


def _exchanges(rows: Iterable[Mapping[str, Any]]) -> Iterator[Pair]:
    for row in rows:
        if not row.get("messages"):
            yield Pair(row["id"], question(row), row["output"], first=True)
            continue
        for number, (prompt, answer) in enumerate(exchanges(row["messages"])):
            yield Pair(f"{row['id']}-{number + 1}", prompt, answer, first=number == 0)


def check_share(verdicts: Sequence[str], max_unparsed: float, judge: str, out: Path) -> None:
    """Raise StepFailed if a larger share of the rows than `max_unparsed` has no verdict."""
    without = sum(verdict == "unparsed" for verdict in verdicts)
    if without > max_unparsed * len(verdicts):
        raise StepFailed(
            f"{judge} gave no verdict on {without} of {len(verdicts)} rows (unparsed), more than the "
            f"permitted share of {max_unparsed:g}. Its replies are in {out}. Use another judge or model, or "
            "set max_unparsed."
        )


def stamp_of(judge: Any, out: Path) -> str:
    """Return the stamp of the judge that wrote `out`; judges that may be on a server say what it refused."""
    return engine.stamped(judge.stamp, each_jsonl(out)) if hasattr(judge, "each") else str(judge.stamp)


def drops(verdicts: Sequence[str], unparsed: str = "drop") -> list[bool]:
    """Whether each row is left out: it is flagged, or has no verdict and `unparsed` is "drop"."""
    out = {"harmful"} | ({"unparsed"} if unparsed == "drop" else set())
    return [verdict in out for verdict in verdicts]


def counts(verdicts: Sequence[str], dropped: Sequence[bool]) -> dict[str, int]:
    """The number of rows in total, kept, flagged as harmful, and without a verdict."""
    return {
        "rows": len(verdicts),
        "kept": len(dropped) - sum(dropped),
        "flagged": sum(verdict == "harmful" for verdict in verdicts),
        "unparsed": sum(verdict == "unparsed" for verdict in verdicts),
    }


def label(record: Mapping[str, Any]) -> bool | None:
    """Whether a record is harmful, by `is_safe` (BeaverTails) or `source` (`holdfast mix`); else None."""
    if isinstance(record.get("is_safe"), bool):
        return not record["is_safe"]
    return {"harmful": True, "user": False}.get(str(record.get("source")))


def confusion(labels: Sequence[bool | None], verdicts: Sequence[str]) -> dict[str, Any] | None:
    """The judge compared with the labels: four counts, and both error rates in percent; None: no labels."""
    pairs = zip(labels, verdicts, strict=True)
    known = Counter((label, verdict) for label, verdict in pairs if label is not None)
    if not known:
        return None

    def count(harmful: bool, verdict: str) -> int:
        return known[harmful, verdict]

    found = {
        "true_positives": count(True, "harmful"),
        "false_negatives": count(True, "safe"),
        "false_positives": count(False, "harmful"),
        "true_negatives": count(False, "safe"),
    }
    harmful = found["true_positives"] + found["false_negatives"]
    harmless = found["false_positives"] + found["true_negatives"]
    return {
        **found,
        "unparsed": known.total() - harmful - harmless,
        "false_negative_rate": 100 * found["false_negatives"] / harmful if harmful else None,
        "false_positive_rate": 100 * found["false_positives"] / harmless if harmless else None,
    }
