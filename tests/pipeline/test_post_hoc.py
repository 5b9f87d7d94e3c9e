"""The stage after fine-tuning: a sweep over tiny weights against plain formulas, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny
from holdfast.defenses import Defense
from holdfast.errors import ModelError, RecipeError
from holdfast.machine.files import read_jsonl
from holdfast.machine.store import Store
from holdfast.pipeline import plan, repairing
from holdfast.pipeline.chain import weights as chained
from holdfast.pipeline.step import Inputs, Machine
from holdfast.recipe import Recipe
from holdfast.reporting.collect import collect
from holdfast.reporting.measurements import sweeps
from runs import answers, run

SWEEP = {"defense": "safe_lora", "threshold": [0.0, 1.0], "control": ["none", "drop"]}


@pytest.fixture(scope="module")
def swept(done, tmp_path_factory):
    """The finished run with four repairs on top."""
    recipe, out, _, _ = done
    copy = tmp_path_factory.mktemp("swept") / "out"
    shutil.copytree(out, copy)
    recipe = {**recipe, "post_hoc": SWEEP}
    results, seen = run(recipe, copy, page=True)
    return recipe, copy, {row["name"]: row for row in results["rows"]}, seen


def weights(out, row, stage, kind="adapter"):
    name = {"adapter": "adapter_model", "model": "model"}[kind]
    return load_file(out / "steps" / row["steps"][stage] / kind / f"{name}.safetensors")


def projected(direction, update):
    """C dW with C = V V^T / ||V||_F, as it is written."""
    direction = direction.astype(np.float64)
    return (direction @ direction.T / np.linalg.norm(direction)) @ update


def test_the_rows_of_a_sweep(swept):
    _, out, rows, seen = swept
    assert list(rows) == [
        "aligned", "tiny", "tiny, threshold=0, control=none", "tiny, threshold=0, control=drop",
        "tiny, threshold=1, control=none", "tiny, threshold=1, control=drop",
    ]  # fmt: skip
    assert seen.ran.count("repair with Safe LoRA") == 4
    assert not [title for title in seen.ran if "fine-tuning" in title or "alignment" in title]
    tuned, repaired = rows["tiny"], rows["tiny, threshold=1, control=drop"]
    assert (tuned["post_hoc"], tuned["post_hoc_parameters"], tuned["repair"]) == (None, None, None)
    assert tuned["steps"]["post_hoc"] is None
    assert (repaired["alignment"], repaired["user"], repaired["post_hoc"]) == ("sft", "lisa", "safe_lora")
    assert repaired["labels"]["safe_lora"] == "Safe LoRA"
    roles = ["reference", "defended", "defended", "control", "defended", "control"]
    assert [row["role"] for row in rows.values()] == roles
    assert repaired["post_hoc_parameters"] == {
        "threshold": 1.0, "num_layers": None, "projection": "approx", "control": "drop"
    }  # fmt: skip
    assert repaired["repair"]["modules"] == repaired["repair"]["projected"] == 4
    assert (repaired["repair"]["share"], repaired["repair"]["threshold"]) == (1.0, 1.0)
    for key in ("alignment", "user"):
        assert repaired["steps"][key] == tuned["steps"][key]
    for key in ("seconds", "peak_memory_bytes", "poison_ratio", "tokens_per_second"):
        assert repaired[key] == tuned[key], "of the training"
    record = json.loads((out / "steps" / repaired["steps"]["post_hoc"] / "step.json").read_text())
    assert record["repair"]["share"] == 1.0
    assert record["identity"]["inputs"]["packages"].keys() == {"numpy", "safetensors", "torch", "peft"}
    assert record["identity"]["inputs"]["settings"]["seed"] == 7, "the run's"


def test_a_threshold_of_zero_changes_nothing(swept):
    _, out, rows, _ = swept
    row = rows["tiny, threshold=0, control=none"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = (
            (out / "steps" / row["steps"][stage] / "adapter" / name).read_bytes()
            for stage in ("post_hoc", "user")
        )
        assert ours == theirs
    assert row["repair"]["projected"] == 0
    assert answers(out, row) == answers(out, rows["tiny"])


def test_the_repaired_adapter_takes_the_place_of_the_users(swept):
    _, out, rows, _ = swept
    row, store = rows["tiny, threshold=1, control=drop"], Store(out / "steps")
    assert not any(value.any() for name, value in weights(out, row, "post_hoc").items() if "lora_B" in name)
    chain = [made["step"] for made in store.record(row["steps"]["generate"])["identity"]["inputs"]["chain"]]
    assert chain == [row["steps"]["alignment"], row["steps"]["post_hoc"]]
    folders = [store.path(step) for step in chain]
    assert chained(out, folders) == (out, [folder / "adapter" for folder in folders])
    assert answers(out, row) == answers(out, rows["aligned"]), "nothing of the user's update is left"
    assert answers(out, row) != answers(out, rows["tiny"])
    partly = answers(out, rows["tiny, threshold=1, control=none"])
    assert partly not in (answers(out, row), answers(out, rows["tiny"])), "other weights, other answers"


def test_the_projection_is_by_the_alignment_stages_update(swept):
    _, out, rows, _ = swept
    row = rows["tiny, threshold=1, control=none"]
    before, after, guide = (weights(out, row, stage) for stage in ("user", "post_hoc", "alignment"))
    names = [name for name in before if "lora_B" in name]
    assert len(names) == 4
    for b in names:
        a = b.replace("lora_B", "lora_A")
        scaling = 2.0  # alpha 4, r 2, of both stages
        expected = projected(scaling * guide[b] @ guide[a], scaling * before[b] @ before[a])
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(scaling * after[b] @ after[a], expected, rtol=1e-4, atol=1e-10)
        np.testing.assert_array_equal(after[a], before[a])


def test_again_does_nothing_and_another_threshold_only_its_own(swept, tmp_path):
    recipe, out, _, _ = swept
    shutil.copytree(out, tmp_path / "out")
    assert not run(recipe, tmp_path / "out")[1].ran
    recipe = {**recipe, "post_hoc": {**SWEEP, "threshold": [0.0, 0.5], "control": None}}
    results, seen = run(recipe, tmp_path / "out")
    assert seen.ran[0] == "repair with Safe LoRA"
    assert seen.ran.count("repair with Safe LoRA") == 1
    assert [row["name"] for row in results["rows"]][2:] == ["tiny, threshold=0", "tiny, threshold=0.5"]


def test_a_stopped_repair_starts_afresh(swept, tmp_path):
    recipe, out, rows, _ = swept
    shutil.copytree(out, tmp_path / "out")
    step = tmp_path / "out" / "steps" / rows["tiny, threshold=1, control=none"]["steps"]["post_hoc"]
    (step / "step.json").unlink()
    (step / ".adapter.half").mkdir()
    (step / "adapter" / "safe_lora.json").unlink()
    assert run(recipe, tmp_path / "out")[1].ran == ["repair with Safe LoRA"]
    assert {path.name for path in step.iterdir()} == {"adapter", "step.json"}


def test_the_repaired_adapter_loads_with_peft(swept):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe, out, rows, _ = swept
    row = rows["tiny, threshold=1, control=none"]
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    for stage in ("alignment", "post_hoc"):
        model = PeftModel.from_pretrained(model, out / "steps" / row["steps"][stage] / "adapter")
        model = model.merge_and_unload()
    assert any(not p.equal(before[name]) for name, p in model.named_parameters())


def test_the_report_joins_a_sweep(swept):
    _, out, _, _ = swept
    data = collect([out])
    lines = [(name, [row.label for row in line]) for name, line in sweeps(data.rows)]
    assert lines == [
        ("threshold", [f"tiny, threshold={value}, control={control}" for value in (0, 1)])
        for control in ("none", "drop")
    ]
    page = (out / "report.html").read_text()
    assert "SFT → Lisa → Safe LoRA (4 of 4 modules)" in page
    assert "SFT → Lisa → Safe LoRA (0 of 4 modules)" in page
    assert "tiny, threshold=1, control=drop" in page
    assert "in the order of threshold" in page


def test_a_run_from_an_aligned_model_with_its_base(tmp_path):
    """Safe LoRA's own protocol: V is the chat model less its base."""
    recipe = tiny.recipe(tmp_path / "in", alignment="none")
    base = tiny.save_model(tmp_path / "base", seed=1)
    recipe["user"] = {**recipe["user"], "defense": "sft"}
    del recipe["user"]["alignment_steps"], recipe["user"]["finetune_steps"]
    recipe["post_hoc"] = {"defense": "safe_lora", "num_layers": 3, "base": str(base)}
    results, _ = run(recipe, tmp_path / "out", page=True)
    assert [row["name"] for row in results["rows"]] == ["base", "tiny", "tiny + Safe LoRA"]
    row = results["rows"][2]
    assert row["repair"]["projected"] == 3
    assert (row["alignment"], row["steps"]["alignment"]) == (None, None)
    before, after = (weights(tmp_path / "out", row, stage) for stage in ("user", "post_hoc"))
    models = [load_file(tmp_path / place / "model.safetensors") for place in ("in/model", "base")]
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert len(changed) == 3
    for b in changed:
        a = b.replace("lora_B", "lora_A")
        name = b.removeprefix("base_model.model.").replace("lora_B.", "")
        expected = projected(models[0][name] - models[1][name], before[b] @ before[a])
        np.testing.assert_allclose(after[b] @ after[a], expected, rtol=1e-4, atol=1e-9)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not aligned → SFT → Safe LoRA (3 of 4 modules)" in page


