"""Complete runs in two processes: work done once, work done together, kills, failures."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

import holdfast
import launch
import tiny
from holdfast import pipeline
from holdfast.errors import RecipeError
from holdfast.machine.processes import Processes, launched
from holdfast.recipe import Recipe
from runs import answers, left
from runs import run as run_once

KINDS = {"ddp": (None, "MULTI_CPU"), "fsdp2": ("SHARDED_STATE_DICT", "FSDP")}


def run(recipe, out, told, before=lambda: None):
    """In every process: run, and write a note of what this process saw."""
    before()
    results, seen = run_once(recipe, out)
    note = {"ran": seen.ran, "cached": seen.cached, "resumed": seen.resumed, "results": results}
    launch.write(told / f"{launch.rank()}.json", note)


def notes(told):
    return [json.loads((told / f"{rank}.json").read_text()) for rank in range(launch.WORLD)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    evaluation = {"prompts": 2, "max_new_tokens": 2, "task_rows": 2}
    return tiny.recipe(tmp_path_factory.mktemp("recipe") / "in", evaluation=evaluation)


@pytest.fixture(scope="module")
def never_cut(recipe, tmp_path_factory):
    """By kind: the folder of a run of two processes, and what they noted."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        launch.done(folder, run, recipe, folder / "out", folder, fsdp=KINDS[kind][0])
        return folder / "out", notes(folder)

    return make


@pytest.fixture(params=KINDS)
def two(request, never_cut):
    return request.param, *never_cut(request.param)


def adapter(out, results, stage):
    return Path(out) / "steps" / results["rows"][1]["steps"][stage] / "adapter"


def test_the_main_process_does_the_steps_and_all_have_the_results(two):
    kind, out, (main, other) = two
    assert len(main["ran"]) == 12
    assert other["ran"] == other["cached"] == []
    assert main["results"] == other["results"] == json.loads((out / "results.json").read_text())
    for row in main["results"]["rows"]:
        assert row["processes"] == 2
    for stage in ("alignment", "user"):
        step = json.loads((adapter(out, main["results"], stage).parent / "step.json").read_text())
        assert step["identity"]["inputs"]["processes"] == 2
        assert step["training"]["processes"] == 2
        assert step["training"]["distributed_type"] == KINDS[kind][1]
        assert step["training"]["rows_per_step"] == 8
        assert step["training"]["steps"] == 4
        assert step["training"]["trainable_parameters"] == 448
        assert not any("checkpoints" in name for name in step["files"])
    card = (adapter(out, main["results"], "user") / "README.md").read_text()
    assert f"processes: 2 ({KINDS[kind][1]})" in card
    assert "4, of 8 rows each" in card


def test_the_number_of_processes_names_only_what_is_trained(recipe, two):
    """In one process, every step keeps its name."""
    _, _, (main, _) = two
    alone = {step.id: step for step in pipeline.plan(Recipe.load(recipe))}
    assert not any("processes" in step.identity for step in alone.values())
    shared = [step["kind"] for step in main["results"]["steps"] if step["id"] in alone]
    assert sorted(shared) == ["data", "data", "data", "manifest"]


def test_ddp_and_fsdp2_train_the_same_adapters(never_cut):
    for stage in ("alignment", "user"):
        one, other = (
            load_file(adapter(out, noted[0]["results"], stage) / "adapter_model.safetensors")
            for out, noted in map(never_cut, KINDS)
        )
        assert one.keys() == other.keys()
        assert max(float((one[k] - other[k]).abs().max()) for k in one) < 1e-6
    (ddp, here), (fsdp2, there) = (never_cut(kind) for kind in KINDS)
    for row, same in zip(here[0]["results"]["rows"], there[0]["results"]["rows"], strict=True):
        assert answers(ddp, row) == answers(fsdp2, same)


def test_the_same_again_does_nothing(two, recipe, tmp_path):
    kind, out, (first, _) = two
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    launch.done(tmp_path, run, recipe, out, tmp_path, fsdp=KINDS[kind][0])
    main, other = notes(tmp_path)
    assert main["ran"] == []
    assert len(main["cached"]) == 12
    assert main["results"] == other["results"] == first["results"]
    changed = {p for p in before if p.stat().st_mtime_ns != before[p]} - {out / "recipe.yaml"}
    assert not changed


