"""Place labels beside the points of a scatter plot so that nothing overlaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DIRECTIONS = 24
REACH = (9.0, 13.0, *range(18, 280, 8))
"""Distances from the point to try, in pixels, nearest first."""

GAP = 2.0
"""Clear space around a label, in pixels."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y points upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box, gap: float = GAP) -> bool:
        """Whether the two rectangles are less than `gap` apart."""
        return (
            self.left < other.right + gap
            and other.left < self.right + gap
            and self.bottom < other.top + gap
            and other.bottom < self.top + gap
        )

    def holds(self, other: Box) -> bool:
        """Whether `other` lies inside this rectangle."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.bottom <= other.bottom
            and other.top <= self.top
        )

    def crossed_by(self, start: tuple[float, float], end: tuple[float, float]) -> bool:
        """Whether the line from `start` to `end` crosses the rectangle (sampled every 2 pixels)."""
        steps = max(2, round(math.dist(start, end) / 2))
        for index in range(steps + 1):
            x = start[0] + (end[0] - start[0]) * index / steps
            y = start[1] + (end[1] - start[1]) * index / steps
            if self.left <= x <= self.right and self.bottom <= y <= self.top:
                return True
        return False


@dataclass(frozen=True)
class Placed:
    """The place of a label: its rectangle, and the end of its leader line if it is away from its point."""

    box: Box
    leader: tuple[float, float] | None


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    inside: Box,
) -> list[Placed | None]:
    """Find a place for each label (width, height) near its point; None if there is no room.

    Greedy: starts at the most crowded point and tries the nearest places first. This is deterministic,
    and good enough for 30 points.
    """
    crowd = [sum(math.dist(point, other) < 60 for other in points) for point in points]
    order = sorted(range(len(points)), key=lambda index: (-crowd[index], index))
    placed: list[Placed | None] = [None] * len(points)
    leaders: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for index in order:
        taken = [item.box for item in placed if item is not None]
        spot = (points[index], sizes[index], [*obstacles, *taken], inside)
        # If many points coincide, a leader line that passes behind a label is better than no label.
        found = _nearest(*spot, labels=taken, leaders=leaders) or _nearest(*spot, labels=(), leaders=())
        placed[index] = found
        if found is not None and found.leader is not None:
            leaders.append((points[index], found.leader))
    return placed


def _nearest(
    point: tuple[float, float],
    size: tuple[float, float],
    blocked: Sequence[Box],
    inside: Box,
    *,
    labels: Sequence[Box],
    leaders: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> Placed | None:
    """The nearest free place where no leader line crosses a label."""
    width, height = size
    for reach in REACH:
        for step in range(DIRECTIONS):
            # Directly to the right first, then alternately above and below.
            turn = (step + 1) // 2 * (1 if step % 2 else -1)
            angle = 2 * math.pi * turn / DIRECTIONS
            across, up = math.cos(angle), math.sin(angle)
            x, y = point[0] + reach * across, point[1] + reach * up
            # The side of the label that faces the point lies at distance `reach`.
            left = x - width * (0.5 - 0.5 * across)
            bottom = y - height * (0.5 - 0.5 * up)
            box = Box(left, bottom, left + width, bottom + height)
            if not inside.holds(box) or any(box.overlaps(other) for other in blocked):
                continue
            if any(box.crossed_by(*line) for line in leaders):
                continue
            if reach <= REACH[1]:
                return Placed(box, None)
            end = (min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top))
            if not any(other.crossed_by(point, end) for other in labels):
                return Placed(box, end)
    return None
