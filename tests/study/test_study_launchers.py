"""Launchers: the order of steps, what they need, and the jobs and tasks that an engine gets."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest

from holdfast.errors import OutputError, RecipeError, StepFailed
from holdfast.machine.files import read_json, write_json
from holdfast.machine.processes import Processes
from holdfast.machine.store import Store
from holdfast.pipeline.step import Busy
from holdfast.study import claims, grid, job, resources, slurm, worker
from holdfast.study import folder as files
from holdfast.study import ray as tasks
from holdfast.study.graph import Graph
from holdfast.study.launching import Sweep
from holdfast.study.resources import KINDS, Launcher, Need

DIAMOND = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c"), "e": ("c",)}


def test_a_step_is_ready_when_all_that_it_reads_is_done_and_the_first_comes_first():
    graph = Graph(DIAMOND)
    assert (graph.pop(), graph.pop()) == ("a", None)
    graph.done("a")
    assert (graph.pop(), graph.pop(), graph.pop()) == ("b", "c", None)
    graph.back(["c", "b"])
    assert graph.pop() == "b", "the first comes first again"
    graph.done("b")
    assert (graph.pop(), graph.pop()) == ("c", None)
    graph.done("c")
    assert (graph.pop(), graph.pop(), graph.pop()) == ("d", "e", None)
    assert graph.left == 2


def test_a_failed_step_stops_what_needs_it_and_nothing_else():
    graph = Graph(DIAMOND)
    graph.done(graph.pop())
    graph.fail("b")
    assert graph.stopped == {"d"}
    graph.done(graph.pop())
    assert (graph.pop(), graph.pop(), graph.left) == ("e", None, 1)


def test_ten_thousand_steps_are_handed_out_in_linear_time():
    parents = {f"a{i}": () for i in range(5000)} | {f"b{i}": (f"a{i}",) for i in range(5000)}
    graph, began = Graph(parents), time.process_time()
    while (name := graph.pop()) is not None:
        graph.done(name)
    assert graph.left == 0
    assert time.process_time() - began < 1, "of computing; a search for each ready step takes minutes"


BLOCK = {
    "name": "slurm", "gpus": 1, "memory": "16G", "time": "1d2h30m", "partition": "long",
    "steps": {"alignment": {"gpus": 4, "time": "90m"}, "score": {"memory": "500M"}},
}  # fmt: skip


def test_each_kind_of_step_has_its_own_needs():
    block = grid.launcher({"extends": "world", "launcher": BLOCK}, None, ["launcher.steps.user.gpus=2"])
    assert block.partition == "long"
    assert block.need("alignment", "cuda") == Need(4, None, 16 * 2**30, 90, 4)
    assert block.need("generate", "cuda") == Need(1, None, 16 * 2**30, 26 * 60 + 30, 1)
    assert block.need("score", "cuda") == Need(0, None, 500 * 2**20, 26 * 60 + 30, 1)
    assert block.need("alignment", "cpu").gpus == 0
    assert block.together("cpu") == {"alignment": 1, "user": 1}
    assert resources.placed(block, "auto") == "cuda"
    assert resources.placed(Launcher(name="ray", gpus=0), "auto") == "cpu"
    assert resources.placed(Launcher(), "auto") == "auto"
    changed = grid.launcher({"extends": "world", "launcher": BLOCK}, "ray", ["launcher.gpus=0", "seed=3"])
    assert (changed.name, changed.gpus) == ("ray", 0)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"memory": "lots"}, "expected a size such as 500M or 32G, found 'lots'"),
        ({"time": "soon"}, "expected a time such as 30m, 4h or 1d12h"),
        ({"partitoin": "long"}, r"unknown key 'launcher.partitoin'.*Did you mean 'partition'"),
        ({"name": "pbs"}, "launcher.name"),
        ({"steps": {"training": {"gpus": 1}}}, "launcher.steps.training"),
        ({"steps": {"generate": {"processes": 2}}}, "only alignment and user steps run in several processes"),
        ("slurm", "expected a block"),
    ],
)
def test_a_block_that_cannot_be_used_is_refused(block, words):
    with pytest.raises(RecipeError, match=words):
        grid.launcher({"extends": "world", "launcher": block})


def test_a_step_claims_its_gpus_alone_and_waits_for_memory(tmp_path, monkeypatch):
    gpus = ["0", "1", "2"]

    def take(worker, **need):
        return claims.take(tmp_path, f"worker-{worker}", Need(**need), gpus[worker], gpus)

    assert take(0, gpus=1) == ["0"]
    assert take(1, gpus=3) is None
    assert take(1, gpus=2) == ["1", "2"]
    assert take(2, gpus=1) is None, "its GPU belongs to the step of the other worker"
    assert take(2, gpus=0) == []
    claims.release(tmp_path, "worker-1")
    assert take(2, gpus=1) == ["2"]
    monkeypatch.setattr(claims, "memory", lambda: 10)
    assert take(0, memory=8) == []
    assert take(1, memory=3) is None
    assert take(1, memory=2) == []
    claims.release(tmp_path, "worker-0"), claims.release(tmp_path, "worker-1")
    claims.release(tmp_path, "worker-2")
    assert take(1, memory=99) == [], "alone, it may try"


RUNS = 3
STEPS: dict[str, tuple[str, tuple[str, ...]]] = {"alignment-0": ("alignment", ())}
for _run in range(RUNS):
    STEPS |= {
        f"user-{_run}": ("user", ("alignment-0",)),
        f"generate-{_run}": ("generate", ("alignment-0", f"user-{_run}")),
        f"moderate-{_run}a": ("moderate", (f"generate-{_run}",)),
        f"moderate-{_run}b": ("moderate", (f"generate-{_run}",)),
        f"score-{_run}": ("score", (f"generate-{_run}", f"moderate-{_run}a", f"moderate-{_run}b")),
    }


def study():
    steps = {name: SimpleNamespace(kind=kind, title=name) for name, (kind, _) in STEPS.items()}
    return SimpleNamespace(steps=steps, parents={name: parents for name, (_, parents) in STEPS.items()})


def status(**states):
    shown = {name: states.get(name.replace("-", "_"), "waiting") for name in STEPS}
    return SimpleNamespace(states=shown)


class Queue:
    """Stands in for submitit and squeue: keeps what was submitted, and what state each job has."""

    def __init__(self):
        self.jobs, self.states, self.refuse = [], {}, False

    def __call__(self, folder, **options):
        self.batch_open, self.parameters = [], {}
        return self

    def update_parameters(self, **parameters):
        self.parameters = parameters

    def batch(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        number = len(self.jobs) + 1
        several = len(self.batch_open) > 1
        names = [one.step for one in self.batch_open]
        for place, made in enumerate(self.made):
            made.job_id = f"{number}_{place}" if several else str(number)
            self.states[made.job_id] = "PENDING"
        self.jobs.append((names, self.parameters.get("dependency")))

    def submit(self, job):
        self.made = [] if not self.batch_open else self.made
        self.batch_open.append(job)
        self.made.append(SimpleNamespace(job_id=None))
        return self.made[-1]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    queue = Queue()
    module, core, utils = (
        ModuleType("submitit"),
        ModuleType("submitit.core"),
        ModuleType("submitit.core.utils"),
    )
    module.SlurmExecutor = queue
    utils.FailedSubmissionError = type("FailedSubmissionError", (RuntimeError,), {})
    for one in (module, core, utils):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    (tmp_path / "failed").mkdir()
    block = Launcher(name="slurm", partition="long", setup=["module load cuda"], options={"nice": 100})
    needs = {kind: Need(gpus=1, memory=2**31, minutes=60) for kind in KINDS}
    made = slurm.Jobs(Sweep(tmp_path, tmp_path, study(), block, needs))
    monkeypatch.setattr(made, "_queue", lambda: dict(queue.states))
    made.begin()
    return made, queue


def test_steps_that_depend_alike_are_one_array(engine):
    jobs, queue = engine
    assert jobs.poll(status())
    assert queue.jobs == [
        (["alignment-0"], None),
        (["user-0", "user-1", "user-2"], "afterok:1"),
        (["generate-0", "generate-1", "generate-2"], "afterok:1,aftercorr:2"),
        (["moderate-0a", "moderate-1a", "moderate-2a"], "aftercorr:3"),
        (["moderate-0b", "moderate-1b", "moderate-2b"], "aftercorr:3"),
        (["score-0", "score-1", "score-2"], "aftercorr:3,aftercorr:4,aftercorr:5"),
    ]
    given = {
        "time": 60,
        "gpus_per_node": 1,
        "mem": "2048M",
        "partition": "long",
        "setup": ["module load cuda"],
    }
    assert given.items() <= queue.parameters.items()
    assert queue.parameters["additional_parameters"] == {
        "kill-on-invalid-dep": "yes", "requeue": True, "ntasks": 1, "nice": 100,
    }  # fmt: skip
    jobs.poll(status())
    assert len(queue.jobs) == 6, "every step has a job"
    again = slurm.Jobs(jobs.sweep)
    again._queue = jobs._queue
    again.begin()
    again.poll(status())
    assert len(queue.jobs) == 6, "another start of the command finds them"


def test_steps_that_no_array_can_describe_are_single_jobs(engine):
    jobs, queue = engine
    done = {"alignment_0": "complete", "user_1": "complete"}
    jobs.poll(status(**done))
    assert queue.jobs[:3] == [
        (["user-0", "user-2"], None),
        (["generate-1"], None),
        (["generate-0", "generate-2"], "aftercorr:1"),
    ]


def test_a_part_of_an_array_is_single_jobs(engine):
    jobs, queue = engine
    jobs.poll(status())
    for name in ("generate-1", "generate-2"):
        queue.states[jobs.places[name].id] = "CANCELLED"
    jobs.poll(status(alignment_0="complete"))
    jobs.poll(status(alignment_0="complete"))
    first = [(["generate-1"], "afterok:2_1"), (["generate-2"], "afterok:2_2")]
    assert queue.jobs[6:] == first, "array tasks 1 and 2 of three cannot correspond to tasks 0 and 1"


def test_a_job_that_died_is_submitted_again_and_one_that_was_cancelled_is_not(engine):
    jobs, queue = engine
    jobs.poll(status())
    for name in queue.states:
        queue.states[name] = "CANCELLED"  # by Slurm, because of the first
    for number in range(slurm.TRIES):
        place = jobs.places["alignment-0"].id
        queue.states |= dict.fromkeys(queue.states, "CANCELLED")
        queue.states[place] = "NODE_FAIL"
        count = len(queue.jobs)
        jobs.poll(status())
        assert len(queue.jobs) == count, "its files may still become visible"
        if number < slurm.TRIES - 1:
            jobs.poll(status())
            assert queue.jobs[count:][0] == (["alignment-0"], None)
    jobs.poll(status())
    assert "3 jobs ended, the last" in files.failures(jobs.sweep.folder)["alignment-0"]
    assert len(queue.jobs) == count, "a failed step gets no job"
    queue.states[place] = "COMPLETED"
    ready = status(alignment_0="complete", user_1="complete", user_2="complete")
    jobs.poll(ready)
    queue.states[jobs.places["user-0"].id] = "CANCELLED"
    jobs.poll(ready)
    jobs.poll(ready)
    assert "someone cancelled it" in files.failures(jobs.sweep.folder)["user-0"]


def test_a_job_that_slurm_removes_with_one_before_it_is_submitted_again(engine):
    """The job before it died, but the process of its step ran on and completed it."""
    jobs, queue = engine
    jobs.poll(status(alignment_0="complete"))
    queue.states[jobs.places["user-0"].id] = "FAILED"
    queue.states[jobs.places["generate-0"].id] = "CANCELLED"
    done = status(alignment_0="complete", user_0="complete")
    count = len(queue.jobs)
    jobs.poll(done)
    jobs.poll(done)
    assert queue.jobs[count:][0] == (["generate-0"], None)
    assert not files.failures(jobs.sweep.folder)


def test_a_job_that_slurm_removes_late_is_submitted_again(engine):
    """The job before it died, and a second job of that step completed before Slurm removed the one that waited."""
    jobs, queue = engine
    before = status(alignment_0="complete")
    jobs.poll(before)
    died, waits = jobs.places["user-0"].id, jobs.places["generate-0"].id
    queue.states[died] = "FAILED"
    jobs.poll(before), jobs.poll(before)
    assert queue.jobs[-1] == (["user-0"], None)
    again = slurm.Jobs(jobs.sweep)
    again._queue = jobs._queue
    again.begin()
    queue.states |= {jobs.places["user-0"].id: "COMPLETED", waits: "CANCELLED"}
    done = status(alignment_0="complete", user_0="complete")
    for engine in (again, jobs):
        count = len(queue.jobs)
        engine.poll(done), engine.poll(done)
        assert queue.jobs[count][0] == ["generate-0"]
        assert not files.failures(jobs.sweep.folder)
        queue.states.pop(died, None)  # Slurm forgets old jobs; the process that saw the death remembers it


def test_a_signal_of_slurm_ends_the_step_while_the_job_waits_for_it(tmp_path, monkeypatch):
    utils = ModuleType("submitit.core.utils")
    utils.DelayedSubmission = lambda work: work
    for name, module in [("submitit", ModuleType("submitit")), ("submitit.core.utils", utils)]:
        monkeypatch.setitem(sys.modules, name, module)
    work = slurm.StepJob(tmp_path, "user-0", 1)
    work.child = subprocess.Popen(["sleep", "60"])

    def signalled(*_):
        raise InterruptedError(work.checkpoint().step)

    before = signal.signal(signal.SIGALRM, signalled)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(InterruptedError, match="user-0"):
            work.child.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert work.child.wait(1) == -signal.SIGKILL


def test_slurm_that_does_not_answer_is_refused_at_the_start_and_waited_for_later(engine):
    jobs, queue = engine
    jobs._queue = lambda: None
    assert jobs.poll(status()), "it is being restarted"
    assert not queue.jobs
    with pytest.raises(OutputError, match="Slurm does not answer"):
        jobs.begin()


def test_the_queue_has_a_limit(engine):
    jobs, queue = engine
    jobs.sweep = Sweep(
        *(getattr(jobs.sweep, n) for n in ("out", "folder", "study")), Launcher(jobs=2), jobs.sweep.needs
    )
    jobs.poll(status())
    assert [names for names, _ in queue.jobs] == [["alignment-0"], ["user-0"]]


def test_torchrun_hides_that_a_step_is_busy_and_a_file_says_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "described", lambda folder: {"steps": {"user-0": {}}})
    (tmp_path / "workers").mkdir()
    note = tmp_path / "workers" / "worker-1.json"
    write_json(note, {})
    for rank, error in [
        (1, StepFailed("Another process failed.")),
        (0, Busy("Another process runs this step.")),
    ]:
        together = Processes(rank=rank, count=2)
        monkeypatch.setattr(together, "start", lambda: None)
        monkeypatch.setattr(together, "speaks", lambda rank=rank: rank == 0)
        monkeypatch.setattr(job, "launched", lambda together=together: together)
        monkeypatch.setattr(job, "_run", mock.Mock(side_effect=error))
        with pytest.raises(type(error)):
            job.run(tmp_path, "user-0", "worker-1")
        assert note.exists() == (rank == 1), "the note is that of the main process"
    torchrun = SimpleNamespace(wait=lambda: 1)
    assert job.wait(torchrun, tmp_path, "worker-1") == job.BUSY
    assert job.wait(torchrun, tmp_path, "worker-1") == 1


class Now(ModuleType):
    """Stands in for ray: a task runs when it is started."""

    def __init__(self, what):
        super().__init__("ray")
        self.what, self.asked = what, []

    def remote(self, function):
        return self

    def options(self, **options):
        self.asked.append(options)
        return SimpleNamespace(remote=self.what)

    def wait(self, references, **_):
        return references[:1], references[1:]

    def get(self, reference):
        if isinstance(reference, Exception):
            raise reference
        return reference[0]


def test_ray_gets_a_task_for_each_step_that_is_ready(tmp_path, monkeypatch):
    ran: list[str] = []
    busy = ["generate-1"]

    def task(folder, step, processes):
        ran.append(step)
        if step in busy:
            busy.remove(step)
            return ("busy", step)
        if step == "user-2":
            return ValueError("the node is gone")
        return ("complete", step)

    ray = Now(task)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(tasks, "PAUSE", 0), monkeypatch.setattr(tasks, "LATER", 0)
    (tmp_path / "failed").mkdir()
    (tmp_path / "score-0").mkdir()
    write_json(tmp_path / "score-0" / "step.json", {})
    need = {"gpus": 0, "cpus": 2, "memory": None, "minutes": None, "processes": 1}
    known = {"store": ".", "needs": dict.fromkeys(KINDS, need), "recipes": {}, "runs": {}, "workers": 1}
    steps = {name: {"kind": kind, "parents": parents} for name, (kind, parents) in STEPS.items()}
    write_json(tmp_path / "study.json", {**known, "steps": steps})
    scheduler = tasks.Scheduler(str(tmp_path))
    scheduler._schedule()
    gone = {"generate-2", "moderate-2a", "moderate-2b", "score-2"}
    assert sorted(ran) == sorted([*(STEPS.keys() - gone - {"score-0"}), "generate-1"])
    assert ran.index("user-0") < ran.index("generate-0") < ran.index("moderate-0a")
    assert "the node is gone" in files.failures(tmp_path)["user-2"]
    assert ray.asked[0] == {"name": "alignment alignment-0", "max_retries": 2, "num_gpus": 0, "num_cpus": 2}
    assert read_json(Path(tmp_path) / "study.json")["steps"]


def test_the_death_of_a_step_in_several_processes_is_one_of_its_worker(tmp_path, monkeypatch):
    """The head reads in the worker's note which step killed it."""
    made = worker._Worker.__new__(worker._Worker)
    made.folder, made.label, made.store = tmp_path, "worker-1", Store(tmp_path / "store", read_only=False)
    made.note = job.Noted(tmp_path / "worker-1.json", lambda step: None)
    made.note.step = "user-0"
    (tmp_path / "failed").mkdir()
    monkeypatch.setattr(job, "start", mock.Mock())
    monkeypatch.setattr(job, "wait", lambda *_: 1)
    with pytest.raises(SystemExit, match="user-0 ended with exit code 1"):
        made._together("user-0", Need(processes=2), [])
    assert read_json(made.note.path)["step"] == "user-0"
    monkeypatch.setattr(job, "wait", lambda *_: job.BUSY)
    assert made._together("user-0", Need(processes=2), []) is False