def kill_in_training():
    """The second process dies inside a phase, one step after a checkpoint."""
    from holdfast.pipeline.monitor import TrainingMonitor

    on_step_end = TrainingMonitor.on_step_end

    def dying(self, args, state, control, **kwargs):
        if "user-" in args.output_dir and state.global_step == 3 and launch.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        on_step_end(self, args, state, control, **kwargs)

    TrainingMonitor.on_step_end = dying


def kill_in_a_checkpoint():
    """The second process dies before it writes its part of a checkpoint; the main process has written its part."""
    from transformers import Trainer

    save = Trainer._save_rng_state

    def dying(self, folder):
        if "user-" in folder and folder.endswith("checkpoint-4") and launch.rank() == 1:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, folder)

    Trainer._save_rng_state = dying


@pytest.mark.parametrize(
    ("kind", "fsdp", "where"),
    [
        ("ddp", None, kill_in_a_checkpoint),
        ("fsdp2", "SHARDED_STATE_DICT", kill_in_training),
        ("fsdp2", "FULL_STATE_DICT", kill_in_training),
    ],
)
def test_a_killed_process_changes_no_number(kind, fsdp, where, never_cut, recipe, tmp_path):
    whole, (first, _) = never_cut(kind)
    codes = launch.start(tmp_path, run, recipe, tmp_path / "out", tmp_path, where, fsdp=fsdp)
    assert codes == [1, -signal.SIGKILL]
    kept = sorted(p.parent.name for p in (tmp_path / "out").glob("steps/user-*/checkpoints/*/holdfast.json"))
    assert kept == ["checkpoint-2"], "a checkpoint is complete when all processes have written their parts"
    (tmp_path / "error-0.txt").unlink()
    launch.done(tmp_path, run, recipe, tmp_path / "out", tmp_path, fsdp=fsdp)
    main, _ = notes(tmp_path)
    assert main["resumed"] == ["user fine-tuning with Lisa"]
    assert left(tmp_path / "out", main["results"]) == left(whole, first["results"]), "bit for bit"


def fail_in_scores():
    from holdfast.pipeline import evaluating

    def failing(*_):
        raise ValueError("made up")

    evaluating.score_answers = failing


def test_a_failure_of_the_main_process_ends_the_others(recipe, tmp_path):
    began = time.monotonic()
    codes = launch.start(tmp_path, run, recipe, tmp_path / "out", tmp_path, fail_in_scores)
    assert codes == [1, 1]
    assert time.monotonic() - began < 60
    assert "scores of the aligned model failed: ValueError: made up" in (tmp_path / "error-0.txt").read_text()
    assert "Process 0 of 2 failed" in (tmp_path / "error-1.txt").read_text()


def test_an_initialisation_that_several_processes_cannot_undo_is_refused(recipe, tmp_path):
    recipe = {**recipe, "user": {**recipe["user"], "lora": {"init_lora_weights": "pissa"}}}
    assert launch.start(tmp_path, run, recipe, tmp_path / "out", tmp_path) == [1, 1]
    assert "user.lora.init_lora_weights: pissa" in (tmp_path / "error-0.txt").read_text()
    begun = {path.name.split("-")[0] for path in (tmp_path / "out").glob("steps/*-*")}
    assert begun <= {"data", "manifest"}, "nothing but rows was made"


def test_all_weights_on_top_of_an_adapter(recipe, tmp_path):
    """Full fine-tuning: DDP and FSDP2 give the same model, which a plain loader can read."""
    from accelerate.utils import is_torch_version
    from transformers import AutoModelForCausalLM

    recipe = {**recipe, "user": {**recipe["user"], "lora": "none"}}
    weights = {}
    for kind, (fsdp, _) in KINDS.items():
        launch.done(tmp_path / kind, run, recipe, tmp_path / kind / "out", tmp_path / kind, fsdp=fsdp)
        folder = next((tmp_path / kind / "out").glob("steps/user-*/model"))
        weights[kind] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    before = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"]).state_dict()
    assert before.keys() == weights["ddp"].keys() == weights["fsdp2"].keys()
    assert sum(float((weights["ddp"][k] - before[k]).abs().max()) > 1e-3 for k in before) > 10
    # Before torch 2.13, only DDP has the lean loss, which rounds differently.
    close = 1e-4 if is_torch_version("<", "2.13") else 1e-5
    assert max(float((weights["ddp"][k] - weights["fsdp2"][k]).abs().max()) for k in before) < close


