"""The contract of every defense with a trainer, tested for every defense in the registry.

Methods of other packages are found through their entry points, so that this file tests them without a
change: `pytest tests/defenses/test_contract.py -k NAME`. No method is named here; `strong` of a method's
declaration has parameters with a visible effect within a few steps (phases of 3 and 4 steps, so that
step 5 lies inside one).
"""

from __future__ import annotations

import dataclasses
import random
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

import tiny
import trainers
from holdfast import registry
from holdfast.errors import ModelError
from holdfast.models.loading import load_model
from holdfast.models.lora import add_lora
from holdfast.training.tokenising import IGNORED
from holdfast.training.trainer import MethodConfig

NAMES = [n for n in registry.list_defenses() if registry.get_defense(n).trainer is not None]
SAVES = {"save_strategy": "steps", "save_steps": 5}


def one_for_each_trainer() -> list[str]:
    """Names of defenses with different trainers: methods that only change rows share that of plain fine-tuning."""
    found: dict[type, str] = {}
    plain = [name for name in NAMES if registry.get_defense(name).baseline]
    for name in plain + sorted(NAMES, key=lambda n: len(registry.faces("defenses")[n].parameters)):
        found.setdefault(registry.get_defense(name).trainer, name)
    return sorted(found.values())


TRAINED = one_for_each_trainer()


def make(name, out, **more):
    """A trainer with the method's strong parameters."""
    return trainers.trainer(name, out, **{**registry.get_defense(name).strong, **more})


def steps(name):
    """Steps of a whole training: two phases of BSO and Lisa and a part of the third. A step of TAR is many."""
    return 4 if name == "tar" else 8


def history(made):
    """The log without times."""
    return [
        {k: v for k, v in entry.items() if "second" not in k and "runtime" not in k}
        for entry in made.state.log_history[:-1]
    ]


def cross_entropy(net, batches):
    """The mean over all completion tokens of some batches, by hand."""
    losses = []
    with torch.no_grad():
        for batch in batches:
            logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:]
            logp = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            losses.append(-logp[labels != IGNORED])
    return float(torch.cat(losses).mean())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """By name: a run with dropout, shuffling, a cosine schedule and two micro-batches per step, and its folder."""
    runs = {}

    def of(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            runs[name] = make(name, folder, net=trainers.model(dropout=0.2), **SAVES, **TWO), folder
            runs[name][0].train()
        return runs[name]

    return of


TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """By name: the weights after 8 steps without dropout, in batches of 4 without accumulation."""
    weights = {}

    def of(name):
        if name not in weights:
            made = make(name, tmp_path_factory.mktemp(name), max_steps=steps(name))
            made.train()
            weights[name] = trainers.weights(made)
        return weights[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_the_face_tells_what_the_config_has(name):
    """The parameters read without an import must equal those of the dataclass, including defaults."""
    config = registry.get_defense(name).config
    fields = {f.name for f in dataclasses.fields(MethodConfig)}
    own = {f.name: f.default for f in dataclasses.fields(config) if f.name not in fields}
    face = registry.faces("defenses")[name]
    assert {k: p.default for k, p in face.parameters.items()} == own
    assert all(p.help for p in face.parameters.values())
    assert face.summary
    assert issubclass(registry.get_defense(name).trainer, Trainer)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_are_not_finite_are_refused_by_name(name, tmp_path):
    config = registry.get_defense(name).config
    own = [k for k, p in registry.faces("defenses")[name].parameters.items() if isinstance(p.default, float)]
    for option in [*own, "learning_rate", "max_grad_norm", "adam_beta1"]:
        for value in (float("nan"), float("inf"), -float("inf")):
            with pytest.raises(ValueError, match=f"{option} must be a finite number, found {value}"):
                config(output_dir=str(tmp_path), use_cpu=True, **{option: value})
    with pytest.raises(ValueError, match=r"lr_scheduler_kwargs.*min_lr.*finite"):
        config(output_dir=str(tmp_path), use_cpu=True, lr_scheduler_kwargs={"min_lr": float("nan")})


@pytest.mark.parametrize("name", TRAINED)
def test_it_logs_and_reports_what_it_declares(name, finished):
    """The report draws the declared series and reads the declared facts; `strong` names its parameters."""
    made, _ = finished(name)
    method = registry.get_defense(name)
    assert set(made.reported(made.state.global_step)) == set(method.facts)
    logged = {key for entry in made.state.log_history for key in entry}
    assert set(method.series) <= logged
    assert set(method.strong) <= set(registry.faces("defenses")[name].parameters)


@pytest.mark.parametrize("name", TRAINED)
def test_making_a_trainer_draws_no_random_number(name, tmp_path):
    """Trainer itself only sets the seed. With a further draw, every later draw would depend on the method."""

    def after(which):
        random.seed(1)
        torch.manual_seed(1)
        (make if which == name else trainers.trainer)(which, tmp_path, net=net)
        return random.getstate(), torch.get_rng_state()

    net = trainers.model()
    (python, torchs), (plain_python, plain_torchs) = after(name), after("sft")
    assert python == plain_python
    assert torch.equal(torchs, plain_torchs)


@pytest.mark.parametrize("name", TRAINED)
def test_a_resumed_run_equals_one_never_cut(name, finished):
    """Cut inside a phase (steps 3 to 6 are the user's), with dropout, shuffling and a cosine schedule."""
    whole, folder = finished(name)
    torch.manual_seed(1)
    resumed = make(name, folder, net=trainers.model(dropout=0.2, seed=8), **SAVES, **TWO)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))
    assert history(whole) == history(resumed)


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_that_was_cut_equals_one_never_cut_so_far(name, finished, tmp_path):
    """The checkpoint of a run that ends there equals that of a run that continues."""

    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 5

    whole, _ = finished(name)
    torch.manual_seed(0)
    made = make(name, tmp_path, net=trainers.model(dropout=0.2), **SAVES, **TWO)
    made.add_callback(Cut())
    made.train()
    assert made.state.global_step == 5
    assert history(made) == history(whole)[:5]


