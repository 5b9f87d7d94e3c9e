"""The filter by a score: the model from which the user stage starts reads the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.errors import DataError, ModelError
from holdfast.measuring import row_scores
from holdfast.pipeline import user_rows
from holdfast.pipeline.chain import loading, tokenizer_of, weights
from holdfast.pipeline.data import rendered, rows_of
from holdfast.pipeline.step import Inputs, Machine
from holdfast.recipe import Recipe
from holdfast.recipe.data import ScoreFilterRecipe


def screen_inputs(recipe: Recipe, screen: ScoreFilterRecipe) -> dict[str, Any]:
    """Return the inputs of the filter, except the rows and the model."""
    asked = screen.model_dump(exclude={"harmful", "safe", "drop"})
    return {
        "screen": {**asked, "drop": screen.share},
        **user_rows.anchor_inputs(recipe, screen),
        "seed": recipe.seed,
    }


def filter_rows(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Write the rows whose score is not above the limit to `rows.jsonl`, and all scores to `scores.jsonl`.

    Raises:
        DataError: no row is left.
    """
    from holdfast.models.loading import load_model

    given, screen, described = rows_of(inputs["rows"]), inputs["screen"], inputs["model"]
    tokenizer = tokenizer_of(described)
    bad, safe = user_rows.anchors(inputs, screen["anchors"])
    texts, harmful, *good = (rendered(part, tokenizer, inputs["template"]) for part in (given, bad, *safe))
    named = [{**text, "id": row["id"]} for text, row in zip(texts, given, strict=True)]

    def value() -> row_scores.Value:
        base, adapters = weights(described["base"].folder, inputs["chain"])
        model = load_model(base, adapters, device=machine.device, **loading(described))
        how = {key: screen[key] for key in ("by", "layer")}
        length = inputs["max_length"]
        return row_scores.value_of(screen["score"], model, tokenizer, harmful, good, max_length=length, **how)

    out, progress = folder / "scores.jsonl", machine.progress.advance
    scores = row_scores.score_rows(named, value, out, progress, len(named))
    most = row_scores.limit(scores, screen["drop"], screen["threshold"])
    gone = row_scores.dropped(scores, most)
    kept = [row for row, drop in zip(given, gone, strict=True) if not drop]
    if not kept:
        raise DataError(
            f"data.filter: {screen['score']} left none of the {len(given)} user rows. Look at the scores in "
            f"{folder}, or raise threshold."
        )
    datasets.write_rows(folder / "rows.jsonl", kept)
    facts = {"score": screen["score"], "by": screen["by"], **row_scores.facts(scores, gone, most)}
    return {"filter": {**facts, **user_rows.of_attack(inputs, given, gone)}}


def check_filter(inputs: Inputs, machine: Machine) -> None:
    """Check everything that could stop the filter.

    Raises:
        DataError, ModelError: there are no anchors, or the model has no gradients or no such layer.
    """
    from holdfast.models.quantization import is_quantized
    from holdfast.pipeline.chain import checked_model

    screen, described = inputs["screen"], inputs["model"]
    user_rows.anchors(inputs, screen["anchors"])
    if screen["by"] == "gradient" and is_quantized(described["base"].folder):
        raise ModelError(
            f"data.filter: the weights in {described['base'].folder} are quantised and have no gradient. "
            "Write by: representation."
        )
    depth = int(checked_model(described, machine).config.get_text_config().num_hidden_layers)
    if screen["layer"] > depth:
        raise ModelError(f"data.filter.layer is {screen['layer']}. Expected 1 to {depth}, or -1.")
