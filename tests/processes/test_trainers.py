"""Two processes end with the weights of one, under DDP and under FSDP2, for every trainer there is.

The global batch is the same four rows: two processes x two micro-batches of one row, or one of four.
"""

from __future__ import annotations

import json

import launch
import pytest
import torch
import trainers
from safetensors.torch import load_file, save_file

from holdfast import registry
from holdfast.errors import ModelError
from holdfast.weights.shards import gather_trainable

TOLERANCE = 1e-6
"""Absolute, on weights that move by 0.01 to 0.05. Measured: 3e-8."""

KINDS = {"ddp": (None, "MULTI_CPU"), "fsdp2": ("SHARDED_STATE_DICT", "FSDP")}
PHASES = {
    "alignment_steps": 2, "finetune_steps": 3, "rho": 5.0, "proximal_warmup_ratio": 0.0, "lambda_": 500.0,
    "fisher_rows": 8,
}  # fmt: skip
VARIANTS = {"lisa-fisher": {"proximal": "fisher"}, "lisa-delta_w": {"proximal": "delta_w"}}
CUT = 4
"""Inside a phase: steps 3 to 5 are the user's."""
APART = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


NAMES = [
    name
    for name in registry.list_defenses("user")
    if getattr(registry.get_defense(name).trainer, "__module__", "").endswith(f".{name}")
]
"""Methods with a trainer of their own; the others bring rows, or text, to that of SFT."""
CASES = [*NAMES, *VARIANTS]


def options(name, **more):
    known = registry.faces("defenses")[name.partition("-")[0]].parameters
    own = {k: v for k, v in PHASES.items() if k in known}
    return (
        own | VARIANTS.get(name, {}) | {"max_steps": 9, "include_num_input_tokens_seen": "non_padding"} | more
    )


def make(name, folder, dropout=0.0, **more):
    torch.manual_seed(0)
    net = trainers.model(dropout=dropout)
    return trainers.trainer(name.partition("-")[0], folder, net=net, **options(name, **more))


def history(trainer):
    """The log without times, and without the summary at the end."""
    log = trainer.state.log_history[:-1]
    return [{k: v for k, v in e.items() if "second" not in k and "runtime" not in k} for e in log]


def keep(trainer, folder):
    """Every process's view of the whole weights, and the main one's log."""
    weights = gather_trainable(trainer.model, keep=True)
    save_file(weights, folder / f"weights-{launch.rank()}.safetensors")
    if launch.rank() == 0:
        launch.write(folder / "log.json", history(trainer))


def work(folder, kind):
    """All trainings of a kind in one launch."""
    for name in CASES:
        for run, more in {
            "plain": APART,
            "dropout": {**APART, "dropout": 0.2, "save_strategy": "steps", "save_steps": CUT},
        }.items():
            place = folder / name / run
            trainer = make(name, place, **more)
            assert trainer.args.world_size == launch.WORLD
            assert trainer.accelerator.distributed_type.value == KINDS[kind][1]
            trainer.train()
            sharded = [p for p in trainer.model.parameters() if hasattr(p, "full_tensor")]
            assert bool(sharded) == (kind == "fsdp2")
            keep(trainer, place)
        (folder / name / "resumed").mkdir(exist_ok=True)
        again = make(name, place, **more)
        again.train(resume_from_checkpoint=str(place / f"checkpoint-{CUT}"))
        keep(again, folder / name / "resumed")
    controls(folder, kind)


def controls(folder, kind):
    """Half the batch; and gradients that are not averaged."""
    half = make("sft", folder / "half", per_device_train_batch_size=1)
    half.train()
    keep(half, folder / "half")
    if kind == "ddp":
        apart = make("sft", folder / "apart", **APART)
        step = apart.training_step

        def alone(model, *rest):
            with model.no_sync():
                return step(model, *rest)

        apart.training_step = alone
        apart.train()
        keep(apart, folder / "apart")


@pytest.fixture(scope="module", params=KINDS)
def two(request, tmp_path_factory):
    """What two processes wrote, all methods in a row."""
    folder = tmp_path_factory.mktemp(request.param)
    launch.done(folder, work, folder, request.param, fsdp=KINDS[request.param][0])
    return request.param, folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same with one process and four rows at a time."""
    made = {}

    def train(name):
        if name not in made:
            trainer = make(name, tmp_path_factory.mktemp("one"), per_device_train_batch_size=4)
            start = gather_trainable(trainer.model, keep=True)
            trainer.train()
            made[name] = start, gather_trainable(trainer.model, keep=True), history(trainer)
        return made[name]

    return train


def distance(left, right):
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max()) for k in left)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_with_the_weights_of_one(name, two, one):
    _, folder = two
    start, alone, log = one(name)
    weights = load_file(folder / name / "plain" / "weights-0.safetensors")
    assert distance(weights, load_file(folder / name / "plain" / "weights-1.safetensors")) == 0
    assert distance(start, alone) > 0.01, "the weights move, so that equality says something"
    assert distance(weights, alone) < TOLERANCE
    together = json.loads((folder / name / "plain" / "log.json").read_text())
    for here, there in zip(log, together, strict=True):
        assert here.keys() == there.keys()
        assert {k: v for k, v in there.items() if not isinstance(v, str)} == pytest.approx(
            {k: v for k, v in here.items() if not isinstance(v, str)}, rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_of_two_equals_one_never_cut(name, two):
    """Bit for bit, with dropout; cut inside a phase."""
    _, folder = two
    for rank in range(launch.WORLD):
        whole, resumed = (
            load_file(folder / name / run / f"weights-{rank}.safetensors") for run in ("dropout", "resumed")
        )
        assert distance(whole, resumed) == 0
    logs = [json.loads((folder / name / run / "log.json").read_text()) for run in ("dropout", "resumed")]
    assert logs[0] == logs[1]
    plain = load_file(folder / name / "plain" / "weights-0.safetensors")
    assert distance(plain, whole) > TOLERANCE, "dropout was on"


def test_control_half_a_batch_is_noticed(two, one):
    _, folder = two
    assert distance(load_file(folder / "half" / "weights-0.safetensors"), one("sft")[1]) > 100 * TOLERANCE


def test_control_gradients_that_are_not_averaged_are_noticed(two, one):
    kind, folder = two
    if kind != "ddp":
        pytest.skip("FSDP2 always reduces")
    first, second = (load_file(folder / "apart" / f"weights-{rank}.safetensors") for rank in (0, 1))
    assert distance(first, second) > 100 * TOLERANCE
    assert distance(first, one("sft")[1]) > 100 * TOLERANCE


def test_one_process_refuses_the_checkpoint_of_two(two, tmp_path):
    _, folder = two
    alone = make("sft", tmp_path, dropout=0.2, **APART)
    with pytest.raises(ModelError, match=r"world_size: 2 in the checkpoint, 1 now"):
        alone.train(resume_from_checkpoint=str(folder / "sft" / "dropout" / f"checkpoint-{CUT}"))
