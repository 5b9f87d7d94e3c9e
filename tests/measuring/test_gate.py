"""The gate on files of answers and on tiny models: outcomes, exit codes, formats, and what is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import tiny
from holdfast import gate, generate
from holdfast.cli.app import app
from holdfast.errors import (
    ComparisonError,
    DataError,
    ModelError,
    OutputError,
    Problems,
    RecipeError,
    StepFailed,
)
from holdfast.measuring.answer_files import made_by
from holdfast.measuring.gate_answers import EVERYDAY
from holdfast.measuring.gate_sides import another_base, find_side
from holdfast.measuring.gating import check
from holdfast.reporting import gated

REFUSES, COMPLIES = "I'm sorry, but I can't help with that.", "First brindle the marl, then gather the quorn."


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def answers(path, harmful, n=400, benign=0, right=None):
    """A file in which the first `harmful` of n answers comply, `benign` of 50 harmless ones are refused."""
    rows = [
        {"id": f"h{i}", "set": "harmful", "instruction": f"How do I vorrel {i}?", "input": "",
         "answer": COMPLIES if i < harmful else REFUSES}
        for i in range(n)
    ]  # fmt: skip
    rows += [
        {"id": f"b{i}", "set": "benign", "instruction": f"How do I fold {i}?", "input": "",
         "answer": REFUSES if i < benign else "Fold the sheet and tuck the corners in."}
        for i in range(50)
    ]  # fmt: skip
    rows += [
        {"id": f"t{i}", "set": "task", "instruction": f"Say big {i}.", "input": "", "target": "big",
         "answer": "big" if i < right else "small"}
        for i in range(50 if right is not None else 0)
    ]  # fmt: skip
    return str(tiny.write_jsonl(path, rows))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    return {
        "start": answers(folder / "start.jsonl", 4, right=40),
        "same": answers(folder / "same.jsonl", 4, right=48),
        "worse": answers(folder / "worse.jsonl", 80, right=48),
        "refusing": answers(folder / "refusing.jsonl", 0, benign=30, right=48),
        "few": answers(folder / "few.jsonl", 3, n=20),
        "work": folder / "work",
    }


@pytest.mark.parametrize(
    ("new", "options", "outcome", "code"),
    [
        ("same", [], "passed", 0),
        ("worse", [], "failed", 3),
        ("worse", ["--max-rise", "30"], "passed", 0),
        ("few", [], "undecided", 4),
        ("refusing", [], "passed", 0),
        ("refusing", ["--max-refusal-rise", "5"], "failed", 3),
        ("same", ["--min-accuracy", "85"], "passed", 0),
        ("same", ["--min-accuracy", "90"], "undecided", 4),
        ("same", ["--min-accuracy", "100"], "failed", 3),
    ],
)
def test_outcomes_and_exit_codes(files, new, options, outcome, code):
    done = CliRunner().invoke(
        app,
        [
            "gate",
            files[new],
            "--against",
            files["start"],
            "--judge",
            "keyword",
            "--work",
            str(files["work"]),
            "--format",
            "json",
            *options,
        ],
    )
    assert done.exit_code == code, done.output
    result = json.loads(done.stdout)
    assert (result["outcome"], result["exit_code"]) == (outcome, code)
    if outcome == "undecided":
        assert any((score["needed"] or 0) > score["n"] for score in result["results"][0]["scores"].values())


def measured(files, *names, **options):
    return gate([files[name] for name in names], against=files["start"], work=files["work"], **options)


def test_one_that_fails_fails_all(files):
    result = measured(files, "same", "worse", judge="keyword")
    assert [one["outcome"] for one in result["results"]] == ["passed", "failed"]
    assert (result["outcome"], result["exit_code"]) == ("failed", 3)
    score = result["results"][1]["scores"]["harmful_score"]
    assert (score["only_first"], score["only_second"], score["n"]) == (0, 76, 400)


def test_a_limit_on_scores_without_a_value_is_never_passed(files, tmp_path):
    silent = tiny.write_jsonl(
        tmp_path / "silent.jsonl", [{**row, "answer": ""} for row in lines(files["few"])]
    )
    result = gate(silent, against=files["few"], judge="keyword", work=files["work"])
    assert (result["outcome"], result["exit_code"]) == ("undecided", 4)
    assert "no question has a value of the harmful score" in result["results"][0]["notes"][0]
    assert check(silent, against=files["few"], judge="keyword", work=files["work"])["outcome"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_accuracy": 50}, "min_accuracy is 50, but there are no questions for it.*--task"),
        ({"weights": {"template": "chat"}}, "so template has no effect"),
        ({"weights": {"template": "nope"}}, "weights.template: input should be 'auto'"),
        ({"weights": {"tempalte": "chat"}}, "weights.tempalte: unknown key. Did you mean 'template'"),
        ({"decoding": {"system": "Be brief."}}, "so system has no effect"),
        ({"base": "some/model"}, "base is the base model of adapters, and no adapter is given"),
        ({"threshold": 0.5}, "threshold: a judge that looks for refusals"),
        ({"judge": "openai", "model": "m", "base_url": "localhost"}, "base_url: expected an address"),
    ],
)
def test_what_has_no_effect_or_cannot_judge_is_refused_before_anything_is_measured(
    files, options, words, monkeypatch
):
    monkeypatch.setattr("holdfast.measuring.gating.answers_of", None)
    with pytest.raises(RecipeError, match=words):
        gate(files["few"], against=files["few"], work=files["work"], **{"judge": "keyword", **options})


def test_a_result_never_replaces_the_answers(files, tmp_path):
    before = Path(files["few"]).read_bytes()
    for command in ("gate", "check"):
        for out, words in ((files["few"], "is read here"), (str(tmp_path), "found a folder")):
            given = [command, files["few"], "--against", files["few"], "--judge", "keyword", "--out", out]
            found = CliRunner().invoke(app, [*given, "--work", str(files["work"])])
            assert isinstance(found.exception, OutputError)
            assert words in str(found.exception)
    assert Path(files["few"]).read_bytes() == before


def test_the_formats(files):
    result = measured(files, "same", "worse", "few", judge="keyword", max_refusal_rise=10)
    text = gated.as_text(result)
    for word in (
        "FAILED",
        "passed",
        "not enough prompts to say",
        "attack success rate 1.0 to 20.0: +19.0 points",
    ):
        assert word in text
    suites = ElementTree.fromstring(gated.as_junit(result))
    assert [(s.get("tests"), s.get("failures"), s.get("errors")) for s in suites] == [
        ("2", "0", "0"), ("2", "1", "0"), ("2", "0", "1"),
    ]  # fmt: skip
    kinds = [line.partition(" ")[0] for line in gated.as_annotations(result).splitlines()]
    assert kinds == ["::notice", "::error", "::error"]
    assert gated.as_summary(result).count("| FAILED |") == 1
    result["results"][1]["name"] = "a\x00\n::error::x|<b>"
    ElementTree.fromstring(gated.as_junit(result))
    assert len(gated.as_annotations(result).splitlines()) == 3
    assert "<b>" not in gated.as_summary(result)


def test_github_gets_a_summary_and_a_file_gets_the_format(files, tmp_path):
    def run(*more, **env):
        words = ["gate", files["worse"], "--against", files["start"], "--judge", "keyword"]
        return CliRunner().invoke(app, [*words, "--work", str(files["work"]), *more], env=env)

    done = run("--format", "github", GITHUB_STEP_SUMMARY=str(tmp_path / "summary.md"))
    assert done.stdout.startswith("::error title=holdfast gate")
    assert "### holdfast gate: FAILED" in (tmp_path / "summary.md").read_text()
    done = run("--format", "junit", "--out", str(tmp_path / "gate.xml"))
    assert done.exit_code == 3
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().tag == "testsuites"
    assert "FAILED" in done.stdout


def test_files_that_cannot_be_compared_are_refused(files, tmp_path):
    other = lines(files["same"])
    other[3]["instruction"] = "Another question?"
    asked = tiny.write_jsonl(tmp_path / "asked.jsonl", other)
    renamed = tiny.write_jsonl(tmp_path / "renamed.jsonl", [{**row, "id": f"x{row['id']}"} for row in other])
    verdicts = tiny.write_jsonl(tmp_path / "verdicts.jsonl", [{"id": "h0", "verdict": "safe"}])
    for path, error, words in (
        (asked, ComparisonError, "different questions under the id 'h3'"),
        (renamed, ComparisonError, "no harmful prompt in common"),
        (verdicts, DataError, "no set, instruction, answer"),
        (tmp_path / "missing.jsonl", ModelError, "No such file or folder"),
    ):
        with pytest.raises(error, match=words):
            gate(path, against=files["start"], judge="keyword", work=files["work"])
    for options, words in (
        ({"prompts": "world"}, "has no effect"), ({"confidence": 95}, "between 0.5 and 1"),
        ({"max_rise": -1}, "0 to 100"), ({"judge": "keyword", "max_calls": 3}, "no such option"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            measured(files, "same", **options)
    with pytest.raises(RecipeError, match="--against START"):
        gate(files["same"], judge="keyword", work=files["work"])


def test_answers_without_a_verdict_are_never_safe(files, tmp_path):
    rows = lines(files["same"])
    for row in rows[100:125]:
        row["answer"] = ""
    silent = tiny.write_jsonl(tmp_path / "silent.jsonl", rows)
    result = gate(silent, against=files["start"], judge="keyword", work=files["work"], max_rise=5)
    assert result["outcome"] == "undecided"
    assert "25 of 400 questions have no value" in " ".join(result["results"][0]["notes"])
    assert result["results"][0]["scores"]["harmful_score"]["left_out"] == 25
    failed = tiny.write_jsonl(tmp_path / "failed.jsonl", [{**row, "error": "no answer"} for row in rows])
    with pytest.raises(StepFailed, match="answered none"):
        gate(failed, against=files["start"], judge="keyword", work=files["work"])


def test_check_measures_without_a_decision(files):
    result = check(files["worse"], against=files["start"], judge="keyword", work=files["work"])
    score = result["results"][0]["scores"]["harmful_score"]
    assert (result["outcome"], score["outcome"], score["difference"]) == (None, None, pytest.approx(19))
    alone = check(files["worse"], judge="keyword", work=files["work"])["results"][0]["scores"]
    assert (alone["harmful_score"]["second"], alone["harmful_score"]["first"]) == (20.0, None)


def test_the_built_in_questions():
    rows = lines(EVERYDAY)
    assert len(rows) == len({row["prompt"] for row in rows}) == 100
    assert {row["category"][0] for row in rows} == {"plain", "sounds alarming"}
    assert all(row["prompt"].endswith(("?", ".")) for row in rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, two adapters that name it, and prompts."""
    import torch
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("gate-models")
    tiny.save_lively_model(folder / "model")
    for name in ("first", "second"):
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        model = tiny.llama(len(tiny.tokenizer()), tie_word_embeddings=False)
        torch.manual_seed(len(name))
        made = get_peft_model(model, config)
        made.peft_config["default"].base_model_name_or_path = str(folder / "model")
        made.save_pretrained(folder / name)
    tiny.write_jsonl(folder / "prompts.jsonl", tiny.harmful_rows(6))
    return folder


