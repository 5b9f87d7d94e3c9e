"""What would stop a run, found before anything starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from holdfast import registry
from holdfast.errors import RecipeError
from holdfast.measuring import judging, protocol
from holdfast.pipeline import mixing, repairing, user_rows
from holdfast.pipeline.context import Context
from holdfast.pipeline.data import prepared
from holdfast.recipe.stages import StageRecipe


def check(context: Context) -> None:
    """Find what would stop the run, before anything starts: tokenizer, template, methods, judges."""
    from holdfast.data.prompts import resolve_template
    from holdfast.evaluation.turns import check_template
    from holdfast.models.loading import load_tokenizer
    from holdfast.models.quantization import check_quantization

    recipe = context.recipe
    tokenizer = load_tokenizer(context.model, recipe.model.trust_remote_code)
    if resolve_template(tokenizer, recipe.model.template) == "alpaca" and protocol.two_turns(recipe):
        check_template(prepared(recipe, "test").rows, "alpaca")
    check_quantization(context.model, recipe.model.quantization)
    for name in ("alignment", "user"):
        if getattr(recipe, name) is not None:
            _check_stage(context, name)
    repairing.check(context)
    for judge in [*recipe.evaluation.judges, *recipe.evaluation.raters] if context.processes.main else ():
        judging.check_judge(judge)
    user_rows.check(context)
    if recipe.user is not None and "mix" in registry.faces("defenses")[recipe.user.defense].code:
        rows = {"train_dataset": prepared(recipe, "user").rows}
        if recipe.data.alignment is not None:
            rows["alignment_dataset"] = prepared(recipe, "alignment").rows
        with tempfile.TemporaryDirectory() as beside:
            mixing.mix(recipe.user.defense, rows, recipe.user.parameters(), recipe.seed, Path(beside))


def _check_stage(context: Context, name: str) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    from holdfast.models.trained import blueprint, check_trained
    from holdfast.pipeline.training import forget_sharding, make_config
    from holdfast.weights.adapter import MUTATING

    recipe = context.recipe
    stage: StageRecipe = getattr(recipe, name)
    method = registry.get_defense(stage.defense)
    if recipe.trains(name) != "continue":
        lora = recipe.lora(name)
        if lora and context.processes.count > 1 and lora.init_lora_weights in MUTATING:
            raise RecipeError(
                f"{name}.lora.init_lora_weights: {lora.init_lora_weights} changes the base weights, which "
                "only a single process can put right when it saves. Train in one process, or leave it out."
            )
        check_trained(
            context.model,
            lora.identity() if lora else None,
            recipe.model.dtype,
            recipe.model.trust_remote_code,
        )
    config = make_config(
        method,
        stage.parameters(),
        stage.training.given(),
        recipe.seed,
        context.store.root / "unused",
        context.device,
    )
    trains = recipe.trains(name)
    # Single LoRA goes on with the alignment adapter.
    lora = None if trains == "full" else recipe.lora("alignment" if trains == "continue" else name)
    check_model = getattr(method.trainer, "check_model", None)
    if check_model is not None:
        plan = blueprint(context.model, lora.identity() if lora else None, recipe.model.trust_remote_code)
        check_model(config, plan)
    merges = recipe.model.adapters == "merge" or recipe.trains(name) == "full"
    below = name == "user" and recipe.alignment is not None and recipe.trains(name) != "continue"
    if below and merges and is_deepspeed_zero3_enabled():
        raise RecipeError(
            "DeepSpeed ZeRO-3 cuts the weights up, so the alignment adapter cannot be added to them. Write "
            "model.adapters: stack and train a LoRA, or use ZeRO-2 or FSDP2."
        )
    del config  # ZeRO-3 is known as long as it lives
    forget_sharding()
