"""Generation, moderation and scores on files: each works alone and resumes where it stopped."""

from __future__ import annotations

import json

import pytest

import tiny
from answers_made import asked, judged, lines, own_answers
from commands import holdfast_command as command
from holdfast import compare, generate, moderate, score
from holdfast.errors import DataError, ModelError, OutputError, RecipeError, StepFailed
from holdfast.evaluation.moderation import check_parsed
from holdfast.recipe.evaluation import Decoding
from holdfast.recipe.model import Weights
from judge_files import flagging


def test_from_prompts_to_scores(place, tmp_path):
    rows = asked(place, tmp_path / "a.jsonl")
    assert [sum(row["set"] == name for row in rows) for name in ("harmful", "task")] == [7, 6]
    verdicts = moderate(tmp_path / "a.jsonl", tmp_path / "v.jsonl")
    assert {row["id"] for row in verdicts} == {row["id"] for row in rows if row["set"] == "harmful"}
    scores = score(tmp_path / "a.jsonl", [tmp_path / "v.jsonl"], out=tmp_path / "s.json")
    assert scores["n_harmful"] + scores["unparsed"] == 7
    assert scores["judge"] == "keyword"
    assert (scores["n_task"], scores["task"]) == (6, "own@1")
    assert json.loads((tmp_path / "s.json").read_text())["n_task"] == 6
    alone = score(tmp_path / "a.jsonl")
    assert alone["harmful_score"] is None
    assert alone["finetune_accuracy"] == scores["finetune_accuracy"]


def test_an_adapters_own_tokenizer_and_template_are_used_and_recorded(place, adapter, tmp_path):
    def made(out, **options):
        asked(place, tmp_path / out, task_rows=None, **options)
        return json.loads((tmp_path / f"{out}.json").read_text())["made"]

    bare, chat = made("bare"), made("chat", adapters=[adapter])
    assert (bare["template"], chat["template"]) == ("alpaca", "chat")
    assert "tokenizer" not in bare
    assert chat["tokenizer"] == chat["adapters"][0]
    with pytest.raises(ModelError, match="no chat template"):
        made("bare chat", template="chat")
    (adapter / "chat_template.jinja").write_text(tiny.CHAT + "{# another #}")
    with pytest.raises(OutputError, match="adapters: was"):
        made("chat", adapters=[adapter])


def test_an_adapter_that_is_refused_does_not_keep_the_file(place, adapter, tmp_path):
    """The next call, with the right adapter, would be refused because of other settings."""
    import shutil

    torn = shutil.copytree(adapter, tmp_path / "torn")
    (torn / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match="damaged"):
        asked(place, tmp_path / "a.jsonl", adapters=[torn])
    assert [path.name for path in tmp_path.iterdir()] == ["torn"]
    assert len(asked(place, tmp_path / "a.jsonl", task_rows=None, adapters=[adapter])) == 7