@pytest.mark.parametrize("name", TRAINED)
def test_control_a_lost_state_is_noticed(name, finished, monkeypatch):
    """Without the method's saved state the resumed run differs: the state is needed, and the tests above can fail."""
    whole, folder = finished(name)
    if not whole.method_state():
        pytest.skip("saves nothing of its own")
    resumed = make(name, folder, net=trainers.model(dropout=0.2), **SAVES, **TWO)
    monkeypatch.setattr(resumed, "method_loaded", lambda state: None)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    alike = trainers.same(trainers.weights(whole), trainers.weights(resumed))
    assert not (alike and history(whole) == history(resumed))


def alignment_below(folder):
    """A new adapter on a frozen adapter, which Trainer alone would train after a resume."""
    below = get_peft_model(
        tiny.llama(len(trainers.TOKENIZER)),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "o_proj"]),
    )
    torch.manual_seed(8)
    for key, p in below.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.05)
    below.save_pretrained(folder / "alignment")
    net = load_model(tiny.save_model(folder / "model"), [folder / "alignment"])
    torch.manual_seed(4)
    lora = {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    return add_lora(net, lora, "model")


def dora(folder):
    torch.manual_seed(4)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=True, target_modules=["q_proj", "v_proj"])
    return get_peft_model(tiny.llama(len(trainers.TOKENIZER)), config)


def everything(folder):
    return tiny.llama(len(trainers.TOKENIZER))


