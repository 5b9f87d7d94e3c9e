"""Two processes end with the weights of one, under DDP and under FSDP2, for every trainer there is.

The global batch is the same four rows: two processes x two micro-batches of one row, or one of four.
"""

from __future__ import annotations

import functools
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import launch
import trainers
from holdfast import registry
from holdfast.errors import ModelError
from holdfast.training.resuming import ResumableMixin
from holdfast.training.shards import gather_trainable

TOLERANCE = 1e-6
"""Absolute, on weights that move by 0.015 to 0.02. Measured: at most 6e-8."""

KINDS = {"ddp": (None, "MULTI_CPU"), "fsdp2": ("SHARDED_STATE_DICT", "FSDP")}
STRONG = {
    "alignment_steps": 2, "finetune_steps": 3, "rho": 5.0, "proximal_warmup_ratio": 0.0, "lambda_": 250.0,
    "beta_first": 5.0, "beta_early": 20.0, "beta_later": 2.0,
    "num_layers": 1, "probability_steps": 3, "resample_steps": 3,
    "inner_steps": 2, "inner_subsample": 1, "adversary_learning_rates": "5e-3, 1e-2", "lambda_tr": 2.0,
    "lambda_retain": 0.4, "dpo_beta": 0.3,
}  # fmt: skip
"""By name of a parameter."""
CUT = 4
"""Inside a phase: steps 3 to 5 are the user's."""
DROPOUT = ("sft", "lisa", "tvaccine")
"""Cases that are also trained with dropout: its random numbers are restored by the same code for every case."""
APART = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


def known(name):
    return registry.faces("defenses")[name].parameters


def own_trainer(name):
    """Other methods bring rows, or text, to that of SFT."""
    return getattr(registry.get_defense(name).trainer, "__module__", "").endswith(f".{name}")


OTHERS = {
    "lisa-fisher": ("lisa", {"proximal": "fisher", "fisher_rows": 8}),
    "lisa-delta_w": ("lisa", {"proximal": "delta_w"}),
    "ewc-l2": ("ewc", {"penalty": "l2", "lambda_": 1.5}),
    "guardspace-subspace": ("guardspace", {"initialisation": "subspace"}),
    "booster": ("booster", {"lambda_": 20.0, "alpha": 0.5}),
    "repnoise": ("repnoise", {"alpha": 3.0, "beta": 20.0}),
}
TRAINED = [*registry.list_defenses("user"), *registry.list_defenses("alignment")]
CASES = {name: (name, {}) for name in TRAINED if own_trainer(name)} | {
    case: (name, given)
    for case, (name, given) in OTHERS.items()
    if name in registry.list_defenses() and set(given) <= set(known(name))
}
"""Every method with a trainer of its own, and its other forms."""


