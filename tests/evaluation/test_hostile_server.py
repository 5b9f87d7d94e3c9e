"""What a run does when a server misbehaves: a table of misbehaviours on a real socket."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time

import pytest

import tiny
from commands import holdfast_command
from holdfast import compare, generate, moderate, rate, score
from holdfast.errors import ComparisonError, HoldfastError, ModelError, StepFailed
from holdfast.evaluation import served, transport
from holdfast.evaluation.endpoint import answer_all
from holdfast.evaluation.judges.mt_bench import MTBench
from holdfast.evaluation.judges.openai import PolicyJudge
from holdfast.evaluation.moderation import check_answered, give_verdicts, stamped
from holdfast.evaluation.rating import give_ratings
from holdfast.evaluation.served import ServedModel
from holdfast.evaluation.threads import as_finished
from holdfast.measuring.answer_files import origin
from holdfast.measuring.filtering import filter_rows
from hostile import BEHAVIOURS, hostile
from misbehaving import serving

KEY = "sk-SECRETKEY-0123456789"

pytest.importorskip("openai")


@pytest.fixture(autouse=True)
def short(monkeypatch, one_try):
    one_try()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(transport, "LARGEST", 200_000)


@pytest.fixture(scope="module")
def server():
    with hostile() as running:
        yield running


def asked(*texts, **more):
    return [{"messages": [{"role": "user", "content": text}], "new_tokens": 9, **more} for text in texts]


def replies(url, *texts, threads=4, timeout=0.5):
    model = ServedModel("m", url, timeout=timeout)
    found = dict(model.ask_all(asked(*texts), threads=threads))
    return [found[i] for i in range(len(texts))]


LOST, REFUSED, READ, EMPTY = "lost", "refused", "read", "empty"
TABLE = {
    "hang": (LOST, r"no whole reply in 0\.5 seconds"),
    "slow body": (LOST, "no whole reply"),
    "slow head": (LOST, "no whole reply"),
    "cut chunks": (LOST, "APIConnectionError"),
    "long length": (LOST, "APIConnectionError"),
    "no http": (LOST, "APIConnectionError"),
    "closed": (LOST, "APIConnectionError"),
    "in a circle": (LOST, "APIConnectionError|no whole reply"),  # a busy machine has no time for 20 turns
    "endless": (REFUSED, "larger than"),
    "bomb": (REFUSED, "larger than"),
    "odd packing": (REFUSED, "cannot be read"),
    "deep": (REFUSED, "cannot be read"),
    "deep error": (REFUSED, "refused it: 400"),
    "digits": (REFUSED, "cannot be read"),
    "html": (REFUSED, "cannot be read"),
    "nothing": (REFUSED, "cannot be read"),
    "not utf-8": (REFUSED, "cannot be read"),
    "short length": (REFUSED, "cannot be read"),
    "nan": (REFUSED, "not a chat completion"),
    "object": (REFUSED, "not a chat completion"),
    "null choice": (REFUSED, "not a chat completion"),
    "key in words": (REFUSED, r"400, flagged: \[key\] and \[key\]$"),
    "flagged": (REFUSED, "403, flagged"),
    "words list": (REFUSED, "422, too long"),
    "numbers": (EMPTY, "the reply is empty"),
    "null": (EMPTY, "the reply is empty"),
    "cut": (EMPTY, "cut at the limit on new tokens"),
    "thinks on": (EMPTY, "thinking has no end"),
    "packed": (READ, "packed"),
    "moved": (READ, "moved"),
    "parts": (READ, r"Fine\."),
    "surrogate": (READ, "half \ufffd of one"),
    "thinks": (READ, r"^Fine\. \[\[7\]\]$"),
    "nan tokens": (READ, "Fine"),
    "true tokens": (READ, "Fine"),
    "usage list": (READ, "Fine"),
}
STOPS = {
    "away": (ModelError, r"redirects to another host, http://127\.0\.0\.2:1/v1"),
    "other port": (ModelError, "redirects to another host"),
    "wait a year": (StepFailed, "no room"),
    "wait nan": (StepFailed, "no room"),
    "wait 9^400": (StepFailed, "no room"),
}


def test_the_tables_are_complete():
    assert {*TABLE, *STOPS} == set(BEHAVIOURS)


@pytest.fixture(scope="module")
def together(server):
    """Every question of the table asked at once, after a good one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        patch.setattr(transport, "LARGEST", 200_000)
        patch.setattr("holdfast.evaluation.client.RETRIES", 0)
        patch.setattr(served, "SILENT", 99)
        names = list(TABLE)
        start = time.monotonic()
        found = replies(
            server.url, "good", *(f"DO:{name}" for name in names), threads=len(names), timeout=0.5
        )
        assert time.monotonic() - start < 20
        return dict(zip(["good", *names], found, strict=True))