def refuses(name, net, folder):
    """Whether the method's own check refuses the model; making its trainer then does too."""
    method = registry.get_defense(name)
    try:
        method.trainer.check_model(method.config(output_dir=str(folder), use_cpu=True, **method.strong), net)
    except ModelError:
        with pytest.raises(ModelError):
            make(name, folder, net=net)
        return True
    return False


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("net", [alignment_below, dora, everything], ids=["stacked", "dora", "full"])
def test_it_trains_and_resumes_whatever_is_trained(name, net, tmp_path):
    """Or refuses it before training; an adapter on top of another one is refused by no method."""
    if net is not alignment_below and refuses(name, net(tmp_path), tmp_path):
        return
    whole = make(name, tmp_path, net=net(tmp_path), max_steps=6, **SAVES)
    before = {k: p.clone() for k, p in whole.model.named_parameters()}
    trained = {k for k, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    resumed = make(name, tmp_path, net=net(tmp_path), max_steps=6, **SAVES)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))
    for made in (whole, resumed):
        assert {k for k, p in made.model.named_parameters() if p.requires_grad} == trained
        moved = {k for k, p in made.model.named_parameters() if not torch.equal(p, before[k])}
        assert moved
        assert moved <= trained
    if net is alignment_below:
        assert resumed.model.active_adapters == ["stage0", "default"]


def test_both_adapters_are_read_also_where_trainer_reads_one(tmp_path):
    """Older versions of Trainer read the folders of the other adapters only, not the default one's files."""
    whole = make(
        "sft", tmp_path, net=alignment_below(tmp_path), max_steps=1, save_strategy="steps", save_steps=1
    )
    whole.train()
    resumed = make("sft", tmp_path, net=alignment_below(tmp_path), max_steps=1)
    with resumed.loading_weights(tmp_path / "checkpoint-1", resumed.model):
        pass  # what Trainer reads
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))


@pytest.mark.parametrize("name", TRAINED)
def test_another_runs_checkpoint_is_refused(name, finished, tmp_path):
    """Other settings, other rows, and another value of each of the method's own numeric parameters."""
    trained, folder = finished(name)
    changes = {"seed": 12, "max_steps": 13, "per_device_train_batch_size": 1, "learning_rate": 1e-3}
    for own in registry.faces("defenses")[name].parameters:
        value = getattr(trained.args, own)
        if isinstance(value, int | float) and not isinstance(value, bool):
            changes[own] = value + 1 if isinstance(value, int) else 0.4 if value == 0.5 else value / 2 + 0.25
    for key, value in [*changes.items(), ("train_dataset", None)]:
        rows = trainers.USER[:20] if key == "train_dataset" else None
        other = make(name, tmp_path, rows=rows, **TWO | ({} if rows else {key: value}))
        with pytest.raises(ModelError, match=key):
            other.train(resume_from_checkpoint=str(folder / "checkpoint-5"))


