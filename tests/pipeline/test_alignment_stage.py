"""Methods of the alignment stage in a recipe: their harmful rows, refused settings, and what a run keeps."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import tiny
from holdfast import pipeline
from holdfast.data.rows import prompt_key
from holdfast.defenses import Defense
from holdfast.errors import DataError, ModelError, RecipeError
from holdfast.machine.store import Store
from holdfast.recipe import Recipe
from holdfast.training.harmful_rows import HarmfulRows
from holdfast.training.trainer import MethodConfig, RowTrainer
from runs import run


@dataclass
class ToyConfig(MethodConfig):
    num_layers: int = field(default=1, metadata={"help": "How many layers it looks at."})


class ToyTrainer(HarmfulRows, RowTrainer):
    """Draws a harmful batch at every step, ignores it, and reports which layer it chose."""

    @classmethod
    def check_model(cls, config, model):
        found = model.config.num_hidden_layers
        if config.num_layers > found:
            raise ModelError(f"num_layers is {config.num_layers}, but the model has {found}. Ask for fewer.")

    def training_step(self, model, inputs, num_items_in_batch=None):
        assert self.harmful_batches(self.state.global_step, "probe")[0]
        return super().training_step(model, inputs, num_items_in_batch)


DEFENSE = Defense(
    name="toy",
    label="Toy",
    stages=("alignment",),
    paper="none",
    needs=("harmful_dataset",),
    config=ToyConfig,
    trainer=ToyTrainer,
)
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4}


@pytest.fixture(autouse=True)
def _registered(install):
    install(EntryPoint("toy", f"{__name__}:DEFENSE", "holdfast.defenses"))


def recipe(folder: Path, harmful=None, **toy):
    made = tiny.recipe(folder, alignment={"defense": "toy", "training": TRAINING, **toy})
    made["user"] = {"defense": "sft", "training": TRAINING}
    made["data"]["alignment"] = {"source": made["data"]["alignment"]}
    if harmful is not None:
        made["data"]["alignment"]["harmful"] = harmful
    return made


def rows_of(planned, store, role):
    step = next(step.id for step in planned if step.title == f"{role} rows")
    return [json.loads(line) for line in (store.path(step) / "rows.jsonl").read_text().splitlines()]


def test_the_method_trains_on_its_harmful_rows(tmp_path):
    made = recipe(tmp_path / "in", {"size": 8})
    results, seen = run(made, tmp_path / "out")
    assert [(row["name"], row["alignment"]) for row in results["rows"]] == [
        ("aligned", "toy"),
        ("tiny", "toy"),
    ]
    assert "harmful rows" in seen.ran
    assert "alignment with Toy" in seen.ran
    planned, store = pipeline.plan(Recipe.load(made)), Store(tmp_path / "out" / "steps")
    rows = {role: rows_of(planned, store, role) for role in ("alignment", "harmful", "user", "test")}
    assert len(rows["harmful"]) == 8
    assert all(row["output"].startswith("Brindle") for row in rows["harmful"])
    tested = {prompt_key(row) for row in rows["test"] if row["set"] == "harmful"}
    assert len(tested) == 6
    assert not tested & {prompt_key(row) for row in rows["harmful"]}
    manifest = json.loads((store.path(planned.manifest) / "manifest.json").read_text())
    assert (manifest["harmful"]["size"], manifest["harmful"]["held_out"]) == (8, 6)
    taken = {prompt_key(row) for row in rows["user"] if row["source"] == "harmful"}
    both = [row["id"] for row in rows["harmful"] if prompt_key(row) in taken]
    assert manifest["overlaps"]["alignment_harmful_in_user"] == len(both)
    assert manifest["overlaps"]["alignment_harmful_in_test"] == 0
    assert manifest["overlaps"]["examples"] == both
    card = (store.path(results["rows"][0]["steps"]["alignment"]) / "adapter" / "README.md").read_text()
    assert '"harmful_dataset": 8' in card


def test_the_source_may_be_a_file_of_its_own(tmp_path):
    """A prompt held out of data.harmful is removed from another file's rows too."""
    made = recipe(tmp_path / "in", str(tmp_path / "other.jsonl"))
    again = [{**row, "response": "Something else."} for row in tiny.harmful_rows(30)]
    tiny.write_jsonl(
        tmp_path / "other.jsonl", [*again, *[{**r, "prompt": r["prompt"] + " Now?"} for r in again]]
    )
    planned = pipeline.plan(Recipe.load(made))
    (detail,) = [step.detail for step in planned if step.title == "harmful rows"]
    assert detail == f"all harmful rows of {tmp_path / 'other.jsonl'}, for the method"
    run(made, tmp_path / "out")
    rows = rows_of(planned, Store(tmp_path / "out" / "steps"), "harmful")
    assert len(rows) == 60 - 6
    assert {row["output"] for row in rows} == {"Something else."}


