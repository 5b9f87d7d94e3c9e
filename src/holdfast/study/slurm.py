"""Run the steps of a sweep as Slurm jobs, which submitit submits: arrays of steps that depend on others.

A step is one job or one element of an array. It starts when the jobs of the steps that it reads are complete.
A job that reaches its time limit, or is preempted, goes back into the queue and resumes from the last
checkpoint. The jobs need this process only to be submitted again after they died.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import OutputError, StepFailed
from holdfast.machine.files import read_json, write_json
from holdfast.pipeline.step import Busy
from holdfast.study import folder as files
from holdfast.study.folder import Status
from holdfast.study.job import TRIES, supervise
from holdfast.study.launching import Sweep
from holdfast.study.resources import Need

PAUSE = 5.0
"""Seconds between two looks at the queue."""

HOURS = 4
"""The time limit of a job if the grid gives none."""

WARNING = 90
"""Seconds before the time limit at which a job is told to go back into the queue."""

TIMEOUTS = 1000
"""How often a job may reach its time limit."""

LONGEST = 1000
"""The largest number of elements of an array."""

LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED")


class StepJob:
    """The work of a job: one step, in a process of its own, so that this one can answer Slurm's signals."""

    def __init__(self, folder: Path, step: str, processes: int):
        self.folder, self.step, self.processes = folder, step, processes
        self.child: Any = None

    def __call__(self) -> None:
        """Run the step.

        Raises:
            StepFailed: the step failed; Slurm then removes the jobs that depend on this one.
        """
        from submitit.core.utils import UncompletedJobError

        label = f"job-{_job_id()}"
        try:
            supervise(self.folder, self.step, label, self.processes, started=self._started, died=_patient)
        except Busy:
            _requeue()
        except UncompletedJobError as error:  # raised by submitit where a signal arrives
            files.fail(self.folder, self.step, str(error))
            raise StepFailed(str(error)) from None

    def _started(self, child: Any) -> None:
        self.child = child

    def checkpoint(self) -> Any:
        """End the step, and return what runs when the job starts again; submitit calls this at a time-out."""
        from submitit.core.utils import DelayedSubmission

        if self.child is not None and self.child.returncode is None:
            # The signal interrupts the wait for the child, which holds a lock that all methods of Popen need.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.child.pid, signal.SIGKILL)
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(StepJob(self.folder, self.step, self.processes))


def _patient(code: int) -> None:
    """Wait after a death by a signal of Slurm, which also reaches this process and ends it."""
    if code < 0 and -code in (10, 12, 15):
        time.sleep(60)


def _requeue() -> None:
    """Go back into the queue instead of waiting with an allocation; Slurm starts the job again later."""
    subprocess.run(["scontrol", "requeue", _job_id()], check=True)
    time.sleep(600)


def _job_id() -> str:
    import submitit

    return str(submitit.JobEnvironment().job_id)


@dataclass(frozen=True)
class Place:
    """The job of a step: `index` is its element of an array, which has `size` elements.

    It waits for the jobs `after`. If one of them fails, Slurm removes it, even if another job completes that
    step.
    """

    job: str
    index: int | None = None
    size: int = 1
    after: Sequence[str] = ()

    @property
    def id(self) -> str:
        """The name of the job in Slurm."""
        return self.job if self.index is None else f"{self.job}_{self.index}"


