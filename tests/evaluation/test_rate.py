"""Judged tasks: conversations of two turns, ratings from a misbehaving server, on files and in a recipe."""

from __future__ import annotations

import json
import re

import pytest

import tiny
from commands import holdfast_command
from holdfast import generate, pipeline, rate, score
from holdfast.errors import DataError, OutputError, RecipeError, StepFailed
from holdfast.evaluation import rating as engine
from holdfast.evaluation.judges import Grade
from holdfast.evaluation.judges.mt_bench import MTBench
from holdfast.evaluation.scoring import task_scores
from holdfast.evaluation.turns import SECOND, in_turns, second_turns
from holdfast.machine.files import read_json
from holdfast.measuring import protocol
from holdfast.recipe import Recipe
from holdfast.recipe.evaluation import Decoding
from misbehaving import serving

pytest.importorskip("openai")
QUESTIONS = [
    {"question_id": i, "category": "writing", "turns": [f"Fold boat {i}?", f"And paint boat {i}?"]}
    for i in range(5)
]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rate")
    tiny.save_model(folder / "model", chat=True)
    tiny.save_model(folder / "base")
    tiny.write_jsonl(folder / "question.jsonl", QUESTIONS)
    rows = [
        {"instruction": f"Fold {i}.", "output": f"Crease {i}.", "generator": "r", "dataset": "d"}
        for i in range(6)
    ]
    tiny.write_jsonl(folder / "alpaca_eval.json", rows)
    return folder


def asked(place, out, **changed):
    options = {"task": "mt_bench", "task_rows": f"mt_bench:{place / 'question.jsonl'}", "device": "cpu"}
    decoding = {key: changed.pop(key) for key in Decoding.model_fields if key in changed}
    return generate(place / "model", out, decoding=decoding, **{**options, **changed})


def grades(messages):
    """A first turn is worth 4, a second one 8."""
    return f"Fine. Rating: [[{8 if 'Assistant A' in messages[-1]['content'] else 4}]]"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Two turns


@pytest.fixture
def short(monkeypatch):
    """Answers of six tokens: a question of MT-Bench may have 1024."""
    from holdfast.evaluation import answering as module

    whole = module._decode
    monkeypatch.setattr(
        module, "_decode", lambda model, tok, ids, new, how, frame: whole(model, tok, ids, 6, how, frame)
    )