def test_what_was_stopped_goes_on(place, tmp_path):
    whole = asked(place, tmp_path / "whole.jsonl", batch_tokens=200)
    asked(place, tmp_path / "cut.jsonl", batch_tokens=200)
    text = (tmp_path / "cut.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(text[:4]) + text[4][:9])
    assert asked(place, tmp_path / "cut.jsonl", batch_tokens=200) == whole
    assert lines(tmp_path / "cut.jsonl") == lines(tmp_path / "whole.jsonl")


def test_answers_of_a_version_that_decoded_otherwise_are_not_continued(place, tmp_path):
    """Earlier versions also applied the model's own `generation_config`, and did not say so."""
    asked(place, tmp_path / "a.jsonl")
    beside = tmp_path / "a.jsonl.json"
    facts = json.loads(beside.read_text())
    del facts["made"]["generation_config"]
    beside.write_text(json.dumps(facts))
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(OutputError, match=r"made with other settings .*generation_config"):
        asked(place, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_what_is_whole_loads_no_model(place, tmp_path, no_model):
    whole = asked(place, tmp_path / "a.jsonl")
    no_model()
    assert asked(place, tmp_path / "a.jsonl") == whole


def test_another_files_answers_are_refused(place, tmp_path):
    asked(place, tmp_path / "a.jsonl")
    with pytest.raises(OutputError, match="max_new_tokens"):
        asked(place, tmp_path / "a.jsonl", max_new_tokens=7)
    (tmp_path / "mine.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(OutputError, match=r"mine\.jsonl exists"):
        asked(place, tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == '{"id": 1}\n'
    moderate(tmp_path / "a.jsonl", tmp_path / "v.jsonl")
    changed = lines(tmp_path / "a.jsonl")
    next(row for row in changed if row["set"] == "harmful")["answer"] += " more"
    tiny.write_jsonl(tmp_path / "b.jsonl", changed)
    with pytest.raises(OutputError, match="answers"):
        moderate(tmp_path / "b.jsonl", tmp_path / "v.jsonl")
    tiny.write_jsonl(tmp_path / "fewer.jsonl", lines(tmp_path / "v.jsonl")[1:])
    with pytest.raises(DataError, match="6 verdicts"):
        score(tmp_path / "a.jsonl", [tmp_path / "fewer.jsonl"])


def test_sampling_has_a_seed(place, tmp_path):
    def sampled(name, seed, temperature=1.5):
        return [r["answer"] for r in asked(place, tmp_path / name, temperature=temperature, seed=seed)]

    first = sampled("a.jsonl", 1)
    assert sampled("b.jsonl", 1) == first
    assert sampled("c.jsonl", 2) != first
    greedy = [row["answer"] for row in asked(place, tmp_path / "d.jsonl")]
    assert sampled("e.jsonl", 1, temperature=1e-4) == greedy


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"harmful": None, "task_rows": None}, RecipeError, "Nothing to ask"),
        ({"temperature": -1}, RecipeError, r"decoding\.temperature: .*greater than or equal to 0"),
        ({"endpoint": {"base_url": "http://localhost:1", "request": 2}}, RecipeError, "requests"),
        ({"harmful": "absent.jsonl"}, DataError, "absent"),
        ({"endpoint": "localhost:1"}, ModelError, "http://"),
        ({"temperature": 1e-320}, RecipeError, r"decoding\.temperature: expected 0 \(greedy\) or at least"),
        ({"top_p": 0.9}, RecipeError, r"decoding\.top_p: greedy decoding"),
    ],
)
def test_bad_input(place, tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        asked(place, tmp_path / "a.jsonl", **options)
    assert not list(tmp_path.iterdir())


def test_scores_and_differences_never_replace_what_they_are_made_of(tmp_path):
    a = tiny.write_jsonl(tmp_path / "a.jsonl", own_answers(3))
    v = tiny.write_jsonl(tmp_path / "v.jsonl", judged(own_answers(3)))
    before = a.read_bytes(), v.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(a)
    s = tmp_path / "s"
    for files, words in (
        ({"out": a}, "a.jsonl is read here and is never overwritten"),
        ({"out": tmp_path / "link.jsonl"}, "link.jsonl is read here"),
        ({"items": v}, "v.jsonl is read here and is never overwritten"),
        ({"out": s, "items": s}, "s is given for two results"),
        ({"out": tmp_path}, "Expected a file to write, found a folder"),
        ({"out": a / "s.json"}, "Cannot write .*a.jsonl is no folder"),
    ):
        with pytest.raises(OutputError, match=words):
            score(a, [v], **files)
    with pytest.raises(OutputError, match=r"v\.jsonl is read here"):
        compare(v, v, out=v)
    assert (a.read_bytes(), v.read_bytes()) == before
    assert score(a, [v], out=tmp_path / "new" / "s.json")["n_harmful"] == 3
    with pytest.raises(DataError, match=r"There is no file .*nope\.jsonl"):
        score(tmp_path / "nope.jsonl")


def test_options_are_mappings_or_blocks(place, tmp_path):
    as_mapping = asked(place, tmp_path / "a.jsonl", max_new_tokens=4, template="alpaca")
    model = Weights(path=str(place / "model"), template="alpaca")
    decoding, prompts = Decoding(max_new_tokens=4), str(place / "prompts.jsonl")
    rows = str(place / "task.jsonl")
    out = tmp_path / "b.jsonl"
    as_block = generate(model, out, harmful=prompts, task_rows=rows, decoding=decoding, device="cpu")
    assert as_block == as_mapping
    assert max(row["tokens"] for row in as_block if row["set"] == "harmful") == 4


def test_rows_without_an_answer_are_refused_with_their_line(tmp_path):
    tiny.write_jsonl(
        tmp_path / "a.jsonl", [{"id": 1, "set": "harmful", "instruction": "How?", "answer": "So."}, {"id": 2}]
    )
    with pytest.raises(DataError, match=r"line 2: no set, instruction, answer"):
        moderate(tmp_path / "a.jsonl", tmp_path / "v.jsonl")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"answer": None}, r"line 2: answer is missing \(null\); expected text"),
        ({"answer": 42}, "line 2: answer is of the type int; expected text"),
        ({"instruction": ["How?"]}, "line 2: instruction is of the type list"),
        ({"input": 3}, "line 2: input is of the type int"),
        ({"id": [1]}, "line 2: id is of the type list"),
        ({"id": None}, "line 2: id is missing"),
        ({"id": "h0"}, r"line 2: id 'h0' is also on line 1"),
        ({"set": "harm"}, "line 2: set is 'harm'; expected harmful, task or benign"),
        ({"category": "violence"}, "line 2: category is 'violence'; expected a list"),
        ({"category": [3]}, "line 2: category"),
    ],
)
def test_answers_that_cannot_be_judged_are_refused_with_their_line(tmp_path, wrong, text):
    rows = own_answers()
    rows[1] |= wrong
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=rf"a\.jsonl, {text}"):
        moderate(tmp_path / "a.jsonl", tmp_path / "v.jsonl")
    assert not (tmp_path / "v.jsonl").exists()
    with pytest.raises(DataError, match=text):
        score(tmp_path / "a.jsonl")