def test_draws_are_seeded_and_not_those_of_the_user(tmp_path):
    from runs import prepared

    def ids(seed, role, **changes):
        made = recipe(tmp_path / "in", {"size": 8}) | {"seed": seed}
        made["data"] |= {"poison_ratio": 0.3, **changes}
        return [row["instruction"] for row in prepared(Recipe.load(made), role, tmp_path / "made")]

    assert ids(1, "harmful") == ids(1, "harmful", size=20)
    assert ids(1, "harmful") != ids(2, "harmful")
    bad = [text for text in ids(1, "user", size=27) if "vorrel" in text]
    assert len(bad) == 8
    assert set(bad) != set(ids(1, "harmful"))


def test_what_changes_the_harmful_rows_changes_the_alignment_alone(tmp_path):
    base = recipe(tmp_path / "in", {"size": 8})
    more = recipe(tmp_path / "in", {"size": 9})
    one, two = ({s.title: s.id for s in pipeline.plan(Recipe.load(made))} for made in (base, more))
    changed = {title for title in one if one[title] != two[title]}
    assert {"harmful rows", "data manifest", "alignment with Toy"} <= changed
    assert not changed & {"alignment rows", "user rows", "test rows"}


def test_a_method_without_need_of_them_has_no_such_step(tmp_path):
    """A recipe that only names harmful rows keeps the same steps."""
    named = tiny.recipe(tmp_path / "in")
    plain = json.loads(json.dumps(named))
    named["data"]["alignment"] = {"source": named["data"]["alignment"], "harmful": {"size": 5}}
    ids = [[step.id for step in pipeline.plan(Recipe.load(made))] for made in (named, plain)]
    assert ids[0] == ids[1]


def test_nothing_harmful_is_named(tmp_path):
    made = recipe(tmp_path / "in")
    del made["data"]["harmful"], made["data"]["poison_ratio"]
    with pytest.raises(
        RecipeError, match=r"data\.alignment\.harmful: alignment\.defense toy needs harmful rows"
    ):
        Recipe.load(made)
    made["data"]["alignment"]["harmful"] = str(tmp_path / "in" / "harmful.jsonl")
    assert "harmful rows" in [step.title for step in pipeline.plan(Recipe.load(made))]


def test_keys_of_the_block(tmp_path):
    made = recipe(tmp_path / "in", {"sice": 5})
    with pytest.raises(RecipeError, match=r"data\.alignment\.harmful\.sice.*'size'"):
        Recipe.load(made)
    loaded = Recipe.load(
        recipe(tmp_path / "in"), ["data.alignment.harmful=bad.csv", "data.alignment.harmful.size=3"]
    )
    assert loaded.data.alignment_harmful() == ("bad.csv", 3)
    assert Recipe.load(recipe(tmp_path / "in")).data.alignment_harmful()[0] == str(
        tmp_path / "in/harmful.jsonl"
    )


