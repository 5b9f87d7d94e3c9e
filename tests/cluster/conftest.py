"""A Slurm and a Ray for the tests; `make test-cluster` sets them up. Without them the tests are skipped."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest


def _needs(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; make test-cluster installs it")


@pytest.fixture(scope="session")
def slurm():
    """A Slurm that answers."""
    _needs("submitit")
    if shutil.which("squeue") is None or subprocess.run(["squeue"], capture_output=True).returncode:
        pytest.skip("no Slurm answers to squeue; make test-cluster starts one")


class Ray:
    """A Ray cluster on this machine, which does not end with the commands that use it."""

    address = "127.0.0.1:26379"

    def start(self):
        _needs("ray")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=26379",
             "--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        last = time.monotonic() + 300
        while not self._answers():
            if time.monotonic() > last:
                self.kill()
                pytest.fail("Ray does not answer 300 s after its start")
            time.sleep(1)

    def _answers(self):
        asked = [sys.executable, "-m", "ray.scripts.scripts", "status", f"--address={self.address}"]
        return subprocess.run(asked, capture_output=True, timeout=120).returncode == 0

    def kill(self):
        """Kill every process of the cluster."""
        import psutil

        try:
            found = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in found:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


@pytest.fixture(scope="session")
def ray():
    os.environ["RAY_AUTH_MODE"] = "disabled"  # of this cluster and of all that connect to it
    made = Ray()
    made.start()
    yield made
    made.kill()


@pytest.fixture
def launcher(request):
    """The block `launcher` of a grid for the engine of a test's parameter."""
    if request.param == "slurm":
        request.getfixturevalue("slurm")
        return {"name": "slurm", "time": "10m", "cpus": 1}
    if request.param == "ray":
        return {"name": "ray", "address": request.getfixturevalue("ray").address}
    return {"name": "local", "workers": 2}
