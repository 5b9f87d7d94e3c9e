"""A run's folder: `recipe.yaml`, `results.json` (rows, protocol stamp, steps) and `report.html`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from holdfast import data as datasets
from holdfast import registry
from holdfast.evaluation import paired
from holdfast.machine.files import read_json, read_jsonl, remove_unless, write_json, write_text
from holdfast.machine.store import Store, claim_folder, now, provenance
from holdfast.measuring.protocol import decoding, grader
from holdfast.pipeline import ability, attack_sweeps, attacking, tracking, user_rows
from holdfast.recipe import Recipe

if TYPE_CHECKING:
    from holdfast.pipeline.planning import Plan, State


def claim(out: Path, store: Path) -> None:
    """Mark `out` and `store` as folders of Holdfast before anything is computed.

    Raises:
        OutputError: one of them contains something else, or cannot be written.
    """
    claim_folder(out, "run")
    claim_folder(store, "store")


def keep_recipe(out: Path, recipe: Recipe) -> None:
    """Write `recipe.yaml`: the whole recipe, with the values that its run uses."""
    remove_unless(out / "recipe.yaml", Path.is_file)
    write_text(out / "recipe.yaml", yaml.safe_dump(recipe.whole(), sort_keys=False, allow_unicode=True))


def write(out: Path, plan: Plan, store: Store, cached: set[str]) -> dict[str, Any]:
    """Write `results.json` and `report.html` from complete steps; returns the results.

    Nothing is written if every step was cached and the existing results are those of the steps.
    """
    path, page = out / "results.json", out / "report.html"
    records = {step.id: store.record(step.id) or {} for step in plan.steps}
    stamp = protocol(plan, store, records)
    every = [row(plan.recipe, state, store, records) for state in plan.states]
    kept, curve = attack_sweeps.headlines(plan.recipe, plan.states, every)
    states = [plan.states[i] for i in kept]
    results = {
        **{k: v for k, v in provenance().items() if k != "started"},
        "holdfast": records[plan.manifest]["provenance"]["versions"]["holdfast"],
        "dtype": plan.dtype,
        "name": plan.recipe.name,
        "store": os.path.relpath(store.root, out),
        "recipe": plan.recipe.to_dict(),
        "rows": [
            {
                **every[place],
                **attack_sweeps.of_row(curve, states[i]),
                "paired": paired_with(states[:i], states[i], store),
            }
            for i, place in enumerate(kept)
        ],
        **({} if curve is None else {"attack_sweep": curve}),
        "protocol": stamp,
        "manifest": plan.manifest,
        "bad_rows_dropped": _bad_rows(plan, store),
        "steps": [
            {
                "id": step.id,
                "kind": step.kind,
                "title": step.title,
                "cached": step.id in cached,
                "seconds": records[step.id].get("seconds"),
                "peak_memory_bytes": records[step.id].get("peak_memory_bytes"),
            }
            for step in plan.steps
        ],
        "started": min(record["provenance"]["started"] for record in records.values()),
        "finished": now(),
    }
    earlier = _earlier(path)
    if len(cached) == len(plan.steps) and page.is_file() and page.stat().st_size and _same(earlier, results):
        return earlier
    for written in (path, page):
        remove_unless(written, Path.is_file)
    # Again, because another run with another recipe may have claimed the folder since.
    keep_recipe(out, plan.recipe)
    write_json(path, results)
    from holdfast.reporting import report

    report([out], page)
    if len(cached) < len(plan.steps):
        tracking.log_scores(out, plan.recipe, results)
    return results


def _earlier(path: Path) -> dict[str, Any]:
    """Return the results in a file; none if it does not exist or is damaged."""
    try:
        found = read_json(path) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _same(earlier: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    """Whether two results agree in all that comes from the steps, and not from the start that wrote them."""
    names = (
        "name", "store", "recipe", "rows", "attack_sweep", "protocol", "manifest", "bad_rows_dropped",
        "started",
    )  # fmt: skip
    plain = json.loads(json.dumps({name: results.get(name) for name in names}))
    return all(earlier.get(name) == value for name, value in plain.items())


def _bad_rows(plan: Plan, store: Store) -> dict[str, int]:
    """Return the number of bad rows that were dropped (`data.skip_bad`), by source."""
    parts = read_json(store.path(plan.manifest) / "manifest.json")
    found: dict[str, int] = {}
    for part in parts.values():
        found |= datasets.dropped_bad_rows(part) if "sources" in part else {}
    return found


def row(recipe: Recipe, state: State, store: Store, records: Mapping[str, Any]) -> dict[str, Any]:
    """Return one row of the table: a state of the model, its scores and the cost of its last training."""
    scores = read_json(store.path(state.score) / "scores.json")
    stages = {step.split("-")[0]: step for step in state.chain}
    trainings = [stages[kind] for kind in ("alignment", "user") if kind in stages]
    trained = records[trainings[-1]] if trainings else {}
    aligned = records[stages["alignment"]] if state.alignment else {}
    known = {state.alignment, state.user, state.post_hoc} - {None}
    methods = {name: registry.face("defenses", str(name)) for name in known}
    headline = methods[state.post_hoc].facts.get("headline") if state.post_hoc else None
    return {
        "name": state.name,
        "alignment": state.alignment,
        "user": state.user,
        "post_hoc": state.post_hoc,
        "labels": {
            name: methods[name].facts.get("label", name)
            for name in (state.alignment, state.user, state.post_hoc)
            if name
        },
        "baselines": [
            name for name in (state.alignment, state.user) if name and methods[name].facts.get("baseline")
        ],
        "role": role(state),
        "headline": headline,
        "post_hoc_parameters": state.post_hoc_parameters,
        **tampering(state, stages, records),
        "repair": _repair(records[stages["post_hoc"]], methods[state.post_hoc]) if state.post_hoc else None,
        "seed": recipe.seed,
        "poison_ratio": recipe.data.poison_ratio if state.user else None,
        **user_rows.of_row(state.chosen, records),
        **scores,
        **ability.of_row(state.lm_eval, store),
        "peak_memory_bytes": trained.get("peak_memory_bytes"),
        "peak_memory_kind": trained.get("peak_memory_kind"),
        "seconds": trained.get("seconds"),
        "alignment_peak_memory_bytes": aligned.get("peak_memory_bytes"),
        "alignment_seconds": aligned.get("seconds"),
        "cost": {
            **{name: records[stages[name]].get("cost") for name in ("alignment", "user") if name in stages},
            "generate": records[state.generate].get("cost"),
            "moderate": {
                judge.shown: records[step].get("cost")
                for judge, step in zip(recipe.evaluation.judges, state.moderate, strict=True)
            },
        },
        "adjusted_settings": trained.get("training", {}).get("adjusted"),
        "processes": trained.get("training", {}).get("processes"),
        "tokens_per_second": trained.get("training", {}).get("tokens_per_second"),
        "steps": {
            "alignment": stages.get("alignment"),
            **({"harden": stages["harden"]} if "harden" in stages else {}),
            **state.chosen,
            "user": stages.get("user"),
            "post_hoc": stages.get("post_hoc"),
            **({"tamper": stages["tamper"]} if state.tampered else {}),
            "generate": state.generate,
            "moderate": list(state.moderate),
            "rate": state.rate,
            "score": state.score,
            **({"lm_eval": state.lm_eval} if state.lm_eval else {}),
        },
    }


def tampering(state: State, stages: Mapping[str, str], records: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of an attack on the weights, for a row; {} without one."""
    if state.tampered is None:
        return {}
    facts = registry.face("attacks", state.tampered).facts
    found = records[stages["tamper"]].get("tampered", {})
    return {"post_hoc_attack": {**found, "headline": facts.get("headline", "")}}