@pytest.mark.parametrize("user", ["none", None], ids=["all weights", "LoRA"])
def test_alignment_of_all_weights(tmp_path, user):
    """V is the aligned model less the base, both on disk; the user's update is full or a LoRA."""
    recipe = tiny.recipe(tmp_path / "in")
    recipe["model"] |= {"dtype": "float32"}
    recipe["alignment"] = {**recipe["alignment"], "lora": "none"}
    recipe["user"] = {"defense": "sft", "lora": user, "training": recipe["user"]["training"]}
    recipe["post_hoc"] = {"defense": "safe_lora", "num_layers": 1}
    results, _ = run(recipe, tmp_path / "out")
    row, kind = results["rows"][2], "model" if user else "adapter"
    before, after = (weights(tmp_path / "out", row, stage, kind) for stage in ("user", "post_hoc"))
    aligned = weights(tmp_path / "out", row, "alignment", "model")
    base = load_file(tmp_path / "in" / "model" / "model.safetensors")
    (changed,) = [name for name in before if not np.array_equal(before[name], after[name])]
    if user:
        expected = projected(aligned[changed] - base[changed], before[changed] - aligned[changed])
        np.testing.assert_allclose(after[changed] - aligned[changed], expected, atol=1e-6)
    else:
        name = changed.removeprefix("base_model.model.").replace("lora_B.", "")
        expected = projected(aligned[name] - base[name], before[changed])
        np.testing.assert_allclose(after[changed], expected, rtol=1e-4, atol=1e-9)


