"""What becomes of the user's rows before fine-tuning: an attack chooses some, a filter leaves some out.

Each step reads the rows of the one before, writes `rows.jsonl`, and is planned only where the recipe asks for
it, so that no other run's steps change their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.errors import DataError, ModelError
from holdfast.machine.seeds import derive_seed
from holdfast.measuring import filtering, judging
from holdfast.pipeline.context import Context
from holdfast.pipeline.data import prepared, rendered
from holdfast.recipe import Recipe
from holdfast.recipe.data import AttackRecipe, FilterRecipe

FORMAT = {"attack": 1, "filter": 1}
"""As in the pipeline: raise one where the content of that kind of step changes for the same identity."""

MAX_LENGTH = 2048
"""Tokens of a row, where the user stage gives no `max_length` (its default too)."""

Add = Callable[[str, str, str, Mapping[str, Any], Any], str]
"""Adds a step (kind, title, detail, identity, work) and returns its id."""


def planned(recipe: Recipe, rows: str, model: Mapping[str, Any], download: bool, add: Add) -> dict[str, str]:
    """The steps after the data step `rows`, by kind and in order; the last one's rows are trained on.

    `model` is the identity of the model that the user stage starts from: "chain" has its trainings.
    """
    found: dict[str, str] = {}
    attack, screen = recipe.data.attack, recipe.data.filter
    if attack is not None:
        identity = {"format": FORMAT["attack"], "rows": rows, **model, **_attack_identity(recipe, attack)}
        title = f"user rows that {attack.name} chooses"
        detail = f"{attack.size:,} benign rows, by {attack.by} on the model that is fine-tuned"
        make = partial(choose_rows, attack=attack, rows=rows, below=model["chain"])
        rows = found["attack"] = add("attack", title, detail, identity, make)
    if screen is not None:
        judge = judging.judge_identity(screen.judge_recipe, model["versions"], download)
        identity = {"format": FORMAT["filter"], "rows": rows, "judge": judge, "unparsed": screen.unparsed}
        title = f"user rows that {screen.judge} lets pass"
        make = partial(filter_rows, screen=screen, rows=rows)
        found["filter"] = add("filter", title, f"{screen.unparsed}s rows without a verdict", identity, make)
    return found


def check(context: Context) -> None:
    """What would stop these steps, found before anything starts.

    Raises:
        DataError, ModelError: no anchors, or too few rows to choose from; a judge that is not there.
    """
    from holdfast.models.quantization import is_quantized

    recipe, attack = context.recipe, context.recipe.data.attack
    if attack is not None:
        _anchors(recipe, attack)
        rows = prepared(recipe, "user").rows
        if len(rows) < attack.size:
            raise DataError(
                f"data.attack.size is {attack.size}, but there are only {len(rows)} user rows to choose from."
            )
        if attack.by == "gradient" and is_quantized(context.model):
            raise ModelError(
                f"data.attack: the weights in {context.model} are quantised and have no gradient. Write "
                "by: lora_gradient or representation."
            )
    if recipe.data.filter is not None and context.processes.main:
        judging.check_judge(recipe.data.filter.judge_recipe)


def choose_rows(
    folder: Path, context: Context, *, attack: AttackRecipe, rows: str, below: Sequence[str]
) -> dict[str, Any]:
    """`rows.jsonl`: the benign rows of the step `rows` with the highest scores; `scores.jsonl` has them all.

    They are scored by the model that is then fine-tuned: in the paper the released, aligned one; here what
    the steps `below` made of the base. An attacker who fine-tunes it can also take its gradients.
    """
    from holdfast.attacks import anchoring
    from holdfast.models.loading import load_tokenizer

    recipe, given = context.recipe, context.rows(rows)
    tokenizer = load_tokenizer(context.model, recipe.model.trust_remote_code)
    texts = [rendered(part, tokenizer, recipe) for part in (given, *_anchors(recipe, attack))]
    named = [{**text, "id": row["id"]} for text, row in zip(texts[0], given, strict=True)]
    vector = _vectors(folder, context, attack, tokenizer, below)
    out, progress = folder / "scores.jsonl", context.progress.advance
    scores = anchoring.score_rows(named, texts[1], texts[2], vector, out, progress)
    chosen = anchoring.highest(scores, attack.size)
    datasets.write_rows(folder / "rows.jsonl", [given[i] for i in chosen])
    facts = {
        "name": attack.name,
        "by": attack.by,
        "rows": len(given),
        "kept": len(chosen),
        "anchors": [len(part) for part in texts[1:]],
        "mean_score": sum(row["score"] or 0 for row in scores) / len(scores),
        "mean_score_kept": sum(scores[i]["score"] for i in chosen) / len(chosen),
    }
    return {"attack": facts}


def _vectors(
    folder: Path, context: Context, attack: AttackRecipe, tokenizer: Any, below: Sequence[str]
) -> Any:
    """v(z) of the attack, on the model that the user stage starts from."""
    from holdfast.attacks import anchoring
    from holdfast.models.loading import load_model
    from holdfast.models.trained import load_trainable

    recipe = context.recipe
    assert recipe.user is not None
    base, adapters = context.weights(below)
    options = {**context.model_options, "device": context.device}
    length = recipe.user.training.max_length or MAX_LENGTH
    if attack.by == "representation":
        return anchoring.representations(load_model(base, adapters, **options), tokenizer, length)
    if attack.by == "gradient":
        model = load_model(base, adapters, **options)
        weights = anchoring.all_weights(model)
    else:  # the very adapter that the user stage is going to train, as it starts
        lora = recipe.lora("user")
        model = load_trainable(
            base, adapters, recipe.trains("user"), lora.identity() if lora else None, base=str(base),
            seed=derive_seed(recipe.seed, "user", "lora"), initial=folder / "initial", **options,
        ).eval()  # fmt: skip
        weights = [weight for weight in model.parameters() if weight.requires_grad]
    return anchoring.gradients(model, tokenizer, weights, attack.tokens, length)


def _anchors(recipe: Recipe, attack: AttackRecipe) -> tuple[list[Any], list[Any]]:
    """Harmful and safe rows to measure by; no harmful one has a prompt that the model is tested on."""
    data, (harmful, safe) = recipe.data, recipe.data.anchors()
    assert harmful is not None
    assert safe is not None
    same: dict[str, Any] = {"size": attack.anchors, "seed": recipe.seed}
    held_out: dict[str, Any] = {"harmful": data.harmful, "harmful_test": data.test_harmful}
    bad = datasets.harmful_rows(source=harmful, prompts=recipe.evaluation.prompts, **held_out, **same)
    return bad.rows, datasets.alignment_rows(source=safe, kind=_kind(recipe), **same).rows


def _kind(recipe: Recipe) -> str:
    return recipe.data.alignment.kind if recipe.data.alignment else "safe"


def _attack_identity(recipe: Recipe, attack: AttackRecipe) -> dict[str, Any]:
    """What decides the chosen rows, beside the model and the rows to choose from."""
    data, (harmful, safe) = recipe.data, recipe.data.anchors()
    assert recipe.user is not None
    assert harmful is not None
    assert safe is not None
    held_out = None
    if data.harmful is not None and datasets.holds_out(data.harmful, data.test_harmful):
        held_out = {
            "of": datasets.fingerprint(data.harmful, role="harmful"),
            "prompts": recipe.evaluation.prompts,
        }
    found = {
        **attack.model_dump(exclude={"harmful", "safe"}),
        "harmful": datasets.fingerprint(harmful, role="harmful"),
        "safe": datasets.fingerprint(safe, role="alignment"),
        "kind": _kind(recipe),
        "held_out": held_out,
        "max_length": recipe.user.training.max_length or MAX_LENGTH,
        "seed": recipe.seed,
    }
    lora = recipe.lora("user")
    if attack.by == "lora_gradient":
        found |= {"trains": recipe.trains("user"), "lora": lora.identity() if lora else None}
    return found


def filter_rows(folder: Path, context: Context, *, screen: FilterRecipe, rows: str) -> dict[str, Any]:
    """`rows.jsonl`: the rows of the step `rows` that the judge does not flag; `verdicts.jsonl` beside it.

    Raises:
        DataError: none is left.
    """
    given = context.rows(rows)
    judge = judging.load_judge(screen.judge_recipe, context.device)
    verdicts = filtering.judge_rows(given, judge, folder / "verdicts.jsonl", context.progress.advance)
    dropped = filtering.drops(verdicts, screen.unparsed)
    kept = [row for row, drop in zip(given, dropped, strict=True) if not drop]
    if not kept:
        raise DataError(
            f"data.filter: {judge.stamp} left none of the {len(given)} user rows. Look at the verdicts in "
            f"{folder}, or choose another judge or threshold."
        )
    datasets.write_rows(folder / "rows.jsonl", kept)
    facts = {
        "judge": screen.judge,
        "judge_stamp": judge.stamp,
        **filtering.counts(verdicts, dropped),
        "confusion": filtering.confusion([filtering.label(row) for row in given], verdicts),
    }
    return {"filter": facts}


def of_row(chosen: Mapping[str, str], records: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the results says of these steps; a key is there only where its step is."""
    return {kind: records[step].get(kind) for kind, step in chosen.items()}