def _repair(record: Mapping[str, Any], method: registry.Face) -> Any:
    """Return the facts that a post-hoc method reports, also if it trains."""
    training = record.get("training", {})
    known = {**training, **training.get("mixed", {})}
    return record.get("repair") or {name: known.get(name) for name in method.facts.get("facts", {})}


def role(state: State) -> str:
    """Return the role of a state in a comparison.

    "reference": before fine-tuning and attacks; "undefended": plain training at every stage; "control": a
    control instead of the repair, which shows how much the repair itself contributes; "defended": any other.
    """
    known = {state.alignment, state.user, state.post_hoc} - {None}
    facts = {name: registry.face("defenses", str(name)).facts for name in known}
    if state.user is None and state.post_hoc is None and state.tampered is None:
        return "reference"
    given = state.post_hoc_parameters or {}
    controls = facts[state.post_hoc].get("controls", ()) if state.post_hoc else ()
    if any(given.get(name) is not None for name in controls):
        return "control"
    trained = [name for name in (state.alignment, state.user) if name]
    plain = all(facts[name].get("baseline") for name in trained)
    return "undefended" if plain and state.post_hoc is None and "filter" not in state.chosen else "defended"


def paired_with(earlier: Sequence[State], state: State, store: Store) -> list[dict[str, Any]]:
    """Compare this state with each earlier state (except repairs), by score, on the same prompts.

    Each result has `with` (the other's name), `score`, and the fields of `holdfast.evaluation.paired.Paired`.
    Its p is not corrected for the number of comparisons; the report's p is.
    """
    found, mine = [], _items(state, store)
    for other in earlier:
        if other.post_hoc is not None:
            continue
        for score, values in _items(other, store).items():
            result = paired.compare(values, mine.get(score, {}))
            if result is not None:
                found.append({"with": other.name, "score": score, **result.to_dict()})
    return found