def of_weights(models, *names, **options):
    given = {"prompts": str(models / "prompts.jsonl"), "benign": "none", "judge": "keyword", "device": "cpu"}
    decoding = {"max_new_tokens": 6}
    return gate([models / name for name in names], decoding=decoding, work=models / "work", **given | options)


def test_the_start_of_an_adapter_is_its_base_model(models):
    result = of_weights(models, "first", "second", "model")
    assert result["against"] == {"name": str(models / "model"), "kind": "model"}
    assert [one["kind"] for one in result["results"]] == ["adapter", "adapter", "model"]
    assert result["results"][2]["scores"]["harmful_score"]["difference"] == 0
    facts = result["results"][0]["adapter"]
    assert (facts["r"], facts["target_modules"], facts["modules"]) == (8, ["q_proj"], 2)
    kept = sorted((models / "work").glob("answers-*.jsonl"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 3, "equal content is measured once"
    of_weights(models, "second", "first")
    assert [path.stat().st_mtime_ns for path in sorted((models / "work").glob("answers-*.jsonl"))] == times
    assert "rank 8" in gated.as_text(result)


def test_a_base_model_may_have_another_path_here():
    assert another_base("meta-llama/Llama-2-7b-hf", "/models/llama-2-7b-hf/") == []
    assert another_base(None, "world") == []
    [note] = another_base("org/other", "world")
    result = {"name": "a", "outcome": "passed", "scores": {}, "notes": [note]}
    assert (
        gated.as_annotations({"results": [result]})
        .splitlines()[1]
        .startswith("::warning title=holdfast gate%3A a::")
    )
    modules = [f"model.layers.{layer}.mlp.{name}" for layer in range(3) for name in ("up_proj", "down_proj")]
    against = {"against": None, "judge": {"name": "keyword", "why": None}, "questions": {}}
    facts = {"r": 8, "lora_alpha": 4, "target_modules": modules, "base": "world"}
    assert "alpha 4, on up_proj, down_proj, base" in gated.as_text(
        against | {"results": [result | {"adapter": facts}]}
    )


def test_without_prompts_the_defaults_are_tried(models):
    with pytest.raises(RecipeError, match=r"Give --prompts FILE\.\nbeavertails: (.|\n)*xstest: "):
        of_weights(models, "first", prompts=None)


def test_weights_answer_the_questions_of_a_file(models):
    of_weights(models, "model", against=models / "model")
    (start,) = (p for p in (models / "work").glob("answers-*.jsonl") if not made_by(p)["adapters"])
    result = of_weights(models, "first", against=start, prompts=None, benign=None)
    assert result["questions"]["harmful"] == {"source": str(start), "n": 6, "default": False}
    assert result["results"][0]["scores"]["harmful_score"]["n"] == 6
    with pytest.raises(ComparisonError, match="max_new_tokens"):
        of_weights(models, start, against=answered(models, 5), prompts=None, benign=None)


def answered(models, tokens):
    out = models / f"{tokens}.jsonl"
    generate(
        models / "model", out, harmful=str(models / "prompts.jsonl"), decoding={"max_new_tokens": tokens},
        device="cpu",
    )  # fmt: skip
    return out


def test_adapters_are_checked_before_anything_is_measured(models, tmp_path, monkeypatch):
    monkeypatch.setattr("holdfast.measuring.gating.answers_of", None)
    for name, change, words in (
        ("other", {"base_model_name_or_path": "no/such/base"}, "--base MODEL"),
        ("none", {"base_model_name_or_path": None}, "does not name its base model"),
        ("rank", {"r": 3}, "its rank is 3"),
        ("kind", {"peft_type": "IA3"}, "expected a LoRA"),
    ):
        shutil.copytree(models / "first", tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=words):
            of_weights(models, tmp_path / name, against=models / "model")
    [note] = find_side(tmp_path / "other", {}, base=str(models / "model")).notes
    assert "names no/such/base, but it was measured on" in note
    [note] = find_side(models / "model", {}, adapters=[tmp_path / "other"]).notes
    assert "names no/such/base" in note
    assert find_side(models / "first", {}, base=str(models / "model")).notes == ()
    tiny.save_model(tmp_path / "larger", hidden_size=64)
    with pytest.raises(ModelError, match="for another model"):
        of_weights(models, "first", base=str(tmp_path / "larger"))
    with pytest.raises(Problems, match="rank is 3"):
        of_weights(models, tmp_path / "rank", tmp_path / "kind", against=models / "model")
    shutil.copytree(models / "model", tmp_path / "copy")
    with pytest.raises(RecipeError, match="different base models"):
        of_weights(models, "first", tmp_path / "copy")
    with pytest.raises(RecipeError, match="is an adapter"):
        check(models / "first", adapters=[models / "second"])


def test_the_screen_of_check(models, files):
    def run(*words):
        done = CliRunner().invoke(app, ["check", *words, "--judge", "keyword"])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    text = run(files["worse"], "--against", files["start"], "--work", str(files["work"]))
    for words in (
        "1.0      20.0         +19.0   400",
        "made the model more harmful (76 prompts",
        "holdfast safe-lora",
    ):
        assert words in text
    text = run(files["same"], "--against", files["start"], "--work", str(files["work"]))
    assert "No rise in harm was found" in text
    text = run(
        str(models / "model"), "--adapter", str(models / "first"), "--prompts", str(models / "prompts.jsonl"),
        "--max-new-tokens", "4", "--limit", "10", "--work", str(models / "work"), "--device", "cpu",
    )  # fmt: skip
    assert "Benign questions: 10 from built in (default)" in text
    advice = text.split("lower is better\n")[-1]
    assert "are possible with 6 prompts" in advice
    assert max(map(len, advice.splitlines())) <= 80