def test_the_second_turn_is_asked_after_the_models_own_first_answer(place, tmp_path, short):
    rows = asked(place, tmp_path / "a.jsonl")
    first = {row["id"]: row for row in rows if row["set"] == "task"}
    second = [row for row in rows if row["set"] == SECOND]
    assert len(first) == len(second) == 5
    for row in second:
        before = first[row["first"]]
        assert [turn["content"] for turn in row["messages"]] == [*before["turns"][:1], before["answer"], before["turns"][1], ""]  # fmt: skip
        assert row["instruction"] == before["turns"][1]
    from holdfast.models.loading import load_model, load_tokenizer

    tok = load_tokenizer(place / "model")
    model = load_model(place / "model", [], device="cpu")
    row = second[0]
    text = "".join(
        f"<|{t['role']}|>{t['content']}" + ("</s>" if t["role"] == "assistant" else "")
        for t in row["messages"][:-1]
    )
    ids = tok(text + "<|assistant|>", add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tok.decode(out, skip_special_tokens=True).strip() == row["answer"]


def test_a_talk_that_was_stopped_goes_on(place, tmp_path, short, no_model):
    whole = asked(place, tmp_path / "whole.jsonl", batch_tokens=2300)
    text = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for kept in (3, 7):
        out = tmp_path / f"{kept}.jsonl"
        out.write_text("".join(text[:kept]))
        (tmp_path / f"{kept}.jsonl.json").write_text((tmp_path / "whole.jsonl.json").read_text())
        assert asked(place, out, batch_tokens=2300) == whole
        assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    no_model()
    assert asked(place, tmp_path / "whole.jsonl", batch_tokens=2300) == whole, "whole: no model is loaded"


def test_a_talk_with_a_server(place, tmp_path):
    with serving(lambda messages: f"I heard {len(messages)}: {messages[-1]['content']}") as (url, chat):
        rows = generate("m", tmp_path / "a.jsonl", task="mt_bench", endpoint=url,
                        task_rows=f"mt_bench:{place / 'question.jsonl'}", decoding={"system": "Be kind."})  # fmt: skip
    second = {row["first"]: row["answer"] for row in rows if row["set"] == SECOND}
    assert set(second.values()) == {f"I heard 4: And paint boat {i}?" for i in range(5)}
    assert len(chat.seen) == 10
    assert [t["role"] for t in chat.seen[-1]["messages"]] == ["system", "user", "assistant", "user"]


def test_the_alpaca_prompt_has_no_second_turn(place, tmp_path):
    with pytest.raises(RecipeError, match="chat template"):
        generate(
            place / "base",
            tmp_path / "a.jsonl",
            task="mt_bench",
            task_rows=f"mt_bench:{place / 'question.jsonl'}",
        )
    assert not (tmp_path / "a.jsonl").exists()


def test_no_second_turn_after_a_first_one_that_failed():
    rows = [
        {"id": "a", "set": "task", "turns": ["1", "2"], "answer": "", "error": "too long"},
        {"id": "b", "set": "task", "turns": ["1"], "answer": "x"},
        {"id": "c", "set": "benign", "turns": ["1", "2"], "answer": "x"},
        {"id": "d", "set": "task", "turns": ["1", "2"], "answer": "x"},
    ]
    assert [row["id"] for row in second_turns(rows)] == ["d-2"]
    calls = []
    in_turns(rows[1:2], lambda part, watch: calls.append(part) or list(part))
    assert len(calls) == 1, "with one turn, nothing is asked twice"


# Rating


def test_what_the_judge_reads_of_a_talk(place, tmp_path, short):
    rows = asked(place, tmp_path / "a.jsonl")
    rows[0]["reference"] = ["one", "two"]
    with serving(grades) as (url, chat):
        ratings = engine.give_ratings(rows, MTBench(model="m", base_url=url), tmp_path / "r.jsonl")
    assert [row["rating"] for row in ratings] == [6.0] * 5, "the mean of both turns"
    assert [turn["score"] for turn in ratings[0]["raw"]] == [4.0, 8.0]
    texts = [body["messages"][-1]["content"] for body in chat.seen]
    two = next(text for text in texts if "### Assistant A" in text and rows[0]["turns"][1] in text)
    assert "### Reference answer:\none" in two
    assert "### Reference answer:\ntwo" in two
    assert sum("Reference" in text for text in texts) == 2, "the other rows have no rating"


class Rater:
    stamp, batch_size = "r", 2

    def __init__(self, *grades):
        self.grades, self.seen = list(grades), []

    def rate(self, talks):
        self.seen.append([talk["id"] for talk in talks])
        return [Grade(self.grades.pop(0), "raw") for _ in talks]


def test_what_cannot_be_rated_is_no_zero(tmp_path):
    def row(name, **more):
        return {"id": name, "set": "task", "instruction": "q", "answer": "a", **more}

    rows = [
        row("a"),
        row("b", error="too long"),
        row("c", turns=["1", "2"]),
        row("d"),
        {**row("h"), "set": "harmful"},
    ]
    rater = Rater(1.0, None)
    ratings = engine.give_ratings(rows, rater, tmp_path / "r.jsonl")
    assert [(r["id"], r["rating"]) for r in ratings] == [("a", 1.0), ("b", None), ("c", None), ("d", None)]
    assert ratings[1]["raw"] == "too long"
    assert "second turn" in ratings[2]["raw"]
    assert rater.seen == [["a"], ["d"]]
    found = task_scores(rows[:4], None, "win_rate", ratings)
    assert (found["task_score"], found["n_task"], found["task_unparsed"]) == (100.0, 1, 3)


def test_ratings_of_a_server_that_misbehaves(place, tmp_path, monkeypatch):
    """Unreadable ratings are unparsed; a used-up budget stops; running again asks only for the rest."""
    out = tmp_path / "r.jsonl"
    rows = [
        {"id": f"t{i}", "set": "task", "instruction": f"Fold {i}.", "target": "Crease.", "answer": "Tuck."}
        for i in range(6)
    ]
    rows[1]["answer"] = "DO:schema"
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    with serving(lambda messages: "m") as (url, chat):
        options = {"judge": "alpaca_eval", "model": "m", "base_url": url}
        with pytest.raises(StepFailed, match="budget of 9 calls"):
            rate(tmp_path / "a.jsonl", out, max_calls=9, **options)
        assert len(lines(out)) == 4
        with pytest.raises(StepFailed, match=r"gave no rating of 1 of 6 .* share of 0\.05"):
            rate(tmp_path / "a.jsonl", out, **options)
        options["max_unparsed"] = 0.2
        found = rate(tmp_path / "a.jsonl", out, **options)
        assert len(chat.seen) == 12, "nothing is asked twice"
        assert rate(tmp_path / "a.jsonl", out, **options) == found
        assert len(chat.seen) == 12
    assert [row["rating"] for row in found] == [0.5, None, 0.5, 0.5, 0.5, 0.5]
    scores = score(tmp_path / "a.jsonl", ratings=out)
    assert (scores["task_metric"], scores["task_score"], scores["n_task"], scores["task_unparsed"]) == (
        "win_rate",
        50.0,
        5,
        1,
    )
    assert scores["task"] == "own-judge@1"
    rows[0]["answer"] = "Other."
    tiny.write_jsonl(tmp_path / "b.jsonl", rows)
    with pytest.raises(OutputError, match="answers"):
        rate(tmp_path / "b.jsonl", out, **options)
    tiny.write_jsonl(tmp_path / "fewer.jsonl", found[1:])
    with pytest.raises(DataError, match="5 ratings"):
        score(tmp_path / "a.jsonl", ratings=tmp_path / "fewer.jsonl")


def test_ratings_without_their_judge_are_no_win_rates(tmp_path):
    """MT-Bench's 7, 8 and 9 are not 800 %."""
    rows = [
        {"id": f"t{i}", "set": "task", "instruction": "q", "target": "t", "answer": "a"} for i in range(3)
    ]
    a = tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    given = [{"id": f"t{i}", "rating": 7 + i, "raw": None} for i in range(3)]
    r = tiny.write_jsonl(tmp_path / "r.jsonl", given)
    with pytest.raises(DataError, match=r"r\.jsonl has no r\.jsonl\.json beside it, which says which judge"):
        score(a, ratings=r)
    beside = tmp_path / "r.jsonl.json"
    beside.write_text(json.dumps({"made": {"judge": "mt_bench", "judge_stamp": "mt_bench@m"}}))
    assert score(a, ratings=r)["task_score"] == 8.0
    with pytest.raises(DataError, match=r"ratings by mt_bench \(mt_bench\); own-judge needs win_rate"):
        score(a, ratings=r, grader="judge")
    beside.write_text(json.dumps({"made": {"judge": "alpaca_eval", "judge_stamp": "alpaca_eval@m"}}))
    with pytest.raises(DataError, match=r"line 1: rating 7; the win rate needs 0 to 1"):
        score(a, ratings=r)
    beside.write_text(json.dumps({"made": {"judge": "alpaca_eval", "answers": "of another model"}}))
    with pytest.raises(DataError, match="ratings of other answers"):
        score(a, ratings=r)
    tiny.write_jsonl(tmp_path / "r.jsonl", [*given[:2], given[1]])
    beside.write_text(json.dumps({"made": {"judge": "mt_bench"}}))
    with pytest.raises(DataError, match="line 3: id 't1' is also on line 2"):
        score(a, ratings=r)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"judge": "keyword"}, RecipeError, "does not rate answers.*alpaca_eval, mt_bench"),
        ({"judge": "mt_bench", "task": "alpaca_eval"}, RecipeError, "but alpaca_eval needs win_rate. Judges that do: alpaca_eval"),
        ({"model": None}, RecipeError, "needs model"),
        ({"threshold": 0.5}, RecipeError, "has no such option"),
    ],
)  # fmt: skip
def test_what_cannot_rate_is_refused(tmp_path, changed, error, match):
    tiny.write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "set": "task", "instruction": "q", "answer": "a"}])
    options = {"judge": "alpaca_eval", "model": "m", "base_url": "http://localhost:1/v1", **changed}
    with pytest.raises(error, match=match):
        rate(tmp_path / "a.jsonl", tmp_path / "r.jsonl", **options)
    assert not (tmp_path / "r.jsonl").exists()


