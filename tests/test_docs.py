"""The documents do what they say."""

from __future__ import annotations

import json
import re

import defense_table
import pytest
import yaml

import tiny
from holdfast import registry
from holdfast.recipe import Recipe, data, evaluation
from holdfast.recipe.attack_sweep import AttackPoint, AttackSweep
from holdfast.recipe.model import Lora, Model
from holdfast.recipe.stages import PostHocRecipe, StageRecipe
from holdfast.recipe.weight_attack import PostHocAttackRecipe
from holdfast.study.grid import expand
from places import DOCS, ROOT, blocks


@pytest.mark.parametrize("page", [DOCS / "python.md", DOCS / "defenses" / "lisa.md"], ids=lambda p: p.name)
def test_the_script_with_a_lisa_trainer_runs(page, tmp_path):
    script = next(b for b in blocks(page, "python") if "LisaTrainer" in b)
    assert len([line for line in script.splitlines() if line.strip()]) <= 18
    model = tiny.save_model(tmp_path / "model")
    names = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    exec(compile(script, page.name, "exec"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 10
    assert {e["state"] for e in trainer.state.log_history if "state" in e} <= {"alignment", "user"}


@pytest.mark.parametrize("name", ["vaccine", "tvaccine"])
def test_the_scripts_of_the_alignment_stage_run(name, tmp_path):
    (script,) = blocks(DOCS / "defenses" / f"{name}.md", "python")
    assert len([line for line in script.splitlines() if line.strip()]) <= 18
    names = {"MODEL": str(tiny.save_model(tmp_path / "model")), "OUT": str(tmp_path / "out")}
    exec(compile(script, name, "exec"), names)
    assert names["trainer"].state.global_step == 10


def test_the_script_with_a_probe_runs(tmp_path):
    (script,) = blocks(DOCS / "probe.md", "python")
    names = {"MODEL": str(tiny.save_model(tmp_path / "model")), "OUT": str(tmp_path / "out")}
    exec(compile(script, "probe.md", "exec"), names)
    assert [entry["step"] for entry in names["probe"].history] == [0, 2, 4]


def test_the_script_that_aligns_runs(tmp_path):
    (script,) = blocks(DOCS / "align.md", "python")
    names = {"MODEL": str(tiny.save_model(tmp_path / "model")), "OUT": str(tmp_path / "out")}
    exec(compile(script, "align.md", "exec"), names)
    assert names["trainer"].state.global_step == 10
    assert (tmp_path / "out" / "aligned" / "adapter_model.safetensors").is_file()


def test_the_script_with_trl_runs(tmp_path, monkeypatch):
    """As a module of its own: Trainer pickles the config's class by name."""
    import importlib

    pytest.importorskip("trl")
    (script,) = blocks(DOCS / "trl.md", "python")
    model = tiny.save_model(tmp_path / "model", chat=True)
    places = f"MODEL, OUT = {str(model)!r}, {str(tmp_path / 'out')!r}\n"
    (tmp_path / "script_with_trl.py").write_text(places + script)
    monkeypatch.syspath_prepend(tmp_path)
    trainer = importlib.import_module("script_with_trl").trainer
    assert trainer.state.global_step == 10
    assert "seq_lengths" in trainer.alignment_dataset.column_names


def test_the_first_pages_commands_run(tmp_path, monkeypatch):
    """The recipe and the commands of docs/start.md as they stand there, on a tiny model; the README's are the same."""
    from typer.testing import CliRunner

    from holdfast.cli.app import app

    monkeypatch.chdir(tmp_path)
    tiny.save_model(tmp_path / "my-model", max_position_embeddings=160)  # so that answers end
    tiny.write_jsonl(tmp_path / "my.jsonl", tiny.user_rows(30))  # more steps than an alignment phase of Lisa
    tiny.write_jsonl(tmp_path / "safe.jsonl", tiny.safe_rows(10))
    tiny.write_jsonl(tmp_path / "bad.jsonl", tiny.harmful_rows(10))
    first, base = blocks(DOCS / "start.md", "yaml")
    commands = blocks(DOCS / "start.md", "bash")[1]
    for readme in (ROOT / "README.md", ROOT / "README.zh.md"):
        assert blocks(readme, "yaml") == [first]
        assert commands.startswith(blocks(readme, "bash")[0])
    (tmp_path / "first.yaml").write_text(first)
    lines = [line.split("#")[0].split() for line in commands.splitlines()]
    assert [words[1] for words in lines] == ["plan", "run", "run", "run", "report"]
    for words in lines:
        assert words[0] == "holdfast"
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
    page = (tmp_path / "compare.html").read_text()
    assert "first" in page
    assert "rho3" in page
    assert len(list((tmp_path / "runs" / "first" / "steps").glob("user-*"))) == 3
    assert not list((tmp_path / "runs" / "first" / "steps").glob("alignment-*"))
    assert Recipe.load(yaml.safe_load(base)).alignment is not None


def test_the_page_on_scores_does_what_it_says(tmp_path, monkeypatch):
    """Its first commands as they stand there, and its script; every option of the others is one."""
    from typer.testing import CliRunner

    from holdfast.cli.app import app

    monkeypatch.chdir(tmp_path)
    tiny.save_model(tmp_path / "my-model")
    tiny.write_jsonl(tmp_path / "my.jsonl", tiny.user_rows(4))
    tiny.write_jsonl(tmp_path / "bad.jsonl", tiny.harmful_rows(5))
    tiny.write_jsonl(tmp_path / "questions.jsonl", [{"prompt": f"How do I fold boat {i}?"} for i in range(3)])
    page, runner = DOCS / "score.md", CliRunner()
    first, *others = blocks(page, "bash")
    for line in first.splitlines():
        done = runner.invoke(app, line.replace("128", "8").split()[1:], env={"COLUMNS": "140"})
        assert done.exit_code == 0, f"{line}: {done.output} {done.exception}"
    assert "not distinguishable" in done.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    for name in re.findall(r"^\| (`[^|]+)\|", page.read_text().split("## The scores")[1], re.M):
        assert {key.strip(" `") for key in name.split(",")} <= set(scores), name
    for line in "".join(others).splitlines():
        shown = runner.invoke(app, [line.split()[1], "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z-]+", line):
            assert option in shown, line
    (script,) = blocks(page, "python")
    exec(compile(script, "score.md", "exec"), {})


@pytest.mark.parametrize("name", registry.list_defenses())
def test_every_defense_has_a_page_with_its_parameters(name):
    page = (DOCS / "defenses" / f"{name}.md").read_text()
    for parameter, what in registry.faces("defenses")[name].parameters.items():
        assert f"`{parameter}`" in page
        if name == "lisa" and not isinstance(what.default, bool):
            assert f"| `{parameter}` | {what.default} |" in page


@pytest.mark.parametrize("name", registry.faces("attacks"))
def test_every_attack_has_a_section_with_its_parameters(name):
    face, page = registry.faces("attacks")[name], (DOCS / "attacks.md").read_text()
    [title] = [s for s in page.split("\n## ") if s.lower().startswith(face.facts["label"].lower())]
    for parameter, what in face.parameters.items():
        [line] = [
            line
            for line in title.splitlines()
            if line.startswith("|") and f"`{parameter}`" in line.split("|")[1]
        ]
        assert ("none" if what.default is None else str(what.default)) in line
    assert face.facts["paper"] in (page if face.facts["paper"] != "none" else "none")
    line = next(line for line in page.splitlines() if line.startswith(f"| [`{name}`]"))
    anchor = line.split("(#")[1].split(")")[0]
    assert anchor == re.sub(r"[^a-z -]", "", title.splitlines()[0].lower()).replace(" ", "-")


def test_the_table_of_methods_is_made_from_the_declarations():
    assert defense_table.parts(defense_table.PAGE.read_text())[1] == defense_table.table(), (
        "run python tests/defense_table.py"
    )
    assert len(defense_table.table().splitlines()) == 2 + len(registry.list_defenses())


def test_the_recipe_page_names_every_key():
    text = (DOCS / "recipes.md").read_text() + (DOCS / "data.md").read_text()
    text += (DOCS / "attacks.md").read_text()
    for block in (
        Recipe,
        Model,
        data.Data,
        data.AlignmentData,
        data.HarmfulData,
        data.AnchoringRecipe,
        data.AttackRecipe,
        data.FilterRecipe,
        data.ScoreFilterRecipe,
        AttackSweep,
        AttackPoint,
        evaluation.Evaluation,
        Lora,
        StageRecipe,
        PostHocRecipe,
        PostHocAttackRecipe,
        evaluation.JudgeRecipe,
    ):
        for key in block.model_fields:
            assert re.search(rf"[`.{{ ]{key}\b", text), key


def test_the_recipes_in_the_pages_are_valid():
    found = 0
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for block in blocks(page, "yaml"):
            raw = yaml.safe_load(block)
            if "grid" in raw:
                assert len(expand(raw)) > 1
            elif "model" in raw or "extends" in raw:
                Recipe.load(raw)
                found += 1
    assert found >= 3


def test_the_example_defense_works(tmp_path, monkeypatch, install):
    import sys
    from importlib.metadata import EntryPoint

    import trainers

    (tmp_path / "halved_defense.py").write_text(blocks(DOCS / "adding-a-defense.md", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    install(EntryPoint("halved", "halved_defense:DEFENSE", "holdfast.defenses"))
    try:
        halved = trainers.trainer("halved", tmp_path / "out", max_grad_norm=0, optim="sgd", max_steps=1)
        plain = trainers.trainer("sft", tmp_path / "out", max_grad_norm=0, optim="sgd", max_steps=1)
        start = trainers.weights(plain)
        halved.train(), plain.train()
        moved = [[b - a for a, b in zip(start, trainers.weights(t), strict=True)] for t in (halved, plain)]
        assert trainers.distance(moved[0], [m / 2 for m in moved[1]]) < 1e-7
        assert max(float(m.abs().max()) for m in moved[1]) > 1e-4
    finally:
        sys.modules.pop("halved_defense", None)


def test_links_between_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_numbers_of_the_world_are_those_measured(monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measured = json.loads((ROOT / "benchmarks" / "results" / "world.json").read_text())
    page = (DOCS / "world-results.md").read_text()
    for line in importlib.import_module("world").markdown(measured["rows"]):
        assert line in page
    evaluation = json.loads((ROOT / "benchmarks" / "results" / "evaluation.json").read_text())
    world, larger = (evaluation["evaluation"][f"{name}, cpu"] for name in ("world", "llama-100m"))
    assert f"{world['ratio_median']:.1f} times as fast" in page
    assert f"{larger['ratio_median']:.1f} times on a Llama" in page
    probe = evaluation["probe"]
    assert f"adds {100 * probe['own_time_over_the_rest_median']:.1f} %" in page


def test_the_page_on_aligning_shows_what_was_measured():
    rows = json.loads((ROOT / "benchmarks" / "results" / "world_alignment.json").read_text())["rows"]
    page, other = (DOCS / "align.md").read_text(), (DOCS / "world-results.md").read_text()
    for name in ("SFT", "Vaccine", "T-Vaccine", "RepNoise", "TAR", "Booster", "T-Vaccine + Lisa + Safe LoRA"):
        [line] = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        shown = [f"{rows[name][key]:.1f} ± {rows[name][f'{key}_stderr']:.1f}" for key in SHOWN]
        assert all(text in line for text in shown), name
        assert "Lisa" in name or shown[0] in other


SHOWN = ("harmful_score", "benign_compliance", "finetune_accuracy")


def test_the_page_on_memory_shows_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "alignment.json").read_text())["cpu"]
    page = " ".join((DOCS / "memory.md").read_text().split())
    nf4 = measured["nf4"]["tvaccine"]["peak_bytes"] / measured["nf4"]["sft"]["peak_bytes"]
    for ratio in (
        measured["methods"]["tvaccine"]["peak_over_sft"],
        measured["methods"]["vaccine"]["peak_over_sft"],
        nf4,
    ):
        assert f"{ratio:.2f} times" in page
