"""The command in two processes, as a user types it: under torchrun's agent where the launcher matters."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time

import pytest
import yaml

import launch
import tiny
from warm import warm


def torchrun(folder, *arguments):
    """The command under torchrun's own agent, which forks two processes: the exit code and what they printed."""
    warm()
    agent = multiprocessing.get_context("fork").Process(target=_agent, args=(folder, arguments))
    agent.start()
    agent.join(120)
    printed = {kind: [path.read_text() for path in sorted((folder / "logs").rglob(f"{kind}.log"))]
               for kind in ("stdout", "stderr")}  # fmt: skip
    return agent.exitcode, printed["stdout"], printed["stderr"]


def _agent(folder, arguments):
    """What `torchrun --standalone --nproc_per_node 2` starts."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.chdir(folder)
    logging.root.handlers.clear()  # pytest's
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)
    (folder / "logs").mkdir()
    logs = DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test",
        start_method="fork", monitor_interval=0.1, logs_specs=logs,
    )  # fmt: skip
    elastic_launch(config, _launched)(arguments)


def _launched(arguments):
    from holdfast.cli.app import main

    launch.fresh()
    sys.argv = ["holdfast", *arguments]
    main()


def command(folder, *arguments, before=lambda: None):
    """The command in two forked processes: what each of them printed, and their exit codes."""
    codes = launch.start(folder, _command, folder, arguments, before)
    return [(folder / f"printed-{rank}.txt").read_text() for rank in range(launch.WORLD)], codes


def _command(folder, arguments, before):
    from holdfast.cli.app import main

    os.chdir(folder)
    printed = os.open(f"printed-{launch.rank()}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout = sys.__stdout__ = sys.stderr = sys.__stderr__ = os.fdopen(printed, "w", buffering=1)
    sys.argv = ["holdfast", *arguments]
    before()
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code or 0)


def ours(text):
    """What the processes said, without the launcher's own lines and its closing traceback."""
    lines = text.splitlines()
    return [line for line in lines if re.match(r"(holdfast: |done |cached |\.\.\. )", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("launched")
    evaluation = {"prompts": 2, "max_new_tokens": 2, "task_rows": 2}
    (place / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(place / "in", evaluation=evaluation)))
    return place


def test_a_run_speaks_with_one_voice(folder):
    code, printed, said = torchrun(folder, "run", "recipe.yaml", "--device", "cpu", "--out", "out")
    assert code == 0, said
    assert len(said) == 2
    assert "Traceback" not in "".join(said)
    assert len([line for line in ours("".join(said)) if line.startswith("done ")]) == 12
    assert "".join(printed).count("Report: out/report.html") == 1
    results = json.loads((folder / "out" / "results.json").read_text())
    assert [row["processes"] for row in results["rows"]] == [2, 2]


def fail():
    """In the training of the second process, while the first waits for it."""
    from holdfast.pipeline.monitor import TrainingMonitor

    on_step_end = TrainingMonitor.on_step_end

    def failing(self, args, state, control, **kwargs):
        if state.global_step == 2 and launch.rank() == 1:
            raise ValueError("made up")
        on_step_end(self, args, state, control, **kwargs)

    TrainingMonitor.on_step_end = failing


def test_a_failure_in_one_process_ends_all_and_says_which(folder):
    began = time.monotonic()
    printed, codes = command(folder, "run", "recipe.yaml", "--device", "cpu", "--out", "failed", before=fail)
    assert codes == [1, 1]
    assert time.monotonic() - began < 60
    messages = [line for line in ours("".join(printed)) if line.startswith("holdfast: ")]
    assert messages == ["holdfast: process 1 of 2: alignment with SFT failed: ValueError: made up"]
    assert "Traceback" not in "".join(printed)


def test_what_all_refuse_is_said_once(folder):
    printed, codes = command(folder, "run", "recipe.yaml", "user.rho=much", "--device", "cpu")
    assert codes == [2, 1]
    assert "user.rho" in printed[0]
    assert printed[1] == ""


def interrupt():
    from holdfast.pipeline.monitor import TrainingMonitor

    def interrupted(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run behind `&`
    TrainingMonitor.on_step_end = interrupted


def test_an_interrupt_ends_all_with_one_word(folder):
    printed, codes = command(
        folder, "run", "recipe.yaml", "--device", "cpu", "--out", "stopped", before=interrupt
    )
    assert codes == [130, 1]
    assert printed[0].splitlines()[-1] == (
        "holdfast: Stopped. Finished work is kept; run the same command again to resume."
    )
    assert "Traceback" not in printed[0]
    assert printed[1] == ""


def test_only_the_main_process_answers_what_needs_no_others(folder):
    printed, codes = command(folder, "plan", "recipe.yaml")
    assert codes == [0, 0]
    assert printed[0].count("steps would run") == 1
    assert printed[1] == ""
    printed, codes = command(folder, "demo")
    assert codes == [2, 0]
    assert "holdfast demo runs in one process" in printed[0]
    assert printed[1] == ""
