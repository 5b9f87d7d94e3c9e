"""Refuse blocks of a recipe that would not do together what they say."""

from __future__ import annotations

from holdfast import registry
from holdfast.recipe.attack_sweep import AttackSweep
from holdfast.recipe.blocks import Blocks
from holdfast.recipe.data import AnchoringRecipe, ScoreFilterRecipe
from holdfast.recipe.model import FULL, Wrong
from holdfast.recipe.stages import PostHocRecipe, StageRecipe
from holdfast.recipe.weight_attack import PostHocAttackRecipe
from holdfast.weights.adapter import MUTATING


def check(recipe: Blocks) -> None:
    """Refuse combinations of blocks that would not do what they say, and data that a method lacks.

    Raises:
        ValueError: the first such combination; `Wrong`, if one key is the reason.
    """
    for name in ("alignment", "user"):
        stage: StageRecipe | None = getattr(recipe, name)
        if stage is None:
            continue
        stage.check(name)
        _need_rows(recipe, name)
    if recipe.alignment is not None:
        _need_alignment_data(recipe, "the alignment stage")
    _check_user_data(recipe)
    _check_adapter(recipe)
    _check_weights(recipe)
    if recipe.post_hoc is not None:
        recipe.post_hoc.check()
    _check_bases(recipe)
    if recipe.post_hoc is not None:
        _check_post_hoc(recipe, recipe.post_hoc)
    if recipe.post_hoc_attack is not None:
        _check_post_hoc_attack(recipe, recipe.post_hoc_attack)
    if recipe.attack_sweep is not None:
        _check_attack_sweep(recipe, recipe.attack_sweep)


def _check_user_data(recipe: Blocks) -> None:
    """An attack or a filter needs a user stage; an attack needs a gradient that can be computed."""
    for name in ("attack", "filter"):
        if getattr(recipe.data, name) is not None and recipe.user is None:
            raise Wrong(["data", name], "this acts on the rows of the user stage, but user is none")
    for attack in recipe.data.attacks:
        by = attack.by if isinstance(attack, AnchoringRecipe) else None
        if by == "gradient" and recipe.model.quantization:
            text = f"{recipe.model.quantization} weights have no gradient; "
            raise Wrong(["data", "attack", "by"], f"{text}write lora_gradient or representation")
        if by == "lora_gradient" and recipe.trains("user") == "full":
            raise Wrong(["data", "attack", "by"], "the user stage trains all weights; write gradient")
    screen = recipe.data.filter
    if isinstance(screen, ScoreFilterRecipe) and screen.by == "gradient" and recipe.model.quantization:
        text = f"{recipe.model.quantization} weights have no gradient; write representation"
        raise Wrong(["data", "filter", "by"], text)
    if recipe.evaluation.attacked and not recipe.data.prompt_attacks():
        text = "no attack of data.attack changes a question of the test; leave this out, or add one"
        raise Wrong(["evaluation", "attacked"], text)
    epochs = recipe.data.attack_training().get("num_train_epochs")
    if recipe.user is not None and epochs is not None and recipe.user.training.max_steps is not None:
        text = f"data.attack sets {epochs:g} epochs, which max_steps would replace; leave it out"
        raise Wrong(["user", "training", "max_steps"], text)


def _check_adapter(recipe: Blocks) -> None:
    """Single LoRA needs the alignment stage's adapter, and takes no LoRA settings of its own."""
    if recipe.alignment is not None and recipe.alignment.adapter is not None:
        raise Wrong(["alignment", "adapter"], "only the user stage has this key; leave it out")
    if recipe.user is None or recipe.user_adapter() == "new":
        return
    who = f"{recipe.user.defense} continues to train the alignment stage's adapter (adapter: continue)"
    if recipe.alignment is None:
        raise Wrong(["user", "adapter"], f"{who}, but alignment is none. Write user.adapter: new")
    if recipe.user.lora is not None:
        raise Wrong(
            ["user", "lora"],
            f"{who}, so this block would be ignored. Write lora: null, or adapter: new",
        )


def _check_weights(recipe: Blocks) -> None:
    """Refuse combinations of LoRA, quantisation and stacking that would not do what their names say."""
    bits = recipe.model.quantization
    for name in ("alignment", "user"):
        if getattr(recipe, name) is None:
            continue
        buffered = "harmful_adapter" in recipe.needs(name)
        if buffered and recipe.trains(name) != "new":
            text = "the adapter below is taken away afterwards, which needs a new LoRA above it"
            raise Wrong([name], f"{getattr(recipe, name).defense}: {text}")
        if recipe.trains(name) == "continue":
            continue
        lora = recipe.lora(name)
        place = ["model", "lora"] if getattr(recipe, name).lora is None else [name, "lora"]
        code = registry.face("defenses", getattr(recipe, name).defense).code
        if lora and lora.use_dora and "apply" in code:
            text = "the method changes updates B A, but DoRA also scales the weights; leave one out"
            raise Wrong([*place, "use_dora"], text)
        if bits and lora is None:
            raise Wrong(place, f"{FULL} trains all weights, but {bits} weights cannot be trained; use LoRA")
        if bits and lora and lora.init_lora_weights in MUTATING:
            text = f"{lora.init_lora_weights} changes the base weights, which {bits} would round again"
            raise Wrong([*place, "init_lora_weights"], text)
        if bits == "int8" and lora and lora.use_dora:
            raise Wrong([*place, "use_dora"], "DoRA does not run on int8 weights; use quantization: nf4")
        aligned = recipe.alignment is not None and recipe.trains("alignment") == "new"
        stacked = name == "user" and (aligned or buffered)
        if lora and lora.use_dora and stacked and recipe.model.adapters == "stack":
            text = "DoRA would scale the base weights without the alignment adapter; "
            choice = "write user.adapter: continue" if bits else "write model.adapters: merge"
            raise Wrong([*place, "use_dora"], text + choice)


