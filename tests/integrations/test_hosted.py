"""axolotl and ms-swift: the hooks against stand-ins of the hosts, and against axolotl itself if it is installed.

`try_axolotl.py` runs axolotl's own command.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from transformers import Trainer, TrainingArguments

import tiny
import trainers
from holdfast.errors import RecipeError
from holdfast.integrations import axolotl, ms_swift
from holdfast.integrations.axolotl_keys import HoldfastArgs, HoldfastKeys
from holdfast.training.tokenising import collator, tokenise_all
from pairs import TWO, save_adapter, save_pair

LISA = {
    "defense": "bso_lisa",
    "alignment_steps": 1,
    "finetune_steps": 2,
    "rho": 3.0,
    "proximal_warmup_ratio": 0.0,
}


@dataclass
class HostArguments(TrainingArguments):
    """Training arguments with a field of the host's own."""

    sample_packing: bool = False


class HostTrainer(Trainer):
    """A trainer that a host makes with its own arguments."""

    def __init__(self, *, bench_data_collator=None, template=None, **kwargs):
        self.template = template
        super().__init__(**kwargs)


def module(monkeypatch, name, **members):
    """Put a stand-in of a host's module in place."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(members)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    made = {name: tiny.write_jsonl(folder / f"{name}.jsonl", found) for name, found in
            (("safe", tiny.safe_rows(12)), ("harmful", tiny.harmful_rows(12)))}  # fmt: skip
    return {name: str(path) for name, path in made.items()}


def options(out):
    return {
        "output_dir": str(out), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 11, "max_steps": 6,
        "learning_rate": 5e-3, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 6,
        "logging_nan_inf_filter": False,
    }  # fmt: skip


USER = tokenise_all(trainers.USER, trainers.TOKENIZER, 512)


def as_host(cls, out, **given):
    """Make the trainer as a host does, and train."""
    made = cls(model=trainers.model(), args=HostArguments(**options(out)), train_dataset=list(USER),
               data_collator=collator(trainers.TOKENIZER), **given)  # fmt: skip
    made.train()
    return made


def test_axolotl_trains_like_our_own_trainer(monkeypatch, tmp_path, rows):
    module(monkeypatch, "axolotl.core.trainers.base", AxolotlTrainer=HostTrainer)
    cfg = {"sequence_len": 512, "holdfast": {**LISA, "alignment_dataset": rows["safe"]}}
    theirs = as_host(axolotl.trainer_class(cfg), tmp_path / "theirs", processing_class=trainers.TOKENIZER)
    parameters = {name: value for name, value in LISA.items() if name != "defense"}
    alignment = axolotl.rows("alignment_dataset", rows["safe"], cfg, trainers.TOKENIZER, 11)
    ours = trainers.trainer("lisa", tmp_path / "ours", rows=USER, alignment=alignment, **options(tmp_path) | parameters
                            | {"lr_scheduler_type": "linear", "output_dir": str(tmp_path / "ours")})  # fmt: skip
    ours.train()
    assert trainers.distance(trainers.weights(ours), trainers.weights(theirs)) < 1e-5
    states = [entry["state"] for entry in theirs.state.log_history if "state" in entry]
    assert states == ["alignment", "user", "user"] * 2
    assert (theirs.args.rho, theirs.args.max_length, theirs.args.sample_packing) == (3.0, 512, False)
    saved = json.loads((tmp_path / "theirs" / "checkpoint-6" / "method" / "run.json").read_text())
    assert saved["rho"] == 3.0


def test_axolotls_data_sets_are_prepared_by_axolotl(monkeypatch):
    from datasets import Dataset

    seen = []

    def prepare_datasets(cfg, tokenizer):
        seen.append(cfg)
        return Dataset.from_dict({"input_ids": [[1]], "labels": [[1]], "position_ids": [[0]]}), None, 1, []

    class DictDefault(dict):
        __getattr__, __setattr__ = dict.get, dict.__setitem__

    module(monkeypatch, "axolotl.utils.data", prepare_datasets=prepare_datasets)
    module(monkeypatch, "axolotl.utils.dict", DictDefault=DictDefault)
    monkeypatch.setitem(sys.modules, "axolotl.utils.data", SimpleNamespace(prepare_datasets=prepare_datasets))
    cfg = {"datasets": [{"path": "user"}], "val_set_size": 0.1, "max_steps": 5, "sequence_len": 64}
    made = axolotl.rows("alignment_dataset", {"path": "safe", "type": "alpaca"}, cfg, None, 1)
    assert made.column_names == ["input_ids", "labels"]
    assert seen[0]["datasets"] == [{"path": "safe", "type": "alpaca"}]
    assert (seen[0]["val_set_size"], seen[0]["max_steps"], seen[0]["sequence_len"]) == (0, None, 64)
    assert cfg["datasets"] == [{"path": "user"}]


class AxolotlConfig(BaseModel):
    """A stand-in of axolotl's configuration."""

    sample_packing: bool | None = None
    trainer_cls: str | None = None


class Merged(AxolotlConfig, HoldfastArgs):
    """What axolotl makes of its configuration and a plug-in's."""