class NoLastCheckpoint(TrainerCallback):
    """Trainer would also save after the last step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save and state.global_step < state.max_steps


def make(case, folder, dropout=0.0, **more):
    name, given = CASES[case]
    strong = {k: v for k, v in STRONG.items() if k in known(name)}
    always = {
        "max_steps": 6 if resumed_of(case, "fsdp2") else 4,
        "include_num_input_tokens_seen": "non_padding",
    }
    torch.manual_seed(0)
    net = trainers.model(dropout=dropout)
    made = trainers.trainer(name, folder, net=net, **{**always, **strong, **given, **more})
    made.add_callback(NoLastCheckpoint())
    return made


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
        for run in runs_of(name):
            place, dropout = folder / name / run, 0.2 if run == "dropout" else 0.0
            saves = {"save_strategy": "steps", "save_steps": CUT} if run == resumed_of(name, kind) else {}
            trainer = make(name, place, dropout, **APART, **saves)
            assert trainer.args.world_size == launch.WORLD
            assert trainer.accelerator.distributed_type.value == KINDS[kind][1]
            trainer.train()
            sharded = [p for p in trainer.model.parameters() if hasattr(p, "full_tensor")]
            assert bool(sharded) == (kind == "fsdp2")
            keep(trainer, place)
            if not saves:
                continue
            (place / "resumed").mkdir(exist_ok=True)
            again = make(name, place, dropout, **APART, **saves)
            again.train(resume_from_checkpoint=str(place / f"checkpoint-{CUT}"))
            keep(again, place / "resumed")
    controls(folder, kind)


def runs_of(name):
    return ("plain", "dropout") if name in DROPOUT else ("plain",)


def resumed_of(name, kind):
    """The run of a case that is resumed; None for a method that saves nothing beyond what SFT saves.

    Under DDP each process holds whole tensors, as one process does: there, three methods are enough.
    """
    saves = registry.get_defense(CASES[name][0]).trainer.method_state is not ResumableMixin.method_state
    return "dropout" if name in DROPOUT else "plain" if saves and kind == "fsdp2" else None


def controls(folder, kind):
    """A checkpoint of another kind; half the batch; and gradients that are not averaged."""
    checkpoint = folder / "sft" / "dropout" / f"checkpoint-{CUT}"
    if launch.rank() == 0:
        written = checkpoint / "method" / "run.json"
        written.write_text(written.read_text().replace(KINDS[kind][1], "DEEPSPEED"))
    other = make("sft", folder / "other", dropout=0.2, **APART)
    other.accelerator.wait_for_everyone()
    with pytest.raises(
        ModelError, match=f"distributed_type: DEEPSPEED in the checkpoint, {KINDS[kind][1]} now"
    ):
        other.train(resume_from_checkpoint=str(checkpoint))
    if kind == "fsdp2":
        hostile_metadata(folder)
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


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def hostile_metadata(folder):
    """The pickle of the sharded weights, and that of the optimizer, name a function."""
    checkpoint = folder / "lisa" / "dropout" / f"checkpoint-{CUT}"
    for part in ("optimizer_0", "pytorch_model_fsdp_0"):
        path = checkpoint / part / ".metadata"
        before = path.read_bytes()
        made = make("lisa", folder / "hostile", dropout=0.2, **APART)
        made.accelerator.wait_for_everyone()
        if launch.rank() == 0:
            path.write_bytes(pickle.dumps(Evil(folder / "ran")))
        made.accelerator.wait_for_everyone()
        with pytest.raises(ModelError, match="mkdir"):
            made.train(resume_from_checkpoint=str(checkpoint))
        made.accelerator.wait_for_everyone()
        if launch.rank() == 0:
            path.write_bytes(before)
        assert not (folder / "ran").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By kind: the folder of what two processes wrote, all cases in a row."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        launch.done(folder, work, folder, kind, fsdp=KINDS[kind][0])
        return folder

    return make


@pytest.fixture(params=KINDS)
def folder(request, trained):
    return trained(request.param)


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
def test_two_processes_end_with_the_weights_of_one(name, folder, one):
    start, alone, log = one(name)
    weights = load_file(folder / name / "plain" / "weights-0.safetensors")
    assert distance(weights, load_file(folder / name / "plain" / "weights-1.safetensors")) == 0
    assert distance(start, alone) > 0.01, "the weights move, so that equality says something"
    assert distance(weights, alone) < TOLERANCE
    penalties = [v for e in log for k, v in e.items() if "penalty" in k]
    assert not penalties or max(penalties) > 1e-4, "a penalty that acts"
    together = json.loads((folder / name / "plain" / "log.json").read_text())
    for here, there in zip(log, together, strict=True):
        assert here.keys() == there.keys()
        assert {k: v for k, v in there.items() if not isinstance(v, str)} == pytest.approx(
            {k: v for k, v in here.items() if not isinstance(v, str)}, rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in CASES if resumed_of(name, kind)]
)
def test_a_resumed_run_of_two_equals_one_never_cut(kind, name, trained):
    """Bit for bit, also with dropout; cut inside a phase."""
    folder, run = trained(kind), resumed_of(name, kind)
    places = folder / name / run, folder / name / run / "resumed"
    for rank in range(launch.WORLD):
        whole, resumed = (load_file(place / f"weights-{rank}.safetensors") for place in places)
        assert distance(whole, resumed) == 0
    logs = [json.loads((place / "log.json").read_text()) for place in places]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("name", DROPOUT)
def test_control_dropout_was_on(name, folder):
    plain, dropped = (
        load_file(folder / name / run / "weights-0.safetensors") for run in ("plain", "dropout")
    )
    assert distance(plain, dropped) > TOLERANCE


def test_control_half_a_batch_is_noticed(folder, one):
    assert distance(load_file(folder / "half" / "weights-0.safetensors"), one("sft")[1]) > 100 * TOLERANCE


def test_control_gradients_that_are_not_averaged_are_noticed(trained, one):
    """Under DDP; FSDP2 always reduces."""
    folder = trained("ddp")
    first, second = (load_file(folder / "apart" / f"weights-{rank}.safetensors") for rank in (0, 1))
    assert distance(first, second) > 100 * TOLERANCE
    assert distance(first, one("sft")[1]) > 100 * TOLERANCE


def test_one_process_refuses_the_checkpoint_of_two(folder, tmp_path):
    alone = make("sft", tmp_path, dropout=0.2, **APART)
    with pytest.raises(ModelError, match=r"world_size: 2 in the checkpoint, 1 now"):
        alone.train(resume_from_checkpoint=str(folder / "sft" / "dropout" / f"checkpoint-{CUT}"))
