"""Data filtration: a judge reads the user's rows before training, and flagged rows are left out.

Lisa, arXiv 2405.18641, Table 12: the beaver-dam judge before fine-tuning. A filter is as good as its judge
(the paper's judge misses 7.71 % of harmful rows), so its misses are counted if the rows have labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.data.sources import Source
from holdfast.errors import DataError, OutputError, RecipeError, StepFailed
from holdfast.evaluation import moderation as engine
from holdfast.machine.files import write_json
from holdfast.machine.progress import Advance, nobody
from holdfast.machine.store import identity_hash, provenance
from holdfast.measuring import judging
from holdfast.measuring.answer_files import claim
from holdfast.recipe.evaluation import cannot_filter

UNPARSED = ("drop", "keep")


def filter_rows(
    source: Source,
    out: str | Path,
    *,
    judge: str = "beaver_dam",
    unparsed: str = "drop",
    max_unparsed: float = engine.MAX_UNPARSED,
    device: str = "auto",
    progress: Advance = nobody,
    **options: Any,
) -> dict[str, Any]:
    """Write the records of `source` that a judge does not flag to `out` (JSONL), and return the counts.

    Two more files are written beside `out`: `OUT.verdicts.jsonl`, with a verdict for each record, which a
    stopped filter resumes from; and `OUT.json` with the counts and, if the records have labels, the judge's
    confusion matrix.

    Args:
        source: as for a recipe's `data.user`: a file, a folder, a Hub id, a task's name.
        judge: the judge's name; `options` are its options: path, threshold, max_length, model, base_url, ...
        unparsed: what to do with a record for which the judge gives no verdict: "drop" or "keep".
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
    rows = [
        {**row, "id": f"{i}-{row['id']}"} for i, row in enumerate(datasets.to_rows(loaded, role="user"), 1)
    ]
    ready = judging.ready(judge, device, options)
    verdicts_file = out.with_name(f"{out.name}.verdicts.jsonl")
    _claim(out, source)
    claim(verdicts_file, {"judge_stamp": ready.stamp, "rows": identity_hash(rows)})
    verdicts = judge_rows(rows, ready, verdicts_file, progress)
    check_share(verdicts, max_unparsed, ready.stamp, verdicts_file)
    dropped = drops(verdicts, unparsed)
    kept = [record for record, drop in zip(loaded.records, dropped, strict=True) if not drop]
    if not kept:
        raise DataError(
            f"{ready.stamp} kept none of the {len(rows)} rows of {loaded.name}, so nothing was written."
        )
    facts = {
        **counts(verdicts, dropped),
        "confusion": confusion([label(record) for record in loaded.records], verdicts),
        "judge_stamp": ready.stamp,
        "source": loaded.name,
        "sha256": loaded.sha256,
    }
    datasets.write_rows(out, kept)
    write_json(out.with_name(f"{out.name}.json"), {**facts, "provenance": provenance()})
    return facts


def _claim(out: Path, source: Source) -> None:
    """Refuse to overwrite the source, or a file that is not an earlier output."""
    if isinstance(source, str | Path) and Path(source).expanduser().resolve() == out.expanduser().resolve():
        raise OutputError(f"{out} is the file to filter, which is never overwritten. Choose another --out.")
    if out.exists() and not out.with_name(f"{out.name}.json").is_file():
        raise OutputError(f"{out} exists and is not an earlier output of this command. Choose another --out.")


def judge_rows(
    rows: Sequence[Mapping[str, Any]], judge: Any, out: Path, progress: Advance = nobody
) -> list[str]:
    """The judge's verdict on each row's own answer, in order; `out` is written during the work."""
    pairs = [{**row, "set": "harmful", "answer": row["output"]} for row in rows]
    found = engine.give_verdicts(pairs, judge, out, progress=progress)
    by_id = {row["id"]: row["verdict"] for row in found}
    return [by_id[row["id"]] for row in rows]


def check_share(verdicts: Sequence[str], max_unparsed: float, judge: str, out: Path) -> None:
    """Raise StepFailed if a larger share of the rows than `max_unparsed` has no verdict."""
    without = sum(verdict == "unparsed" for verdict in verdicts)
    if without > max_unparsed * len(verdicts):
        raise StepFailed(
            f"{judge} gave no verdict on {without} of {len(verdicts)} rows (unparsed), more than the "
            f"permitted share of {max_unparsed:g}. Its replies are in {out}. Use another judge or model, or "
            "set max_unparsed."
        )


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
    known = [(label, verdict) for label, verdict in zip(labels, verdicts, strict=True) if label is not None]
    if not known:
        return None

    def count(harmful: bool, verdict: str) -> int:
        return sum(pair == (harmful, verdict) for pair in known)

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
        "unparsed": len(known) - harmful - harmless,
        "false_negative_rate": 100 * found["false_negatives"] / harmful if harmful else None,
        "false_positive_rate": 100 * found["false_positives"] / harmless if harmless else None,
    }