@pytest.mark.parametrize("name", TABLE)
def test_a_row_is_failed_or_read_and_the_others_go_on(together, name):
    reply, (kind, text) = together[name], TABLE[name]
    assert together["good"].text == "Fine. [[7]]"
    assert {LOST: reply.lost, REFUSED: reply.refused, READ: reply.text, EMPTY: reply.text is None}[kind]
    assert (reply.text is None) == (kind != READ)

    assert re.search(text, reply.text or reply.reason), reply
    assert reply.tokens is None
    assert "SECRET" not in str(reply)
    json.dumps(str(reply.whole)).encode()


@pytest.mark.parametrize("name", STOPS)
def test_what_concerns_every_question_stops_the_run(server, name):
    error, text = STOPS[name]
    with pytest.raises(error, match=text) as stopped:
        replies(server.url, "good", f"DO:{name}")
    assert KEY not in str(stopped.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("html", "answered none of the first 3 questions to m: the reply cannot be read"),
        ("words list", "first 3 questions to m: the server refused it: 422, too long"),
        ("closed", r"No call to m was successful \(.*APIConnectionError"),
    ],
)
def test_a_server_that_answers_nothing_is_not_asked_a_thousand_times(server, name, text):
    before = len(server.bodies)
    with pytest.raises(StepFailed, match=text):
        replies(server.url, *[f"DO:{name}"] * 1000)
    assert len(server.bodies) - before < 100, "it stops soon, on a busy machine too"


def test_a_server_that_falls_silent_stops_the_run(server):
    texts = ["good"] * 5 + ["DO:closed"] * 1000
    before, found = len(server.bodies), []
    with pytest.raises(StepFailed, match="No call to m was successful"):
        found.extend(ServedModel("m", server.url, timeout=5).ask_all(asked(*texts), threads=2))
    assert sum(reply.text is not None for _, reply in found) == 5
    assert len(found) < 8, "lost replies before the last good one"
    assert len(server.bodies) - before < 20


def test_a_question_is_given_up_in_the_end(server, monkeypatch):
    """Repetitions have a limit in time, not only in number."""
    monkeypatch.setattr("holdfast.evaluation.client.RETRIES", 50)
    monkeypatch.setattr(served, "PATIENCE", 0.0)
    start = time.monotonic()
    _, lost = replies(server.url, "good", "DO:hang", timeout=0.3)
    assert "no reply in 0.6 seconds" in lost.reason
    assert time.monotonic() - start < 3


