"""The checks before a run: everything is found at once, before anything is trained, by `run` and `plan` alike."""

from __future__ import annotations

import json

import pytest
import yaml

import tiny
from holdfast import Recipe, pipeline
from holdfast.data import places_of
from holdfast.errors import DataError, InputError, Problems, RecipeError
from holdfast.machine.store import Store
from holdfast.pipeline import dry_run, rows_checked
from runs import run

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + tiny.CHAT
)


def turns(number, *first):
    asked = {"role": "user", "content": f"Is {number} small?"}
    return {"messages": [*first, asked, {"role": "assistant", "content": "yes"}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A chat model whose template refuses a system message, and rows of which three cannot be trained on."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny.save_lively_model(folder / "model", chat=True)
    (model / "chat_template.jinja").write_text(NO_SYSTEM, encoding="utf-8")
    rows = [turns(i) for i in range(30)]
    rows[17] = turns(17, {"role": "system", "content": "Be brief."})
    rows[21]["messages"][0]["content"] = "small " * 60
    tiny.write_jsonl(folder / "mine.jsonl", rows)
    safe = tiny.safe_rows(12)
    safe[4]["prompt"] = "vorrel " * 60
    tiny.write_jsonl(folder / "safe.jsonl", safe)
    return folder


def write(made, name="r.yaml", **changes):
    recipe = {
        "name": "r",
        "model": {"path": str(made / "model"), "lora": {"r": 2}},
        "data": {"user": str(made / "mine.jsonl"), "alignment": str(made / "safe.jsonl")},
        "alignment": {"defense": "sft", "training": {"max_steps": 2, "max_length": 40}},
        "user": {"defense": "sft", "training": {"max_steps": 2, "max_length": 40}},
        "evaluation": {"max_new_tokens": 4},
    }
    path = made / name
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False), encoding="utf-8")
    return path


def both(path, out):
    """The texts with which `run` and `plan` refuse a recipe, which must be the same."""
    with pytest.raises(InputError) as ran:
        run(path, out)
    planned = pipeline.plan(Recipe.load(path))
    with pytest.raises(InputError) as rehearsed:
        pipeline.rehearse(planned, Store(out / "nothing"), device="cpu")
    assert str(ran.value) == str(rehearsed.value)
    assert not (out / "nothing").exists()
    assert not list(out.rglob("*.safetensors"))
    assert not [p for p in (out / "steps").glob("*-*") if p.name.split("-")[0] not in ("data", "manifest")]
    return ran.value


def test_every_row_that_cannot_be_used_is_listed_with_file_and_line(made, tmp_path):
    found = str(both(write(made), tmp_path))
    assert "mine.jsonl, line 18: the model's chat template refuses it: System role not supported" in found
    assert "mine.jsonl, line 22: the prompt alone has" in found
    assert "2 of 27 user rows" in found, "three are held out for the test"
    assert found.index("line 18") < found.index("line 22")
    assert "safe.jsonl, line 5: the prompt alone has" in found
    assert "drop the row" in found


def test_all_problems_are_found_at_once_with_the_line_of_the_recipe(made, tmp_path):
    good = {"max_steps": 2, "max_length": 40}
    path = write(
        made,
        data={
            "user": str(tiny.write_jsonl(tmp_path / "few.jsonl", tiny.user_rows(20))),
            "alignment": str(tiny.write_jsonl(tmp_path / "safe.jsonl", tiny.safe_rows(12))),
        },
        alignment={"defense": "sft", "training": {**good, "optim": "galore_adamw"}},
        user={"defense": "vlguard", "alignment_size": 500, "training": {**good, "optim": "lomo"}},
    )
    found = both(path, tmp_path / "out")
    assert isinstance(found, Problems)
    lines = path.read_text().split("\n")
    stages = {name: lines.index(f"{name}:") + 1 for name in ("alignment", "user")}
    text = str(found)
    assert f"{path}, line {stages['alignment']}: sft: the training cannot start: You need to install" in text
    assert f"{path}, line {stages['user']}: " in text
    assert "500" in text, "there are only 12 rows for VLGuard"
    assert found.exit_code == 2


