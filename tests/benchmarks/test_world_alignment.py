"""The benchmark of the alignment stage runs with few steps."""

from __future__ import annotations

from places import BENCHMARKS
from runs import no_pages


def test_every_alignment_is_measured_before_and_after_the_attack(tmp_path, monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("world_alignment")
    whole = benchmark.runs()
    assert {"SFT", "Vaccine", "T-Vaccine", "RepNoise", "TAR", "Booster"} < set(whole)
    chosen = {name: whole[name] for name in ("SFT", "T-Vaccine", "T-Vaccine + Lisa + Safe LoRA")}
    chosen["T-Vaccine + Lisa + Safe LoRA"] += ["user.alignment_steps=1"]  # of two steps, one on user rows
    few = ("alignment.training.max_steps=2", "user.training.max_steps=2", "evaluation.prompts=4",
           "evaluation.task_rows=4", "evaluation.max_new_tokens=4", "data.size=40",
           "data.alignment.size=40")  # fmt: skip
    with no_pages():
        found = benchmark.measure(tmp_path, seeds=(42,), changes=few, settings=chosen)["rows"]
    names = ("SFT", "T-Vaccine")
    assert set(found) == {*names, *(f"aligned, {name}" for name in names), "T-Vaccine + Lisa", [*chosen][-1]}
    for row in found.values():
        assert row["seeds"] == 1, "each model once, even if several runs share it"
        assert row["alignment_seconds"] > 0
        assert row["alignment_peak_memory_bytes"] > 1e7
    stack = found["T-Vaccine + Lisa + Safe LoRA"]
    assert (stack["alignment"], stack["user"], stack["post_hoc"]) == ("tvaccine", "lisa", "safe_lora")