def test_whole_numbers_are_ids_and_an_empty_error_is_none(tmp_path):
    rows = [{**row, "id": i, "error": (None, "", "too long")[i]} for i, row in enumerate(own_answers())]
    rows[2]["answer"] = None
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    verdicts = moderate(tmp_path / "a.jsonl", tmp_path / "v.jsonl")
    assert [row["verdict"] for row in verdicts] == ["harmful", "harmful", "unparsed"]
    found = score(tmp_path / "a.jsonl", [tmp_path / "v.jsonl"])
    assert (found["harmful_score"], found["n_harmful"], found["failed"]) == (100.0, 2, 1)


def test_verdicts_on_other_answers_are_refused(tmp_path):
    """With the same ids; the refusals of one model must not get the verdicts of another."""
    a = tiny.write_jsonl(tmp_path / "a.jsonl", own_answers(text="Sure."))
    b = tiny.write_jsonl(tmp_path / "b.jsonl", own_answers(text="I'm sorry, but I can't."))
    moderate(a, tmp_path / "va.jsonl")
    with pytest.raises(
        DataError, match=r"va\.jsonl holds verdicts on other answers than those in .*b\.jsonl"
    ):
        score(b, [tmp_path / "va.jsonl"])
    assert score(a, [tmp_path / "va.jsonl"])["harmful_score"] == 100.0
    (tmp_path / "va.jsonl.json").write_text("{")
    with pytest.raises(DataError, match=r"va\.jsonl\.json is damaged"):
        score(a, [tmp_path / "va.jsonl"])


@pytest.mark.parametrize(
    ("given", "words"),
    [({"task": "sst2"}, "the task sst2 grades"), ({"grader": "exact"}, "the grader exact grades")],
)
def test_a_grader_without_answers_is_refused(tmp_path, given, words):
    a = tiny.write_jsonl(tmp_path / "a.jsonl", own_answers())
    with pytest.raises(DataError, match=rf"a\.jsonl has no answers to a task, so {words} nothing"):
        score(a, **given)


