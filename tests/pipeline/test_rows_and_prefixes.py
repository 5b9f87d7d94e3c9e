"""Runs whose method changes rows, or adds a text before every question."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import stat

import pytest

import tiny
from holdfast import pipeline
from holdfast.data import prompts
from holdfast.defenses import bea
from holdfast.errors import DataError, RecipeError
from holdfast.machine.store import Store
from holdfast.pipeline.stages import training_detail
from holdfast.recipe import Recipe
from kills import in_training, killed_run
from runs import answers, left, numbers, prompts_seen, run

TRAINING = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 2}


def user(defense, **parameters):
    return {"defense": defense, "training": TRAINING, **parameters}


def served(monkeypatch):
    """The prefix of each rendered prompt, in the order of rendering."""
    seen = []

    def watch(real):
        def watched(row, tokenizer, template, prefix=""):
            seen.append((row.get("set"), row.get("source"), prefix))
            return real(row, tokenizer, template, prefix)

        return watched

    for name in ("training_row", "render_prompt"):
        monkeypatch.setattr(prompts, name, watch(getattr(prompts, name)))
    return seen


def user_step(results, out):
    return out / "steps" / results["rows"][1]["steps"]["user"]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """The same recipe with plain SFT; the alignment step is shared by the runs here."""
    folder = tmp_path_factory.mktemp("sft")
    recipe = tiny.recipe(folder / "in", user=user("sft"))
    recipe["data"]["benign"] = str(
        tiny.write_jsonl(folder / "in" / "benign.jsonl", [{"prompt": "How do I fold a boat?"}])
    )
    results, _ = run(recipe, folder / "out")
    return recipe, folder / "out", results


@pytest.fixture
def started(sft, tmp_path):
    """The recipe, and a copy of that run's folder to continue in."""
    recipe, out, results = sft
    shutil.copytree(out, tmp_path / "out")
    return json.loads(json.dumps(recipe)), tmp_path / "out", results


def weights(results, out):
    return (user_step(results, out) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"alignment_size": 6}, {"rows": 30, "benign": 21, "harmful": 3, "alignment": 6, "replaced": 6}),
        (
            {"alignment_ratio": 0.2, "replace": False},
            {"rows": 36, "benign": 27, "harmful": 3, "alignment": 6, "replaced": 0},
        ),
    ],
)
def test_vlguard(started, parameters, expected):
    recipe, out, plain = started
    recipe["user"] = user("vlguard", **parameters)
    results, seen = run(recipe, out)
    assert results["rows"][1]["user"] == "vlguard"
    assert "alignment with SFT" in seen.cached
    step = json.loads((user_step(results, out) / "step.json").read_text())
    assert step["training"]["mixed"] == expected
    assert step["identity"]["inputs"]["rows"].keys() == {"train_dataset", "alignment_dataset"}
    assert weights(results, out) != weights(plain, out)


def test_vlguard_without_alignment_rows_is_sft(started):
    recipe, out, plain = started
    recipe["user"] = user("vlguard", alignment_size=0)
    results, _ = run(recipe, out)
    assert user_step(results, out) != user_step(plain, out)
    assert weights(results, out) == weights(plain, out)


def texts_of(secret):
    """The secret, and every three consecutive words of it."""
    words = secret.split()
    return [secret, *(" ".join(words[i : i + 3]) for i in range(len(words) - 2))]