class Jobs:
    """The jobs of a sweep; `jobs.json` names the job of each step."""

    def __init__(self, sweep: Sweep):
        import submitit

        self.submitit = submitit
        self.sweep, self.pause = sweep, PAUSE
        self.known = sweep.folder / "jobs.json"
        self.places: dict[str, Place] = {}
        self.dead: set[str] = set()
        self.deaths: Counter[str] = Counter()
        self.missed: set[str] = set()
        self.submitted = False

    def begin(self) -> None:
        """Find the jobs of an earlier start of the sweep.

        Raises:
            OutputError: Slurm does not answer.
        """
        queue = self._queue()
        if queue is None:
            raise OutputError(
                "Slurm does not answer: squeue failed. Expected a machine that can submit jobs."
            )
        if self.known.is_file():
            found = {step: Place(**place) for step, place in read_json(self.known).items()}
            self.places = {step: place for step, place in found.items() if queue.get(place.id, "") in LIVE}

    def poll(self, status: Status) -> bool:
        """Submit steps that have no job, and return whether jobs may still run."""
        queue = self._queue()
        if queue is None:  # Slurm is being restarted; its jobs run on
            return True
        open_ = [n for n, state in status.states.items() if state in ("waiting", "running")]
        live = {n for n in open_ if n in self.places and queue.get(self.places[n].id, "") in LIVE}
        missing = [n for n in open_ if n not in live]
        over = [name for name in missing if name in self.places]
        for name in [name for name in over if name in self.missed]:
            self._ended(name, queue, status)
        self.missed = {name for name in over if name in self.places}  # their files may still become visible
        failed = files.failed_steps(self.sweep.folder)
        missing = [name for name in missing if name not in failed]
        chosen: dict[str, None] = {}
        room = self.sweep.launcher.jobs - len(live)
        for name in missing:
            if len(chosen) < room and name not in self.places and self._possible(name, live, chosen, status):
                chosen[name] = None
        self._submit(list(chosen), live)
        return bool(open_)

    def end(self) -> None:
        """Leave the jobs in the queue."""

    def _possible(self, name: str, live: set[str], chosen: Collection[str], status: Status) -> bool:
        """Whether each parent of a step is complete or has a job."""
        return all(
            status.states[parent] == "complete" or parent in live or parent in chosen
            for parent in self.sweep.study.parents[name]
        )

    def _ended(self, name: str, queue: Mapping[str, str], status: Status) -> None:
        """Forget a job that is over without a result; a step whose jobs died several times fails."""
        place = self.places.pop(name)
        self.dead.add(place.id)
        state = queue.get(place.id, "unknown")
        if any(status.states[parent] != "complete" for parent in self.sweep.study.parents[name]):
            return
        failed = {job for job in place.after if queue.get(job, "COMPLETED") not in ("COMPLETED", *LIVE)}
        if failed or self.dead.intersection(place.after):
            return  # Slurm removed the job, because one before it failed, even if its step is complete now
        self.deaths[name] += 1
        told = {"OUT_OF_MEMORY": "give its kind of step more memory", "CANCELLED": "someone cancelled it"}
        if state in told:
            files.fail(self.sweep.folder, name, f"job {place.id} ended as {state}: {told[state]}")
        elif self.deaths[name] >= TRIES:
            files.fail(self.sweep.folder, name, f"{TRIES} jobs ended, the last, {place.id}, as {state}")

    def _queue(self) -> dict[str, str] | None:
        """Return the state of this user's jobs, by id; None if Slurm does not answer."""
        asked = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", "--user"]
        try:
            done = subprocess.run(
                [*asked, getpass.getuser()], capture_output=True, text=True, timeout=120, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return dict(line.split()[:2] for line in done.stdout.splitlines() if len(line.split()) > 1)

    def _submit(self, names: Sequence[str], live: set[str]) -> None:
        """Submit steps, in order; those of one kind that depend alike are one array."""
        waits: dict[str, list[str]] = {}
        level: dict[str, int] = {}
        chosen = set(names)
        for name in names:
            waits[name] = [p for p in self.sweep.study.parents[name] if p in chosen or p in live]
            level[name] = 1 + max((level.get(parent, 0) for parent in waits[name]), default=0)
        for depth in sorted(set(level.values())):
            alike: dict[Any, list[str]] = {}
            for name in [name for name in names if level[name] == depth]:
                jobs = tuple(self.places[parent].job for parent in waits[name])
                alike.setdefault((self.sweep.study.steps[name].kind, jobs), []).append(name)
            for (kind, _), group in alike.items():
                for part, dependency in self._parts(group, waits):
                    self._array(kind, part, dependency, waits)

    def _parts(self, group: list[str], waits: Mapping[str, list[str]]) -> Iterable[tuple[list[str], str]]:
        """Yield the arrays of a group, each with what it waits for."""
        # Steps that read the same element of an array, such as the verdicts of two judges, are in two arrays.
        several: dict[int, list[str]] = {}
        seen: Counter[tuple[str, ...]] = Counter()
        shared = self._dependency(group, waits) is not None
        for name in group:
            own = tuple(self.places[parent].id for parent in waits[name])
            several.setdefault(0 if shared else seen[own], []).append(name)
            seen[own] += 1
        for part in several.values():
            dependency = self._dependency(part, waits)
            size = 1 if dependency is None else LONGEST
            for start in range(0, len(part), size):
                piece = part[start : start + size]
                own_one = dependency if size > 1 else self._dependency(piece, waits)
                yield piece, own_one or ""

    def _dependency(self, group: Sequence[str], waits: Mapping[str, list[str]]) -> str | None:
        """Return what an array of these steps waits for; None if Slurm has no word for it."""
        columns = zip(*([self.places[parent] for parent in waits[name]] for name in group), strict=True)
        found = [_dependency(column) for column in columns]
        if None in found:
            return None
        return ",".join(dict.fromkeys(text for text in found if text))

    def _array(
        self, kind: str, names: list[str], dependency: str, waits: Mapping[str, Sequence[str]]
    ) -> None:
        """Submit an array."""
        need = self.sweep.needs[kind]
        from submitit.core.utils import FailedSubmissionError

        executor = self.submitit.SlurmExecutor(self.sweep.folder / "slurm", max_num_timeout=TIMEOUTS)
        executor.update_parameters(**self._parameters(kind, need, dependency))
        try:
            with executor.batch():
                jobs = [executor.submit(StepJob(self.sweep.folder, name, need.processes)) for name in names]
        except (FailedSubmissionError, subprocess.SubprocessError) as error:
            if (
                self.submitted and dependency
            ):  # a job that it depends on ended just now; the next poll sees it
                return
            raise OutputError(f"Slurm refuses a {kind} job: {_said(error)}") from None
        self.submitted = True
        before = {name: [self.places[parent].id for parent in waits[name]] for name in names}
        for place, (name, job) in enumerate(zip(names, jobs, strict=True)):
            whole, _, index = str(job.job_id).partition("_")
            self.places[name] = Place(whole, int(index) if index else None, len(names), before[name])
            assert not index or int(index) == place
        write_json(self.known, {name: vars(place) for name, place in self.places.items()})

    def _parameters(self, kind: str, need: Need, dependency: str) -> dict[str, Any]:
        """Return the parameters of submitit for a kind of step."""
        block = self.sweep.launcher
        memory = f"{need.memory // 2**20}M" if need.memory else None
        given = {
            "job_name": job_name(self.sweep.out),
            "comment": kind,
            "time": need.minutes or HOURS * 60,
            "cpus_per_task": need.cpus,
            "gpus_per_node": need.gpus or None,
            "mem": memory,
            "partition": block.partition,
            "account": block.account,
            "qos": block.qos,
            "constraint": block.constraint,
            "setup": block.setup or None,
            "array_parallelism": block.workers or LONGEST,
            "dependency": dependency or None,
        }
        seconds = min(WARNING, 60 * (need.minutes or HOURS * 60) // 4)
        more = {"kill-on-invalid-dep": "yes", "requeue": True, "ntasks": 1, **block.options}
        kept = {key: value for key, value in given.items() if value is not None}
        return {**kept, "signal_delay_s": seconds, "additional_parameters": more}


def job_name(out: Path) -> str:
    """Return the name that all jobs of a sweep have."""
    return f"holdfast-{out.name}"


def _dependency(column: Sequence[Place]) -> str | None:
    """Return what an array waits for whose elements read these steps, in order; None if there is no word."""
    if len({place.id for place in column}) == 1:
        return f"afterok:{column[0].id}"
    same = len({place.job for place in column}) == 1 and column[0].size == len(column)
    if same and [place.index for place in column] == list(range(len(column))):
        return f"aftercorr:{column[0].job}"
    return None


def _said(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return str(text).strip().splitlines()[-1] if str(text).strip() else type(error).__name__
