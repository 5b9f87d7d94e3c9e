"""Ready trainers on TRL, made from the registry, and TRL's own script with them."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from datasets import Dataset

import tiny
import trainers
from holdfast import registry
from holdfast.cli.app import app
from holdfast.errors import DataError, RecipeError
from holdfast.integrations import trl as ready
from holdfast.integrations.composing import method, methods

trl = pytest.importorskip("trl")


def test_every_method_with_a_trainer_has_classes():
    found = methods()
    own = {
        name
        for name in registry.list_defenses()
        if (d := registry.get_defense(name)).trainer and not (d.baseline or d.mix or d.prefix)
    } - {"buffer"}  # plain training above another adapter
    assert own == found.keys()
    assert found["lisa"].needs == ("alignment_dataset",)
    assert found["sbr"].needs == ("harmful_dataset",)
    for name, one in found.items():
        config, trainer = (getattr(ready, text) for text in ready.names(one))
        assert issubclass(trainer, trl.SFTTrainer)
        assert issubclass(trainer, one.mixins)
        assert issubclass(config, trl.SFTConfig)
        assert issubclass(config, registry.get_defense(name).config)
        assert {config.__name__, trainer.__name__} <= set(dir(ready))
    from holdfast.integrations.trl import LisaSFTTrainer

    assert LisaSFTTrainer is ready.LisaSFTTrainer
    with pytest.raises(AttributeError, match="LisaSFTTrainer"):
        ready.LiaSFTTrainer  # noqa: B018


@pytest.mark.parametrize(
    ("name", "options"),
    [("guardspace", {}), ("sbr", {}), ("spag", {}), ("tar", {"inner_steps": 1, "inner_subsample": 1})],
)
def test_methods_that_no_other_test_trains_on_trl(name, options, tmp_path):
    """With TRL's own defaults: bfloat16, checkpointing."""
    found = methods()[name]
    config, trainer = ready.classes(found)
    args = config(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=2, learning_rate=1e-2,
                  per_device_train_batch_size=4, logging_steps=1, **options)  # fmt: skip
    rows = {"alignment_dataset": trainers.ALIGNMENT, "harmful_dataset": trainers.HARMFUL}
    made = trainer(model=trainers.model(), args=args, processing_class=trainers.TOKENIZER,
                   train_dataset=Dataset.from_list(trainers.USER), **{need: rows[need] for need in found.needs})  # fmt: skip
    assert args.gradient_checkpointing
    start = trainers.weights(made)
    made.train()
    assert trainers.distance(start, trainers.weights(made)) > 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    tiny.save_model(folder / "model")
    tiny.write_jsonl(folder / "user.jsonl", trainers.USER)
    tiny.write_jsonl(folder / "safe.jsonl", trainers.ALIGNMENT)
    (folder / "data").mkdir()
    tiny.write_jsonl(folder / "data" / "train.jsonl", trainers.USER)
    return folder


def test_trls_script(files, tmp_path):
    """Options of TRL and of the method, from the command line and from a YAML file; rho wins on the line."""
    settings = {"defense": "lisa", "alignment_dataset": str(files / "safe.jsonl"), "rho": 7.0, "max_steps": 4,
                "use_cpu": True, "report_to": "none", "logging_steps": 1}  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    line = ["trl", "--config", str(tmp_path / "c.yaml"), "--rho", "2", "--alignment_steps", "1", "--finetune_steps", "2",
            "--model_name_or_path", str(files / "model"), "--dataset_name", str(files / "data"), "--use_peft",
            "--lora_target_modules", "q_proj", "v_proj", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    app(line, standalone_mode=False)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [entry["state"] for entry in log if "state" in entry] == ["alignment", "user", "user", "alignment"]
    assert "drift" in log[-2]
    run = json.loads((checkpoint / "method" / "run.json").read_text())
    assert run["rho"] == 2
    assert trl.SFTTrainer.__name__ == "SFTTrainer", "the replaced names are back"
    saved = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert (saved.defense, saved.rho) == ("lisa", 2)


REFUSED = {
    "no method": ([], RecipeError, "Give --defense"),
    "misspelt": (["--defense", "lsia"], RecipeError, "Did you mean 'lisa'"),
    "of rows": (["--defense", "vlguard"], RecipeError, "changes the rows"),
    "of weights": (["--defense", "safe_lora"], RecipeError, "holdfast safe-lora"),
    "plain": (["--defense", "sft"], RecipeError, "plain training"),
    "models needed": (["--defense", "asft"], RecipeError, "asft needs base and aligned"),
    "rows missing": (["--defense", "lisa"], RecipeError, "needs --alignment_dataset"),
    "rows too many": (["--defense", "vaccine", "--harmful_dataset", "x.jsonl"], RecipeError, "does not use"),
    "no such rows": (
        ["--defense", "lisa", "--alignment_dataset", "nothing.jsonl"],
        DataError,
        "nothing.jsonl",
    ),
    "no such value": (["--defense", "vaccine", "--rho", "-1"], RecipeError, "holdfast trl: rho"),
    "no user rows": (["--defense", "vaccine"], RecipeError, "--dataset_name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_command_refuses(case, tmp_path):
    options, kind, text = REFUSED[case]
    with pytest.raises(kind, match=text):
        ready.run_script([*options, "--output_dir", str(tmp_path), "--use_cpu"])


def test_a_trainer_with_code_of_its_own_is_not_combined(monkeypatch):
    """Its methods would be lost."""
    lisa = registry.get_defense("lisa")
    own = type("LisaTrainer", lisa.trainer.__bases__, {"log": lambda self, logs: None})
    monkeypatch.setattr(lisa.__class__, "trainer", own, raising=False)
    monkeypatch.setitem(lisa.__dict__, "trainer", own)
    with pytest.raises(RecipeError, match="no trainer to combine"):
        method("lisa")