def kill_in_the_repair():
    """The main process is ended while it writes the second repaired adapter."""
    from holdfast.defenses import safe_lora

    overwrite = safe_lora.overwrite
    seen = []

    def dying(folder, tensor, values):
        overwrite(folder, tensor, values)
        seen.append(folder)
        if len(set(seen)) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    safe_lora.overwrite = dying


def test_the_repair_is_the_main_processs_alone(never_cut, recipe, tmp_path):
    """Also after a kill during the repair: the same bytes as from one process, and done once."""
    shutil.copytree(never_cut("ddp")[0], tmp_path / "out")
    block = {"defense": "safe_lora", "num_layers": [1, 3], "control": ["none", "drop"]}
    recipe = {**recipe, "post_hoc": block}
    codes = launch.start(tmp_path, run, recipe, tmp_path / "out", tmp_path, kill_in_the_repair)
    assert codes == [-signal.SIGKILL, 1]
    launch.done(tmp_path, run, recipe, tmp_path / "out", tmp_path)
    main, other = notes(tmp_path)
    assert main["ran"].count("repair with Safe LoRA") == 3, "one was done before the kill"
    assert not [title for title in main["ran"] if "fine-tuning" in title or "alignment" in title]
    assert other["ran"] == []
    assert main["results"] == other["results"]
    rows = main["results"]["rows"]
    assert [row["post_hoc"] for row in rows] == [None, None, *["safe_lora"] * 4]
    steps = tmp_path / "out" / "steps"
    for row in rows[2:]:
        guide, tuned, repaired = (
            steps / row["steps"][s] / "adapter" for s in ("alignment", "user", "post_hoc")
        )
        parameters = row["post_hoc_parameters"]
        holdfast.safe_lora(
            tuned, base=recipe["model"]["path"], aligned=guide, out=tmp_path / row["name"],
            num_layers=parameters["num_layers"], control=parameters["control"],
        )  # fmt: skip
        files = [folder / "adapter_model.safetensors" for folder in (tmp_path / row["name"], repaired)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert not list(repaired.parent.glob(".*")), "no partial files"


def test_an_adapter_that_cannot_be_merged_under_zero_3_is_refused(tmp_path, monkeypatch):
    import transformers.integrations

    recipe = tiny.recipe(tmp_path / "in")
    recipe["model"]["adapters"] = "merge"
    monkeypatch.setattr(transformers.integrations, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(RecipeError, match="DeepSpeed ZeRO-3 partitions the weights"):
        pipeline.run(Recipe.load(recipe), out=tmp_path / "out", device="cpu")


def test_what_is_loaded_after_a_training_is_whole():
    """Under ZeRO-3, the main process would wait for the other processes, which load nothing."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config

    from holdfast.pipeline.training import forget_sharding

    class Zero3:
        def is_zero3(self):
            return True

    config = Zero3()  # transformers keeps a weak reference to it
    set_hf_deepspeed_config(config)
    assert is_deepspeed_zero3_enabled()
    forget_sharding()
    assert not is_deepspeed_zero3_enabled()


def silently_unsharded():
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    launched.cache_clear()


def test_sharding_that_would_silently_not_happen_is_refused(recipe, tmp_path):
    assert launch.start(tmp_path, run, recipe, tmp_path / "out", tmp_path, silently_unsharded) == [1, 1]
    assert "accelerate would use MULTI_CPU" in (tmp_path / "error-0.txt").read_text()


def test_a_precision_that_only_the_launcher_knows_is_refused(recipe, tmp_path, monkeypatch):
    """accelerate would train in that precision, but the step would have the name of another result."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(RecipeError, match="launcher asks for mixed precision bf16, the recipe for no"):
        pipeline.run(Recipe.load(recipe), out=tmp_path, device="cpu")


def test_processes_that_would_train_apart_are_refused():
    from accelerate.utils import DistributedType

    from holdfast.pipeline.training import _check_processes

    trainer = SimpleNamespace(
        args=SimpleNamespace(world_size=1), accelerator=SimpleNamespace(distributed_type=DistributedType.NO)
    )
    with pytest.raises(RecipeError, match="2 processes were started, but each would train alone"):
        _check_processes(trainer, Processes(0, 2))