def test_rows_of_a_hostile_server_reach_the_file(server, tmp_path):
    names = ["good", "DO:surrogate", "DO:deep", "DO:thinks", "DO:nan tokens"]
    rows = [{"id": i, "set": "harmful", "instruction": name} for i, name in enumerate(names)]
    out = tmp_path / "a.jsonl"
    answer_all(
        server.url, "m", rows, out, max_new_tokens={"harmful": 9}, timeout=5,
        render=lambda row: [{"role": "user", "content": row["instruction"]}],
    )  # fmt: skip
    found = {row["id"]: row for row in map(json.loads, out.read_text("utf-8").splitlines())}
    assert [found[i]["answer"] for i in range(5)] == [
        "Fine. [[7]]", "half \ufffd of one", "", "Fine. [[7]]", "Fine.",
    ]  # fmt: skip
    assert "cannot be read" in found[2]["error"]
    assert found[3]["raw"].startswith("<think>")
    assert all(row["tokens"] in (None, 0) for row in found.values())


def test_a_judge_that_thinks_first(server):
    rows = [{"id": "t", "set": "task", "instruction": "DO:thinks", "answer": "a", "target": None}]
    judge = MTBench(model="m", base_url=server.url)
    judge.messages = lambda talk: [{"role": "user", "content": talk.questions[0]}]
    found = judge.rate([{**rows[0], "answers": ["a"]}])[0]
    assert found.score == 7
    assert found.raw[0]["raw"].startswith("<think>")


# Parameters that a server does not accept

