"""Single and double LoRA, all weights, LoRA's options and quantised bases in the pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from holdfast import pipeline
from holdfast.errors import ModelError, RecipeError
from holdfast.machine.digests import Digests
from holdfast.machine.store import Store
from holdfast.models.loading import load_model
from holdfast.pipeline.chain import loading, model_input, weights
from holdfast.pipeline.step import opened
from holdfast.recipe import Recipe
from holdfast.weights.folders import fingerprint
from runs import Seen, run

TRAINING = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 2,
    "lr_scheduler_type": "cosine",
}


def recipe(folder, dropout=0.1, model=None, **user):
    made = tiny.recipe(
        folder,
        alignment={"defense": "sft", "training": TRAINING},
        user={"defense": "sft", "training": TRAINING, **user},
        evaluation={"prompts": 4, "task_rows": 2, "max_new_tokens": 3},
    )
    made["model"] |= {"lora": {"r": 2, "alpha": 4, "dropout": dropout}, **(model or {})}
    return made


def trained(out, results):
    """The results of a run: the folders of the alignment and the user step, and the evaluated model."""
    steps = Store(out / "steps")
    row = results["rows"][1]
    made = Recipe.load(results["recipe"])
    chain = [made["step"] for made in steps.record(row["steps"]["generate"])["identity"]["inputs"]["chain"]]
    described = opened(model_input(made, Path(made.model.path), Digests()), steps)
    model = load_model(
        *weights(described["base"].folder, [steps.path(s) for s in chain]), **loading(described)
    )
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 40)[None]).logits
    return steps.path(row["steps"]["alignment"]), steps.path(row["steps"]["user"]), chain, logits


def far(left, right):
    return float((left - right).abs().max())


def test_double_lora_stacked_and_merged_train_the_same(tmp_path):
    """Both stages trained, dropout off: the adapters differ by rounding only (1e-5), and so do the logits."""
    seen = []
    for how in ("stack", "merge"):
        made = recipe(tmp_path / "in", dropout=0.0, model={"adapters": how}, defense="lisa", alignment_steps=1,
                      finetune_steps=2, proximal_warmup_ratio=0.0)  # fmt: skip
        results, _ = run(made, tmp_path / how)
        _, user, chain, logits = trained(tmp_path / how, results)
        assert len(chain) == 2
        seen.append((load_file(user / "adapter" / "adapter_model.safetensors"), logits))
    (stacked, left), (merged, right) = seen
    assert max(far(stacked[name], merged[name]) for name in stacked) < 1e-5
    assert far(left, right) < 1e-5


def test_single_lora_replaces_the_alignment_adapter(tmp_path):
    double, _ = run(recipe(tmp_path / "in"), tmp_path / "double")
    first = trained(tmp_path / "double", double)
    before = fingerprint(first[0] / "adapter")
    seen = {}
    for how in ("stack", "merge"):
        made = recipe(tmp_path / "in", model={"adapters": how}, adapter="continue")
        planned = pipeline.plan(Recipe.load(made))
        assert [s.detail for s in planned if s.kind == "user"] == [
            "6 optimizer steps of 4 rows, single LoRA, learning rate 0.01"
        ]
        out = tmp_path / ("double" if how == "stack" else how)  # the same steps, if they can be shared
        results, ran = run(made, out)
        assert ("alignment with SFT" in ran.cached) is (how == "stack")
        alignment, user, chain, logits = trained(out, results)
        assert chain == [user.name]
        assert results["rows"][1]["steps"]["alignment"] == alignment.name
        assert results["rows"][1]["alignment"] == "sft"
        assert fingerprint(alignment / "adapter") == before, "the alignment adapter is not changed"
        assert "single LoRA" in (user / "adapter" / "README.md").read_text()
        assert alignment.name in (user / "adapter" / "README.md").read_text()
        seen[how] = logits
    assert far(seen["stack"], seen["merge"]) < 1e-6, "there is no adapter below it"
    assert far(seen["stack"], first[3]) > 1e-2, "it is another training than double LoRA"


def test_all_weights_in_either_stage(tmp_path):
    """LoRA then full, full then LoRA, full then full: each evaluates what it trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    slow = {**TRAINING, "learning_rate": 1e-3}
    seen = []
    for alignment, user in ((None, "none"), ("none", None), ("none", "none")):
        made = recipe(tmp_path / "in", training=slow)
        if alignment:
            made["alignment"] = {"defense": "sft", "training": slow, "lora": alignment}
        if user:
            made["user"]["lora"] = user
        results, _ = run(made, tmp_path / "out")
        first, second, chain, logits = trained(tmp_path / "out", results)
        assert (first / "model").is_dir() is bool(alignment)
        assert (second / "model").is_dir() is bool(user)
        assert chain == ([second.name] if user else [first.name, second.name])
        whole = second if user else first
        assert AutoTokenizer.from_pretrained(whole / "model").eos_token == "</s>"
        assert "all weights" in (whole / "model" / "README.md").read_text()
        if user:
            loaded = AutoModelForCausalLM.from_pretrained(second / "model")
            with torch.no_grad():
                assert torch.equal(loaded(input_ids=torch.arange(3, 40)[None]).logits, logits)
        else:
            base = json.loads((second / "adapter" / "adapter_config.json").read_text())
            assert base["base_model_name_or_path"] == first.name
        steps = json.loads((whole / "step.json").read_text())["training"]
        whole_model = load_file(tmp_path / "in" / "model" / "model.safetensors")
        assert steps["trainable_parameters"] == sum(p.numel() for p in whole_model.values())
        seen.append(logits)
    assert min(far(a, b) for i, a in enumerate(seen) for b in seen[:i]) > 1e-3


