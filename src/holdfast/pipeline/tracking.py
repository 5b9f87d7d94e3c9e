"""Send the scores of a complete run to the trackers that its recipe names in `training.report_to`.

The scores are one run of the tracker, named after the recipe. A tracker that fails changes no result.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import first_line
from holdfast.recipe import Recipe
from holdfast.recipe.stages import trackers

SCORES = (
    "harmful_score", "finetune_accuracy", "task_score", "harmonic_mean", "benign_compliance",
    "over_refusal_rate", "gibberish_rate", "attack_success_rate", "true_harmful_score",
)  # fmt: skip
PROJECT = "huggingface"
"""The project to which transformers sends the logs of a training if none is named."""


def log_scores(out: Path, recipe: Recipe, results: Mapping[str, Any]) -> None:
    """Send the scores of all models of a run, each as "model/score"; a failure is a warning."""
    stages = [stage for stage in (recipe.alignment, recipe.user) if stage is not None]
    asked = dict.fromkeys(name for stage in stages for name in trackers(stage.training.report_to))
    given = {key: value for stage in stages for key, value in stage.training.given().items()}
    values = scores(results)
    for tracker in asked if values else ():
        try:
            TRACKERS[tracker](out, recipe.name, values, given)
        except Exception as error:
            text = "The scores could not be sent to %s (%s). They are in results.json."
            logging.getLogger(__name__).warning(text, tracker, first_line(error)[:200])


def scores(results: Mapping[str, Any]) -> dict[str, float]:
    """The scores of all models of a run by "model/score"; what was not measured is left out."""
    return {
        f"{row['name']}/{key}": float(row[key])
        for row in results["rows"]
        for key in SCORES
        if isinstance(row.get(key), int | float)
    }


def _wandb(out: Path, name: str, values: Mapping[str, float], given: Mapping[str, Any]) -> None:
    import wandb

    ours = wandb.run is None
    run = wandb.run or wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=name)
    run.summary.update(dict(values))
    if ours:
        wandb.finish()


def _trackio(out: Path, name: str, values: Mapping[str, float], given: Mapping[str, Any]) -> None:
    import trackio

    trackio.init(
        project=given.get("project", PROJECT),
        name=name,
        space_id=given.get("trackio_space_id"),
        resume="allow",
    )
    trackio.log(dict(values))
    trackio.finish()


def _mlflow(out: Path, name: str, values: Mapping[str, float], given: Mapping[str, Any]) -> None:
    import mlflow

    with mlflow.start_run(run_name=name, nested=mlflow.active_run() is not None):
        mlflow.log_metrics(dict(values))


def _tensorboard(out: Path, name: str, values: Mapping[str, float], given: Mapping[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard" / "scores")) as writer:
        for key, value in values.items():
            writer.add_scalar(key, value)


TRACKERS: Mapping[str, Callable[[Path, str, Mapping[str, float], Mapping[str, Any]], None]] = {
    "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow, "tensorboard": _tensorboard,
}  # fmt: skip