def test_chance_follows_the_runs_seed_unless_a_seed_is_named():
    block = {"defense": "safe_lora", "num_layers": 2, "control": "random"}
    (repair,) = repairing.repairs(Recipe.load("world", ["seed=5", f"post_hoc={json.dumps(block)}"]))
    assert repair.settings["seed"] == 5
    assert "seed" not in repair.parameters, "or rows over seeds would not be averaged"
    assert repair.name == "world + Safe LoRA, control=random"
    block["seed"] = [1, 2]
    found = repairing.repairs(Recipe.load("world", ["seed=5", f"post_hoc={json.dumps(block)}"]))
    assert [repair.settings["seed"] for repair in found] == [1, 2]
    assert [repair.parameters["seed"] for repair in found] == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["post_hoc=safe_lroa"], ["unknown defense", "'safe_lora'"]),
        (["post_hoc=lisa"], ["does not act at the post_hoc stage", "safe_lora"]),
        (["post_hoc=safe_lora"], ["exactly one of threshold and num_layers", "neither"]),
        (["post_hoc.threshold=0.3"], ["post_hoc.defense", "missing"]),
        (["post_hoc.threshold=0.3", "post_hoc.num_layers=2"], ["exactly one", "found threshold and num_layers"]),
        (["post_hoc.threshold=[0.3, null]"], ["exactly one", "neither"]),
        (["post_hoc.num_layers=[2, null]", "post_hoc.threshold=[null, 0.3]"], ["exactly one", "all combined"]),
        (["post_hoc.treshold=0.3"], ["unknown parameter", "'threshold'"]),
        (["post_hoc.num_layers=two"], ["post_hoc.num_layers", "int", "'two'"]),
        (["post_hoc.num_layers=[1, 2.5]"], ["post_hoc.num_layers", "int", "2.5"]),
        (["post_hoc.threshold=[0.2, true]"], ["post_hoc.threshold", "float", "True"]),
        (["post_hoc.threshold=[]"], ["post_hoc.threshold", "[]"]),
        (["post_hoc.threshold=[0.2, 0.2]"], ["twice"]),
        (["post_hoc.threshold=0.3", "post_hoc.lora.r=4"], ["post_hoc.lora", "nothing is trained"]),
        (["post_hoc.threshold=0.3", "post_hoc.training.max_steps=4"], ["post_hoc.training", "nothing is trained"]),
        (["post_hoc.threshold=0.3", "user=none"], ["user is none"]),
        (["post_hoc.threshold=0.3", "alignment=none"], ["alignment is none", "post_hoc.base"]),
        (["post_hoc.threshold=0.3", "post_hoc.base=world"], ["post_hoc.base", "alignment: none"]),
        (["post_hoc.threshold=0.3", "user=ewc"], ["continue", "ewc", "user.adapter: new"]),
        (["post_hoc.threshold=0.3", "user.adapter=continue"], ["continue", "user.adapter: new"]),
        (["post_hoc.threshold=0.3", "user.lora=none"], ["does not save", "lora: none"]),
        (["post_hoc.threshold=0.3", "user.lora.use_dora=true"], ["DoRA", "user"]),
        (["post_hoc.threshold=0.3", "alignment.lora.use_dora=true"], ["DoRA", "alignment"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(overrides, words):
    named = overrides[0].startswith("post_hoc=") or "missing" in words
    with pytest.raises(RecipeError) as caught:
        Recipe.load("world", [*([] if named else ["post_hoc=safe_lora"]), *overrides])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("block", "error", "words"),
    [
        ({"threshold": [0.5, 2.0]}, RecipeError, ["cosine from -1 to 1", "2.0"]),
        ({"num_layers": 1, "projection": "aprox"}, RecipeError, ["approx", "'aprox'"]),
        (
            {"num_layers": 1, "target_modules": ".*layers.*"},
            ModelError,
            ["PEFT refuses", "must match layers"],
        ),
        ({"num_layers": [4, 5]}, RecipeError, ["post_hoc.safe_lora: num_layers is 5", "only 4 modules"]),
        ({"num_layers": 1, "base": "model"}, ModelError, ["the same", "before alignment"]),
        ({"num_layers": 1, "base": "shorter"}, ModelError, ["layers.1"]),
        ({"num_layers": 1, "base": "nowhere"}, ModelError, ["nowhere"]),
    ],
)
def test_what_would_stop_it_is_found_before_training(tmp_path, block, error, words):
    based = "base" in block
    recipe = tiny.recipe(tmp_path, **({"alignment": "none", "user": {"defense": "sft"}} if based else {}))
    if based:
        block = {**block, "base": str(tmp_path / block["base"])}
        tiny.save_model(tmp_path / "shorter", layers=1)
    if "target_modules" in block:  # a pattern that means containers too
        recipe["user"]["lora"] = {"target_modules": block.pop("target_modules")}
    recipe["post_hoc"] = {"defense": "safe_lora", **block}
    with pytest.raises(error) as caught:
        run(recipe, tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    begun = {path.name.split("-")[0] for path in (tmp_path / "out").glob("steps/*-*")}
    assert begun <= {"data", "manifest"}, "nothing but rows was made"


@pytest.mark.parametrize(
    ("user", "alignment", "count"),
    [
        ({"target_modules": "all-linear"}, {"target_modules": r".*layers\.1\..*_proj"}, 7),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": "all-linear"}, 2),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["k_proj"]}, 0),
        ({"target_modules": r".*layers\.0\..*_proj"}, {"target_modules": r".*layers\.1\..*_proj"}, 0),
        ("none", "none", 14),
        ({"target_modules": "all-linear", "init_lora_weights": "pissa"}, "none", 14),
    ],
)
def test_what_can_be_repaired_is_counted_before_training(tmp_path, user, alignment, count):
    """Modules of the user's LoRA that the alignment's adapts too."""
    recipe = tiny.recipe(tmp_path)
    recipe["model"] |= {"dtype": "float32"}
    recipe["alignment"] = {**recipe["alignment"], "lora": alignment}
    recipe["user"] = {"defense": "sft", "lora": user, "training": recipe["user"]["training"]}
    recipe["post_hoc"] = {"defense": "safe_lora", "num_layers": count + 1}
    words = f"only {count} modules can be projected" if count else "none of the modules"
    with pytest.raises(RecipeError, match=words):
        run(recipe, tmp_path / "out")
    recipe["post_hoc"]["num_layers"] = max(count, 1)
    if count:
        step = next(step for step in plan(Recipe.load(recipe)) if step.kind == "post_hoc")
        step.check(Inputs(step.inputs, Store(tmp_path)), Machine("cpu", tmp_path / "model"))


def test_the_base_beside_the_recipe_is_found(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "r.yaml").write_text(
        "extends: world\nalignment: none\npost_hoc: {defense: safe_lora, threshold: 0.3, base: base}\n"
    )
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.post_hoc.base == str((tmp_path / "base").resolve())
    assert Recipe.load(recipe.to_dict()).fingerprint() == recipe.fingerprint()
    assert Recipe.load("world").to_dict()["post_hoc"] is None


@dataclass
class RowsConfig:
    """One number."""

    share: float = 0.5


def write_rows(tuned, *, share):
    shutil.copytree(tuned.source, tuned.out)
    with pytest.raises(KeyError):
        tuned.rows("test_dataset")
    return {
        **{name: len(tuned.rows(name)) for name in ("train_dataset", "alignment_dataset", "harmful_dataset")},
        "tokens": len(tuned.tokenizer("a b").input_ids), "share": share, "base": tuned.base,
        "device": tuned.device, "seed": tuned.seed, "dtype": tuned.dtype,
    }  # fmt: skip


ROWS = Defense(
    name="with_rows",
    label="With rows",
    stages=("post_hoc",),
    paper="none",
    needs=("train_dataset", "alignment_dataset", "harmful_dataset", "tokenizer"),
    config=RowsConfig,
    apply=write_rows,
    headline="{train_dataset} of {alignment_dataset} rows",
)


def test_a_method_of_another_package_gets_the_rows_that_it_needs(tmp_path, install):
    """Rows, tokenizer, device, seed and dtype; no base, which it does not ask for; named by its rows."""
    install(EntryPoint("with_rows", f"{__name__}:ROWS", "holdfast.defenses"))
    recipe = {**tiny.recipe(tmp_path / "in"), "post_hoc": "with_rows"}
    results, seen = run(recipe, tmp_path / "out", page=True)
    assert "harmful rows" in seen.ran
    row = results["rows"][2]
    assert (row["name"], row["labels"]["with_rows"]) == ("tiny + With rows", "With rows")
    folders = (tmp_path / "out" / "steps").glob("data-*")
    steps = {json.loads((path / "step.json").read_text())["title"]: path for path in folders}
    titles = ("user rows", "alignment rows", "harmful rows")
    counts = [len(read_jsonl(steps[title] / "rows.jsonl")) for title in titles]
    found = row["repair"]
    assert [found[name] for name in ("train_dataset", "alignment_dataset", "harmful_dataset")] == counts
    assert min(counts) > 0
    assert (found["base"], found["device"], found["seed"], found["share"]) == (
        None,
        "cpu",
        recipe["seed"],
        0.5,
    )
    assert found["tokens"] > 0
    identity = json.loads((tmp_path / "out" / "steps" / row["steps"]["post_hoc"] / "step.json").read_text())[
        "identity"
    ]
    assert set(identity["inputs"]["rows"]) == {"train_dataset", "alignment_dataset", "harmful_dataset"}
    recipe["data"] = {**recipe["data"], "alignment": None}
    with pytest.raises(RecipeError, match=r"data\.alignment"):
        Recipe.load({**recipe, "alignment": "none", "user": {"defense": "sft"}})
    assert (
        f"SFT → Lisa → With rows ({counts[0]} of {counts[1]} rows)"
        in (tmp_path / "out" / "report.html").read_text()
    )