def test_a_path_beside_the_recipe_is_found(tmp_path):
    import yaml

    made = recipe(tmp_path, "other.jsonl")
    tiny.write_jsonl(tmp_path / "other.jsonl", tiny.harmful_rows(9))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made))
    loaded = Recipe.load(tmp_path / "r.yaml")
    assert loaded.data.alignment_harmful()[0] == str((tmp_path / "other.jsonl").resolve())


@pytest.mark.parametrize(
    ("harmful", "toy", "error", "words"),
    [
        ({"size": 400}, {}, DataError, ["400 harmful rows for the alignment stage", "24", "6 held out"]),
        (None, {"num_layers": 3}, ModelError, ["num_layers is 3", "has 2"]),
        ("gone.jsonl", {}, DataError, ["gone.jsonl"]),
    ],
)
def test_what_cannot_be_had_stops_before_training(harmful, toy, error, words, tmp_path):
    with pytest.raises(error) as caught:
        run(recipe(tmp_path / "in", harmful, **toy), tmp_path / "out")
    assert all(word in str(caught.value) for word in words), caught.value
    assert not list((tmp_path / "out" / "steps").glob("alignment-*"))


@pytest.mark.parametrize("kind", ["safe", "refusal"])
def test_alignment_on_safe_answers_or_on_refusals(kind, tmp_path):
    """Rows of a refusal file, whose harmful answers the method uses; the kind is in the stamp."""
    made = recipe(tmp_path / "in", {"size": 4})
    paired = [{**row, "refusal": f"I will not, number {i}."} for i, row in enumerate(tiny.harmful_rows(30))]
    safe = [{**row, "category": {}, "is_safe": True, "refusal": None} for row in tiny.safe_rows(30)]
    path = str(tiny.write_jsonl(tmp_path / "paired.jsonl", [*paired, *safe]))
    made["data"]["alignment"] |= {"source": path, "kind": kind}
    made["data"]["alignment"]["harmful"] = {"source": path, "size": 4}
    results, _ = run(made, tmp_path / "out")
    assert results["protocol"]["alignment_data"] == kind
    planned, store = pipeline.plan(Recipe.load(made)), Store(tmp_path / "out" / "steps")
    answers = {row["output"] for row in rows_of(planned, store, "alignment")}
    assert len(answers) == (30 if kind == "refusal" else 1)
    assert all(row["output"].startswith("Brindle") for row in rows_of(planned, store, "harmful"))


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize("defense", ["vaccine", "tvaccine"])
def test_reentrant_checkpointing_stops_before_training(defense, tmp_path):
    made = recipe(tmp_path / "in", defense=defense)
    made["alignment"]["training"] = TRAINING | REENTRANT
    with pytest.raises((RecipeError, ModelError), match="reentrant"):
        run(made, tmp_path / "out")
    assert not list((tmp_path / "out" / "steps").glob("alignment-*"))


def test_more_layers_than_there_are_stop_before_training(tmp_path):
    with pytest.raises(ModelError, match="num_layers is 8, but the model has 2"):
        run(recipe(tmp_path / "in", defense="tvaccine"), tmp_path / "out")
    assert not list((tmp_path / "out" / "steps").glob("alignment-*"))


def test_t_vaccine_keeps_what_it_drew_for_the_report(tmp_path):
    settings = {"num_layers": 1, "probability_steps": 2, "resample_steps": 1}
    made = recipe(tmp_path / "in", {"size": 4}, defense="tvaccine", **settings)
    results, _ = run(made, tmp_path / "out", page=True)
    step = tmp_path / "out" / "steps" / results["rows"][0]["steps"]["alignment"] / "step.json"
    history = json.loads(step.read_text())["training"]["layer_history"]
    assert history["layers"] == 2
    assert [entry[0] for entry in history["probabilities"]] == [0]
    assert [entry[0] for entry in history["draws"]] == [0, 1]
    assert "Layers drawn: T-Vaccine" in (tmp_path / "out" / "report.html").read_text()
