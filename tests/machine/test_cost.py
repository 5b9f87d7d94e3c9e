"""The cost of a step: sums over starts and processes, values not measured, and where costs are recorded."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import pytest

from holdfast.machine import cost
from holdfast.machine.cost import Cost


def test_what_is_counted_on_a_cpu():
    spent = Cost("cpu")
    block = bytearray(b"x" * 80_000_000)
    spent.look()
    del block
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    time.sleep(0.1)
    found = spent.facts(tokens=300, steps=4)
    assert 0.15 <= found["seconds"] < 10
    assert 0.05 <= found["device_seconds"] <= found["seconds"] - 0.09, "while it sleeps, no core computes"
    assert found["device_time"] == "cores computing"
    assert found["peak_memory_bytes"] >= Cost("cpu").peak, "memory that is freed again counts"
    assert found["tokens_per_second"] == pytest.approx(300 / found["seconds"])
    assert found["seconds_per_1000_steps"] == pytest.approx(250 * found["seconds"])
    assert found["device_seconds_per_1000_steps"] == pytest.approx(250 * found["device_seconds"])
    assert (found["energy_joules"], found["peak_reserved_bytes"]) == (None, None), "not measured"
    assert "seconds_per_1000_steps" not in spent.facts(tokens=1)


def test_an_earlier_start_is_added():
    earlier = {"seconds": 100.0, "device_seconds": 70.0, "peak_memory_bytes": 10**15, "energy_joules": None}
    found = Cost("cpu", earlier).facts(
        tokens=1000, steps=10, over=lambda v, how: 2 * v if how == "sum" else v
    )
    assert 100 < found["seconds"] < 101
    assert 70 <= found["device_seconds"] < 71, "the earlier seconds already include all processes"
    assert found["peak_memory_bytes"] == 10**15
    assert found["tokens_per_second"] == pytest.approx(10, rel=0.02), "tokens are those of all starts"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose counter starts at 5000 mJ and rises by 2000 per reading; `gpu.broken` makes the driver fail."""
    import torch

    state = SimpleNamespace(millijoules=3000, broken=False, name=None)

    def energy(handle):
        if state.broken:
            raise RuntimeError("not supported")
        state.name, state.millijoules = handle, state.millijoules + 2000
        return state.millijoules

    monkeypatch.setitem(
        sys.modules,
        "pynvml",
        SimpleNamespace(
            nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetHandleByUUID=lambda name: name,
            nvmlDeviceGetTotalEnergyConsumption=energy,
        ),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-12"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 900)
    return state


def test_what_a_gpu_tells(gpu):
    spent = Cost("cuda:0", {"energy_joules": 10.0, "device_seconds": 3.0, "peak_reserved_bytes": 800})
    assert spent.energy == 5.0
    found = spent.facts(tokens=1, over=lambda v, how: 2 * v if how == "sum" else v)
    assert found["energy_joules"] == 10 + 2 * 2, "of two processes, each with its GPU"
    assert gpu.name == "GPU-ab-12"
    assert (found["peak_memory_bytes"], found["peak_reserved_bytes"]) == (700, 900)
    assert (found["peak_memory_kind"], found["device_time"]) == ("cuda allocated", "devices held")
    assert found["device_seconds"] >= 3


@pytest.mark.parametrize("earlier", [None, {"energy_joules": None}])
def test_energy_that_is_not_known_throughout_is_not_measured(gpu, earlier):
    gpu.broken = earlier is None
    spent = Cost("cuda", earlier)
    gpu.broken = False
    assert spent.facts(tokens=1)["energy_joules"] is None


def test_without_the_library(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert cost.energy_counter("cuda") is None
    assert cost.energy_counter("cpu") is None


def test_every_result_holds_it(done):
    _, out, results, _ = done
    for row in results["rows"]:
        found = row["cost"]
        assert set(found) == {"alignment", "generate", "moderate"} | ({"user"} if row["user"] else set())
        parts = [found["generate"], *found["moderate"].values(), found["alignment"], found.get("user")]
        for part in filter(None, parts):
            assert part["seconds"] > 0
            assert part["device_seconds"] > 0
            assert part["peak_memory_bytes"] > 1e7
            assert part["energy_joules"] is None
        trained = found.get("user", found["alignment"])
        assert (trained["seconds"], trained["peak_memory_bytes"]) == (
            row["seconds"],
            row["peak_memory_bytes"],
        )
        assert trained["seconds_per_1000_steps"] > 0
        folder = out / "steps" / row["steps"]["generate"]
        answers = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
        assert found["generate"]["tokens"] == sum(answer["tokens"] for answer in answers)
        judged = sum(answer["tokens"] for answer in answers if answer["set"] == "harmful")
        assert found["moderate"]["keyword"]["tokens"] == judged
