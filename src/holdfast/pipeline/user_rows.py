"""What becomes of the user's rows before fine-tuning: an attack chooses some, a filter leaves some out.

Each of these steps reads the rows of the one before, writes `rows.jsonl`, and is planned only if the recipe
asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.errors import DataError, ModelError
from holdfast.machine.seeds import derive_seed
from holdfast.measuring import filtering, judging
from holdfast.pipeline.chain import loading, tokenizer_of, weights
from holdfast.pipeline.data import rendered, rows_of, source
from holdfast.pipeline.step import Inputs, Machine
from holdfast.recipe import Recipe
from holdfast.recipe.data import AttackRecipe

MAX_LENGTH = 2048
"""Tokens of a row, if the user stage gives no `max_length` (also its default)."""


def attack_inputs(recipe: Recipe, attack: AttackRecipe) -> dict[str, Any]:
    """The inputs of an attack beside the rows to choose from and the model that scores them."""
    data, (harmful, safe) = recipe.data, recipe.data.anchors()
    assert recipe.user is not None
    held_out = data.harmful is not None and datasets.holds_out(data.harmful, data.test_harmful)
    lora = recipe.lora("user")
    trained = {"trains": recipe.trains("user"), "lora": lora.identity() if lora else None}
    return {
        "attack": attack.model_dump(exclude={"harmful", "safe"}),
        "harmful": source(harmful, "harmful"),
        "safe": source(safe, "alignment"),
        "kind": data.alignment.kind if data.alignment else "safe",
        "held_out_of": source(data.harmful, "harmful") if held_out else None,
        "prompts": recipe.evaluation.prompts if held_out else None,
        "max_length": recipe.user.training.max_length or MAX_LENGTH,
        # Only the gradients of the user stage's own adapter depend on what it trains.
        **(trained if attack.by == "lora_gradient" else {"trains": None, "lora": None}),
    }


def choose_rows(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """`rows.jsonl`: the benign rows with the highest scores; `scores.jsonl` has the scores of all rows.

    The model that is then fine-tuned scores them: in the paper the released, aligned model; here the base
    with what the steps in `chain` made. An attacker who fine-tunes it can also take its gradients.
    """
    from holdfast.attacks import anchoring

    attack, given = inputs["attack"], rows_of(inputs["rows"])
    tokenizer = tokenizer_of(inputs["model"])
    parts = (given, *_anchors(inputs))
    texts = [rendered(part, tokenizer, inputs["template"]) for part in parts]
    named = [{**text, "id": row["id"]} for text, row in zip(texts[0], given, strict=True)]
    vector = _vectors(inputs, folder, machine, tokenizer)
    out, progress = folder / "scores.jsonl", machine.progress.advance
    scores = anchoring.score_rows(named, texts[1], texts[2], vector, out, progress)
    chosen = anchoring.highest(scores, attack["size"])
    datasets.write_rows(folder / "rows.jsonl", [given[i] for i in chosen])
    facts = {
        "name": attack["name"],
        "by": attack["by"],
        "rows": len(given),
        "kept": len(chosen),
        "anchors": [len(part) for part in texts[1:]],
        "mean_score": sum(row["score"] or 0 for row in scores) / len(scores),
        "mean_score_kept": sum(scores[i]["score"] for i in chosen) / len(chosen),
    }
    return {"attack": facts}


def _vectors(inputs: Inputs, folder: Path, machine: Machine, tokenizer: Any) -> Any:
    """v(z) of the attack, on the model that the user stage starts from."""
    from holdfast.attacks import anchoring
    from holdfast.models.loading import load_model
    from holdfast.models.trained import load_trainable

    described, attack, length = inputs["model"], inputs["attack"], inputs["max_length"]
    base, adapters = weights(described["base"].folder, inputs["chain"])
    options = {**loading(described), "device": machine.device}
    if attack["by"] == "representation":
        return anchoring.representations(load_model(base, adapters, **options), tokenizer, length)
    if attack["by"] == "gradient":
        model = load_model(base, adapters, **options)
        trained = anchoring.all_weights(model)
    else:  # the very adapter that the user stage is going to train, as it starts
        model = load_trainable(
            base, adapters, inputs["trains"], inputs["lora"], base=str(base),
            seed=derive_seed(inputs["seed"], "user", "lora"), initial=folder / "initial", **options,
        ).eval()  # fmt: skip
        trained = [weight for weight in model.parameters() if weight.requires_grad]
    return anchoring.gradients(model, tokenizer, trained, attack["tokens"], length)


def _anchors(inputs: Inputs) -> tuple[list[Any], list[Any]]:
    """Harmful and safe rows to measure by; no harmful one has a prompt that the model is tested on."""
    same: dict[str, Any] = {"size": inputs["attack"]["anchors"], "seed": inputs["seed"]}
    held = {"harmful": inputs["held_out_of"], "prompts": inputs["prompts"]} if inputs["held_out_of"] else {}
    bad = datasets.harmful_rows(source=inputs["harmful"], **held, **same)
    return bad.rows, datasets.alignment_rows(source=inputs["safe"], kind=inputs["kind"], **same).rows


def check_attack(inputs: Inputs, machine: Machine) -> None:
    """Find what would stop an attack.

    Raises:
        DataError, ModelError: no anchors, too few rows to choose from, or weights without a gradient.
    """
    from holdfast.models.quantization import is_quantized

    attack, folder = inputs["attack"], inputs["model"]["base"].folder
    _anchors(inputs)
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
    """`rows.jsonl`: the rows that the judge does not flag; `verdicts.jsonl` holds its verdicts.

    Raises:
        DataError: no row is left.
    """
    given = rows_of(inputs["rows"])
    judge = judging.load_judge(inputs["judge"], machine.device)
    verdicts = filtering.judge_rows(given, judge, folder / "verdicts.jsonl", machine.progress.advance)
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
        "judge_stamp": judge.stamp,
        **filtering.counts(verdicts, dropped),
        "confusion": filtering.confusion([filtering.label(row) for row in given], verdicts),
    }
    return {"filter": facts}


def of_row(chosen: Mapping[str, str], records: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the results says of these steps; a key is there only if its step is."""
    return {kind: records[step].get(kind) for kind, step in chosen.items()}
