"""The training steps: a method trains on the rows of data steps, on top of the weights of earlier steps."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.errors import RecipeError, problems, refuse
from holdfast.machine.seeds import derive_seed
from holdfast.machine.store import canonical_json
from holdfast.pipeline import mixing, repairing
from holdfast.pipeline.chain import checked_model, checked_tokenizer, loading, made_in, tokenizer_of, weights
from holdfast.pipeline.data import rendered, rows_of
from holdfast.pipeline.step import Inputs, Machine
from holdfast.recipe.stages import NOT_IDENTITY

STAGE = {"harmful_adapter": "user", "refusal_adapter": "user"}
"""The stage in the recipe whose settings train such an adapter."""


def train_stage(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Train a stage; writes `adapter` (or `model` if it trains all weights) and `trainer_state.json`."""
    from holdfast.pipeline.training import TrainingJob, train

    model, method, seed = inputs["model"], inputs["method"], inputs["seed"]
    tokenizer = tokenizer_of(model)
    rows: dict[str, Any] = {name: rows_of(step) for name, step in inputs["rows"].items()}
    facts: dict[str, Any] = {}
    if method.mix is not None:
        with machine.processes.main_first():  # the others read what the method wrote there
            rows, facts = mixing.mix(method, rows, inputs["parameters"], seed, folder)
    base, adapters = weights(model["base"].folder, inputs["chain"])
    job = TrainingJob(
        stage=inputs["stage"],
        defense=method,
        parameters=inputs["parameters"],
        training=inputs["training"],
        trains=inputs["trains"],
        lora=inputs["lora"] if inputs["trains"] == "new" else None,
        model=base,
        model_name=model["base"].name if base == model["base"].folder else str(base),
        model_title=model["base"].title if base == model["base"].folder else base.parent.name,
        tokenizer=tokenizer,
        model_options=loading(model),
        adapters=adapters,
        buffer=made_in(inputs["buffer"]) if "buffer" in inputs else None,
        rows={name: rendered(part, tokenizer, inputs["template"]) for name, part in rows.items()},
        folders=_alignment_folders(inputs),
        seed=seed,
        logs=folder.parent.parent / "tensorboard" / folder.name,
    )
    trained = train(
        folder, job, device=machine.device, progress=machine.progress, processes=machine.processes
    )
    series = {name: list(shown) for name, shown in method.series.items()}
    return {**trained, "training": {**trained["training"], **facts, "series": series}}


def _alignment_folders(inputs: Inputs) -> dict[str, Path]:
    """Return the folders of the model before alignment and of the aligned one, if the method needs them."""
    if "base" not in inputs["method"].needs:
        return {}
    chain, model = inputs["chain"], inputs["model"]["base"].folder
    return {"base": inputs["before_alignment"], "aligned": made_in(chain[-1]) if chain else model}


def check_stage(inputs: Inputs, machine: Machine) -> None:
    """Check everything that could stop a training: model, template, LoRA, the method's values and rows.

    Raises:
        InputError: one of them cannot be used; the message says what to change. `Problems` if several.
    """
    # Without a tokenizer and a model, the other checks would only repeat that.
    checked_tokenizer(inputs["model"], machine)
    checked_model(inputs["model"], machine)
    refuse(
        [
            problem.at(STAGE.get(inputs["stage"], inputs["stage"]))
            for problem in problems(
                partial(check, inputs, machine)
                for check in (_check_weights, _check_method, _check_trainer, _check_rows)
            )
        ]
    )