def test_a_lost_ray_cluster_ends_the_command_with_a_message(tmp_path, monkeypatch):
    class Slow(Exception):
        pass

    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = "{}:{}".format(*head.getsockname())
        ray = ModuleType("ray")
        ray.exceptions = SimpleNamespace(RayError=Slow, GetTimeoutError=Slow)
        ray.get_runtime_context = lambda: SimpleNamespace(gcs_address=address)
        ray.get = mock.Mock(side_effect=[Slow, (False, None), *[Slow] * 4])
        monkeypatch.setitem(sys.modules, "ray", ray)
        made = tasks.Tasks(SimpleNamespace(launcher=Launcher(name="ray", address=address)))
        made.actor = mock.Mock()
        monkeypatch.setattr(tasks, "time", SimpleNamespace(monotonic=iter(range(100)).__next__))
        monkeypatch.setattr(tasks, "LOST", 4.0)
        assert made.poll(status()), "the head accepts connections; the actor is slow"
    with pytest.raises(StepFailed, match="Run the same command again"):
        made.poll(status())
    assert made.lost
    assert ray.get.call_count == 6, "not at the first refusal: the head may be starting again"
    made.end()  # calls nothing of ray


def test_the_page_shows_the_files_that_were_run():
    from places import DOCS, blocks

    shown = blocks(DOCS / "cluster.md", "yaml")
    for name in ("slurm", "ray"):
        file = DOCS / "cluster" / f"{name}.yaml"
        assert file.read_text() in [block.rstrip() + "\n" for block in shown]
        assert grid.launcher(file).name == name
        assert len(grid.expand(file)) == 4