@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_of_nobody_is_refused(name, finished, tmp_path):
    _, folder = finished(name)
    unsigned = tmp_path / "checkpoint-5"
    unsigned.mkdir()
    for path in (folder / "checkpoint-5").iterdir():
        if path.name != "method":
            (unsigned / path.name).symlink_to(path)
    with pytest.raises(ModelError, match=r"run\.json is missing"):
        make(name, tmp_path, **TWO).train(resume_from_checkpoint=str(unsigned))


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("accumulation", [2, 4])
def test_gradient_accumulation_changes_nothing(name, accumulation, plain, tmp_path):
    made = make(
        name, tmp_path, max_steps=steps(name), per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    made.train()
    assert trainers.distance(trainers.weights(made), plain(name)) < 1e-5


@pytest.mark.parametrize("name", TRAINED)
def test_gradient_checkpointing_changes_nothing(name, plain, tmp_path):
    made = make(
        name, tmp_path, max_steps=steps(name), gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    made.train()
    assert trainers.distance(trainers.weights(made), plain(name)) < 1e-6


@pytest.mark.parametrize("name", TRAINED)
def test_a_loaded_model_trains_as_any_other(name, tmp_path):
    """It is loaded in evaluation mode: code before the first step must have dropout and checkpointing too."""

    def trained(mode):
        net = trainers.model(dropout=0.2).train(mode)
        torch.manual_seed(0)
        made = make(name, tmp_path, net=net, max_steps=4, gradient_checkpointing=True)
        for layer in net.base_model.model.model.layers:
            layer.register_forward_pre_hook(
                lambda module, inputs: (
                    checkpointed.append(module.training) if torch.is_grad_enabled() else None
                )
            )
        made.train()
        return trainers.weights(made)

    checkpointed: list[bool] = []
    assert trainers.same(trained(False), trained(True))
    assert len(checkpointed) > 8
    assert all(checkpointed)


class Scaler:
    """fp16's loss scaler without fp16: gradients are 8 times too large from backward until clipping."""

    def __init__(self, made):
        made.accelerator.scaler = self
        self.clip = made.accelerator.clip_grad_norm_
        made.accelerator.clip_grad_norm_ = self.unscale_and_clip

    def scale(self, loss):
        return 8 * loss

    def get_scale(self):
        return 8.0

    def unscale_and_clip(self, parameters, *args, **kwargs):
        parameters = list(parameters)
        for p in parameters:
            if p.grad is not None:
                p.grad.div_(8)
        return self.clip(parameters, *args, **kwargs)

    def step(self, optimizer, closure=None):
        optimizer.step()

    def update(self):
        pass


@pytest.mark.parametrize("name", TRAINED)
def test_a_loss_scaler_changes_nothing(name, plain, tmp_path):
    made = make(name, tmp_path, max_steps=steps(name))
    Scaler(made)
    made.train()
    assert trainers.distance(trainers.weights(made), plain(name)) < 1e-6


@pytest.mark.parametrize("name", TRAINED)
def test_bf16_runs(name, plain, tmp_path):
    made = make(name, tmp_path, max_steps=steps(name), bf16=True)
    made.train()
    assert all(torch.isfinite(w).all() for w in trainers.weights(made))
    assert 0 < trainers.distance(trainers.weights(made), plain(name)) < 0.1


@pytest.mark.parametrize("name", TRAINED)
def test_the_eval_loss_is_plain_cross_entropy(name, finished):
    """At weights far from the final ones, so that a penalty would be visible."""
    made, _ = finished(name)
    kept = trainers.weights(made)
    other = trainers.model(seed=9)
    for key, p in other.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.2)
    own = [p for p in made.model.parameters() if p.requires_grad]
    try:
        with torch.no_grad():
            for p, value in zip(own, trainers.weights(types.SimpleNamespace(model=other)), strict=True):
                p.copy_(value)
        made.args.per_device_eval_batch_size = len(made.train_dataset)
        found = made.evaluate(eval_dataset=made.train_dataset)["eval_loss"]
        rows = [made.train_dataset[i] for i in range(len(made.train_dataset))]
        assert found == pytest.approx(cross_entropy(other.eval(), [made.data_collator(rows)]), abs=1e-5)
    finally:
        with torch.no_grad():
            for p, value in zip(own, kept, strict=True):
                p.copy_(value)


@pytest.mark.parametrize("name", TRAINED)
def test_the_logged_loss_is_true(name, tmp_path):
    """Compare each logged step with cross-entropy by hand, on its batches, at the weights before the step.

    The logged value is `cross_entropy` if a method logs it (its loss is another), else the loss of the step's
    `state` if there are states, else `loss`.
    """
    made = make(name, tmp_path, max_steps=6, **TWO)
    own = [p for p in made.model.parameters() if p.requires_grad]  # a method may freeze some weights in turns
    seen = []

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append([p.detach().clone() for p in own])

    made.add_callback(Keep())
    made.train()
    batches = list(made.get_train_dataloader())
    assert len(batches) == 12
    made.model.eval()
    for step, entry in enumerate(e for e in made.state.log_history if "loss" in e):
        with torch.no_grad():
            for p, value in zip(own, seen[step], strict=True):
                p.copy_(value)
        key = "cross_entropy" if "cross_entropy" in entry else f"{entry.get('state', '')}_loss".lstrip("_")
        by_hand = cross_entropy(made.model, batches[2 * step : 2 * step + 2])
        assert entry[key] == pytest.approx(by_hand, abs=1e-4), f"{key} of step {step + 1}"