PISSA = {"r": 2, "alpha": 4, "dropout": 0.1, "init_lora_weights": "pissa", "target_modules": "all-linear"}
KINDS = {
    "single LoRA": ({}, {"adapter": "continue"}),
    "all weights": ({}, {"lora": "none"}),
    "PiSSA": ({}, {"lora": PISSA}),
    "NF4": ({"quantization": "nf4"}, {}),
}
"""Keys of `model` and of `user`."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*changes the base weights")
def test_a_run_that_was_stopped_goes_on_exactly(kind, tmp_path):
    """Stopped in the user stage after step 4 of 6 (checkpoints at 2 and 4), dropout and a schedule on."""
    if kind == "NF4":
        pytest.importorskip("bitsandbytes")

    class Stop(Seen):
        user = False

        def begin(self, title, resumed):
            super().begin(title, resumed)
            self.user = title.startswith("user fine-tuning")

        def advance(self, done, total, **facts):
            if self.user and done == 5:
                raise KeyboardInterrupt

    made, out = recipe(tmp_path / "in"), tmp_path / "out"
    model, user = KINDS[kind]
    made["model"] |= model
    made["user"] |= user
    results, _ = run(made, out)
    whole = trained(out, results)
    shutil.rmtree(whole[1])
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(Recipe.load(made), out=out, device="cpu", progress=Stop())
    checkpoints = whole[1] / "checkpoints"
    assert {p.name for p in checkpoints.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    results, seen = run(made, out)
    assert seen.ran == seen.resumed == ["user fine-tuning with SFT"]
    assert torch.equal(trained(out, results)[3], whole[3])


def test_options_change_the_steps_that_read_them_and_no_others():
    planned = pipeline.plan(Recipe.load("world"))
    for step in planned:
        if step.kind in ("alignment", "user"):
            assert set(step.inputs) == {
                "model", "template", "stage", "method", "parameters", "training", "trains", "lora", "rows",
                "chain", "seed", "processes", "packages",
            }  # fmt: skip
            assert set(step.inputs["lora"]) == {"r", "alpha", "dropout", "target_modules", "use_rslora"}
    ids = {step.id for step in planned}
    for options in (
        ["user.adapter=continue", "user.lora=null"],
        ["user.lora=none"],
        ["user.lora.use_dora=true"],
    ):
        other = {step.id for step in pipeline.plan(Recipe.load("world", options))} - ids
        assert {step.split("-")[0] for step in other} == {"user", "generate", "moderate", "score"}, options
    quantized = ["model.adapters=stack", "model.quantization=nf4"]
    other = {step.id for step in pipeline.plan(Recipe.load("world", quantized))}
    plain = {step.id for step in pipeline.plan(Recipe.load("world", quantized[:1]))}
    assert {step.split("-")[0] for step in plain & other} == {"data", "manifest"}
    assert {s.id for s in pipeline.plan(Recipe.load("world", ["user.adapter=new"]))} == ids


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"user": {"adapter": "continue"}, "alignment": "none"},
            ["user.adapter", "alignment is none", "new"],
        ),
        ({"user": {"adapter": "continue", "lora": {"r": 4}}}, ["user.lora", "ignored"]),
        ({"user": {"adapter": "both"}}, ["user.adapter", "'new' or 'continue'"]),
        ({"alignment": {"adapter": "continue"}}, ["alignment.adapter", "only the user stage"]),
        ({"user": {"lora": {"use_dora": True}}}, ["user.lora.use_dora", "adapters: merge"]),
        ({"model": {"lora": {"use_dora": True}}}, ["model.lora.use_dora", "adapters: merge"]),
        (
            {"user": {"lora": {"init_lora_weights": "pisa"}}},
            ["user.lora.init_lora_weights", "'pissa'", "pisa"],
        ),
        ({"user": {"lora": {"init_lora_weights": "orthogonal", "r": 3}}}, ["user.lora.r", "even"]),
        (
            {"user": {"lora": {"init_lora_weights": "pissa", "use_dora": True}}},
            ["user.lora.use_dora", "plain"],
        ),
        ({"user": {"lora": {"rank_pattern": {"q_proj": 0}}}}, ["user.lora.rank_pattern", "1"]),
        ({"user": {"lora": {"rr": 3}}}, ["unknown key 'user.lora.rr'"]),
        ({"model": {"quantization": "nf4", "adapters": "merge"}}, ["model.adapters", "stack"]),
        ({"model": {"quantization": "int4"}}, ["model.quantization", "'nf4'", "int4"]),
        ({"model": {"quantization": "nf4"}, "user": {"lora": "none"}}, ["user.lora", "cannot be trained"]),
        ({"model": {"quantization": "nf4", "lora": "none"}}, ["model.lora", "cannot be trained"]),
        ({"model": {"quantization": "int8"}, "user": {"lora": {"use_dora": True}}}, ["use_dora", "nf4"]),
        ({"model": {"quantization": "nf4"}, "user": {"lora": {"use_dora": True}}}, ["adapter: continue"]),
        ({"model": {"quantization": "nf4"}, "user": {"lora": {"init_lora_weights": "pissa"}}}, ["round"]),
        ({"user": {"training": {"fp16": True}}}, ["fp16", "bf16"]),
        ({"user": {"lora": "none"}, "model": {"dtype": "bfloat16"}}, ["model.dtype: float32"]),
    ],
    ids=str,
)
def test_what_cannot_be_right_is_refused_before_training(change, words, tmp_path):
    made = tiny.recipe(tmp_path / "in")
    for block, values in change.items():
        made[block] = {**made[block], **values} if isinstance(values, dict) else values
    with pytest.raises(RecipeError) as caught:
        run(made, tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    assert not list((tmp_path / "out").glob("steps/alignment-*"))


@pytest.mark.parametrize(
    "user",
    [
        {"lora": "none"},
        {"lora": {"r": 2, "use_dora": True}},
        {"adapter": "continue"},  # of an alignment stage that trains all weights
    ],
    ids=str,
)
def test_a_method_refuses_what_trains_before_the_alignment_stage(user, tmp_path):
    lisa = {"defense": "lisa", "proximal": "delta_w", "alignment_steps": 1, "finetune_steps": 2}
    made = recipe(tmp_path / "in", model={"adapters": "merge"}, **lisa, **user)
    if "adapter" in user:
        made["alignment"]["lora"] = "none"
    with pytest.raises(ModelError, match="delta_w"):
        run(made, tmp_path / "out")
    assert not list((tmp_path / "out").glob("steps/alignment-*"))
    made["user"]["rho"] = 0.0
    assert run(made, tmp_path / "out")[0]["rows"]


def test_what_is_kept_of_a_recipe_can_be_read_again(tmp_path):
    made = recipe(tmp_path / "in", lora="none")
    loaded = Recipe.load(made)
    assert Recipe.load(loaded.to_dict()) == loaded
    assert (loaded.trains("alignment"), loaded.trains("user")) == ("new", "full")
    going_on = Recipe.load(made, ["user.lora=null", "user.adapter=continue", "alignment.lora=none"])
    assert going_on.trains("user") == "full", "with a model whose every weight was trained"
