"""Judges in a recipe: options, users' own files, entry points, identities; and the page about judges."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

import tiny
from holdfast import registry
from holdfast.errors import InputError, ModelError, RecipeError, StepFailed
from holdfast.machine.files import read_json
from holdfast.machine.store import Store
from holdfast.measuring import judging
from holdfast.pipeline import plan, rehearse, run
from holdfast.recipe import Recipe
from holdfast.recipe.evaluation import JudgeRecipe
from holdfast.reporting.collect import collect
from holdfast.weights.adapter_folder import find_adapter
from holdfast.weights.folders import find_model

PAGE = Path(__file__).parents[2] / "docs" / "judges.md"


def blocks(language):
    return re.findall(rf"(<!-- [^\n]* -->\n)?```{language}\n(.*?)```", PAGE.read_text(), re.S)


def refused(tmp_path, judge, match):
    with pytest.raises(RecipeError, match=match):
        Recipe.load(tiny.recipe(tmp_path, evaluation={"judges": [judge]}))


@pytest.mark.parametrize(
    ("judge", "match"),
    [
        ("keywrod", "Did you mean 'keyword'"),
        ({"name": "keyword", "quantization": "nf4"}, "quantization.*keyword has no such option"),
        ({"name": "llama_guard", "quantization": "nf5"}, "quantization"),
        ({"name": "openai"}, "openai needs model"),
        ({"name": "openai", "model": "m", "max_calls": 0}, "max_calls"),
        ({"name": "mt_bench", "model": "m"}, "no verdict on harm"),
        ("nowhere.py", "no file nowhere.py"),
        ({"name": "beaver_dam", "path": ""}, "path: expected a text that is not empty"),
        ({"name": "keyword", "label": "A/B"}, "at most 40 letters from A to Z"),
    ],
)
def test_what_a_judge_does_not_take_is_refused(tmp_path, judge, match):
    refused(tmp_path, judge, match)


def test_what_would_stop_a_judge_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    recipe = Recipe.load(tiny.recipe(tmp_path, evaluation={"judges": [{"name": "openai", "model": "m"}]}))
    with pytest.raises(ModelError, match="OPENAI_API_KEY"):
        run(recipe, out=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("generations.jsonl"))
    judge = {"name": "harmbench", "path": str(tmp_path / "model"), "threshold": 0.3}
    with pytest.raises(RecipeError, match="threshold"):
        judging.check_judge(JudgeRecipe(**judge))


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The refusal of a recipe with a block `evaluation`, from planning it or from the checks before a run."""
    folder = tmp_path_factory.mktemp("planned")
    base = tiny.recipe(folder, alignment="none", user="none")
    classifier = tiny.save_judge(folder / "classifier")
    softmax = shutil.copytree(classifier, folder / "softmax")
    config = read_json(softmax / "config.json") | {"problem_type": "single_label_classification"}
    (softmax / "config.json").write_text(json.dumps(config))
    (folder / "latin.txt").write_bytes("Keine Äpfel.".encode("latin-1"))

    def refusal(evaluation):
        text = yaml.safe_dump({**base, "evaluation": evaluation}, sort_keys=False)
        (folder / "r.yaml").write_text(text.replace("FOLDER", str(folder)))
        with pytest.raises(InputError) as caught:
            rehearse(plan(Recipe.load(folder / "r.yaml")), Store(folder / "nothing"), device="cpu")
        return str(caught.value)

    return refusal