def _check_bases(recipe: Blocks) -> None:
    """A method that needs the model before alignment must get it, and nothing else may be given one."""
    if recipe.alignment is not None and recipe.alignment.base is not None:
        raise Wrong(["alignment", "base"], "the alignment starts from model.path; leave this out")
    for name in ("user", "post_hoc"):
        part: StageRecipe | PostHocRecipe | None = getattr(recipe, name)
        if part is None:
            continue
        needs = "base" in recipe.needs(name)
        if needs and recipe.alignment is None and part.base is None:
            text = f"{part.defense} needs the model before alignment, but alignment is none. Add an "
            raise Wrong([name], f"{text}alignment stage, or give the model before alignment: {name}.base")
        if recipe.alignment is not None and part.base is not None:
            text = "the base is model.path, from which the alignment stage starts. Leave it out, or write "
            raise Wrong([name, "base"], f"{text}alignment: none if model.path is already aligned")
        if part.base is not None and not needs and "base" not in recipe.may_use(name):
            text = f"{part.defense} does not use the model before alignment; leave it out"
            raise Wrong([name, "base"], text)


def _check_post_hoc(recipe: Blocks, repair: PostHocRecipe) -> None:
    """The update that the method repairs must be separate from others, and its inputs must be on disk."""
    facts, needs = registry.face("defenses", repair.defense).facts, recipe.needs("post_hoc")
    who = f"{repair.defense} repairs"
    if recipe.user is None:
        raise Wrong(["post_hoc"], f"{who} what the user stage trained, but user is none; leave one out")
    _need_rows(recipe, "post_hoc")
    trains, aligns = recipe.trains("user"), recipe.alignment and recipe.trains("alignment")
    if trains == "continue" and trains not in facts.get("repairs", (trains,)):
        text = f"{who} the user's update, which adapter: continue ({recipe.user.defense}) does not keep "
        raise Wrong(["post_hoc"], f"{text}separate from the alignment. Write user.adapter: new")
    if trains not in facts.get("repairs", (trains,)):
        text = "all weights" if trains == "full" else "a separate adapter"
        raise Wrong(["post_hoc"], f"{repair.defense} does not repair {text}, which the user stage trains")
    if trains == "full" and aligns == "new" and "aligned" in needs:
        text = f"{who} all weights with those of the aligned model, which alignment with LoRA does not "
        raise Wrong(["post_hoc"], f"{text}save. Train both stages with LoRA, or both with lora: none")
    merges = "apply" in registry.face("defenses", repair.defense).code
    for stage, how in (("alignment", aligns), ("user", trains)) if merges else ():
        lora = recipe.lora(stage) if how == "new" else None
        if lora and lora.use_dora:
            text = f"{who} updates B A, but DoRA in the {stage} stage also scales the weights; leave one out"
            raise Wrong(["post_hoc"], text)


def _check_post_hoc_attack(recipe: Blocks, attack: PostHocAttackRecipe) -> None:
    """An attack on weights needs harmful prompts, and adapters that can be added to the weights."""
    if attack.harmful is None and recipe.data.harmful is None:
        text = "give a file of harmful rows here, or as data.harmful"
        raise Wrong(["post_hoc_attack", "harmful"], text)
    for stage in ("alignment", "user"):
        lora = recipe.lora(stage) if getattr(recipe, stage) is not None else None
        if lora and lora.use_dora and recipe.trains(stage) != "full":
            text = f"{attack.name} needs the weights, to which DoRA in the {stage} stage cannot be added"
            raise Wrong(["post_hoc_attack"], f"{text}; leave one out")


def _check_attack_sweep(recipe: Blocks, sweep: AttackSweep) -> None:
    """The points must change a training that runs, and nothing that an attack on rows also sets."""
    if recipe.user is None:
        raise Wrong(["attack_sweep"], "this sweeps the training of the user stage, but user is none")
    if "rank" in sweep.keys and recipe.trains("user") != "new":
        text = "the user stage trains no adapter of its own, so it has no rank"
        raise Wrong(["attack_sweep", "rank"], f"{text}; leave it out, or write user.adapter: new")
    length = "steps" if "steps" in sweep.keys else "epochs"
    if length in sweep.keys and "num_train_epochs" in recipe.data.attack_training():
        raise Wrong(["attack_sweep", length], "data.attack sets the epochs; leave one of the two out")


def _need_alignment_data(recipe: Blocks, who: str) -> None:
    if recipe.data.alignment is None:
        raise ValueError(f"{who} needs data.alignment: a file of prompts with safe answers")


def _need_rows(recipe: Blocks, stage: str) -> None:
    """The rows that a stage's defense needs must be there."""
    if "alignment" in recipe.reads(stage):
        _need_alignment_data(recipe, f"{stage}.defense {getattr(recipe, stage).defense}")
    if "harmful" in recipe.reads(stage) and recipe.data.alignment_harmful()[0] is None:
        defense = getattr(recipe, stage).defense
        text = f"{stage}.defense {defense} needs harmful rows: give a file of them here, or as "
        raise Wrong(["data", "alignment", "harmful"], f"{text}data.harmful")
