"""The command as a user has it: exit codes, messages of a few lines on standard error, no traceback."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import holdfast
import tiny
from commands import holdfast_command as command
from commands import refused
from runs import Inside, no_pages


@pytest.fixture
def recipe(tmp_path):
    """A good recipe as a file; `change` writes it with keys changed."""
    made = tiny.recipe(tmp_path / "in")

    def write(**changes):
        raw = json.loads(json.dumps(made))
        for key, value in changes.items():
            place = raw
            *parents, last = key.split("__")
            for parent in parents:
                place = place[parent]
            place[last] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list"], ["--version"]])
def test_help_answers_before_torch_could(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "holdfast", *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert after.ru_utime - before.ru_utime < 2, "of computing; torch and what comes with it take longer"


@pytest.mark.parametrize("name", ["demo", "run", "plan", "mix", "report", "list"])
def test_every_command_has_an_example(name):
    assert f"Example: holdfast {name}" in " ".join(command(name, "--help").stdout.split())


def test_list_shows_what_is_there():
    out = command("list").stdout
    for word in ("lisa", "bso", "sft", "keyword", "beaver_dam", "gsm8k", "sst2", "lisa-sst2", "user stage"):
        assert word in out
    assert "lisa" not in command("list", "tasks").stdout
    protocols = command("list", "protocols").stdout
    assert [name in protocols for name in ("lisa-guide", "t-vaccine", "lisa-sst2")] == [True, True, False]


def test_run_of_a_grid_names_the_command_for_it():
    refused(command("run", "world-study"), "world-study is a grid", "holdfast sweep world-study")


def test_run_from_end_to_end_and_again(recipe, tmp_path):
    done = command("run", recipe(), "--out", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "harmful" in done.stdout
    assert str(tmp_path / "out" / "report.html") in done.stdout.replace("\n", "")
    assert "user fine-tuning with Lisa" in done.stderr
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!")
    planned = command("plan", recipe(), "--out", tmp_path / "out")
    assert "0 of 12 steps would run." in planned.stdout
    assert (
        "4 of 12 steps would run."
        in command("plan", recipe(), "user.rho=9", "--out", tmp_path / "out").stdout
    )
    again = command("run", recipe(), "--out", tmp_path / "out")
    assert "Nothing to do" in again.stdout
    assert "harmful" in again.stdout


def test_plan_writes_nothing(recipe, tmp_path):
    path = recipe()
    before = sorted(tmp_path.rglob("*"))
    assert "12 of 12 steps would run." in command("plan", path, cwd=tmp_path).stdout
    assert sorted(tmp_path.rglob("*")) == before


BAD_RECIPES = {
    "unknown key": ({"data__poison_ratoi": 0.1}, ["data.poison_ratoi", "poison_ratio", "line"]),
    "unknown defense": ({"user__defense": "lsia"}, ["lsia", "lisa"]),
    "ratio": ({"data__poison_ratio": 1.5}, ["poison_ratio", "1.5"]),
    "missing model": ({"model": "./no/model"}, ["no/model"]),
    "missing file": ({"data__user": "usre.jsonl"}, ["usre.jsonl"]),
    "too few rows": ({"data__size": 9999}, ["9999"]),
    "unknown task": ({"data__task": "sst3"}, ["sst3", "sst2"]),
    "unknown judge": ({"evaluation": {"judges": ["keywrd"]}}, ["keywrd", "keyword"]),
}


@pytest.mark.parametrize(
    ("what", "verb"),
    [
        (what, verb)
        for what in BAD_RECIPES
        for verb in ("plan", "run")
        if (what, verb) != ("too few rows", "plan")  # plan reads no rows
    ],
)
def test_bad_recipes(what, verb, recipe, tmp_path):
    changes, words = BAD_RECIPES[what]
    done = command(verb, recipe(**changes), "--out", tmp_path / "out")
    refused(done, *words)
    assert not (tmp_path / "out" / "results.json").exists()


BAD_FILES = {
    "torn JSON": (b'{"instruction": "a", "output": "b"}\n{"instruction": "a", "outp\n', ["line 2"]),
    "wrong columns": (b'{"question": "a", "reply": "b"}\n', ["question", "reply", "instruction", "output"]),
    "binary junk": (bytes(range(256)) * 4, []),
    "empty": (b"", ["empty"]),
    "blank answer": (b'{"instruction": "a", "output": ""}\n', ["line 1"]),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files(what, recipe, tmp_path):
    content, words = BAD_FILES[what]
    (tmp_path / "bad.jsonl").write_bytes(content)
    done = command("run", recipe(data__user=str(tmp_path / "bad.jsonl")), "--out", tmp_path / "out")
    refused(done, "bad.jsonl", *words)
    assert not list((tmp_path / "out").glob("steps/user-*"))


def test_not_yaml(tmp_path):
    (tmp_path / "r.yaml").write_text("a: [1, 2")
    refused(command("run", tmp_path / "r.yaml"), "r.yaml", "not valid YAML", "line")


def test_an_output_folder_that_holds_something_else(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    refused(command("run", recipe(), "--out", tmp_path / "out"), "out", "not empty")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_disk_that_is_full(recipe, tmp_path):
    """A limit on the size of files makes every write beyond it fail, as a full disk does."""

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    done = command("run", recipe(), "--out", tmp_path / "out", before=full)
    refused(done, "alignment with SFT", code=1)
    assert not list((tmp_path / "out").glob("steps/alignment-*/step.json"))
    assert not (tmp_path / "out" / "results.json").exists()
    assert command("run", recipe(), "--out", tmp_path / "out").returncode == 0, (
        "the same command goes on later"
    )


def test_debug_shows_the_traceback(recipe, tmp_path):
    done = command("run", recipe(model="./no/model"), "--out", tmp_path / "out", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_mix_and_its_errors(recipe, tmp_path):
    recipe()
    files = {name: tmp_path / "in" / f"{name}.jsonl" for name in ("user", "harmful")}
    done = command(
        "mix", "--user", files["user"], "--harmful", files["harmful"],
        "--size", 20, "--poison-ratio", 0.25, "--out", tmp_path / "mixed",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "mixed" / "user.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert sum(row["source"] == "harmful" for row in rows) == 5
    assert (
        json.loads((tmp_path / "mixed" / "manifest.json").read_text())["user"]["poison_ratio_realised"]
        == 0.25
    )
    given = ("--test", files["user"], "--test-harmful", f"beavertails:{files['harmful']}")
    command("mix", "--user", files["user"], *given, "--out", tmp_path / "tested")
    tested = json.loads((tmp_path / "tested" / "manifest.json").read_text())
    assert tested["test"]["sources"][0]["data_set"] == "beavertails@1"
    assert tested["user"]["held_out"] == 0
    refused(command("mix", "--user", files["user"], "--poison-ratio", 2, "--out", tmp_path / "x"), "2")
    refused(command("mix", "--out", tmp_path / "x"), "--user")
    assert not (tmp_path / "x").exists()


def test_report_compares_only_what_was_measured_alike(recipe, tmp_path):
    for name, tokens in (("a", 8), ("b", 9)):
        done = command(
            "run", recipe(), f"name={name}", f"evaluation.max_new_tokens={tokens}",
            "--out", tmp_path / name, "--store", tmp_path / "steps",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    page = tmp_path / "page.html"
    refused(
        command("report", tmp_path / "a", tmp_path / "b", "-o", page), "max_new_tokens", "8", "9", "--force"
    )
    assert not page.exists()
    assert command("report", tmp_path / "a", tmp_path / "b", "-o", page, "--force").returncode == 0
    assert "max_new_tokens" in page.read_text()
    refused(command("report", tmp_path / "nothing", "-o", page), "nothing")


def test_unknown_commands_and_options(tmp_path):
    refused(command("rnu"), "rnu")
    refused(command("demo", "--seeds", "0"), "seeds")
    refused(command("run", "world", "--device", "tpu", "--out", tmp_path / "x"), "tpu", "cuda")


def test_the_full_demo_adds_a_control_and_every_defense():
    from holdfast import registry
    from holdfast.cli.demo import demo_runs
    from holdfast.recipe import Recipe

    loaded = {
        name: Recipe.load("world", [f"name={name}", *changes])
        for name, changes in demo_runs(full=True).items()
    }
    assert {recipe.user.defense for recipe in loaded.values()} == set(registry.list_defenses("user"))
    alignments = {recipe.alignment.defense for recipe in loaded.values() if recipe.alignment}
    assert alignments == set(registry.list_defenses("alignment"))
    repairs = {recipe.post_hoc.defense for recipe in loaded.values() if recipe.post_hoc}
    assert repairs == set(registry.list_defenses("post_hoc"))
    assert len(demo_runs(full=True)) > len(demo_runs()) == 6
    # The attack is the same after every alignment.
    assert loaded["T-Vaccine"].user == loaded["Vaccine"].user == loaded["SFT"].user
    assert loaded["T-Vaccine"].data == loaded["SFT"].data
    stack = loaded["T-Vaccine + Lisa + Safe LoRA"]
    assert (stack.alignment, stack.user) == (loaded["T-Vaccine"].alignment, loaded["Lisa"].user)
    assert stack.post_hoc == loaded["SFT + Safe LoRA"].post_hoc
    assert loaded["SFT without harmful rows"].data.poison_ratio == 0
    assert loaded["NA-SFT"].alignment is None
    assert loaded["Lisa"].user.training == loaded["SFT"].user.training


def test_the_demo_compares_its_rows(tmp_path, monkeypatch):
    """The real demo on few steps: every row, a report, a summary."""
    from holdfast.cli.demo import demo, demo_runs
    from holdfast.recipe import Recipe
    from holdfast.study import local

    load = Recipe.load
    few = ["alignment.training.max_steps=2", "user.training.max_steps=2", "evaluation.prompts=4",
           "evaluation.task_rows=4", "evaluation.max_new_tokens=4", "data.size=40",
           "data.alignment.size=40"]  # fmt: skip

    def loaded(source, overrides=()):
        phases = ["user.alignment_steps=1"] if "user.defense=lisa" in overrides else []
        return load(source, [*few, *overrides, *phases])

    monkeypatch.setattr(Recipe, "load", loaded)
    monkeypatch.setattr(local, "start_worker", Inside)
    with no_pages():  # but the last, which compares them
        results = demo(tmp_path / "demo", device="cpu", workers=1)
    names = [row["name"] for row in results["rows"]]
    assert set(names) == {"base", "aligned", "T-Vaccine + Lisa", *demo_runs()}
    assert names.count("aligned") == 2, "by SFT and T-Vaccine"
    page = (tmp_path / "demo" / "report.html").read_text()
    assert all(f"aligned, {by}" in page for by in ("SFT", "T-Vaccine"))
    assert "Alignment time" in page
    assert "Layers drawn: T-Vaccine" in page
    assert "NA-SFT" in page
    assert Path(holdfast.__file__).exists()


def test_the_demo_runs_every_row_for_every_seed(tmp_path, monkeypatch):
    from holdfast.cli.demo import demo, demo_runs
    from holdfast.study import sweeping

    class Enough(Exception):
        """The runs are known."""

    runs = []

    def note(given, **options):
        runs.extend(given)
        raise Enough

    monkeypatch.setattr(sweeping, "run_all", note)
    with pytest.raises(Enough):
        demo(tmp_path / "demo", seeds=2, device="cpu", workers=1)
    assert len({run.folder for run in runs}) == len(runs) == 2 * len(demo_runs())
    assert [run.recipe.seed for run in runs if run.folder.startswith("lisa")] == [42, 43]


def test_the_demo_says_which_rows_are_not_typical_of_their_method():
    from holdfast.cli import demo

    saved = Path(__file__).parents[2] / "benchmarks" / "results"
    measured = {}
    for file in ("world.json", "world_alignment.json"):
        measured |= json.loads((saved / file).read_text())["rows"]
    for name, scores in demo.SEEDS.items():
        assert [round(score, 1) for score in measured[name]["harmful_score_by_seed"]] == list(scores)
    rows = [{"name": "SFT", "harmful_score": 85.7}, {"name": "T-Vaccine", "harmful_score": 14.7}]
    [text] = demo.unusual(rows)
    assert text.startswith("T-Vaccine: this seed is not typical. Its harmful score is 14.7 here;")
    assert "14.7, 98.0, 89.3 (mean 67.3)" in text
    assert not demo.unusual([*rows, *rows]), "means over seeds"