def _check_weights(inputs: Inputs, machine: Machine) -> None:
    """Check the template, the quantisation, and that the stage can train and save these weights."""
    from holdfast.data.prompts import resolve_template
    from holdfast.models.dtypes import used_dtype
    from holdfast.models.quantization import check_quantization
    from holdfast.models.trained import MUTATING, check_trained

    model, stage, lora = inputs["model"], inputs["stage"], inputs["lora"]
    folder = model["base"].folder
    resolve_template(checked_tokenizer(model, machine), inputs["template"])
    check_quantization(folder, model["quantization"])
    if inputs["trains"] != "continue":
        if lora and machine.processes.count > 1 and lora.get("init_lora_weights") in MUTATING:
            init = lora["init_lora_weights"]
            raise RecipeError(
                f"{stage}.lora.init_lora_weights: {init} changes the base weights, and only a single "
                "process can correct that when it saves. Train in one process, or leave it out."
            )
        used = used_dtype(folder, model["dtype"], machine.device)
        check_trained(folder, lora, used, model["trust_remote_code"], checked_model(model, machine))


def _check_method(inputs: Inputs, machine: Machine) -> None:
    """Run the check of a method that needs the model before alignment."""
    method = inputs["method"]
    if "base" in method.needs and method.check is not None:
        method.check(repairing.planned(inputs), **inputs["parameters"])


def _check_trainer(inputs: Inputs, machine: Machine) -> None:
    """Build the trainer once without weights, and take a step with a tiny model.

    Steps that differ only in their seed, or in rows of the same number, share this check.
    """
    model, method, rows = inputs["model"], inputs["method"], inputs["rows"]
    names = ("stage", "parameters", "training", "lora", "trains")
    settings = {name: inputs[name] for name in names}
    settings |= {name: model[name] for name in ("trust_remote_code", "compose")}
    settings |= {"method": method.name, "below": bool(inputs["chain"])}
    if method.mix is None:
        settings["rows"] = {name: _count(step) for name, step in rows.items()}
    else:  # the rows and the seed decide how many rows the method makes
        settings |= {"rows": {name: str(step) for name, step in rows.items()}, "seed": inputs["seed"]}
    folders = _alignment_folders(inputs)
    key = "trainer", method.trainer, model["base"].folder, *folders.values(), canonical_json(settings)
    machine.once(key, partial(_try_trainer, inputs, machine, folders))


def _try_trainer(inputs: Inputs, machine: Machine, folders: Mapping[str, Path]) -> None:
    """Do the check of `_check_trainer`; `folders` are those of weights, by argument of the trainer."""
    from holdfast.models.trained import blueprint
    from holdfast.pipeline.dry_run import MANY, build_trainer, take_a_step
    from holdfast.pipeline.training import forget_sharding

    model, method, training = inputs["model"], inputs["method"], inputs["training"]
    made = _config(inputs, method, training, "unused", machine)
    check_model = getattr(method.trainer, "check_model", None)
    empty = blueprint(model["base"].folder, inputs["lora"], model["trust_remote_code"])
    if check_model is not None:
        check_model(made, empty)
    _check_sharding(inputs)
    del made  # transformers applies ZeRO-3 as long as the config exists
    forget_sharding()
    mixed = _mixed(inputs)
    given = {"train_dataset": inputs["rows"]["train_dataset"]} if method.mix else inputs["rows"]
    counts = {name: _count(step) for name, step in given.items()}
    if mixed is not None:
        counts["train_dataset"] = len(mixed)
    if machine.processes.count == 1:  # a launcher's sharding would wait for weights
        numbers = {name: MANY if number is None else number for name, number in counts.items()}
        quiet = {k: v for k, v in training.items() if k not in NOT_IDENTITY}
        with tempfile.TemporaryDirectory() as out:

            def config(of: Any) -> Any:
                return _config(inputs, of, quiet, out, machine)

            build_trainer(method, config, empty, checked_tokenizer(model, machine), numbers, folders)
        take_a_step(f"{inputs['stage']}.training", training, machine.device)


def _config(inputs: Inputs, method: Any, training: Mapping[str, Any], folder: str, machine: Machine) -> Any:
    """Return the configuration of the training."""
    from holdfast.pipeline.method_config import make_config

    seed = derive_seed(inputs["seed"], inputs["stage"])
    return make_config(method, inputs["parameters"], training, seed, Path(folder), machine.device)