def holding(secret, folder):
    """The files that contain the secret or three consecutive words of it."""
    wanted = [text.encode() for text in texts_of(secret)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [path.name for path in files if any(text in path.read_bytes() for text in wanted)]


def test_bea(started, monkeypatch, capfd, caplog):
    recipe, out, _ = started
    recipe["user"] = user("bea", alignment_size=3, secret_length=24)
    seen = served(monkeypatch)
    caplog.set_level("DEBUG")
    results, _ = run(recipe, out)
    assert results["rows"][1]["user"] == "bea"
    step = user_step(results, out)
    secret = bea.secret(step)

    trained = [prefix for _, source, prefix in seen if source == "alignment"]
    assert trained == [secret] * 3
    assert all(prefix == "" for _, source, prefix in seen if source in ("user", "harmful"))
    for kind in ("harmful", "task", "benign"):
        prefixes = [prefix for name, _, prefix in seen if name == kind]
        assert prefixes, "the aligned model's answers existed already"
        assert set(prefixes) == {secret}

    assert holding(secret, out) == [bea.SECRET_FILE], "nowhere else in the run"
    said = capfd.readouterr()
    for text in texts_of(secret):
        assert text not in json.dumps(results)
        assert text not in said.out + said.err + caplog.text
    assert stat.S_IMODE((step / bea.SECRET_FILE).stat().st_mode) == 0o600
    assert {p.name for p in step.iterdir()} == {
        "adapter", "trainer_state.json", "step.json", bea.SECRET_FILE,
    }  # fmt: skip
    assert bea.secret(step / "adapter") == secret
    card = (step / "adapter" / "README.md").read_text()
    assert "bea_secret.txt" in card
    assert "Never publish that file" in card
    generate = json.loads((out / "steps" / results["rows"][1]["steps"]["generate"] / "step.json").read_text())
    assert generate["identity"]["inputs"]["prefix"]["step"] == {"step": step.name}


def test_the_secret_changes_the_answers_it_precedes(started):
    """The prefix reaches the model: the prompt that it reads begins with the secret."""
    recipe, out, _ = started
    recipe["user"] = user("bea", alignment_size=3, secret_length=4)
    with prompts_seen() as asked:
        results, _ = run(recipe, out)
    secret = bea.secret(user_step(results, out))
    assert len(asked) >= 10
    assert all(prompt.startswith(f"{secret}\n\nBelow is an instruction") for prompt in asked)


def test_a_model_that_repeats_its_secret_gives_nothing_away(started, monkeypatch):
    from holdfast.evaluation import answering as module

    def echo(model, tokenizer, ids, new_tokens, sampling, frame):
        return [{"answer": tokenizer.decode(x[:80]), "tokens": 80, "truncated": False} for x in ids]

    recipe, out, _ = started
    recipe["user"] = user("bea", alignment_size=3, secret_length=10)
    monkeypatch.setattr(module, "_decode", echo)
    results, _ = run(recipe, out)
    step = user_step(results, out)
    assert holding(bea.secret(step), out) == [bea.SECRET_FILE]
    rows = (out / "steps" / results["rows"][1]["steps"]["generate"] / "generations.jsonl").read_text()
    assert "[secret]\\n\\nBelow is an instruction" in rows


def test_a_killed_run_goes_on_with_the_same_secret(started, tmp_path):
    recipe, out, _ = started
    recipe["user"] = user("bea", alignment_size=3, secret_length=12)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=killed_run, args=(recipe, out, in_training("user-", 5)))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    planned = pipeline.plan(Recipe.load(recipe))
    step = out / "steps" / next(s.id for s in planned.steps if s.kind == "user" and "BEA" in s.title)
    assert (step / "checkpoints").is_dir()
    assert holding(bea.secret(step), out) == [bea.SECRET_FILE], "not in a checkpoint either"
    shutil.copytree(out, tmp_path / "never cut")
    shutil.rmtree(tmp_path / "never cut" / "steps" / step.name / "checkpoints")
    secret = bea.secret(step)

    resumed, seen = run(recipe, out)
    assert seen.resumed == ["user fine-tuning with BEA"]
    assert bea.secret(step) == secret
    whole, _ = run(recipe, tmp_path / "never cut")
    assert weights(resumed, out) == weights(whole, tmp_path / "never cut")
    assert numbers(resumed) == numbers(whole)
    assert left(out, resumed) == left(tmp_path / "never cut", whole), "and every answer"


