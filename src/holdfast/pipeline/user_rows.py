"""The steps that select user rows before fine-tuning: anchoring chooses some, a filter removes some.

Each of these steps reads the rows of the step before it, writes `rows.jsonl`, and is planned only if the
recipe asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.errors import DataError, ModelError
from holdfast.machine.seeds import derive_seed
from holdfast.measuring import filtering, judging, row_scores
from holdfast.pipeline.chain import loading, tokenizer_of, weights
from holdfast.pipeline.data import rendered, rows_of, source
from holdfast.pipeline.step import Inputs, Machine
from holdfast.recipe import Recipe
from holdfast.recipe.data import AnchoringRecipe, ScoreFilterRecipe

MAX_LENGTH = 2048
"""Maximum number of tokens of a row if the user stage sets no `max_length`; also the default of that key."""

SAFE_SETS = 2
"""Sets of safe anchors that are drawn from one source, as many as in the authors' code."""


def anchor_inputs(recipe: Recipe, asked: AnchoringRecipe | ScoreFilterRecipe) -> dict[str, Any]:
    """Return the inputs from which anchors are drawn, for an attack or a filter."""
    data, (harmful, safe) = recipe.data, recipe.data.anchors(asked)
    assert recipe.user is not None
    held_out = data.harmful is not None and datasets.holds_out(data.harmful, data.test_harmful)
    return {
        "harmful": source(harmful, "harmful"),
        "safe": [source(one, "alignment") for one in safe],
        "kind": data.alignment.kind if data.alignment else "safe",
        "skip_bad": data.skip_bad,
        "held_out_of": source(data.harmful, "harmful") if held_out else None,
        "prompts": recipe.evaluation.prompts if held_out else None,
        "max_length": recipe.user.training.max_length or MAX_LENGTH,
    }


def attack_inputs(recipe: Recipe, attack: AnchoringRecipe) -> dict[str, Any]:
    """Return the inputs of an attack, except the rows to choose from and the model that scores them."""
    lora = recipe.lora("user")
    trained = {"trains": recipe.trains("user"), "lora": lora.identity() if lora else None}
    return {
        "attack": attack.model_dump(exclude={"harmful", "safe"}),
        **anchor_inputs(recipe, attack),
        # Only the gradients of the user stage's adapter depend on what that stage trains.
        **(trained if attack.by == "lora_gradient" else {"trains": None, "lora": None}),
    }