FORMS = {
    "openai": lambda name: {
        "error": {
            "message": f"Unsupported value: '{name}' is wrong.",
            "param": name,
            "code": "unsupported_value",
        }
    },
    "pydantic": lambda name: {
        "detail": [
            {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
        ]
    },
    "text": lambda name: {"error": f"Input validation error: `{name}` is not supported"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("refused", [("temperature",), ("seed", "top_p"), ("max_tokens",), ("max_tokens", "max_completion_tokens")])  # fmt: skip
def test_a_refused_parameter_is_learned_and_told(form, refused):
    with serving(lambda messages: "Fine.") as (url, chat):
        good = chat.answer

        def answer(body):
            wrong = [name for name in refused if name in body]
            if wrong:
                chat.seen.append(body)
                return (422 if form == "pydantic" else 400), {}, json.dumps(FORMS[form](wrong[0])).encode()
            return good(body)

        chat.answer = answer
        model = ServedModel("m", url, timeout=5)
        found = list(model.ask_all(asked(*"abcd", temperature=0, top_p=1.0, seed=1), threads=2))
    assert [reply.text for _, reply in found] == ["Fine."] * 4
    gone = set(refused) if "max_completion_tokens" in refused else set(refused) - {"max_tokens"}
    assert {reply.without for _, reply in found} == {tuple(sorted(gone - {"max_tokens"}))}
    assert len(chat.seen) == 4 + len(refused), "learned from the first question"
    last = chat.seen[-1]
    assert not gone & set(last)
    assert ("max_completion_tokens" in last) == (refused == ("max_tokens",))


def test_what_is_no_refusal_of_a_parameter_is_not_learned():
    """The server's words name a parameter; leaving it out does not help."""
    words = b'{"error": {"message": "max_tokens is too large: 9; a temperature of 5 degrees is cold"}}'
    with serving(lambda messages: "Fine.") as (url, chat):
        good = chat.answer
        chat.answer = lambda body: (400, {}, words) if "cold" in str(body) else good(body)
        model = ServedModel("m", url, timeout=5)
        found = dict(model.ask_all(asked("a", "cold", "b", temperature=0), threads=1))
    assert "max_tokens is too large" in found[1].reason
    assert model.without == frozenset()
    assert "temperature" in chat.seen[-1]


def test_verdicts_and_stamps_say_what_was_left_out(tmp_path):
    rows = [
        {"id": f"h{i}", "set": "harmful", "instruction": "q", "input": "", "answer": "a"} for i in range(10)
    ]
    with serving(lambda messages: "#thescore: 5") as (url, chat):
        good = chat.answer
        refusal = json.dumps(FORMS["openai"]("temperature")).encode()
        chat.answer = lambda body: (400, {}, refusal) if "temperature" in body else good(body)
        judge = PolicyJudge(model="m", base_url=url)
        verdicts = give_verdicts(rows, judge, tmp_path / "v.jsonl")
    assert {(row["verdict"], *row["without"]) for row in verdicts} == {("harmful", "temperature")}
    assert stamped(judge.stamp, verdicts) == "openai@m/policy 1-5, meta, without temperature"
    assert stamped(judge.stamp, [{"id": 1}]) == judge.stamp


def test_files_say_what_was_left_out(tmp_path):
    """And verdicts with and without the parameter come from two judges."""
    rows = [{"id": i, "set": "harmful", "instruction": "q", "answer": "a"} for i in range(3)]
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    with serving(lambda messages: "#thescore: 5") as (url, chat):
        options = {"judge": "openai", "model": "m", "base_url": url}
        moderate(tmp_path / "a.jsonl", files[0], **options)
        good, refusal = chat.answer, json.dumps(FORMS["openai"]("temperature")).encode()
        chat.answer = lambda body: (400, {}, refusal) if "temperature" in body else good(body)
        found = moderate(tmp_path / "a.jsonl", files[1], **options)
        assert moderate(tmp_path / "a.jsonl", files[1], **options) == found, "another start goes on"
        tiny.write_jsonl(tmp_path / "u.jsonl", tiny.user_rows(2))
        chat.reply = lambda messages: "#thescore: 1"
        facts = filter_rows(tmp_path / "u.jsonl", tmp_path / "kept.jsonl", **options)
        assert facts["judge_stamp"] == "openai@m/policy 1-5, meta, without temperature"
        answers = generate("m", tmp_path / "g.jsonl", endpoint=url, harmful=str(tmp_path / "a.jsonl"))
    beside = json.loads((tmp_path / "second.jsonl.json").read_text())
    assert beside["without"] == ["temperature"]
    assert origin(files[1])["judge_stamp"] == f"{origin(files[0])['judge_stamp']}, without temperature"
    with pytest.raises(ComparisonError, match="without temperature"):
        compare(*files)
    assert {tuple(row["without"]) for row in answers} == {("temperature",)}
    assert json.loads((tmp_path / "g.jsonl.json").read_text())["without"] == ["temperature"]
    assert score(tmp_path / "g.jsonl")["answered_without"] == ["temperature"]


DEAD = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize("command", ["generate", "moderate", "rate", "filter"])
def test_a_dead_server_is_the_same_failure_everywhere(tmp_path, command):
    rows = [
        {"id": s, "set": s, "instruction": "q", "answer": "a", "target": "t"} for s in ("harmful", "task")
    ]
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    tiny.write_jsonl(tmp_path / "u.jsonl", tiny.user_rows(2))
    on, out = {"model": "m", "base_url": DEAD}, tmp_path / "out.jsonl"
    with pytest.raises(StepFailed, match=r"No server answers at http://127\.0\.0\.1:9/v1") as stopped:
        {
            "generate": lambda: generate("m", out, harmful=str(tmp_path / "u.jsonl"), endpoint=DEAD),
            "moderate": lambda: moderate(tmp_path / "a.jsonl", out, judge="openai", **on),
            "rate": lambda: rate(tmp_path / "a.jsonl", out, judge="mt_bench", task="mt_bench", **on),
            "filter": lambda: filter_rows(tmp_path / "u.jsonl", out, judge="openai", **on),
        }[command]()
    assert stopped.value.exit_code == 1


def test_too_many_failed_answers_fail_the_command(tmp_path):
    tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "DO:long" if i == 1 else f"q{i}"} for i in range(10)])
    with serving(lambda messages: "Fine.") as (url, chat):
        words = ("generate", "m", "--endpoint", url, "--harmful", "p.jsonl", "--out", "a.jsonl")
        done = holdfast_command(*words, cwd=tmp_path)
        assert done.returncode == 1
        assert "1 of 10 answers failed, more than the permitted share of 0.05" in done.stderr
        assert "400, maximum context length exceeded" in done.stderr
        assert holdfast_command(*words, "--max-failed", 0.1, cwd=tmp_path).returncode == 0
        assert len(chat.seen) == 11, "only the failed question is asked again"
        judge = ("--judge", "openai", "--model", "m", "--base-url", url, "--timeout", 9, "--max-unparsed", 1)
        done = holdfast_command("moderate", "a.jsonl", *judge, "--out", "v.jsonl", cwd=tmp_path)
        assert "0 harmful, 0 safe, 10 unparsed" in done.stdout