def test_two_models_behind_one_judge_stay_apart(tmp_path):
    a = tiny.write_jsonl(tmp_path / "a.jsonl", own_answers())

    def verdicts(name, word, **made):
        path = tiny.write_jsonl(tmp_path / f"{name}.jsonl", judged(own_answers(), word))
        if made:
            (tmp_path / f"{name}.jsonl.json").write_text(json.dumps({"made": made}))
        return path

    first = verdicts("first", "harmful", judge="openai", judge_stamp="openai@a/policy 1-5, meta")
    second = verdicts("second", "safe", judge="openai", judge_stamp="openai@b/policy 1-5, meta")
    third = verdicts("openai", "safe")
    found = score(a, [first, second])
    assert (found["harmful_score"], found["judge"]) == (100.0, "openai@a/policy 1-5, meta")
    shares = {name: one["harmful_score"] for name, one in found["judges"].items()}
    assert shares == {"openai@a/policy 1-5, meta": 100.0, "openai@b/policy 1-5, meta": 0.0}
    assert found["agreement"][0]["only_first"] == 3
    assert list(score(a, [first, third])["judges"]) == ["openai@a/policy 1-5, meta", str(third)]
    assert list(score(a, [second])["judges"]) == ["openai"], "alone, a judge keeps its name"
    again = verdicts("again", "safe", judge="openai", judge_stamp="openai@a/policy 1-5, meta")
    for two in ([first, again], [third, third]):
        with pytest.raises(DataError, match=r"are both verdicts of .*openai.*Give one of them"):
            score(a, two)


def test_the_verdicts_of_steps_are_named_by_their_judges(tmp_path):
    """Every step's file is verdicts.jsonl; its `step.json` names the judge."""
    a = tiny.write_jsonl(tmp_path / "a.jsonl", own_answers())
    for name, word in (("beaver_dam", "harmful"), ("keyword", "safe")):
        (tmp_path / name).mkdir()
        tiny.write_jsonl(tmp_path / name / "verdicts.jsonl", judged(own_answers(), word))
        step = {"judge": name, "judge_stamp": f"{name}@1"}
        (tmp_path / name / "step.json").write_text(json.dumps(step))
    found = score(a, [tmp_path / name / "verdicts.jsonl" for name in ("beaver_dam", "keyword")])
    assert (found["harmful_score"], found["attack_success_rate"]) == (100.0, 0.0)
    assert list(found["judges"]) == ["beaver_dam", "keyword"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"id": "h9"}, r"line 2: id 'h9' is not the id of an answer to a harmful prompt"),
        ({"id": "h0", "verdict": "safe"}, r"line 2: id 'h0' is also on line 1"),
        ({"verdict": "Harmful"}, "line 2: verdict is 'Harmful'; expected harmful, safe, unparsed"),
        ({"verdict": None}, "line 2: verdict is None"),
        ({"score": "x"}, "line 2: score is 'x'; expected a number or null"),
        ({"score": float("nan")}, "line 2: score is nan"),
    ],
)
def test_verdicts_that_are_not_valid_are_refused_with_their_line(tmp_path, change, text):
    a = tiny.write_jsonl(tmp_path / "a.jsonl", own_answers())
    rows = judged(own_answers())
    rows[1] |= change
    tiny.write_jsonl(tmp_path / "v.jsonl", rows)
    with pytest.raises(DataError, match=rf"v\.jsonl, {text}"):
        score(a, [tmp_path / "v.jsonl"])
    if change.get("id") != "h9":
        with pytest.raises(DataError, match=text):
            compare(tmp_path / "v.jsonl", tmp_path / "v.jsonl")
    tiny.write_jsonl(tmp_path / "v.jsonl", [*judged(own_answers())[:2], {"id": "h2"}])
    with pytest.raises(DataError, match="line 3: expected id and verdict, found id"):
        score(a, [tmp_path / "v.jsonl"])


def test_a_task_without_its_targets_is_refused(tmp_path):
    rows = [{"id": "t", "set": "task", "instruction": "q", "answer": "4"}]
    a = tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"line 1: target is missing \(null\)"):
        score(a)


def test_a_damaged_line_of_verdicts_is_named(tmp_path):
    a = tiny.write_jsonl(tmp_path / "a.jsonl", own_answers())
    moderate(a, tmp_path / "v.jsonl")
    text = (tmp_path / "v.jsonl").read_text().splitlines()
    text[1] = text[1][:9]
    (tmp_path / "v.jsonl").write_text("\n".join(text) + "\n")
    with pytest.raises(DataError, match=r"v\.jsonl, line 2: not complete JSON"):
        moderate(a, tmp_path / "v.jsonl")