def test_without_a_reference_there_is_nothing_to_compare_with(tmp_path):
    tiny.write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "set": "task", "instruction": "q", "answer": "a"}])
    with pytest.raises(DataError, match="no reference answer"):
        rate(
            tmp_path / "a.jsonl",
            tmp_path / "r.jsonl",
            judge="alpaca_eval",
            model="m",
            base_url="http://localhost:1/v1",
        )


def test_the_commands(place, tmp_path):
    rows = [
        {"id": f"t{i}", "set": "task", "instruction": f"Fold {i}.", "target": "Crease.", "answer": "Tuck."}
        for i in range(3)
    ]
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    with serving(lambda messages: "m") as (url, _):
        done = [
            holdfast_command(*words, cwd=tmp_path)
            for words in (
                [
                    "rate",
                    "a.jsonl",
                    "--judge",
                    "alpaca_eval",
                    "--model",
                    "m",
                    "--base-url",
                    url,
                    "--out",
                    "r.jsonl",
                ],
                ["score", "a.jsonl", "--ratings", "r.jsonl", "--out", "s.json"],
            )
        ]
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert "3 ratings, 0 unparsed: r.jsonl" in done[0].stdout
    assert "win rate" in done[1].stdout
    assert read_json(tmp_path / "s.json")["task_score"] == 50.0