def choose_rows(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Write the benign rows with the highest scores to `rows.jsonl`, the scores of all to `scores.jsonl`.

    The model that is fine-tuned afterwards scores the rows: in the paper the released, aligned model; here
    the base model with the weights of the steps in `chain`. An attacker who can fine-tune this model can also
    compute its gradients.
    """
    from holdfast.attacks import anchoring

    attack, given = inputs["attack"], rows_of(inputs["rows"])
    tokenizer = tokenizer_of(inputs["model"])
    bad, safe = anchors(inputs, attack["anchors"])
    texts, harmful, *good = (rendered(part, tokenizer, inputs["template"]) for part in (given, bad, *safe))
    named = [{**text, "id": row["id"]} for text, row in zip(texts, given, strict=True)]
    vector, anchor = _vectors(inputs, folder, machine, tokenizer)
    out, progress = folder / "scores.jsonl", machine.progress.advance
    scores = anchoring.score_rows(named, harmful, good, vector, out, progress, anchor=anchor)
    chosen = anchoring.highest(scores, attack["size"])
    datasets.write_rows(folder / "rows.jsonl", [given[i] for i in chosen])
    facts = {
        "name": attack["name"],
        "by": attack["by"],
        "rows": len(given),
        "kept": len(chosen),
        "anchors": [len(part) for part in (harmful, *good)],
        "mean_score": sum(row["score"] or 0 for row in scores) / len(scores),
        "mean_score_kept": sum(scores[i]["score"] for i in chosen) / len(chosen),
    }
    return {"attack": facts}


def _vectors(inputs: Inputs, folder: Path, machine: Machine, tokenizer: Any) -> Any:
    """Return the functions v(z) of a row and of an anchor, on the model from which the user stage starts."""
    from holdfast.attacks import anchoring
    from holdfast.models.loading import load_model
    from holdfast.models.trained import load_trainable

    described, attack, length = inputs["model"], inputs["attack"], inputs["max_length"]
    base, adapters = weights(described["base"].folder, inputs["chain"])
    options = {**loading(described), "device": machine.device}
    if attack["by"] == "representation":
        vector = anchoring.representations(load_model(base, adapters, **options), tokenizer, length)
        return vector, vector
    if attack["by"] == "gradient":
        model = load_model(base, adapters, **options)
        trained = anchoring.all_weights(model)
    else:  # the adapter that the user stage will train, with its initial weights
        model = load_trainable(
            base, adapters, inputs["trains"], inputs["lora"], base=str(base),
            seed=derive_seed(inputs["seed"], "user", "lora"), initial=folder / "initial", **options,
        ).eval()  # fmt: skip
        trained = [weight for weight in model.parameters() if weight.requires_grad]
    return [anchoring.gradients(model, tokenizer, trained, n, length) for n in (None, attack["tokens"])]


def anchors(inputs: Inputs, size: int) -> tuple[list[Any], list[list[Any]]]:
    """Return the harmful anchors and the sets of safe ones; no harmful anchor has a prompt of the test."""
    same: dict[str, Any] = {
        "size": size, "seed": inputs["seed"], "skip_bad": inputs["skip_bad"],
    }  # fmt: skip
    held = {"harmful": inputs["held_out_of"], "prompts": inputs["prompts"]} if inputs["held_out_of"] else {}
    bad = datasets.harmful_rows(source=inputs["harmful"], **held, **same)
    sources = inputs["safe"]
    wanted = {**same, "size": size if len(sources) > 1 else SAFE_SETS * size}
    drawn = [datasets.alignment_rows(source=one, kind=inputs["kind"], **wanted).rows for one in sources]
    safe = [list(rows) for rows in drawn]
    if len(sources) == 1:
        safe = [safe[0][i * size : (i + 1) * size] for i in range(SAFE_SETS)]
    return list(bad.rows), safe


def check_attack(inputs: Inputs, machine: Machine) -> None:
    """Check everything that could stop an attack.

    Raises:
        DataError, ModelError: there are no anchors, too few rows to choose from, or no gradients.
    """
    from holdfast.models.quantization import is_quantized

    attack, folder = inputs["attack"], inputs["model"]["base"].folder
    anchors(inputs, attack["anchors"])
    if not (inputs["rows"] / "rows.jsonl").is_file():
        return
    found = len(rows_of(inputs["rows"]))
    if found < attack["size"]:
        raise DataError(
            f"data.attack.size is {attack['size']}, but there are only {found} user rows to choose from."
        )
    if attack["by"] == "gradient" and is_quantized(folder):
        raise ModelError(
            f"data.attack: the weights in {folder} are quantised and have no gradient. Write "
            "by: lora_gradient or representation."
        )


def filter_rows(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Write the rows that the judge does not flag to `rows.jsonl`, and its verdicts to `verdicts.jsonl`.

    Raises:
        StepFailed: too many rows have no verdict.
        DataError: no row is left.
    """
    given = rows_of(inputs["rows"])
    judge = judging.load_judge(inputs["judge"], machine.device)
    out = folder / "verdicts.jsonl"
    verdicts = filtering.judge_rows(given, judge, out, machine.progress.advance, len(given))
    filtering.check_share(verdicts, inputs["max_unparsed"], judge.stamp, out)
    dropped = filtering.drops(verdicts, inputs["unparsed"])
    kept = [row for row, drop in zip(given, dropped, strict=True) if not drop]
    if not kept:
        raise DataError(
            f"data.filter: {judge.stamp} left none of the {len(given)} user rows. Look at the verdicts in "
            f"{folder}, or choose another judge or threshold."
        )
    datasets.write_rows(folder / "rows.jsonl", kept)
    facts = {
        "judge": inputs["judge"].name,
        "judge_stamp": filtering.stamp_of(judge, out),
        **filtering.counts(verdicts, dropped),
        "confusion": filtering.confusion([filtering.label(row) for row in given], verdicts),
        **of_attack(inputs, given, dropped),
    }
    return {"filter": facts}


def of_attack(
    inputs: Inputs, given: Sequence[Mapping[str, Any]], gone: Sequence[bool]
) -> dict[str, dict[str, Any]]:
    """Return how many of the attack's rows a filter finds; {} if no row is the attack's.

    The attack's rows are the harmful rows, and the rows that an attack on rows changed or added.
    """
    known = {_content(row) for row in rows_of(inputs["before"])} if inputs["before"] else None
    mine = [row["source"] == "harmful" or (known is not None and _content(row) not in known) for row in given]
    found = row_scores.found_rows(mine, gone)
    return {"attack_rows": found} if found else {}


def _content(row: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in row.items() if key != "id"}, sort_keys=True)


def of_row(chosen: Mapping[str, str | list[str]], records: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of these steps for a row of the results; a step that does not exist has no key."""
    return {
        kind: records[steps].get(kind) if isinstance(steps, str) else [records[s].get(kind) for s in steps]
        for kind, steps in chosen.items()
    }