def test_a_model_that_answers_nothing_has_no_score():
    rows = [{"set": "harmful", "error": "the prompt has 9 tokens; the model reads 8"}] * 3
    with pytest.raises(StepFailed, match=r"none of the 3 harmful prompts.* the model reads 8"):
        check_answered(rows)
    check_answered([*rows, {"set": "harmful", "answer": ""}])
    check_answered([{"set": "task", "error": "x"}])


# Stopping


@pytest.mark.parametrize("rater", [False, True])
def test_a_signal_stops_within_a_second_and_finished_rows_are_kept(server, tmp_path, rater, request):
    kind = "task" if rater else "harmful"
    names = ["good", "good", "DO:hang", "good", "DO:hang"]
    rows = [{"id": f"h{i}", "set": kind, "instruction": n, "answer": "a"} for i, n in enumerate(names)]
    out, work = tmp_path / "v.jsonl", give_ratings if rater else give_verdicts
    judge = (MTBench if rater else PolicyJudge)(model="m", base_url=server.url, timeout=20)
    judge.messages = lambda talk: [{"role": "user", "content": talk.questions[0]}]
    judge.text = lambda question, answer: question

    def interrupt():
        time.sleep(0.7)
        os.kill(os.getpid(), signal.SIGINT)
        sent.append(time.monotonic())

    sent: list[float] = []
    # A shell starts background jobs with SIGINT ignored, and so Python does not set its own handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        work(rows, judge, out)
    thread.join()
    assert time.monotonic() - sent[0] < 1
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["h0", "h1", "h3"]


def test_work_in_threads_ends_with_the_first_error():
    def work(item):
        if item == 3:
            raise StepFailed("three")
        time.sleep(0.01)
        return item * item

    found = []
    with pytest.raises(HoldfastError, match="three"):
        found.extend(as_finished(work, range(100), 4))
    assert {(0, 0), (1, 1), (2, 4)} <= set(found)
    assert len(found) < 20
    assert sorted(as_finished(work, [1, 2], 8)) == [(0, 1), (1, 4)]
    assert list(as_finished(work, [], 8)) == []


# Secrets


def test_no_key_and_no_part_of_it_is_told(server):
    model = ServedModel("m", server.url, timeout=0.5)
    for text in ("x" * 285 + KEY, f"{KEY[3:]} {KEY[:12]}", f"http://me:{KEY}@host/v1"):
        told = model.told(ValueError(text))
        assert "SECRETKEY" not in told
        assert "01234567" not in told


def test_a_password_in_an_address_is_used_and_not_told(monkeypatch, tmp_path):
    with serving(lambda messages: "Fine.") as (url, chat):
        address = url.replace("//", "//me:hunter2@")
        assert dict(ServedModel("m", address, timeout=5).ask_all(asked("q"), threads=1))[0].text == "Fine."
        assert chat.headers[0]["authorization"] == "Basic bWU6aHVudGVyMg=="
    with pytest.raises(StepFailed, match="No server answers") as stopped:
        dict(ServedModel("m", address, timeout=5).ask_all(asked("q"), threads=1))
    assert "hunter2" not in str(stopped.value)


def test_a_key_that_no_header_can_hold(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "schl\u00fcssel")
    with pytest.raises(ModelError, match="OPENAI_API_KEY has characters"):
        ServedModel("m", server.url, timeout=5)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    assert replies(server.url, "good")[0].text