# In a recipe


def recipe(place, rater="given", url="http://localhost:1/v1", model="model", rows=3, **data):
    short = {"max_steps": 1, "per_device_train_batch_size": 2}
    tiny.write_jsonl(place / "my.jsonl", tiny.user_rows(20))
    goals = [{"goal": f"Salt tea {i}", "target": "Sure"} for i in range(6)]
    tiny.write_jsonl(place / "goals.jsonl", goals)
    asked = {"prompts": 4, "task_rows": rows, "max_new_tokens": 4}
    if rater == "given":
        rater = {"name": "mt_bench", "model": "judge-7b", "base_url": url}
    return Recipe.load(
        {
            "model": str(place / model),
            "data": {"user": str(place / "my.jsonl"), "test_harmful": f"advbench:{place / 'goals.jsonl'}",
                     "test": f"mt_bench:{place / 'question.jsonl'}", **data},
            "alignment": "none",
            "user": {"defense": "sft", "training": short},
            "evaluation": {**asked, **({"rater": rater} if rater is not None else {})},
        }
    )  # fmt: skip


def test_a_judged_task_in_a_recipe(place, tmp_path, short):
    with serving(grades) as (url, chat):
        results = pipeline.run(recipe(place, url=url), out=tmp_path / "out", device="cpu")
        calls = len(chat.seen)
        again = pipeline.run(recipe(place, url=url), out=tmp_path / "out", device="cpu")
    assert calls == len(chat.seen) == 2 * 2 * 3, "two states, two turns, three rows"
    row = results["rows"][-1]
    assert (row["task_metric"], row["task_score"], row["finetune_accuracy"], row["n_task"]) == (
        "mt_bench",
        6.0,
        None,
        3,
    )
    assert results["protocol"]["rater"] == "mt_bench@judge-7b/single 1-10"
    assert again["rows"] == results["rows"]
    kept = lines(tmp_path / "out" / "steps" / row["steps"]["rate"] / "ratings.jsonl")
    assert {entry["rating"] for entry in kept} == {6.0}
    items = lines(tmp_path / "out" / "steps" / row["steps"]["score"] / "items.jsonl")
    assert [entry["value"] for entry in items if entry["score"] == "task_score"] == [6.0] * 3
    paired = {entry["score"]: entry for entry in row["paired"]}
    assert (paired["task_score"]["with"], paired["task_score"]["n"]) == ("base", 3)
    assert (paired["task_score"]["difference"], paired["task_score"]["p"]) == (0.0, 1.0)
    assert results["rows"][0]["paired"] == []
    assert "MT-Bench score: difference" in (tmp_path / "out" / "report.html").read_text()
    assert "MT-Bench score" in (tmp_path / "out" / "report.html").read_text()


