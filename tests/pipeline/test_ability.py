"""`evaluation.lm_eval`: its step, its results and its refusals, with a stand-in for the harness, and with it."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

import tiny
from holdfast.errors import RecipeError
from holdfast.machine import store
from holdfast.measuring import ability
from holdfast.pipeline import plan
from holdfast.recipe import Recipe
from holdfast.reporting.ability import ability_table
from holdfast.reporting.collect import collect
from runs import run

REAL = importlib.util.find_spec("lm_eval") is not None
STAND_IN = '''
import json, os

def simple_evaluate(model, tasks, **options):
    """What the harness returns for two groups of questions, and a record of how it was asked."""
    options.pop("task_manager")
    with open(os.environ["ASKED"], "a") as file:
        file.write(json.dumps({"model": type(model.pretrained).__name__, "tasks": tasks, **options}) + "\\n")
    acc = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4}
    return {
        "results": {"tea_a": acc, "tea_b": {**acc, "acc,none": 0.7},
                    "say": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A",
                            "exact_match,flexible-extract": 0.75, "exact_match_stderr,flexible-extract": 0.2}},
        "groups": {"tea": {**acc, "acc,none": 0.6}},
        "group_subtasks": {"tea": ["tea_a", "tea_b"]},
        "versions": {"tea_a": 2.0, "tea_b": 2.0, "say": 3.0}, "n-shot": {"tea_a": 5, "tea_b": 5, "say": 0},
        "higher_is_better": {"tea": {"acc": True}, "say": {"exact_match": True}},
        "n-samples": {n: {"original": 9, "effective": 4} for n in ("tea_a", "tea_b", "say")},
    }
'''
TASKS = """
class Task:
    def __init__(self, unsafe=False):
        self.UNSAFE_CODE = unsafe

class TaskManager:
    all_tasks = ["tea", "tea_a", "tea_b", "say", "code", "gone"]
    def __init__(self, include_path=None):
        self.include_path = include_path
    def load(self, names):
        if names == ["gone"]:
            raise ConnectionError("the data set cannot be reached")
        return {"tasks": {name: Task(name == "code") for name in names}}
"""
MODELS = """
class HFLM:
    def __init__(self, pretrained, tokenizer, backend, batch_size):
        self.pretrained = pretrained
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """A package that answers as lm-evaluation-harness does; returns the file with what it was asked."""
    folder = tmp_path / "site"
    files = {
        "lm_eval/__init__.py": STAND_IN,
        "lm_eval/tasks/__init__.py": TASKS,
        "lm_eval/models/__init__.py": "",
        "lm_eval/models/huggingface.py": MODELS,
        "lm_eval-9.8.7.dist-info/METADATA": "Metadata-Version: 2.1\nName: lm_eval\nVersion: 9.8.7\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setenv("ASKED", str(tmp_path / "asked.jsonl"))
    _forget()
    monkeypatch.syspath_prepend(folder)
    yield tmp_path / "asked.jsonl"
    _forget()


def _forget():
    store.versions.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


def asking(folder, names, **more):
    """A recipe that trains nothing and asks for some tasks."""
    made = tiny.recipe(folder, alignment="none", user="none")
    return {**made, "evaluation": {**made["evaluation"], "lm_eval": names, **more}}


def test_the_results_are_in_the_row_the_stamp_and_the_report(tmp_path, harness):
    block = {"tasks": ["tea", "say"], "limit": 4}
    results, seen = run(asking(tmp_path, block, system="Be brief."), tmp_path / "out", page=True)
    assert "general ability of the base model" in seen.ran
    (asked,) = [json.loads(line) for line in harness.read_text().splitlines()]
    assert (asked["model"], asked["tasks"], asked["limit"]) == ("LlamaForCausalLM", ["tea", "say"], 4)
    assert (asked["system_instruction"], asked["apply_chat_template"]) == ("Be brief.", False)
    found = results["rows"][0]["lm_eval"]
    assert (found["tea"]["n"], found["tea"]["num_fewshot"], found["tea"]["version"]) == (8, 5, 2.0)
    assert found["tea"]["metrics"] == [
        {"metric": "acc", "filter": "none", "value": 0.6, "stderr": 0.1, "higher_is_better": True}
    ]
    assert [(m["filter"], m["value"], m["stderr"]) for m in found["say"]["metrics"]] == [
        ("strict-match", 0.25, None), ("flexible-extract", 0.75, 0.2),
    ]  # fmt: skip
    assert results["protocol"]["lm_eval"] == {
        "harness": "9.8.7", "tasks": ["tea@2.0, 5-shot", "say@3.0, 0-shot"], "limit": 4, "chat_template": False,
    }  # fmt: skip
    assert results["versions"]["lm_eval"] == "9.8.7"
    columns = ability_table(collect([tmp_path / "out"]).rows)
    assert [(c.title, c.explain, c.better, c.cells[0].text) for c in columns] == [
        ("tea", "acc", "higher", "0.6000"),
        ("say", "exact_match, strict-match", "higher", "0.2500"),
        ("say", "exact_match, flexible-extract", "higher", "0.7500"),
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h3>General ability</h3>" in page
    assert "± 0.1000" in page
    # A second start computes nothing, and only its own inputs name the step.
    step = results["rows"][0]["steps"]["lm_eval"]
    assert run(asking(tmp_path, block, system="Be brief."), tmp_path / "out")[1].ran == []
    for other, same in (
        ({**block, "limit": 3}, False),
        ({**block, "include_path": str(tmp_path / "site")}, False),
    ):
        ids = [one.id for one in plan(Recipe.load(asking(tmp_path, other, system="Be brief.")))]
        assert (step in ids) is same


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["taa"], r"lm-evaluation-harness 9\.8\.7 has no task 'taa'\. Did you mean 'tea"),
        (["something_else_entirely"], r"has no task .* `lm_eval ls tasks` lists all"),
        (
            ["gone"],
            "The task 'gone' of lm-evaluation-harness cannot be loaded: ConnectionError: the data set cannot",
        ),
        (["code"], "The task 'code' runs code that the model writes"),
        ({"tasks": ["tea"], "include_path": "nowhere"}, "include_path: nowhere is not a folder"),
    ],
)
def test_a_task_that_cannot_be_measured_is_refused_before_anything_runs(tmp_path, harness, names, message):
    with pytest.raises(RecipeError, match=message):
        run(asking(tmp_path, names), tmp_path / "out")
    assert not list((tmp_path / "out").glob("steps/generate-*"))


