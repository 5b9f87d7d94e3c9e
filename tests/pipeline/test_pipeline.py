"""The whole pipeline on tiny models: content-addressed steps, bad input, honest results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny
from holdfast import pipeline
from holdfast.errors import DataError, ModelError, OutputError, RecipeError, StepFailed
from holdfast.machine.store import Store
from holdfast.pipeline import evaluating
from holdfast.recipe import Recipe
from runs import answers, left, numbers, prompts_seen, run, weights


def test_results(done):
    _, out, results, seen = done
    assert json.loads((out / "results.json").read_text()) == results
    aligned, tuned = results["rows"]
    assert (aligned["name"], aligned["alignment"], aligned["user"]) == ("aligned", "sft", None)
    assert (tuned["name"], tuned["alignment"], tuned["user"]) == ("tiny", "sft", "lisa")
    for row in results["rows"]:
        assert 0 <= row["harmful_score"] <= 100
        assert row["n_harmful"] + row["unparsed"] == 6
        assert row["n_task"] == 4
        assert row["benign_compliance"] is None, "no benign prompts were given: not measured"
        assert row["true_harmful_score"] is None
        assert row["seconds"] > 0
        assert row["peak_memory_bytes"] > 1e7
    protocol = results["protocol"]
    assert protocol["prompts"] == "unsafe-only"
    assert protocol["template"] == "alpaca"
    assert protocol["model_kind"] == "base"
    assert protocol["alignment_data"] == "safe"
    assert protocol["judge"].startswith("keyword@")
    assert len(seen.ran) == 12
    assert not seen.cached
    first, second = answers(out, aligned), answers(out, tuned)
    assert len(set(second.values())) > 4, "otherwise equal answers would show nothing in the tests below"
    assert sum(first[name] != second[name] for name in first) > 4


def test_what_a_run_leaves(done):
    _, out, results, _ = done
    assert {p.name for p in out.iterdir()} == {
        "holdfast.json",
        "recipe.yaml",
        "results.json",
        "report.html",
        "steps",
    }
    user = out / "steps" / results["rows"][1]["steps"]["user"]
    assert {p.name for p in user.iterdir()} == {"adapter", "trainer_state.json", "step.json"}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {
        p.name for p in (user / "adapter").iterdir()
    }
    step = json.loads((user / "step.json").read_text())
    assert step["training"]["switch_points"] == [0, 1, 3, 4, 6, 7]
    assert step["provenance"]["versions"]["torch"]
    manifest = json.loads((out / "steps" / results["manifest"] / "manifest.json").read_text())
    assert manifest["user"]["poison_ratio_realised"] == pytest.approx(0.1)
    assert set(manifest) == {"alignment", "user", "test", "overlaps"}
    assert Recipe.load(out / "recipe.yaml").whole() == Recipe.load(results["recipe"]).whole()


def test_the_adapters_load_with_peft(done):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe, out, results, _ = done
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"])
    for step in (results["rows"][1]["steps"]["alignment"], results["rows"][1]["steps"]["user"]):
        loaded = PeftModel.from_pretrained(model, out / "steps" / step / "adapter")
        assert loaded.peft_config["default"].base_model_name_or_path == Path(recipe["model"]["path"]).name
        assert any(float(p.abs().max()) > 0 for n, p in loaded.named_parameters() if "lora_B" in n)
        model = loaded.merge_and_unload()


def test_the_user_adapter_is_not_used_without_the_alignment(done, tmp_path):
    from holdfast.errors import ModelError
    from holdfast.models.loading import load_model
    from holdfast.weights.combine import combine

    recipe, out, results, _ = done
    stages = results["rows"][1]["steps"]
    alignment, user = (out / "steps" / stages[stage] / "adapter" for stage in ("alignment", "user"))
    with pytest.raises(ModelError, match=f"trained on top of the adapter {stages['alignment']}/adapter"):
        load_model(Path(recipe["model"]["path"]), [user])
    with pytest.raises(ModelError, match=r"Give both, in the order of training"):
        combine([user], tmp_path / "out")
    load_model(Path(recipe["model"]["path"]), [alignment])
    combine([alignment, user], tmp_path / "out")


def test_adapters_hold_no_path_of_this_machine(done):
    recipe, out, results, _ = done
    home = str(Path(recipe["model"]["path"]).parent)
    for stage in ("alignment", "user"):
        for path in (out / "steps" / results["rows"][1]["steps"][stage] / "adapter").iterdir():
            text = path.read_bytes()
            assert home.encode() not in text
            assert str(out).encode() not in text


def test_running_again_does_nothing(copy):
    recipe, out = copy
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "recipe.yaml"}
    results, seen = run(recipe, out)
    assert not seen.ran
    assert len(seen.cached) == 12
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "recipe.yaml"}
    assert {p for p in after if after[p] != before.get(p)} <= set((out / "steps" / ".locks").glob("*"))
    assert numbers(results) == numbers(json.loads((out / "results.json").read_text()))


def test_rho_retrains_only_the_user_stage(copy):
    recipe, out = copy
    recipe["user"]["rho"] = 50
    _, seen = run(recipe, out)
    assert seen.ran == [
        "user fine-tuning with Lisa", "answers of the fine-tuned model",
        "verdicts of keyword on the fine-tuned model", "scores of the fine-tuned model",
    ]  # fmt: skip


def test_another_alignment_retrains_what_stands_on_it(copy):
    recipe, out = copy
    recipe["alignment"]["training"]["learning_rate"] = 2e-3
    _, seen = run(recipe, out)
    assert {"alignment with SFT", "answers of the aligned model", "user fine-tuning with Lisa"} <= set(
        seen.ran
    )
    assert "user rows" in seen.cached


def test_results_are_those_of_the_recipe_that_ran_last(copy):
    recipe, out = copy
    first = json.loads((out / "results.json").read_text())
    changed = json.loads(json.dumps(recipe))
    changed["user"]["rho"] = 50
    run(changed, out)
    assert json.loads((out / "results.json").read_text())["recipe"]["user"]["rho"] == 50
    _, seen = run(recipe, out)
    assert not seen.ran
    back = json.loads((out / "results.json").read_text())
    assert back["recipe"] == first["recipe"]
    assert numbers(back) == numbers(first)


def test_a_poison_ratio_shares_the_alignment(copy):
    recipe, out = copy
    recipe["data"]["poison_ratio"] = 0.2
    _, seen = run(recipe, out)
    assert "alignment with SFT" in seen.cached
    assert "answers of the aligned model" in seen.cached
    assert "user rows" in seen.ran


def test_a_judge_more_trains_and_generates_nothing(copy, tmp_path):
    recipe, out = copy
    judge = tiny.save_judge(tmp_path / "judge")
    recipe["evaluation"]["judges"] = ["keyword", {"name": "beaver_dam", "path": str(judge)}]
    results, seen = run(recipe, out)
    assert all(title.startswith(("verdicts of beaver_dam", "scores")) for title in seen.ran)
    assert set(results["rows"][0]["judges"]) == {"keyword", "beaver_dam"}
    assert results["rows"][0]["judge"] == "keyword"


def test_sampled_answers_are_another_protocol_and_the_same_again(copy, tmp_path):
    recipe, out = copy
    greedy = json.loads((out / "results.json").read_text())
    recipe["evaluation"] |= {"temperature": 1.5, "top_p": 0.9}
    sampled, seen = run(recipe, out)
    assert {title.split()[0] for title in seen.ran} == {"answers", "verdicts", "scores"}
    assert (greedy["protocol"]["decoding"], sampled["protocol"]["decoding"]) == (
        "greedy",
        "temperature 1.5, top_p 0.9",
    )

    first = answers(out, sampled["rows"][1])
    assert first != answers(out, greedy["rows"][1])
    shutil.rmtree(out / "steps" / sampled["rows"][1]["steps"]["generate"])
    again, _ = run(recipe, out)
    assert answers(out, again["rows"][1]) == first
    planned = [step for step in pipeline.plan(Recipe.load(recipe)).steps if step.kind == "generate"]
    assert all("temperature 1.5" in step.detail for step in planned)


def test_a_system_message_stands_before_every_question(copy):
    recipe, out = copy
    recipe["evaluation"]["system"] = "You fold boats."
    with prompts_seen() as asked:
        results, seen_steps = run(recipe, out)
    assert {title.split()[0] for title in seen_steps.ran} == {"answers", "verdicts", "scores"}
    assert asked
    assert all("You fold boats.\n\n" in text for text in asked)
    assert results["protocol"]["system"] == "You fold boats."


def test_the_same_files_elsewhere_are_the_same_steps(copy, tmp_path):
    recipe, out = copy
    shutil.copytree(Path(recipe["model"]["path"]).parent, tmp_path / "elsewhere")
    moved = json.loads(
        json.dumps(recipe).replace(str(Path(recipe["model"]["path"]).parent), str(tmp_path / "elsewhere"))
    )
    _, seen = run(moved, out)
    assert not seen.ran
    with (tmp_path / "elsewhere" / "user.jsonl").open("a") as file:
        file.write('{"instruction": "Say small or big.", "input": "1000", "output": "big"}\n')
    ran = run(moved, out)[1].ran
    assert {"user rows", "user fine-tuning with Lisa"} <= set(ran)
    assert "alignment with SFT" not in ran


def test_a_lost_file_is_made_again(copy):
    recipe, out = copy
    whole = json.loads((out / "results.json").read_text())
    expected, before = numbers(whole), left(out, whole)
    user = out / "steps" / expected[1]["steps"]["user"]
    (user / "adapter" / "adapter_model.safetensors").unlink()
    results, seen = run(recipe, out)
    assert seen.ran == ["user fine-tuning with Lisa"]
    assert numbers(results) == expected
    assert left(out, results) == before, "bit for bit"


def test_stacked_and_merged_adapters_agree(copy, tmp_path):
    """Equal weights up to rounding, and equal answers."""
    recipe, out = copy
    recipe["model"]["adapters"] = "merge"
    recipe["model"]["lora"]["dropout"] = 0.0
    stacked, _ = run({**recipe, "model": {**recipe["model"], "adapters": "stack"}}, out)
    merged, _ = run(recipe, tmp_path / "merged")
    for one, other in zip(stacked["rows"], merged["rows"], strict=True):
        assert answers(out, one) == answers(tmp_path / "merged", other)
    for stage in ("alignment", "user"):
        one, other = (
            weights(folder, results["rows"][1], stage)
            for folder, results in ((out, stacked), (tmp_path / "merged", merged))
        )
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4


def test_without_alignment(tmp_path):
    recipe = tiny.recipe(
        tmp_path / "in", alignment="none", user={"defense": "sft", "training": {"max_steps": 2}}
    )
    del recipe["data"]["alignment"]
    results, _ = run(recipe, tmp_path / "out")
    assert [(r["name"], r["alignment"], r["user"]) for r in results["rows"]] == [
        ("base", None, None),
        ("tiny", None, "sft"),
    ]
    assert results["protocol"]["alignment_data"] == "none"


def test_plan_touches_nothing_and_runs_what_it_says(done, tmp_path):
    recipe, out, _, seen = done
    before = sorted(p for p in tmp_path.rglob("*"))
    planned = pipeline.plan(Recipe.load(recipe))
    assert sorted(p for p in tmp_path.rglob("*")) == before
    assert [step.title for step in planned.steps] == seen.ran
    assert all(Store(out / "steps").record(step.id) for step in planned.steps)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": {"path": "nowhere/at/all"}}, ModelError, ["nowhere/at/all"]),
        ({"data.user": "gone.jsonl"}, DataError, ["gone.jsonl"]),
        ({"data.size": 4000}, DataError, ["4000", "36"]),
        ({"user.training": {"lr_scheduler_type": "cosin"}}, RecipeError, ["cosin"]),
        ({"model.template": "chat"}, ModelError, ["chat template"]),
        (
            {"user.lora": {"target_modules": ["v_proj", "q_prj"]}},
            ModelError,
            ["q_prj", "Did you mean 'q_proj'"],
        ),
        ({"evaluation.judges": [{"name": "beaver_dam", "path": "./no-judge"}]}, ModelError, ["no-judge"]),
        ({"user.rho": -1.0}, RecipeError, ["rho"]),
        ({"user.alignment_steps": 0, "user.finetune_steps": 0}, RecipeError, ["finetune_steps"]),
    ],
)
def test_what_cannot_be_used_stops_before_training(change, error, words, tmp_path):
    recipe = tiny.recipe(tmp_path / "in")
    for key, value in change.items():
        place = recipe
        *parents, last = key.split(".")
        for parent in parents:
            place = place[parent]
        place[last] = value
    with pytest.raises(error) as caught:
        run(recipe, tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    assert not list((tmp_path / "out" / "steps").glob("alignment-*"))
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["torn", "junk", "empty", "gone"])
def test_a_damaged_model_is_named_before_training(file, damage, tmp_path):
    recipe = tiny.recipe(tmp_path / "in")
    path = Path(recipe["model"]["path"]) / file
    whole = path.read_bytes()
    path.write_bytes({"torn": whole[: len(whole) // 2], "junk": bytes(range(256)) * 9}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    with pytest.raises(ModelError) as caught:
        run(recipe, tmp_path / "out")
    assert recipe["model"]["path"] in str(caught.value)
    assert len(str(caught.value)) < 700
    assert not list((tmp_path / "out" / "steps").glob("alignment-*"))


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not empty"):
        run(tiny.recipe(tmp_path / "in"), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_said_and_the_run_goes_on_later(done, tmp_path, monkeypatch):
    recipe, whole, expected, _ = done

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(evaluating, "generate_answers", full)
        with pytest.raises(StepFailed, match="No space left on the disk") as caught:
            run(recipe, tmp_path / "out")
        assert caught.value.exit_code == 1
    results, _ = run(recipe, tmp_path / "out")
    assert numbers(results) == numbers(expected)
    assert left(tmp_path / "out", results) == left(whole, expected)


def test_a_training_that_diverges_is_no_result(tmp_path):
    recipe = tiny.recipe(tmp_path / "in")
    recipe["user"] = {
        "defense": "sft",
        "training": {"learning_rate": 1e30, "max_steps": 6, "max_grad_norm": 0},
    }
    with pytest.raises(ModelError, match="not finite"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