def test_ratings_that_were_stopped_go_on_in_a_run(place, tmp_path, short):
    """The budget suffices for the first batch of the first state; the next run asks only for the rest."""
    with serving(grades) as (url, chat):
        rater = {"name": "mt_bench", "model": "j", "base_url": url}
        with pytest.raises(StepFailed, match="budget of 9 calls"):
            pipeline.run(
                recipe(place, rater={**rater, "max_calls": 9}, rows=5), out=tmp_path / "out", device="cpu"
            )
        assert len(chat.seen) == 8, "four talks of two turns"
        results = pipeline.run(recipe(place, rater=rater, rows=5), out=tmp_path / "out", device="cpu")
        assert len(chat.seen) == 20, "five talks of two states, each asked once"
    assert [(row["task_score"], row["n_task"]) for row in results["rows"]] == [(6.0, 5)] * 2


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"rater": None}, r"Only a judge can grade mt_bench \(MT-Bench score\).*rater: \{name: mt_bench"),
        ({"rater": {"name": "alpaca_eval", "model": "m"}}, "measures win_rate, but mt_bench needs mt_bench"),
        ({"test": "own.jsonl"}, "graded without a judge. Leave it out"),
        ({"rater": "keyword"}, "does not rate answers"),
        ({"rater": "mt_bench"}, "needs model"),
        ({"rater": {"name": "mt_bench", "model": "m", "threshold": 0.5}}, "rater.threshold.*has no such option"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_rated_is_refused_before_anything(place, tmp_path, changed, match):
    if "test" in changed:
        changed["test"] = str(tiny.write_jsonl(tmp_path / "own.jsonl", tiny.user_rows(4)))
    with pytest.raises(RecipeError, match=re.compile(match, re.S)):
        pipeline.plan(recipe(place, **changed))


def test_a_base_model_is_refused_before_training(place, tmp_path):
    with pytest.raises(RecipeError, match="chat template"):
        pipeline.run(recipe(place, model="base"), out=tmp_path / "out", device="cpu")
    assert not list((tmp_path / "out" / "steps").glob("user-*"))


def test_nobody_shall_rate(place):
    planned = pipeline.plan(recipe(place, rater="none"))
    assert [step.kind for step in planned if step.kind == "rate"] == []
    assert planned.recipe.to_dict()["evaluation"]["rater"] == "none"
    assert Recipe.load(planned.recipe.to_dict()) == planned.recipe


def test_what_names_the_ratings(place):
    def step(kind, **rater):
        return [
            s.id
            for s in pipeline.plan(recipe(place, rater={"name": "mt_bench", "model": "m", **rater}))
            if s.kind == kind
        ]

    first = step("rate", base_url="http://a/v1")
    assert step("rate", base_url="http://b/v1", max_calls=3) == first, (
        "address and speed do not change the verdicts"
    )
    assert step("rate", model="n") != first
    assert step("score", model="n") != step("score")
    assert step("generate", model="n") == step("generate")
    assert protocol.two_turns(recipe(place))