@pytest.mark.skipif(REAL, reason="lm-evaluation-harness is installed")
def test_a_missing_harness_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(RecipeError, match=r"not installed\. Install it: pip install 'holdfast\[lm-eval\]'"):
        run(asking(tmp_path, "gsm8k"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("steps/generate-*"))


def test_a_name_or_a_list_is_the_block():
    for given in ("gsm8k", ["gsm8k"], {"tasks": ["gsm8k"]}):
        asked = {"evaluation": {"lm_eval": given}, "alignment": "none"}
        recipe = Recipe.load({"model": "m", "data": {"task": "sst2"}, **asked})
        assert recipe.evaluation.lm_eval.tasks == ["gsm8k"]
    none = {"model": "m", "data": {"task": "sst2"}, "alignment": "none", "evaluation": {"lm_eval": "none"}}
    assert Recipe.load(none).evaluation.lm_eval is None
    with pytest.raises(RecipeError, match=r"evaluation\.lm_eval\.tasks"):
        Recipe.load({"model": "m", "data": {"task": "sst2"}, "evaluation": {"lm_eval": []}})


def test_a_tag_stands_for_its_tasks():
    found = {
        "results": {"a": {"acc,none": 0.5}, "b": {"acc,none": 1.0}, "in_group": {"acc,none": 0.0}},
        "groups": {"group": {"acc,none": 0.0}},
        "group_subtasks": {"group": ["in_group"]},
        "n-samples": {name: {"effective": 2} for name in ("a", "b", "in_group")},
    }
    assert list(ability.results_of(found, ["tag", "group"])) == ["group", "a", "b"]


@pytest.mark.skipif(
    not REAL, reason="lm-evaluation-harness is not installed (pip install 'holdfast[lm-eval]')"
)
def test_the_harness_itself_measures_a_tiny_model(tmp_path):
    rows = [{"question": f"Is {i} small?", "choices": ["yes", "no"], "label": i % 2} for i in range(4)]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "small.yaml").write_text(
        "task: holdfast_small\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        "metadata: {version: 1.0}\n"
    )
    block = {"tasks": ["holdfast_small"], "include_path": str(tmp_path), "limit": 3}
    results, _ = run(asking(tmp_path / "run", block), tmp_path / "out")
    found = results["rows"][0]["lm_eval"]["holdfast_small"]
    assert (found["n"], found["version"], len(found["metrics"])) == (3, 1.0, 1)
    assert 0 <= found["metrics"][0]["value"] <= 1
