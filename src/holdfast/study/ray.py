"""Run the steps of a sweep as Ray tasks, on a cluster with an address or on one that is started here.

An actor in the cluster hands out the tasks, so that they run on if the command that started the sweep ends.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import OutputError, StepFailed
from holdfast.machine.store import identity_hash
from holdfast.pipeline.step import Busy
from holdfast.study import folder as files
from holdfast.study.folder import Status
from holdfast.study.graph import Graph
from holdfast.study.job import TRIES, logging_to, run, supervise
from holdfast.study.launching import Sweep

PAUSE = 1.0
"""Seconds between two looks at the state of the steps."""

LATER = 5.0
"""Seconds until a step is tried again that another sweep runs."""

ANSWER = 600.0
"""Seconds in which the actor must answer; a cluster may need minutes to start it."""

LOST = 20.0
"""Seconds without a connection to the head of the cluster; after 60, Ray itself ends this process."""

NAMESPACE = "holdfast"


def actor_name(folder: Path) -> str:
    """Return the name of the actor of the sweep in a folder."""
    return f"sweep-{identity_hash(str(folder))}"


def do_step(folder: str, step: str, processes: int) -> str:
    """Run a step in a task: "complete", "busy" or "failed"."""
    import ray

    place = Path(folder)
    label = f"task-{ray.get_runtime_context().get_task_id()[:12]}"
    try:
        if processes > 1:
            supervise(place, step, label, processes)
        else:
            with logging_to(files.log(place, step)):
                run(place, step, label)
    except Busy:
        return "busy"
    except Exception:  # it is noted
        return "failed"
    return "complete"


class Scheduler:
    """The actor: starts a task for each step that is ready."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.thread: threading.Thread | None = None
        self.error: str | None = None
        self.ended = False

    def poll(self) -> tuple[bool, str | None]:
        """Start if it does not run yet, as after a restart; return whether it is over, and why it stopped."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
        return self.ended, self.error

    def _run(self) -> None:
        try:
            self._schedule()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.ended = True

    def _schedule(self) -> None:
        import ray

        known = files.described(self.folder)
        graph = Graph({name: step["parents"] for name, step in known["steps"].items()})
        store = self.folder / known["store"]
        most = known["workers"] or len(known["steps"])
        tasks: dict[Any, str] = {}
        busy: dict[str, float] = {}
        while graph.left:
            while len(tasks) < most and (name := graph.pop()) is not None:
                if (store / name / "step.json").is_file():
                    graph.done(name)
                    continue
                kind = known["steps"][name]["kind"]
                tasks[self._start(name, kind, known["needs"][kind])] = name
            back = [name for name, since in busy.items() if time.monotonic() - since > LATER]
            graph.back(back)
            for name in back:
                del busy[name]
            if not tasks:
                time.sleep(PAUSE)
                continue
            for ref in ray.wait(list(tasks), num_returns=1, timeout=LATER)[0]:
                name = tasks.pop(ref)
                what = self._result(ref, name)
                if what == "complete":
                    graph.done(name)
                elif what == "busy":
                    busy[name] = time.monotonic()
                else:
                    graph.fail(name)

    def _start(self, name: str, kind: str, need: Mapping[str, Any]) -> Any:
        import ray

        asked = {"num_gpus": need["gpus"], "num_cpus": need["cpus"] or 1, "memory": need["memory"]}
        options = {key: value for key, value in asked.items() if value is not None}
        task = ray.remote(do_step).options(name=f"{kind} {name}", max_retries=TRIES - 1, **options)
        return task.remote(str(self.folder), name, need["processes"])

    def _result(self, ref: Any, name: str) -> str:
        import ray

        try:
            return str(ray.get(ref))
        except Exception as error:  # the worker died several times, or the node has too little memory
            if name not in files.failed_steps(self.folder):
                text = str(error).strip().splitlines()[0]
                files.fail(self.folder, name, f"its task ended {TRIES} times: {type(error).__name__}: {text}")
            return "failed"


class Tasks:
    """The connection of the command to the cluster, and to the actor of this sweep."""

    def __init__(self, sweep: Sweep):
        import ray

        self.ray, self.sweep, self.pause = ray, sweep, PAUSE
        self.actor: Any = None
        self.over, self.lost = False, False

    @property
    def address(self) -> str | None:
        """The address of the cluster; None for one that ends with this command."""
        return self.sweep.launcher.address

    def begin(self) -> None:
        """Connect, and find or start the actor.

        Raises:
            OutputError: there is no cluster at the address.
        """
        options: dict[str, Any] = {
            "namespace": NAMESPACE,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if self.address is None:
            options |= {"include_dashboard": False, "address": "local"}
            if self.sweep.launcher.workers:
                options["num_cpus"] = self.sweep.launcher.workers
        else:
            options["address"] = self.address
        try:
            self.ray.init(**options)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            where = self.address or "this machine"
            raise OutputError(f"Cannot use Ray on {where}: {error}") from None
        self._find()

    def _find(self) -> None:
        actor = self.ray.remote(Scheduler).options(
            name=actor_name(self.sweep.folder),
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        self.actor = actor.remote(str(self.sweep.folder))

    def poll(self, status: Status) -> bool:
        """Return whether the actor still hands out tasks.

        Raises:
            StepFailed: the cluster cannot be reached, or the actor stopped.
        """
        if self.over:
            return False
        try:
            self.over, error = self._ask()
        except self.ray.exceptions.RayError as problem:
            text = f"The Ray cluster ended or cannot be reached ({type(problem).__name__})"
            raise StepFailed(f"{text}. Run the same command again to go on.") from None
        if error:
            raise StepFailed(f"The scheduler of the sweep stopped: {error}")
        return True  # once more, to see the last files

    def _ask(self) -> Any:
        """Return the answer of the actor; raise the time-out of Ray if the cluster is lost."""
        asked, began, seen = self.actor.poll.remote(), time.monotonic(), time.monotonic()
        while True:
            try:
                return self.ray.get(asked, timeout=LOST / 4)
            except self.ray.exceptions.GetTimeoutError:
                now = time.monotonic()
                if self._reachable():
                    seen = now
                self.lost = now - seen >= LOST
                if self.lost or now - began >= ANSWER:
                    raise

    def _reachable(self) -> bool:
        """Return whether the head of the cluster accepts connections."""
        if str(self.address).startswith("ray://"):
            return True  # this machine may see only a proxy of the head
        host, _, port = self.ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), LOST / 4).close()
        except OSError:
            return False
        return True

    def end(self) -> None:
        """Disconnect; remove the actor if it is over, and otherwise leave it to the cluster."""
        if self.lost:
            return  # each call to the cluster would wait until Ray ends this process
        with contextlib.suppress(Exception):
            if self.over:
                self.ray.kill(self.actor)
            self.ray.shutdown()
