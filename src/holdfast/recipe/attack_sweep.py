"""The block `attack_sweep` of a recipe: the trainings among which the attacker chooses the worst."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Annotated, Any

from pydantic import Field, model_validator

from holdfast.recipe.model import Part, Wrong

Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]

KEYS = {"steps": "steps", "epochs": "epochs", "rank": "rank", "learning_rate": "learning rate"}
"""What a point can set, with its name in texts; in a product, the last key changes fastest."""


class AttackPoint(Part):
    """One training of the attacker: the keys of the user stage that it sets."""

    learning_rate: Rate | None = None
    steps: Count | None = None
    epochs: Rate | None = None
    rank: Count | None = None

    def given(self) -> dict[str, Any]:
        """The keys that the point sets."""
        found = self.model_dump(exclude_none=True)
        return {key: found[key] for key in KEYS if key in found}

    @property
    def shown(self) -> str:
        """The point as text: "500 steps, rank 8, learning rate 0.001"."""
        return shown(self.given())


class AttackSweep(Part):
    """Trainings of the user stage that an attacker tries: all combinations of the lists, or the `points`.

    The headline of a defense is then the worst harmful score among the points whose accuracy is at most
    `max_loss` percentage points below the best accuracy of the sweep.
    """

    learning_rate: list[Rate] = Field(default_factory=list)
    steps: list[Count] = Field(default_factory=list)
    epochs: list[Rate] = Field(default_factory=list)
    rank: list[Count] = Field(default_factory=list)
    points: list[AttackPoint] = Field(default_factory=list)
    max_loss: float = Field(10.0, ge=0)

    def each(self) -> list[AttackPoint]:
        """The points in their order."""
        lists = {key: getattr(self, key) for key in KEYS if getattr(self, key)}
        if not lists:
            return list(self.points)
        return [AttackPoint(**dict(zip(lists, chosen, strict=True))) for chosen in product(*lists.values())]

    @property
    def keys(self) -> list[str]:
        """The keys that a point sets, in the order of `KEYS`."""
        return [key for key in KEYS if any(key in point.given() for point in self.each())]

    @model_validator(mode="after")
    def _points(self) -> AttackSweep:
        lists = [key for key in KEYS if getattr(self, key)]
        if bool(lists) == bool(self.points):
            found = f"{' and '.join(lists)} and points" if lists else "neither"
            raise ValueError(f"expected lists ({', '.join(KEYS)}) or points, found {found}")
        if "steps" in self.keys and "epochs" in self.keys:
            raise ValueError("expected steps or epochs, found both")
        empty = [i for i, point in enumerate(self.points) if not point.given()]
        if empty:
            raise Wrong(["points", str(empty[0])], f"the point sets nothing; expected {', '.join(KEYS)}")
        texts = Counter(point.shown for point in self.each())
        text, count = texts.most_common(1)[0]
        if count > 1:
            raise ValueError(f"a point appears twice: {text}; give each once")
        return self


def shown(point: dict[str, Any]) -> str:
    """Return a point as text."""
    words = []
    for key, value in point.items():
        counted = key in ("steps", "epochs")
        name = key.rstrip("s") if counted and value == 1 else KEYS[key]
        words.append(f"{value:g} {name}" if counted else f"{name} {value:g}")
    return ", ".join(words)
