"""`holdfast filter --score`: drop the rows of a file that look harmless and undo safety, by a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from holdfast import data as datasets
from holdfast.data.prompts import resolve_template, training_row
from holdfast.data.sources import Source
from holdfast.errors import DataError, RecipeError
from holdfast.machine.digests import Digests
from holdfast.machine.files import write_json
from holdfast.machine.progress import Advance, nobody
from holdfast.machine.store import provenance
from holdfast.measuring import filtering, row_scores
from holdfast.measuring.answer_files import claim, unclaimed_on_error
from holdfast.recipe.data import ScoreFilterRecipe
from holdfast.recipe.model import block

MAX_LENGTH = 2048


def filter_by_score(
    source: Source,
    out: str | Path,
    *,
    score: Literal["datashield", "anchoring"] = "datashield",
    model: str | Path,
    adapters: Sequence[str | Path] = (),
    harmful: Source,
    safe: Source,
    template: str = "auto",
    seed: int = 42,
    skip_bad: bool = False,
    device: str = "auto",
    progress: Advance = nobody,
    **options: Any,
) -> dict[str, Any]:
    """Write the records of `source` whose score is not too high to `out` (JSONL), and return the counts.

    Two more files are written beside `out`: `OUT.scores.jsonl`, with the score of each record, which a
    stopped filter resumes from; and `OUT.json` with the counts and, if the records have labels, the share of
    the harmful records that was found.

    Args:
        source: as for a recipe's `data.user`: a file, a folder, a Hub id, a task's name.
        model, adapters: the model that is fine-tuned afterwards; it reads every row once.
        harmful, safe: harmful questions with harmful answers, and rows with safe answers.
        template: the prompt template: "chat", "alpaca", "alpaca_newline" or "auto".
        options: `anchors`, `by`, `layer`, `drop` and `threshold`, as in a recipe's `data.filter`.

    Raises:
        RecipeError: an option is not valid.
        DataError: a source cannot be read, there are too few anchors, or no record is left.
        ModelError: the model cannot be loaded.
        OutputError: `out` exists and is not an earlier output, or is the source.
    """
    from holdfast.models.loading import load_tokenizer
    from holdfast.weights.adapter_folder import find_adapter
    from holdfast.weights.folders import find_model, fingerprint, model_path

    given = {name: value for name, value in options.items() if value is not None}
    asked = block(ScoreFilterRecipe, {"score": score, **given}, "filter")
    out = Path(out)
    loaded = datasets.read_records(source, role="user")
    filtering.claim_out(out, source)
    identity, total, bad = filtering.checked(loaded, skip_bad)
    anchors = _anchors(harmful, safe, asked.anchors, seed)
    digests = Digests()
    folder = find_model(str(model_path(str(model))), None, download=True)
    chain = [find_adapter(str(one))[0] for one in adapters]
    tokenizer = load_tokenizer(folder, adapters=chain)
    chosen = resolve_template(tokenizer, template)

    def rendered(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [training_row(row, tokenizer, chosen) for row in rows]

    def value() -> row_scores.Value:
        from holdfast.machine.processes import Processes
        from holdfast.models.device import choose_device
        from holdfast.models.loading import load_model

        reader = load_model(folder, chain, device=choose_device(device, folder, Processes()))
        sets = [rendered(part) for part in anchors]
        return row_scores.value_of(
            asked.score,
            reader,
            tokenizer,
            sets[0],
            sets[1:],
            by=asked.by,
            layer=asked.layer,
            max_length=MAX_LENGTH,
        )

    scores_file = out.with_name(f"{out.name}.scores.jsonl")
    made = {
        "score": asked.model_dump(include={"score", "anchors", "by", "layer"}),
        "rows": identity,
        "model": [fingerprint(one, digests) for one in (folder, *chain)],
        "anchors": [[row["id"] for row in part] for part in anchors],
        "template": chosen,
    }
    with claim(scores_file, made):
        texts = ({**rendered([one.row])[0], "id": one.row["id"]} for one in filtering.usable(loaded))
        with unclaimed_on_error(scores_file):
            scores = row_scores.score_rows(texts, value, scores_file, progress, total)
        most = row_scores.limit(scores, asked.share, asked.threshold)
        gone = row_scores.dropped(scores, most)
        if all(gone):
            raise DataError(
                f"{score} kept none of the {total} rows of {loaded.name}, so nothing was written."
            )
        labels: list[bool | None] = []

        def kept() -> Iterator[Mapping[str, Any]]:
            for one, drop in zip(filtering.usable(loaded), gone, strict=True):
                labels.append(filtering.label(one.record))
                if not drop:
                    yield one.record

        datasets.write_rows(out, kept())
        facts = {
            **row_scores.facts(scores, gone, most),
            **({"bad_rows_dropped": bad.count, "first_bad_rows": bad.places()} if bad.count else {}),
            "attack_rows": row_scores.found_rows(labels, gone),
            "score": asked.model_dump(exclude={"harmful", "safe", "drop"}) | {"drop": asked.share},
            "source": loaded.name,
            "sha256": loaded.sha256,
        }
        write_json(out.with_name(f"{out.name}.json"), {**facts, "provenance": provenance()})
        return facts


def _anchors(harmful: Source, safe: Source, size: int, seed: int) -> list[Sequence[Mapping[str, Any]]]:
    """Return the harmful anchors, and two sets of safe anchors from one source, as in a recipe."""
    if harmful is None or safe is None:
        raise RecipeError("A score needs anchors: give files of harmful rows and of safe rows.")
    bad = datasets.harmful_rows(source=harmful, size=size, seed=seed).rows
    good = datasets.alignment_rows(source=safe, size=2 * size, seed=seed).rows
    return [list(bad), list(good[:size]), list(good[size:])]