SAFE: dict[str, Any] = {"alignment_dataset": "safe.jsonl"}
REFUSED = {
    "lisa": ({"holdfast": {**SAFE, "defense": "lisa"}}, "write bso_lisa"),
    "misspelt": ({"holdfast": {**SAFE, "defense": "bso_lisaa"}}, "unknown defense"),
    "parameter": ({"holdfast": {**SAFE, "defense": "ewc", "lamda_": 1}}, "Did you mean 'lambda_'"),
    "without defense": ({"holdfast": {"rho": 1}}, "needs `defense`"),
    "no rows": ({"holdfast": {"defense": "ewc"}}, "needs alignment_dataset"),
    "useless rows": ({"holdfast": {**SAFE, "defense": "vaccine"}}, "does not use alignment_dataset"),
    "row method": ({"holdfast": {"defense": "safe_instr"}}, "no trainer to combine"),
    "packing": ({"holdfast": {**SAFE, "defense": "ewc"}, "sample_packing": True}, "sample_packing: false"),
    "trainer_cls": ({"holdfast": {**SAFE, "defense": "ewc"}, "trainer_cls": "a.B"}, "trainer_cls"),
    "two gates": ({"holdfast": {"safe_lora": {"base": "b", "threshold": 0.3, "num_layers": 2}}}, "threshold or num_layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_configuration_refuses(case):
    settings, text = REFUSED[case]
    with pytest.raises(ValidationError, match=text):
        Merged(**settings)


def test_what_the_configuration_accepts(tmp_path):
    assert Merged(sample_packing=True).holdfast is None
    block = Merged(holdfast={**SAFE, "defense": "ewc", "lambda_": 2.0}).holdfast
    assert isinstance(block, HoldfastKeys)
    assert block.parameters == {"lambda_": 2.0}
    assert Merged(holdfast={"probe": {"prompts": "world"}}, sample_packing=True).holdfast.probe.every == 50
    bad = {"output_dir": str(tmp_path), "holdfast": {**SAFE, "defense": "ewc", "lambda_": -1.0}}
    with pytest.raises(RecipeError, match="ewc: lambda_ must not be negative"):
        axolotl.check(bad)
    assert axolotl.trainer_class({}) is axolotl.trainer_class({"holdfast": {}}) is None
    assert axolotl.probe({}, None) == []


def test_the_probe(rows):
    [made] = axolotl.probe({"holdfast": {"probe": {"prompts": rows["harmful"], "every": 3, "size": 4}}}, None)
    assert (made.every, len(made.prompts)) == (3, 4)
    assert made.prompts[0].startswith("How do I vorrel")


def test_safe_lora_after_the_merge(tmp_path):
    base, aligned = save_pair(tmp_path)
    adapter = save_adapter(tmp_path / "adapter", target_modules=TWO)
    cfg = {"base_model": str(aligned), "holdfast": {"safe_lora": {"base": str(base), "num_layers": 2}}}
    axolotl.repair(cfg, str(adapter), str(tmp_path / "merged"))
    assert json.loads((tmp_path / "adapter-safe_lora" / "safe_lora.json").read_text())["projected"] == 2
    assert (tmp_path / "merged-safe_lora" / "model.safetensors").is_file()
    axolotl.repair({}, "nothing", "nothing")


INSTALLED = find_spec("axolotl") is not None


def test_the_plugin_has_the_hooks(monkeypatch):
    if not INSTALLED:
        module(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    made = axolotl._plugin()
    name, _, cls = made().get_input_args().rpartition(".")
    assert getattr(sys.modules[name], cls) is HoldfastArgs
    assert made().get_trainer_cls({}) is None
    if INSTALLED:
        for hook, function in vars(made).items():
            if not hook.startswith("_"):
                real = inspect.signature(getattr(made.__base__, hook)).parameters
                assert list(inspect.signature(function).parameters) == list(real), hook


def test_ms_swift(monkeypatch, tmp_path, rows):
    class TrainerFactory:
        TRAINER_MAPPING = {"causal_lm": "swift.trainers.Seq2SeqTrainer"}  # noqa: RUF012

    class Template:
        packing = padding_free = False

        def encode(self, row):
            return trainers_row(row["messages"])

    callbacks = {}
    module(monkeypatch, "swift.callbacks", callbacks_map=callbacks)
    module(monkeypatch, "swift.trainers.trainer_factory", TrainerFactory=TrainerFactory)
    sys.modules["swift.trainers"].Seq2SeqTrainer = HostTrainer
    with pytest.raises(RecipeError, match="in ms-swift, LISA"):
        ms_swift.use_defense("lisa", alignment_dataset=rows["safe"])
    with pytest.raises(RecipeError, match="no parameter 'rh'"):
        ms_swift.use_defense("bso_lisa", alignment_dataset=rows["safe"], rh=1)
    ms_swift.use_defense(**{**LISA, "defense": "bso_lisa"}, alignment_dataset=rows["safe"])
    place, _, name = TrainerFactory.TRAINER_MAPPING["causal_lm"].rpartition(".")
    made = as_host(getattr(sys.modules[place], name), tmp_path, template=Template())
    states = [entry["state"] for entry in made.state.log_history if "state" in entry]
    assert states == ["alignment", "user", "user"] * 2
    ms_swift.use_probe(rows["harmful"], every=2)
    assert callbacks["holdfast_probe"](made.args, made).trainer is made
    Template.packing = True
    with pytest.raises(RecipeError, match="packing"):
        as_host(getattr(sys.modules[place], name), tmp_path, template=Template())


def trainers_row(messages):
    """Tokens of a conversation, as a template would encode it."""
    [made] = tokenise_all(
        [{"prompt": messages[0]["content"], "completion": messages[1]["content"]}], trainers.TOKENIZER, 512
    )
    return {**made, "length": len(made["input_ids"])}


def test_arguments_with_the_methods_fields_are_saved(monkeypatch, tmp_path, rows):
    module(monkeypatch, "axolotl.core.trainers.base", AxolotlTrainer=HostTrainer)
    cfg = {"holdfast": {"defense": "sbr", "anchors": 4, "harmful_dataset": rows["harmful"]}}
    made = as_host(axolotl.trainer_class(cfg), tmp_path, processing_class=trainers.TOKENIZER)
    assert "penalty" in made.state.log_history[0]
    saved = torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert (saved.anchors, saved.sample_packing) == (4, False)