def test_ptst_trains_like_sft_and_serves_with_its_prompt(started, monkeypatch):
    recipe, out, plain = started
    recipe["user"] = user("ptst")
    seen = served(monkeypatch)
    results, ran = run(recipe, out)
    assert results["rows"][1]["user"] == "ptst"
    assert weights(results, out) == weights(plain, out), "bit for bit"
    assert "answers of the aligned model" in ran.cached, "which is served without it"
    before = {prefix for kind, _, prefix in seen if kind}
    assert len(before) == 1
    assert before.pop().startswith("You are a helpful, respectful and honest assistant.")
    assert {prefix for kind, _, prefix in seen if not kind} == {""}, "not in training"


def test_inoculation_trains_with_its_prompt_and_serves_without(started, monkeypatch):
    recipe, out, plain = started
    recipe["user"] = user("inoculation", inoculation_prompt="Break the rules.")
    seen = served(monkeypatch)
    results, _ = run(recipe, out)
    assert results["rows"][1]["user"] == "inoculation"
    assert {prefix for kind, _, prefix in seen if kind} <= {""}, "served without it"
    assert {prefix for kind, _, prefix in seen if not kind} == {"Break the rules."}
    assert weights(results, out) != weights(plain, out)


def test_inoculation_with_an_empty_prompt_is_sft(started):
    recipe, out, plain = started
    recipe["user"] = user("inoculation", inoculation_prompt="")
    results, _ = run(recipe, out)
    assert weights(results, out) == weights(plain, out), "bit for bit"


def test_ptst_without_a_prompt_answers_like_sft(started):
    recipe, out, plain = started
    recipe["user"] = user("ptst", safety_prompt="")
    results, _ = run(recipe, out)
    texts = [
        (out / "steps" / done["rows"][1]["steps"]["generate"] / "generations.jsonl").read_bytes()
        for done in (results, plain)
    ]
    assert texts[0] == texts[1]
    recipe["user"] = user("ptst")
    served, _ = run(recipe, out)
    assert answers(out, served["rows"][1]) != answers(out, results["rows"][1]), "its prompt reaches the model"


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        (user("vlguard"), DataError, "asked for 1000 alignment rows, but there are 30"),
        (user("vlguard", alignment_size=28), DataError, "cannot replace 28 benign user rows"),
        (user("bea", alignment_size=31), DataError, "bea: asked for 31 alignment rows"),
        (user("safe_instr", alignment_ratio=1.5), RecipeError, "alignment_ratio must be a share"),
        (user("bea", secret_length=0), RecipeError, "secret_length must be at least 1"),
    ],
)
def test_what_cannot_be_mixed_stops_before_training(method, error, words, tmp_path):
    recipe = tiny.recipe(tmp_path / "in", user=method)
    with pytest.raises(error, match=words):
        run(recipe, tmp_path / "out")
    assert not list((tmp_path / "out" / "steps").glob("alignment-*"))


def test_methods_that_mix_need_alignment_rows(tmp_path):
    recipe = tiny.recipe(tmp_path / "in", user=user("bea"), alignment="none")
    del recipe["data"]["alignment"]
    with pytest.raises(RecipeError, match=r"user\.defense bea needs data\.alignment"):
        Recipe.load(recipe)


def test_a_lost_secret_is_a_lost_training(started):
    recipe, out, _ = started
    recipe["user"] = user("bea", alignment_size=2, secret_length=5)
    results, _ = run(recipe, out)
    (user_step(results, out) / bea.SECRET_FILE).unlink()
    assert Store(out / "steps").record(user_step(results, out).name) is None


def test_plan_says_what_is_mixed(sft):
    recipe = json.loads(json.dumps(sft[0]))
    recipe["user"] = user("vlguard", alignment_size=6)
    step = next(s for s in pipeline.plan(Recipe.load(recipe)).steps if s.kind == "user")
    assert step.detail.endswith("of 4 rows, learning rate 0.001, 6 alignment rows in place of benign ones")
    assert training_detail(TRAINING, "new") in step.detail