SERVER = {"name": "openai", "model": "m", "base_url": "http://localhost:1/v1"}


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ({"name": "keyword", "threshold": 0.3}, "threshold: a judge that looks for refusals"),
        ({"name": "keyword", "path": "FOLDER/model"}, "path: a judge that looks for refusals"),
        ({"name": "keyword_published", "max_length": 9}, "max_length: a judge that looks for refusals"),
        ({"name": "beaver_dam", "path": "FOLDER/nowhere"}, "No such model folder"),
        (
            {"name": "beaver_dam", "path": "FOLDER"},
            "Expected a model folder with config.json, found none in ",
        ),
        (
            {"name": "beaver_dam", "path": "FOLDER/model"},
            "holds no classifier: its weights lack score.weight",
        ),
        ({"name": "beaver_dam", "path": "FOLDER/softmax"}, "problem_type in config.json"),
        ({"name": "beaver_dam", "path": "FOLDER/classifier", "max_length": 513}, "has 512 positions"),
        ({"name": "harmbench", "path": "FOLDER/classifier"}, "lack lm_head.weight"),
        ({"name": "wildguard", "path": "FOLDER/classifier"}, "lack lm_head.weight"),
        ({"name": "llama_guard", "path": "FOLDER/model"}, "no chat template that shows a question"),
        ({"name": "shieldgemma", "path": "FOLDER/model"}, "no token 'Yes'"),
        ({"name": "strongreject", "path": "FOLDER/classifier"}, "lack lm_head.weight"),
        ({"name": "strongreject", "path": "FOLDER/model", "base": "FOLDER"}, "no adapter on a base"),
        ({**SERVER, "path": "FOLDER/model"}, "path: judge openai asks a server"),
        ({**SERVER, "policy": "FOLDER/latin.txt"}, "latin.txt is not UTF-8"),
        ({**SERVER, "policy": "FOLDER/nowhere.txt"}, "nowhere.txt cannot be read (No such file"),
        ({**SERVER, "base_url": "http://localhost:99999/v1"}, "base_url: expected an address"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused_with_its_line_before_training(planned, judge, words):
    found = planned({"judges": [{"name": "keyword", "label": "first"}, judge]})
    assert words in found
    assert re.search(r"r\.yaml, line \d+: ", found)
    assert found.count("r.yaml") == 1


def test_a_rater_for_rows_that_need_none_is_refused_with_its_line(planned):
    found = planned({"prompts": 6, "rater": {**SERVER, "name": "mt_bench"}})
    assert re.search(
        r"r\.yaml, line \d+: evaluation.rater: .* your own rows are graded without a judge", found
    )


def test_a_revision_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    for find in (find_model, find_adapter):
        with pytest.raises(ModelError, match="so the revision 'v2' has no effect"):
            find(str(tmp_path / "model"), "v2")
    for number in range(12):
        (tmp_path / f"other{number}").mkdir()
    with pytest.raises(ModelError) as caught:
        find_model(str(tmp_path / "zzz"))
    assert str(caught.value) == f"No such model folder: {tmp_path}/zzz.", "a long list helps nobody"


def test_files_are_looked_up_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "there" / "tasks").mkdir(parents=True)
    (tmp_path / "there" / "policy.txt").write_text("No vorrelling.")
    judges = [
        {"name": "openai", "model": "m", "policy": "policy.txt"},
        {"name": "beaver_dam", "path": "world"},
    ]
    asked = {"judges": judges, "lm_eval": {"tasks": ["mine"], "include_path": "tasks"}}
    text = yaml.safe_dump(tiny.recipe(tmp_path / "data", evaluation=asked))
    (tmp_path / "there" / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    evaluation = Recipe.load("there/recipe.yaml").evaluation
    assert evaluation.lm_eval.include_path == str((tmp_path / "there" / "tasks").resolve())
    first, second = evaluation.judges
    assert first.policy == str((tmp_path / "there" / "policy.txt").resolve())
    assert second.path == "world"


def test_identities_hold_what_decides_the_verdicts(tmp_path):
    def identity(**judge):
        return judging.judge_identity(JudgeRecipe(**judge))

    assert identity(name="keyword") == {
        "model": None, "threshold": None, "max_length": None, "options": {},
    }  # fmt: skip
    policy = tmp_path / "policy.txt"
    policy.write_text("No vorrelling.")
    first = identity(name="openai", model="m", policy=str(policy))
    assert (
        identity(name="openai", model="m", policy=str(policy), base_url="http://x/v1", max_calls=3) == first
    )
    assert identity(name="openai", model="n", policy=str(policy)) != first
    policy.write_text("No drumbling.")
    assert identity(name="openai", model="m", policy=str(policy)) != first


def test_the_page_names_every_judge_with_what_the_registry_says():
    rows = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = cells
    faces = {
        name: face for name, face in registry.faces("judges").items() if face.module.startswith("holdfast.")
    }
    assert set(rows) == set(faces)
    for name, face in faces.items():
        assert rows[name][1] == face.facts["source"]
        assert rows[name][2] == face.facts["licence"]
        assert rows[name][6] == face.facts["version"]
        better = "higher" if face.facts.get("direction") == "higher" else None
        assert better is None or better in rows[name][3]
        for option in face.facts.get("options", ()):
            assert f"`{option}" in PAGE.read_text() or option == "base"


def test_the_recipes_of_the_page_are_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_judge.py").write_text(blocks("python")[0][1])
    found = blocks("yaml")
    assert len(found) == 5
    for _, block in found:
        Recipe.load({**tiny.recipe(tmp_path), **yaml.safe_load(block)})


def test_the_judge_of_the_page_runs_as_a_file(tmp_path, monkeypatch):
    """In a recipe with a second judge: the results have their agreement, and a changed file judges again."""
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[0][1]
    (tmp_path / "my_judge.py").write_text(code)
    recipe = tiny.recipe(
        tmp_path, evaluation={"judges": ["my_judge.py", "keyword"], "prompts": 6, "max_new_tokens": 4}
    )
    recipe |= {"alignment": None, "user": {"defense": "sft", "training": recipe["user"]["training"]}}
    results = run(Recipe.load(recipe), out=tmp_path / "out")
    row = results["rows"][-1]
    assert set(row["judges"]) == {"my_judge.py", "keyword"}
    assert results["protocol"]["judge"] == "long_answers@1/0.5"
    (pair,) = row["agreement"]
    assert pair["judges"] == ["my_judge.py", "keyword"]
    assert pair["n"] + pair["one_unparsed"] == 6
    assert row["judges"]["my_judge.py"]["harmful_score"] in (0.0, None)
    assert "Agreement of the judges" in (tmp_path / "out" / "report.html").read_text()
    steps = row["steps"]["moderate"]
    (tmp_path / "my_judge.py").write_text(code.replace("100 * self.threshold", "-1"))
    again = run(Recipe.load(recipe), out=tmp_path / "out")["rows"][-1]
    assert again["judges"]["my_judge.py"]["harmful_score"] in (100.0, None)
    assert again["steps"]["moderate"][0] != steps[0]
    assert again["steps"]["moderate"][1] == steps[1]
    assert read_json(tmp_path / "out" / "steps" / steps[1] / "step.json")["judge_stamp"].startswith(
        "keyword@3"
    )


def test_the_same_judge_twice_by_a_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_judge.py").write_text(blocks("python")[0][1])
    twice = ["my_judge.py", {"name": "my_judge.py", "threshold": 0}]
    with pytest.raises(RecipeError, match=r"my_judge.py appears twice; give one a label.*label: second"):
        Recipe.load(tiny.recipe(tmp_path, evaluation={"judges": twice}))
    twice[0] = {"name": "my_judge.py", "label": "patient"}
    recipe = tiny.recipe(tmp_path, evaluation={"judges": twice, "prompts": 6, "max_new_tokens": 8})
    recipe |= {"alignment": None, "user": None}
    results = run(Recipe.load(recipe), out=tmp_path / "out")
    (row,) = results["rows"]
    assert list(row["judges"]) == ["patient", "my_judge.py"]
    assert row["judge"] == "patient"
    assert row["judges"]["patient"] != row["judges"]["my_judge.py"], "one has another threshold"
    assert row["agreement"][0]["judges"] == ["patient", "my_judge.py"]
    assert collect([tmp_path / "out"]).headline_judge == "patient", "though the stamp names the file"
    twice[0]["label"] = "slow"
    again = run(Recipe.load(recipe), out=tmp_path / "out")["rows"][0]
    assert list(again["judges"]) == ["slow", "my_judge.py"]
    assert again["steps"]["moderate"] == row["steps"]["moderate"], "a new label does not judge again"


def test_a_judge_that_gives_no_verdicts_stops_the_run(tmp_path, monkeypatch):
    """Its verdicts are kept: with a larger `max_unparsed` nothing is judged again."""
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[0][1].replace("if count == 0:", "if count != -1:")
    (tmp_path / "my_judge.py").write_text(code)
    evaluation = {"judges": ["keyword", "my_judge.py"], "prompts": 6, "max_new_tokens": 8}
    recipe = tiny.recipe(tmp_path, evaluation=evaluation) | {"alignment": None, "user": None}
    with pytest.raises(StepFailed, match=r"Judge my_judge\.py gave no verdict on (\d) of \1 answers"):
        run(Recipe.load(recipe), out=tmp_path / "out")
    steps = {path.parent.name for path in (tmp_path / "out" / "steps").glob("moderate-*/step.json")}
    recipe["evaluation"]["max_unparsed"] = 1
    (row,) = run(Recipe.load(recipe), out=tmp_path / "out")["rows"]
    assert set(row["steps"]["moderate"]) == steps
    assert row["judges"]["my_judge.py"]["harmful_score"] is None


def test_a_file_that_is_no_judge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(RecipeError, match="does not end in `JUDGE"):
        registry.face("judges", "empty.py")
    (tmp_path / "broken.py").write_text("raise RuntimeError('oh')\nJUDGE = Judge(name='x', version='1')\n")
    assert registry.face("judges", "broken.py").name == "x", "the file is read, not run"
    with pytest.raises(RecipeError, match=r"broken\.py cannot be imported: RuntimeError: oh"):
        registry.get("judges", "broken.py")


def test_a_judge_of_another_package(tmp_path, monkeypatch, install):
    (tmp_path / "long_answers.py").write_text(blocks("python")[0][1])
    monkeypatch.syspath_prepend(tmp_path)
    install(EntryPoint("long_answers", "long_answers:JUDGE", "holdfast.judges"))
    try:
        assert JudgeRecipe(name="long_answers").options() == {}
        judge = registry.get("judges", "long_answers").load(threshold=0.01)
        assert [v.verdict for v in judge(["q", "q", "q"], ["one two", "one", ""])] == [
            "harmful",
            "safe",
            "unparsed",
        ]
    finally:
        sys.modules.pop("long_answers", None)


def test_the_other_scripts_of_the_page_run(capsys):
    for mark, script in blocks("python")[1:]:
        if "needs a server" in mark:
            compile(script, "judges.md", "exec")
        else:
            exec(compile(script, "judges.md", "exec"), {})
    assert capsys.readouterr().out == "safe i'm sorry\n"


def test_the_list_of_judges_tells_all():
    from typer.testing import CliRunner

    from holdfast.cli.app import app

    shown = " ".join(CliRunner().invoke(app, ["list", "judges"], env={"COLUMNS": "250"}).output.split())
    assert "allenai/wildguard" in shown
    assert "lower is better" in shown
    assert "higher is better" in shown
    assert "version 1" in shown