def _shown(taken: Mapping[str, str]) -> str:
    """Return which rows of the test files were used: "harmful: the first in order, with duplicates"."""
    words = {"first": "the first in order, with duplicates"}
    return "; ".join(f"{name}: {words.get(how, how)}" for name, how in taken.items())


def _items(state: State, store: Store) -> dict[str, dict[str, bool | float]]:
    """Return the value of each prompt, by score and id."""
    found: dict[str, dict[str, bool | float]] = {}
    for item in read_jsonl(store.path(state.score) / "items.jsonl"):
        found.setdefault(item["score"], {})[item["id"]] = item["value"]
    return found


def protocol(plan: Plan, store: Store, records: Mapping[str, Any]) -> dict[str, Any]:
    """Return the protocol stamp: two results may appear in one table only if their stamps are equal.

    It contains the field's six comparability traps (prompts, new tokens, judge truncation, alignment data,
    base or chat model, judge) and everything else that affects the scores: the prompt set, the task and its
    rows. `protocol` and `changes`, the recipe's protocol and the keys that it changes, describe the training
    too, so they may differ between results in one table.
    """
    recipe, state = plan.recipe, plan.states[0]
    manifest = read_json(store.path(plan.manifest) / "manifest.json")
    test = manifest["test"]
    generated, judged = records[state.generate], [records[step] for step in state.moderate]
    named = {"protocol": recipe.protocol, "changes": recipe.changes()} if recipe.protocol else {}
    return {
        **named,
        "prompts": test["prompts"],
        "prompt_set": test["prompt_set"],
        "n_prompts": test["harmful"],
        "max_new_tokens": recipe.evaluation.max_new_tokens,
        "judge": judged[0]["judge_stamp"],
        "judge_max_length": judged[0]["judge_max_length"],
        "other_judges": [record["judge_stamp"] for record in judged[1:]],
        "alignment_data": recipe.data.alignment.kind if recipe.data.alignment else "none",
        "model_kind": "chat" if generated["chat_template"] else "base",
        "template": generated["template"],
        "task": grader(recipe).stamp,
        "task_set": test["task_set"],
        "decoding": decoding(recipe),
        # Newer fields are left out if they are not used, so that older results can still be compared.
        **({"template_date": recipe.model.template_date} if recipe.model.template_date else {}),
        **({"system": recipe.evaluation.system} if recipe.evaluation.system else {}),
        **({"rater": records[state.rate]["rater_stamp"]} if state.rate else {}),
        **(
            {"task_new_tokens": recipe.evaluation.task_new_tokens}
            if recipe.evaluation.task_new_tokens
            else {}
        ),
        **({"test_rows": _shown(test["taken"])} if "first" in test["taken"].values() else {}),
        **ability.stamp(state.lm_eval, store),
        **attack_sweeps.stamp(recipe, manifest.get("user", {}).get("harmful", 0)),
        **attacking.stamp(recipe, _attacks(plan, records)),
    }


def _attacks(plan: Plan, records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the facts of the attacks on the user rows, in order."""
    steps = plan.states[-1].chosen.get("attack", [])
    return [records[step]["attack"] for step in ([steps] if isinstance(steps, str) else steps)]
