"""The steps of a study: each once, in the order of the graph, with the runs that use it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import InputError, refuse
from holdfast.machine.files import read_json
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store
from holdfast.pipeline import planning, plans, preflight
from holdfast.pipeline.step import Machine, Step
from holdfast.recipe import Recipe
from holdfast.study.grid import Run

CHANGED = (
    "The files that the recipes name, or the code of Holdfast, changed since the sweep began. Run the same "
    "command again."
)
"""What a worker says whose plan has other steps than that of the sweep."""


@dataclass(frozen=True)
class Study:
    """The plans of all runs of a grid, by folder.

    Attributes:
        steps: every step once; a step comes after those that it reads.
        parents: by step, the steps that it reads.
        uses: by step, the number of runs that use it.
    """

    plans: Mapping[str, plans.Plan]
    steps: Mapping[str, Step] = field(init=False)
    parents: Mapping[str, tuple[str, ...]] = field(init=False)
    uses: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        found = {step.id: step for one in self.plans.values() for step in one.steps}
        object.__setattr__(self, "steps", found)
        object.__setattr__(
            self, "parents", {name: tuple(dict.fromkeys(preflight.parents(s))) for name, s in found.items()}
        )
        uses = Counter(name for one in self.plans.values() for name in {step.id for step in one.steps})
        object.__setattr__(self, "uses", uses)

    def elsewhere(self) -> list[str]:
        """Return what is not on this machine, each text once."""
        return list(dict.fromkeys(text for one in self.plans.values() for text in one.elsewhere))

    def complete(self, store: Store) -> set[str]:
        """Return the ids of the steps that are complete."""
        return {name for name in self.steps if store.record(name) is not None}

    def machines(self, device: str, progress: Progress | None = None) -> dict[str, Machine]:
        """Return by run the objects that its steps can use; runs of one model share them."""
        shared: dict[Path, Machine] = {}
        for one in self.plans.values():
            shared.setdefault(one.model, Machine(device, one.model, progress or Progress()))
        return {folder: shared[one.model] for folder, one in self.plans.items()}


def plan(
    runs: Iterable[Run],
    store: Store,
    *,
    device: str = "auto",
    download: bool = False,
    partial: bool = False,
    processes: Mapping[str, int] | None = None,
) -> Study:
    """Return the steps of the runs; see `holdfast.plan` for the arguments."""
    today, known = store.started(), dict[Any, Any]()
    return Study(
        {
            run.folder: planning.plan(
                run.recipe,
                download=download,
                digests=store.digests,
                today=today,
                partial=partial,
                device=device,
                processes=processes,
                known=known,
            )
            for run in runs
        }
    )


def replan(
    recipes: Mapping[str, Any], store: Store, device: str, processes: Mapping[str, int] | None = None
) -> Study:
    """Return the study of recipes that an earlier plan completed, by folder."""
    runs = [Run(name, Recipe.model_validate(raw)) for name, raw in recipes.items()]
    return plan(runs, store, device=device, processes=processes)


def check(study: Study, store: Store, device: str, progress: Progress | None = None) -> None:
    """Prepare the rows of all runs, and check each missing step once.

    Raises:
        InputError: a run would be refused; `Problems` if there are several reasons.
    """
    found: dict[str, InputError] = {}
    seen: set[str] = set()
    for folder, machine in study.machines(device, progress).items():
        one = study.plans[folder]
        names = [step.id for step in one.steps if step.id not in seen and store.record(step.id) is None]
        seen |= {step.id for step in one.steps}
        problems = preflight.prepare_rows([s for s in one.steps if s.id in names], store, machine)
        problems += preflight.check(one, [name for name in names if study.steps[name].check], store, machine)
        for problem in preflight.located(problems, one):
            found.setdefault(str(problem), problem)
    refuse(list(found.values()))


def rehearse(study: Study, store: Store, device: str, progress: Progress | None = None) -> None:
    """Do the checks of all runs for their missing steps, without writing anything into `store`.

    Raises:
        InputError: a run would be refused; `Problems` if there are several reasons.
    """
    with preflight.beside(study.steps.values(), store) as copy:
        check(study, copy, device, progress)


@dataclass(frozen=True)
class Cost:
    """What the missing steps take, from the times of earlier steps of the same kind in the store.

    Attributes:
        by_kind: by kind of step, the numbers of steps, of shared and of cached steps, and the seconds of the
            missing ones (None: no step of that kind was done before).
    """

    by_kind: Mapping[str, tuple[int, int, int, float | None]]

    @property
    def seconds(self) -> float:
        """The seconds of all missing steps of kinds that were done before."""
        return sum(row[3] or 0.0 for row in self.by_kind.values())

    @property
    def unknown(self) -> list[str]:
        """The kinds of missing steps whose time is not known."""
        return [kind for kind, row in self.by_kind.items() if row[3] is None]


def cost(study: Study, store: Store, done: set[str]) -> Cost:
    """Estimate the time of missing steps: the median of steps of the same detail, or of the same kind."""
    taken: dict[tuple[str, ...], list[float]] = {}
    for path in store.root.glob("*/step.json"):
        name = path.parent.name
        try:
            seconds = float(read_json(path)["seconds"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
        taken.setdefault((name.rpartition("-")[0],), []).append(seconds)
        if name in study.steps:
            taken.setdefault(_alike(study.steps[name]), []).append(seconds)
    rows: dict[str, tuple[int, int, int, float | None]] = {}
    for name, step in study.steps.items():
        count, shared, cached, seconds_left = rows.get(step.kind, (0, 0, 0, 0.0))
        if name not in done:
            known = taken.get(_alike(step)) or taken.get((step.kind,))
            if known and seconds_left is not None:
                seconds_left += statistics.median(known)
            else:
                seconds_left = None
        rows[step.kind] = (count + 1, shared + (study.uses[name] > 1), cached + (name in done), seconds_left)
    return Cost(rows)


def _alike(step: Step) -> tuple[str, ...]:
    return step.kind, step.detail