def _check_rows(inputs: Inputs, machine: Machine) -> None:
    """Render and tokenise every row once, in the main process."""
    from holdfast.data.prompts import resolve_template
    from holdfast.pipeline import rows_checked
    from holdfast.pipeline.user_rows import MAX_LENGTH

    if not machine.processes.main:
        return
    if inputs["method"].mix is not None:  # a wrong parameter is one problem, not two
        _config(inputs, inputs["method"], inputs["training"], "unused", machine)
    model = inputs["model"]
    tokenizer = checked_tokenizer(model, machine)
    longest = inputs["training"].get("max_length") or MAX_LENGTH
    template = resolve_template(tokenizer, inputs["template"])
    known = rows_checked.limits(checked_model(model, machine))
    mixed = _mixed(inputs)
    good: set[int] = machine.once(("good rows", tokenizer, model["base"].folder, template, longest), set)

    def check(name: str, rows: Any, number: int) -> None:
        what = f"{name.removesuffix('_dataset').replace('train', inputs['stage'])} rows"
        cut = rows_checked.check_training_rows(
            rows, number, what, tokenizer=tokenizer, template=template, max_length=longest, model=known,
            progress=machine.progress.advance, known=good,
        )  # fmt: skip
        if cut:
            machine.progress.say(f"{cut:,} of {number:,} {what} are cut to max_length, {longest:,} tokens.")

    checks = []
    if mixed is not None:
        checks.append(partial(check, "train_dataset", mixed, len(mixed)))
    for name, step in inputs["rows"].items() if inputs["method"].mix is None else ():
        number, same = _count(step), (step, model["base"].folder, template, longest)
        if number is not None and same not in machine.known:
            machine.known[same] = None
            rows = rows_checked.read_one_by_one(step / "rows.jsonl")
            checks.append(partial(check, name, rows, number))
    refuse(problems(checks))


def _count(step: Path) -> int | None:
    """Return the number of rows of a step; None if it is not done."""
    from holdfast.pipeline.rows_checked import count_rows

    path = step / "rows.jsonl"
    return count_rows(path) if path.is_file() else None


def _check_sharding(inputs: Inputs) -> None:
    """Raise RecipeError if an adapter must be added to weights that DeepSpeed ZeRO-3 partitions."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    below = inputs["chain"] and inputs["trains"] != "continue"
    merges = inputs["model"]["compose"] == "merge" or inputs["trains"] == "full"
    if below and merges and is_deepspeed_zero3_enabled():
        raise RecipeError(
            "DeepSpeed ZeRO-3 partitions the weights, so the alignment adapter cannot be added to them. "
            "Write model.adapters: stack and train a LoRA, or use ZeRO-2 or FSDP2."
        )


def _mixed(inputs: Inputs) -> Sequence[Mapping[str, Any]] | None:
    """Return the rows that the method makes of its rows; None if it changes none or they do not exist yet.

    Raises:
        DataError: there are too few rows.
    """
    found: Mapping[str, Path] = inputs["rows"]
    if inputs["method"].mix is None or any(_count(step) is None for step in found.values()):
        return None
    rows: dict[str, Any] = {name: rows_of(step) for name, step in found.items()}
    with tempfile.TemporaryDirectory() as beside:
        made, _ = mixing.mix(inputs["method"], rows, inputs["parameters"], inputs["seed"], Path(beside))
    return made["train_dataset"]


def training_detail(training: Mapping[str, Any], trains: str, processes: int = 1) -> str:
    """Return the text that `plan` shows for a training."""
    batch = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
    batch *= processes
    what = {"continue": ", single LoRA", "full": ", all weights"}.get(trains, "")
    what += f", learning rate {training['learning_rate']:g}"
    if "max_steps" in training:
        return f"{training['max_steps']:,} optimizer steps of {batch} rows{what}"
    return f"{training['num_train_epochs']:g} epochs in steps of {batch} rows{what}"
