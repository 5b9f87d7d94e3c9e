"""Run the steps of a sweep on this machine: start workers, and replace those that die."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from holdfast.errors import RecipeError, StepFailed
from holdfast.study import claims
from holdfast.study import folder as files
from holdfast.study.folder import Status
from holdfast.study.job import TRIES
from holdfast.study.launching import Sweep

PAUSE = 0.3
"""Seconds between two looks at the workers."""


def devices(device: str) -> tuple[str, ...]:
    """Return the GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    if device not in ("auto", "cuda"):
        return ()
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",") if visible and count else map(str, range(count)))


def start_worker(folder: Path, number: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker; it ends when this process ends, because its standard input closes."""
    with (folder / "logs" / f"worker-{number}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "holdfast.study.worker", str(folder), str(number)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C reaches only this process, which ends the workers
        )


class Workers:
    """The workers of this machine; each sees one GPU."""

    def __init__(self, sweep: Sweep):
        self.sweep, self.folder, self.pause = sweep, sweep.folder, PAUSE
        count = sweep.launcher.workers or len(sweep.devices) or 1
        self.environments = [self._environment(number) for number in range(count)]
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self.deaths: Counter[str] = Counter()
        most = max((need.gpus for need in sweep.needs.values()), default=0)
        if most > max(1, len(sweep.devices)):
            text = f"launcher: a step needs {most} GPUs, and this machine has {len(sweep.devices)}"
            raise RecipeError(f"{text}. For several processes on the CPU: device cpu, and processes: {most}.")

    def _environment(self, number: int) -> dict[str, str]:
        names = self.sweep.devices
        return {**os.environ, **({"CUDA_VISIBLE_DEVICES": names[number % len(names)]} if names else {})}

    def begin(self) -> None:
        """Start the workers."""
        for left in self.folder.glob("claims/*.json"):
            left.unlink()
        self.workers = {n: start_worker(self.folder, n, env) for n, env in enumerate(self.environments)}

    def poll(self, status: Status) -> bool:
        """Replace workers that died, and return whether some run."""
        for number, worker in list(self.workers.items()):
            code = worker.poll()
            if code is None:
                continue
            del self.workers[number]
            if code != 0:
                self._died(number, code)
                self.workers[number] = start_worker(self.folder, number, self.environments[number])
        return bool(self.workers)

    def end(self) -> None:
        """End the workers."""
        for worker in self.workers.values():
            worker.terminate()
        for worker in self.workers.values():
            worker.wait()
        for left in self.folder.glob("workers/*.json"):
            left.unlink(missing_ok=True)

    def _died(self, number: int, code: int) -> None:
        """Note that a worker died; a step in which several died counts as failed."""
        label = f"worker-{number}"
        step = files.at_work(self.folder).get(label, {}).get("step", "")
        (self.folder / "workers" / f"{label}.json").unlink(missing_ok=True)
        claims.release(self.folder, label)
        self.deaths[step] += 1
        if self.deaths[step] < TRIES:
            return
        where = f"in {self.sweep.study.steps[step].title}" if step else "outside a step"
        text = f"{TRIES} workers ended {where}, the last with exit code {code}"
        if not step:
            raise StepFailed(f"{text}. See {self.folder / 'logs' / f'{label}.log'}.")
        files.fail(self.folder, step, text)