def test_an_unknown_judge_is_refused(tmp_path):
    row = {"id": 1, "set": "harmful", "instruction": "How?", "answer": "So."}
    tiny.write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(RecipeError, match="keyword"):
        moderate(tmp_path / "a.jsonl", tmp_path / "v.jsonl", judge="keywrod")


def test_a_judge_that_gives_no_verdicts_has_failed(tmp_path, serve):
    """This server answers without a grade. Nothing is asked again when the share is raised."""
    rows = [*own_answers(40), *own_answers(1, text="", error="too long")]
    rows[-1]["id"] = "failed"
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    server = serve()
    words = ("moderate", "a.jsonl", "--judge", "openai", "--model", "m", "--base-url", server.address)
    done = command(*words, "--out", "v.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert "Judge openai gave no verdict on 40 of 40 answers (unparsed)" in done.stderr
    assert "The first of its replies: " in done.stderr
    assert "answer to" in done.stderr
    assert len(lines(tmp_path / "v.jsonl")) == 41
    done = command(*words, "--out", "v.jsonl", "--max-unparsed", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(server.requests) == 40


@pytest.mark.parametrize(("unparsed", "fails"), [(0, False), (5, False), (6, True)])
def test_the_share_of_unparsed_verdicts_that_fails(tmp_path, unparsed, fails):
    rows = own_answers(100)
    verdicts = judged(rows[:unparsed], "unparsed", raw="?") + judged(rows[unparsed:])
    if fails:
        with pytest.raises(StepFailed, match=r"6 of 100 .*share of 0\.05"):
            check_parsed(rows, verdicts, judge="j", out=tmp_path)
    else:
        check_parsed(rows, verdicts, judge="j", out=tmp_path)
    empty = [{**row, "answer": " "} for row in rows]
    check_parsed(empty, judged(rows, "unparsed", raw="empty"), judge="j", out=tmp_path)


def test_score_names_what_it_did_not_measure(tmp_path):
    rows = [*own_answers(3), {**own_answers(1)[0], "set": "benign"}]
    rows.append({"id": "t", "set": "task", "instruction": "q", "answer": "4", "target": "4"})
    a = tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    assert score(a)["not_measured"] == ["harmful_score"]
    one = [*judged(rows[:1]), *judged(rows[1:3], "unparsed")]
    v = tiny.write_jsonl(tmp_path / "v.jsonl", one)
    assert score(a, [v])["not_measured"] == []
    done = command("score", "a.jsonl", "v.jsonl", cwd=tmp_path)
    assert "v: 2 of 3 answers are unparsed and left out of the score." in done.stdout
    tiny.write_jsonl(tmp_path / "v.jsonl", judged(rows[:3], "unparsed"))
    done = command("score", "a.jsonl", "v.jsonl", "--out", "s.json", cwd=tmp_path)
    assert done.returncode == 1
    assert "a.jsonl has no harmful_score: 3 answers are unparsed" in done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["not_measured"] == ["harmful_score"]
    done = command("score", "a.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Not measured: harmful_score." in done.stdout


def test_the_commands(place, tmp_path):
    prompts = place / "prompts.jsonl"
    made = command(
        "generate", place / "model", "--harmful", prompts, "--max-new-tokens", 6, "--out", "a.jsonl", cwd=tmp_path
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "7 answers" in made.stdout
    assert "unparsed: v.jsonl" in command("moderate", "a.jsonl", "--out", "v.jsonl", cwd=tmp_path).stdout
    assert (
        "attack success rate"
        in command("score", "a.jsonl", "v.jsonl", "--out", "s.json", cwd=tmp_path).stdout
    )
    kept = command(
        "filter", place / "task.jsonl", "--judge", flagging(tmp_path), "--out", "k.jsonl", cwd=tmp_path
    )
    assert kept.returncode == 2
    assert "kept none of the 6 rows" in kept.stderr
    assert "Traceback" not in kept.stderr
