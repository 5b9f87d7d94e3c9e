"""What every launcher does: it starts steps, says whether some may still run, and ends or leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from holdfast.study.folder import Status
from holdfast.study.planning import Study
from holdfast.study.resources import Launcher, Need


@dataclass(frozen=True)
class Sweep:
    """A sweep that is planned and checked, for its launcher.

    Attributes:
        out, folder: the folder of the study, and the folder `sweep` in it.
        needs: by kind of step, what it needs.
        devices: the GPUs of this machine.
    """

    out: Path
    folder: Path
    study: Study
    launcher: Launcher
    needs: Mapping[str, Need]
    devices: tuple[str, ...] = ()


class Engine(Protocol):
    """Runs the steps of a sweep that are not complete."""

    pause: float
    """Seconds between two calls of `poll`."""

    def begin(self) -> None:
        """Start."""

    def poll(self, status: Status) -> bool:
        """Do what is due, and return whether steps may still run.

        Args:
            status: the state of the sweep now.
        """

    def end(self) -> None:
        """End what this process started, or leave the jobs of a cluster running."""