def test_a_run_whose_user_rows_would_not_be_trained_on_is_refused(tmp_path):
    made = tiny.recipe(tmp_path / "in")
    made["user"] = {"defense": "lisa", "alignment_steps": 50, "training": made["user"]["training"]}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    found = str(both(path, tmp_path / "out"))
    assert "the run has 8 optimizer steps, and the first alignment phase takes 50 (alignment_steps)" in found
    assert "alignment_steps=1 and finetune_steps=18" in found


@pytest.mark.parametrize(
    ("training", "what"),
    [
        ({"use_liger_kernel": True}, "liger-kernel"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"optim": "schedule_free_adamw"}, "schedulefree"),
        ({"optim": "no_such_optimizer"}, "no_such_optimizer"),
        ({"fp16": True}, "fp16"),
    ],
)
def test_a_training_argument_that_does_not_work_here_is_refused(training, what):
    with pytest.raises(RecipeError, match=what):
        dry_run.take_a_step("user.training", training, "cpu")


def test_arguments_that_work_are_accepted_once_for_all_stages():
    given = {"learning_rate": 1e-3, "num_train_epochs": 3, "bf16": True, "warmup_steps": 0.1}
    dry_run.take_a_step("alignment.training", given, "cpu")
    before = dry_run._stepped.cache_info().hits
    dry_run.take_a_step("user.training", given, "cpu")
    assert dry_run._stepped.cache_info().hits == before + 1


def test_rows_beyond_the_positions_or_the_tokens_of_a_model_are_refused():
    tokenizer = tiny.tokenizer()
    rows = [{"id": "user-1", "instruction": "How?", "input": "", "output": "small " * 50}]
    common = {"tokenizer": tokenizer, "template": "alpaca", "progress": lambda *_: None}

    def check(tokens, positions, most=2048):
        limits = rows_checked.Limits(tokens, positions)
        return rows_checked.check_training_rows(rows, 1, "user rows", max_length=most, model=limits, **common)

    assert check(len(tokenizer), None) == 0
    assert check(len(tokenizer), 100, most=100) == 1, "one row is cut"
    with pytest.raises(DataError, match="only 100 positions"):
        check(len(tokenizer), 100)
    with pytest.raises(DataError, match="of the tokenizer is not in the model, which knows 50 tokens"):
        check(50, None)


def test_many_bad_rows_are_counted():
    bad = rows_checked.BadRows({f"user-{i}": "no" for i in range(25)}, 100, "user rows")
    assert "25 of 100 user rows" in str(bad)
    assert str(bad).endswith("... and 5 more")


def test_places_of_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\nHow?,So\nWhy?,No\n", encoding="utf-8")
    from holdfast.data import read_records, to_rows

    rows = to_rows(read_records(path), role="user")
    assert places_of([rows[1]["id"], "user-000000000000"], [(path, "user")]) == {
        rows[1]["id"]: f"{path}, line 3"
    }


def test_settings_that_transformers_refuses_to_save_stay_those_of_the_folder(tmp_path):
    """Llama-2's file sets a temperature without sampling; a training of all weights saves it unchanged."""
    recipe = tiny.recipe(tmp_path / "in", alignment=None)
    recipe["model"] = {"path": recipe["model"]["path"], "lora": "none", "dtype": "float32"}
    recipe["user"] = {"defense": "sft", "training": {"max_steps": 2}}
    settings = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}
    given = tmp_path / "in" / "model" / "generation_config.json"
    given.write_text(json.dumps(settings), encoding="utf-8")
    results, _ = run(recipe, tmp_path / "out")
    step = results["rows"][1]["steps"]["user"]
    kept = tmp_path / "out" / "steps" / step / "model" / "generation_config.json"
    assert json.loads(kept.read_text()) == settings


def test_bad_rows_of_a_file_in_two_roles_are_listed_once(made, tmp_path):
    rows = [turns(i) for i in range(9)] + [{"messages": "no list"}]
    user = tiny.write_jsonl(tmp_path / "bad.jsonl", rows)
    path = write(made, "twice.yaml", data={"user": str(user)}, alignment="none")
    assert str(both(path, tmp_path / "out")).count("line 10: ") == 1
