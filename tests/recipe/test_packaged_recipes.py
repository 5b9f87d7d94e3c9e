"""Every packaged recipe is planned, and some of each kind are run tiny, but for sizes and sources as they stand."""

from __future__ import annotations

import shutil
from importlib.metadata import EntryPoint

import pytest

import tiny
from holdfast import pipeline, registry
from holdfast.errors import RecipeError
from holdfast.recipe import Recipe, packaged
from holdfast.recipe.stages import ALIGNMENT_TRAINING, USER_TRAINING
from runs import run

TASK_ROWS = {
    "sst2": [{"sentence": f"film number {i}", "label": i % 2} for i in range(40)],
    "agnews": [{"text": f"news number {i}", "label": i % 4} for i in range(40)],
    "gsm8k": [
        {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(40)
    ],
}
ALPACA = [{"instruction": f"Name {i} leaves.", "input": "", "output": f"Oak {i}."} for i in range(40)]
TINY = [
    "data.size=20", "evaluation.prompts=4", "evaluation.task_rows=4", "evaluation.max_new_tokens=4",
    "evaluation.task_new_tokens=4",
    "alignment.training.max_steps=2", "user.training.max_steps=2",
]  # fmt: skip
RUN = (
    "sft-refusal-agnews",
    "world",
    "lisa-sst2",
    "na-sft-gsm8k",
    "ewc-sst2",
    "bea-sst2",
    "vaccine-safe-gsm8k",
    "tvaccine-sst2",
    "tar-sst2",
    "booster-gsm8k",
    "anchoring-lisa-alpaca",
    "lisa-guide-sst2",
)
OWN = {"tvaccine": ["alignment.num_layers=1"], "tar": ["alignment.inner_steps=4"]}
"""What a model of two layers, and seconds, need beside that."""
PHASES = ["user.alignment_steps=1", "user.finetune_steps=1"]
ATTACK = ["data.attack.size=6", "data.attack.anchors=2", "model.dtype=float32"]


def protocol(*bases):
    """The recipes of the protocols, and of those that extend them."""
    return [
        name
        for name, made in packaged.recipes().items()
        if packaged.protocols()[made.protocol].block and set(bases) & set(packaged.chain(made.protocol))
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files in the published formats instead of the Hub's data and models, as overrides by task."""
    folder = tmp_path_factory.mktemp("sources")
    rows = [{**row, "refusal": f"No, not {i}."} for i, row in enumerate(tiny.harmful_rows(40))]
    safe = [{**row, "category": {}, "is_safe": True, "refusal": None} for row in tiny.safe_rows(40)]
    labelled = tiny.write_jsonl(folder / "beavertails.jsonl", rows + safe)
    test = tiny.write_jsonl(folder / "test.jsonl", rows[:8] + safe[:8])
    shared = [
        f"model.path={tiny.save_model(folder / 'model')}",
        f"data.harmful={labelled}",
        f"data.test_harmful={test}",
        f"data.alignment.source={labelled}",
        "data.alignment.size=20",
        "data.alignment.skip=0",
        f"data.alignment.harmful={{source: {labelled}, size: 12, skip: 0}}",
        f"evaluation.judges=[{{name: beaver_dam, path: {tiny.save_judge(folder / 'judge')}}}, keyword]",
    ]
    own = {
        t: f"data.user={tiny.write_jsonl(folder / f'{t}.jsonl', r)}"
        for t, r in (TASK_ROWS | {"alpaca": ALPACA}).items()
    }
    return {"world": []} | {task: [*shared, user] for task, user in own.items()}


def load_tiny(name, files):
    recipe = Recipe.load(name)
    changes = [c for c in TINY if recipe.alignment or not c.startswith("alignment.")]
    own = OWN.get(recipe.alignment.defense, []) if recipe.alignment else []
    own = own + (ATTACK if recipe.data.attack else [])
    own = own + (PHASES if recipe.user.defense in ("bso", "lisa") else [])
    return Recipe.load(name, [*changes, *own, *files[recipe.data.task]])


@pytest.mark.parametrize("name", [*protocol("lisa-code", "t-vaccine", "booster"), "world"])
def test_planned(name, files):
    recipe = load_tiny(name, files)
    assert recipe.name == name
    steps = [step.kind for step in pipeline.plan(recipe)]
    assert steps.count("alignment") == (0 if name.startswith("na-sft") else 1)
    stages = ("alignment", "user", "post_hoc")
    assert steps.count("data") == 3 + any("harmful" in recipe.reads(stage) for stage in stages)
    states = 2 + len(recipe.post_hoc.combinations() if recipe.post_hoc else ())
    assert (steps.count("user"), steps.count("generate"), steps.count("moderate")) == (1, states, 2 * states)


@pytest.mark.parametrize("name", RUN)
def test_run(name, files, tmp_path):
    recipe = load_tiny(name, files)
    results, _ = run(recipe, tmp_path / "out")
    row = results["rows"][-1]
    ratio = 0 if recipe.data.attack else 0.1
    assert (row["name"], row["user"], row["poison_ratio"]) == (name, recipe.user.defense, ratio)
    assert row["n_task"] == (0 if recipe.data.task == "alpaca" else 4)
    assert set(row["judges"]) == {"beaver_dam", "keyword"}


def test_safe_lora_repairs_what_sft_trained(files, tmp_path):
    """Every threshold with its control, on the steps that the recipe it extends made."""
    sft, recipe = load_tiny("sft-agnews", files), load_tiny("safe-lora-agnews", files)
    shared = {step.id for step in pipeline.plan(sft)}
    new = [step for step in pipeline.plan(recipe) if step.id not in shared]
    assert {step.kind for step in new} == {"post_hoc", "generate", "moderate", "score"}
    rows = run(recipe, tmp_path / "out")[0]["rows"]
    assert [row["name"] for row in rows[1:]] == [
        "safe-lora-agnews",
        *(f"safe-lora-agnews, threshold={t}, control={c}" for t in (0.35, 0.6) for c in ("none", "drop")),
    ]
    assert all(row["repair"]["modules"] == 4 for row in rows[2:])


def test_one_of_each_method_for_each_task():
    found = {task: [made.name for made in recipes] for task, recipes in packaged.by_task().items()}
    assert found.pop("world") == ["world"]
    anchored = [f"anchoring-{name}-alpaca" for name in ("lisa", "sft", "vaccine")]
    repaired = [f"safe-lora{model}" for model in ("", "-code", "-gemma", "-llama-3")]
    assert found.pop("alpaca") == sorted(anchored + [f"{name}-alpaca" for name in repaired])
    chats = [f"{name}-dialog-summary" for name in repaired]
    assert found.pop("dialog_summary") == sorted(["medical-assistant", *chats])
    assert found.pop("purebad") == sorted(f"{name}-purebad" for name in repaired)
    assert set(found) == {"sst2", "agnews", "gsm8k"}
    methods = {task: {name.removesuffix(f"-{task}") for name in names} for task, names in found.items()}
    methods["sst2"] -= {"filter-sft", "filter-lisa"}  # Lisa's Table 12 is on SST-2
    methods["sst2"] -= {"smollm2"}  # a plain recipe, as `world` is
    methods["gsm8k"] -= {"sft-llama-3", "buffer-llama-3", "reinforce-llama-3"}  # their paper is on GSM8K
    assert methods["sst2"] == methods["agnews"] == methods["gsm8k"]
    known = {name for stage in ("alignment", "user", "post_hoc") for name in registry.list_defenses(stage)}
    others = {"na-sft", "na-sft-refusal", "sft-refusal", "vaccine-safe"}
    others |= {"lisa-paper", "bso-paper", "sft-paper", "lisa-guide", "sft-guide", "na-sft-guide"}
    others |= {"tvaccine-guide", "sft-refusal-guide", "na-sft-refusal-guide"}
    others |= {"booster-own", "sft-booster", "lisa-booster", "sft-chat", "asft-chat", "guardspace-chat"}
    others |= {"sft-llama-3.1", "sbr-llama-3.1"}
    assert methods["sst2"] - others == {name.replace("_", "-") for name in known}


def test_no_two_recipes_have_one_name():
    made = [
        recipe.name
        for name, protocol in packaged.protocols().items()
        for recipe in packaged._recipes_of(name, protocol)
    ]
    assert len(made) == len(set(made)) == len(packaged.recipes())


@pytest.mark.parametrize("name", packaged.recipes())
def test_each_says_what_it_is(name):
    about = packaged.recipes()[name].about
    assert about.endswith(".")
    assert name in ("world", "smollm2", "medical-assistant") or "protocol" in about


def test_every_protocol_that_a_method_names_is_there():
    for name, face in registry.faces("defenses").items():
        assert set(packaged.settings(face)) <= set(packaged.protocols()), name


TOY = '''"""Toy: a method of another package that has a place in two protocols."""
from dataclasses import dataclass
from holdfast.defenses import Defense
from holdfast.training.trainer import MethodConfig, RowTrainer

@dataclass
class ToyConfig(MethodConfig):
    strength: float = 0.5

DEFENSE = Defense(
    name="toy_method", label="Toy", stages=("alignment",), paper="none", config=ToyConfig, trainer=RowTrainer,
    protocols={"refusal": {"alignment": {"strength": 2.0}}, "anchoring": {"alignment": {}}},
)
'''


def test_a_new_method_has_recipes_by_its_declaration_alone(tmp_path, monkeypatch, install):
    (tmp_path / "toy_protocols.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(packaged.recipes())
    install(EntryPoint("toy_method", "toy_protocols:DEFENSE", "holdfast.defenses"))
    names = {"anchoring-toy-method-alpaca", *(f"toy-method-{task}" for task in TASK_ROWS)}
    assert set(packaged.recipes()) - before == names
    recipe = Recipe.load("toy-method-gsm8k", ["alignment.strength=3"])
    assert (recipe.name, recipe.alignment.defense) == ("toy-method-gsm8k", "toy_method")
    assert recipe.alignment.parameters() == {"strength": 3}
    assert (recipe.data.task, recipe.data.size, recipe.lora("user").alpha) == ("gsm8k", 1000, 0.5)
    own = Recipe.load({"extends": "toy-method-sst2", "name": "mine", "data": {"size": 7}})
    assert (own.alignment.parameters(), own.data.size, own.data.task) == ({"strength": 2.0}, 7, "sst2")


def test_an_error_names_the_recipe_or_the_protocols_file_and_line(monkeypatch, tmp_path):
    with pytest.raises(RecipeError, match=r"^lisa-sst2, override: data\.poison_ratio"):
        Recipe.load("lisa-sst2", ["data.poison_ratio=7"])
    with pytest.raises(RecipeError, match="Did you mean 'lisa-sst2'"):
        Recipe.load("lisa-sst3")
    wrong = shutil.copytree(packaged.FOLDER, tmp_path / "recipes") / "lisa-code.yaml"
    lines = wrong.read_text().splitlines()
    line = next(i for i, line in enumerate(lines, 1) if line.startswith("  poison_ratio"))
    lines[line - 1] = "  poison_ratio: 7"
    wrong.write_text("\n".join(lines))
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "recipes")
    monkeypatch.setattr(packaged, "protocols", packaged.protocols.__wrapped__)
    with pytest.raises(RecipeError, match=rf"lisa-code\.yaml, line {line}: data\.poison_ratio"):
        Recipe.load("lisa-sst2")


def test_a_recipe_in_full():
    """What the generator makes, against a recipe that is written out."""
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    training = {
        "per_device_train_batch_size": 10, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
        "num_train_epochs": 20, "max_length": 200, "bf16": True,
    }  # fmt: skip
    refusals = {"source": "beavertails_refusals", "size": 5000}
    written = {
        "name": "booster-gsm8k",
        "seed": 42,
        "model": {
            "path": "meta-llama/Llama-2-7b-hf", "template": "alpaca_newline", "dtype": "float16",
            "adapters": "merge", "lora": {"r": 8, "alpha": 4, "dropout": 0.1, "target_modules": seven},
        },
        "data": {
            "task": "gsm8k", "harmful": "beavertails", "size": 1000, "poison_ratio": 0.1, "take": "first",
            "suffix": "\nFirst think step by step and then answer the final number.\n",
            "alignment": {
                "source": "beavertails_refusals", "kind": "refusal", "size": 2000, "harmful": refusals
            },
        },
        "alignment": {
            "defense": "booster", "lambda_": 5.0, "alpha": 0.1, "training": {"learning_rate": 1e-3, **training},
        },
        "user": {
            "defense": "sft", "lora": {"r": 8, "alpha": 0.5, "dropout": 0.1, "target_modules": seven},
            "training": {"learning_rate": 1e-5, **training},
        },
        "evaluation": {
            "judges": [{"name": "beaver_dam", "threshold": 0.5, "max_length": 256, "dtype": "float32"}, "keyword"],
            "prompts": 500, "task_rows": 500, "max_new_tokens": 128, "task_new_tokens": 200, "take": "first",
        },
    }  # fmt: skip
    assert Recipe.load("booster-gsm8k").to_dict() == {
        **Recipe.load(written).to_dict(),
        "protocol": "t-vaccine",
    }


@pytest.mark.parametrize("name", protocol("lisa-code"))
def test_the_papers_settings(name):
    """Lisa's protocol (paper's text, section 5.1, and code): the numbers that a reproduction needs."""
    recipe = Recipe.load(name)
    assert recipe.model.path == "meta-llama/Llama-2-7b-hf"
    assert recipe.model.adapters == "merge"
    rows = (None, 0) if recipe.data.attack else (5000, 0.1)
    assert (recipe.data.size, recipe.data.poison_ratio, recipe.data.alignment.size) == (*rows, 10000)
    assert (recipe.evaluation.prompts, recipe.evaluation.max_new_tokens) == (1000, 512)
    guide, rank = "guide" in name, 8 if "guide" in name or "-paper-" in name else 16
    assert recipe.evaluation.mixed_prompts is not guide
    assert {recipe.data.take, recipe.evaluation.take} == {"drawn" if guide else "first"}
    assert (recipe.evaluation.task_rows, recipe.evaluation.task_new_tokens) == (
        (1, 200) if recipe.data.attack else (1000, 200)
    )
    assert recipe.user.training.num_train_epochs == (50 if recipe.data.task == "gsm8k" else 20)
    assert recipe.user.training.model_extra == {"bf16": True, "lr_scheduler_type": "constant"}
    assert recipe.model.dtype == ("bfloat16" if recipe.data.attack else "float16")
    if recipe.alignment is not None:
        other = next((method for method in ("vaccine", "lox") if method in name), "sft")
        assert recipe.alignment.defense == other
        assert recipe.lora("alignment").r == rank
        assert len(recipe.lora("alignment").target_modules) == 7
    if recipe.trains("user") == "new":
        assert (recipe.lora("user").r, recipe.lora("user").alpha) == (8, 4)
        assert recipe.lora("user").target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("name", protocol("t-vaccine"))
def test_the_settings_of_the_comparison_by_t_vaccine(name):
    """Paper's text and code (papers.md 2.2); Vaccine also at its own, RepNoise in the batch it fits in."""
    recipe = Recipe.load(name)
    own, method, gsm8k = "-safe-" in name, name.split("-")[0], recipe.data.task == "gsm8k"
    guide = "-guide-" in name
    assert recipe.model.template == ("alpaca" if own else "alpaca_newline")
    assert recipe.data.grader == (None if gsm8k else "contains")
    assert recipe.data.suffix.startswith("\nFirst think step by step") is gsm8k
    assert {recipe.data.take, recipe.evaluation.take} == {"drawn" if guide else "first"}
    assert (recipe.model.path, recipe.model.adapters) == ("meta-llama/Llama-2-7b-hf", "merge")
    assert (recipe.data.size, recipe.data.poison_ratio, recipe.data.alignment.size) == (1000, 0.1, 2000)
    assert recipe.data.alignment.kind == ("safe" if own else "refusal")
    sizes = {"tar": 2000, "repnoise": 2000, "booster": 5000}
    if "harmful_dataset" in recipe.needs("alignment"):
        assert recipe.data.alignment_harmful() == (recipe.data.alignment.source, sizes.get(method, 200))
    for stage, alpha in (("alignment", 4), ("user", 4 if guide else 0.5 if gsm8k else 1)):
        if getattr(recipe, stage) is None:
            continue
        lora = recipe.lora(stage)
        assert (lora.r, lora.alpha, lora.dropout, len(lora.target_modules)) == (8, alpha, 0.1, 7)
    epochs = {"alignment": 50 if own else 20, "user": 50 if own and gsm8k else 20}
    defaults = {"alignment": (ALIGNMENT_TRAINING, 1e-3), "user": (USER_TRAINING, 1e-5)}
    for stage, (default, rate) in defaults.items():
        if getattr(recipe, stage) is None:
            continue
        training = default | getattr(recipe, stage).training.given()
        batch, length = (5, 2048) if own else (10, 200)
        if (stage, method) == ("alignment", "repnoise"):
            batch, length = 8, 100
        assert (training["learning_rate"], training["num_train_epochs"]) == (rate, epochs[stage])
        assert (training["per_device_train_batch_size"], training["max_length"]) == (batch, length)
        assert (training["weight_decay"], training["warmup_steps"], training["bf16"]) == (0.1, 0.1, True)
        assert training["lr_scheduler_type"] == "cosine"
    if recipe.alignment is not None:
        assert recipe.alignment.training.max_steps == (750 if method == "tar" else None)
    assert (recipe.evaluation.prompts, recipe.evaluation.max_new_tokens) == (500, 128)
    assert (recipe.evaluation.task_rows, recipe.evaluation.task_new_tokens) == (500, 200)
    assert not recipe.evaluation.mixed_prompts


@pytest.mark.parametrize("task", TASK_ROWS)
def test_the_settings_of_asft(task):
    """Those of its code: papers.md has the results."""
    recipe, plain = Recipe.load(f"asft-chat-{task}"), Recipe.load(f"sft-chat-{task}")
    assert recipe.user.parameters() == {"lambda_": 1.0, "scaling": "code"}
    assert (recipe.alignment, recipe.user.base) == (None, "meta-llama/Llama-2-7b-hf")
    assert recipe.user.training == plain.user.training
    training = recipe.user.training
    assert (training.learning_rate, training.num_train_epochs) == (5e-5, 10)
    assert training.per_device_train_batch_size == 8
    lora = recipe.lora("user")
    assert (lora.r, lora.alpha, lora.target_modules) == (8, 32, ["q_proj", "v_proj"])
    assert (recipe.data.size, recipe.data.poison_ratio, recipe.evaluation.prompts) == (1000, 0.1, 250)


def test_the_settings_of_guardspace_sbr_and_buffer(files):
    """As far as they are known. GuardSpace is published in AsFT's protocol: 8 directions, alpha / r = 4."""
    ours, plain = Recipe.load("guardspace-chat-gsm8k"), Recipe.load("sft-chat-gsm8k")
    assert ours.user.parameters()["initialisation"] == "subspace"
    assert (ours.user.training, ours.data) == (plain.user.training, plain.data)
    assert (ours.lora("user").r // 2, ours.lora("user").alpha / ours.lora("user").r) == (8, 4)
    sbr, buffer = Recipe.load("sbr-llama-3.1-sst2"), Recipe.load("reinforce-llama-3-gsm8k")
    assert sbr.user.parameters() == {"lambda_": 50.0, "anchors": 8, "norm": "mean"}
    assert (sbr.user.training.learning_rate, sbr.user.training.num_train_epochs) == (1e-5, 20)
    assert (sbr.lora("user").use_rslora, len(sbr.lora("user").target_modules)) == (True, 7)
    assert (buffer.user.defense, buffer.post_hoc.parameters()) == ("buffer", {"weight": 0.5, "alpha": 0.1})
    assert (buffer.lora("user").r, buffer.lora("user").alpha, buffer.user.training.num_train_epochs) == (
        32,
        64,
        3,
    )
    for name in (ours.name, sbr.name, buffer.name):
        without = [c for c in files["gsm8k"] if not c.startswith("data.alignment")]
        rows = files["gsm8k"] if name == buffer.name else without
        steps = [step.kind for step in pipeline.plan(Recipe.load(name, [*TINY[:1], *rows]))]
        assert (steps.count("alignment"), steps.count("user")) == (0, 1), name


def test_a_filter_in_front_of_fine_tuning():
    """Lisa's Table 12: the same judge, at the same threshold, as the one that scores."""
    for name in ("filter-sft-sst2", "filter-lisa-sst2"):
        recipe, plain = Recipe.load(name), Recipe.load(name.removeprefix("filter-"))
        assert recipe.data.filter.judge_recipe == plain.evaluation.judges[0]
        assert recipe.user == plain.user
        assert plain.data.filter is None


def test_the_papers_settings_of_the_methods():
    phases = {"alignment_steps": 100, "finetune_steps": 900}
    assert Recipe.load("lisa-gsm8k").user.parameters() == {**phases, "rho": 1.0}
    everywhere = {**phases, "rho": 1.0, "proximal_warmup_ratio": 0.0}
    assert Recipe.load("lisa-paper-gsm8k").user.parameters() == everywhere
    assert Recipe.load("lisa-guide-sst2").user.parameters() == everywhere
    assert Recipe.load("bso-sst2").user.parameters() == phases
    assert Recipe.load("sft-agnews").user.parameters() == {}
    assert Recipe.load("na-sft-sst2").alignment is None
    ewc = Recipe.load("ewc-sst2")
    assert (ewc.user.parameters(), ewc.trains("user")) == ({"lambda_": 0.001}, "continue")
    assert Recipe.load("vlguard-sst2").user.parameters() == {"alignment_size": 1000}
    for name, asked in {
        "tvaccine": {
            "rho": 3.0,
            "num_layers": 8,
            "probability_steps": 200,
            "resample_steps": 20,
            "probe_rows": 1,
            "freeze": "attention",
        },
        "vaccine": {"rho": 2.0},
        "repnoise": {"alpha": 0.1, "beta": 0.001},
        "tar": {},
        "booster": {"lambda_": 5.0, "alpha": 0.1},
    }.items():
        for task in TASK_ROWS:
            assert Recipe.load(f"{name}-{task}").alignment.parameters() == asked
    assert (ALIGNMENT_TRAINING["learning_rate"], ALIGNMENT_TRAINING["num_train_epochs"]) == (1e-3, 30)
    assert (USER_TRAINING["learning_rate"], USER_TRAINING["num_train_epochs"]) == (1e-5, 20)
    assert USER_TRAINING["lr_scheduler_type"] == "constant"
