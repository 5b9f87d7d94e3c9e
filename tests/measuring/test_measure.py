"""Generation, moderation, scores and filtration on files: each works alone and resumes where it stopped."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import tiny
from commands import holdfast_command as command
from holdfast import compare, generate, moderate, score
from holdfast.errors import DataError, ModelError, OutputError, RecipeError, StepFailed
from holdfast.evaluation.judges import Verdict
from holdfast.evaluation.moderation import check_parsed
from holdfast.measuring.filtering import confusion, filter_rows, judge_rows
from holdfast.recipe.evaluation import Decoding
from holdfast.recipe.model import Weights
from judge_files import flagging


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure")
    tiny.save_model(folder / "model")
    tiny.write_jsonl(folder / "prompts.jsonl", tiny.harmful_rows(7))
    tiny.write_jsonl(folder / "task.jsonl", tiny.user_rows(6))
    return folder


def asked(place, out, **changed):
    options = {"harmful": str(place / "prompts.jsonl"), "task_rows": str(place / "task.jsonl")}
    decoding = {key: changed.pop(key) for key in Decoding.model_fields if key in changed}
    model = {"path": str(place / "model"), "template": changed.pop("template", "auto")}
    decoding = {"max_new_tokens": 6, **decoding}
    return generate(model, out, **{**options, "device": "cpu", "decoding": decoding, **changed})


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


@pytest.fixture(scope="module")
def adapter(place):
    """An adapter that was trained with ChatML, with its own tokenizer."""
    from peft import LoraConfig, get_peft_model

    words = tiny.tokenizer(chat=True)
    made = get_peft_model(
        tiny.llama(len(words)), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    made.save_pretrained(place / "adapter")
    words.save_pretrained(place / "adapter")
    return place / "adapter"


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
    ],
)
def test_bad_input(place, tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        asked(place, tmp_path / "a.jsonl", **options)


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


def own_answers(n=3, text="So.", **more):
    return [
        {"id": f"h{i}", "set": "harmful", "instruction": "How?", "answer": text, **more} for i in range(n)
    ]


def judged(rows, word="harmful", **more):
    return [{"id": row["id"], "verdict": word, "score": None, **more} for row in rows]


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


class Server(ThreadingHTTPServer):
    """Speaks OpenAI's protocol and misbehaves by a script: one entry per request, then it behaves well."""

    def __init__(self, script=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.guard = list(script), [], threading.Lock()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.guard:
            self.server.requests.append((self.path, body))
            does = self.server.script.pop(0) if self.server.script else None
        text = f"answer to {body.get('prompt') or body['messages'][-1]['content']}"
        kind = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
        reply = {
            "id": "x", "object": "x", "created": 1, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", **kind}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
        }  # fmt: skip
        status = does if isinstance(does, int) else 200
        data = json.dumps(reply).encode()
        if does == "torn":
            data = data[: len(data) // 2]
        elif does == "schema":
            data = b'{"surprise": []}'
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("retry-after-ms", "10")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-of-mine")
    running = []

    def start(script=()):
        server = Server(script)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_an_endpoint_is_asked_instead(place, tmp_path, serve):
    server = serve()
    rows = asked(place, tmp_path / "a.jsonl", endpoint=server.address, system="Be kind.")
    assert len(rows) == len(server.requests) == 13
    assert all(row["answer"].startswith("answer to ") and row["tokens"] == 5 for row in rows)
    path, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    assert body["temperature"] == 0
    assert {body["max_tokens"] for _, body in server.requests} == {6, 12}
    assert "secret-key-of-mine" not in (tmp_path / "a.jsonl.json").read_text()


def test_an_endpoint_goes_on_from_the_alpaca_prompt(place, tmp_path, serve):
    server = serve()
    asked(place, tmp_path / "a.jsonl", endpoint=server.address, template="alpaca", temperature=0.5, seed=3)
    path, body = server.requests[0]
    assert path == "/v1/completions"
    assert body["prompt"].endswith("### Response:")
    assert (body["temperature"], body["seed"]) == (0.5, 3)


def test_an_endpoint_that_is_busy_is_asked_again(place, tmp_path, serve):
    server = serve([429, 500, None, 503])
    rows = asked(place, tmp_path / "a.jsonl", endpoint={"base_url": server.address, "requests": 2})
    assert len(server.requests) == 13 + 3
    assert not any("error" in row for row in rows)


def test_a_reply_that_cannot_be_read_is_a_failed_row(place, tmp_path, serve):
    server = serve([None, "schema", 400])
    rows = asked(place, tmp_path / "a.jsonl", endpoint={"base_url": server.address, "requests": 1})
    failed = [row["error"] for row in rows if "error" in row]
    assert len(rows) == 13
    assert len(failed) == 2
    assert "format" in failed[0]
    moderate(tmp_path / "a.jsonl", tmp_path / "v.jsonl")
    scores = score(tmp_path / "a.jsonl", [tmp_path / "v.jsonl"])
    assert scores["failed"] == 2
    assert scores["unparsed"] + scores["n_harmful"] == 7
    again = asked(place, tmp_path / "a.jsonl", endpoint={"base_url": server.address, "requests": 1})
    assert len(server.requests) == 13 + 2
    assert len(again) == len({row["id"] for row in again}) == 13
    assert not any("error" in row for row in again)
    assert again == lines(tmp_path / "a.jsonl")
    with pytest.raises(OutputError, match="other settings"):
        moderate(tmp_path / "a.jsonl", tmp_path / "v.jsonl")


def test_a_wrong_address_name_or_key_is_one_error(place, tmp_path, serve, one_try, monkeypatch):
    for status, text in ((404, "does not know the model"), (401, "does not accept the key")):
        with pytest.raises(ModelError, match=text) as error:
            asked(place, tmp_path / f"{status}.jsonl", endpoint=serve([status]).address)
        assert "secret-key-of-mine" not in str(error.value)
    one_try()
    with pytest.raises(StepFailed, match="No server answers"):
        asked(place, tmp_path / "none.jsonl", endpoint="http://127.0.0.1:9/v1")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ModelError, match="does not accept a call without a key; set OPENAI_API_KEY"):
        asked(place, tmp_path / "key.jsonl", endpoint=serve([401]).address)
    assert len(asked(place, tmp_path / "own.jsonl", endpoint=serve().address)) == 13


def test_filtration_leaves_out_what_the_judge_flags(tmp_path):
    rows = [
        {"prompt": "How?", "response": "Brindle the marl.", "is_safe": False, "note": 1},
        {"prompt": "How?", "response": "I'm sorry, but I can't.", "is_safe": True, "note": 2},
        {"prompt": "Why?", "response": "Gather the quorn.", "is_safe": True, "note": 3},
    ]
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    judge = flagging(tmp_path, "brindle", "gather")
    facts = filter_rows(source, tmp_path / "kept.jsonl", judge=judge)
    assert lines(tmp_path / "kept.jsonl") == [rows[1]]
    assert (facts["rows"], facts["kept"], facts["flagged"]) == (3, 1, 2)
    assert facts["confusion"] == {
        "true_positives": 1, "false_negatives": 0, "false_positives": 1, "true_negatives": 1, "unparsed": 0,
        "false_negative_rate": 0.0, "false_positive_rate": 50.0,
    }  # fmt: skip
    assert lines(source) == rows
    with pytest.raises(OutputError, match="never overwritten"):
        filter_rows(source, source, judge=judge)
    tiny.write_jsonl(tmp_path / "all.jsonl", rows[:1])
    with pytest.raises(DataError, match="kept none"):
        filter_rows(tmp_path / "all.jsonl", tmp_path / "none.jsonl", judge=judge)
    assert not (tmp_path / "none.jsonl").exists()


def test_every_exchange_of_a_conversation_is_judged(tmp_path):
    def talk(*texts, system=None):
        turns = [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 9, texts, strict=False)]
        return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}

    rows = [
        talk("How?", "Brindle the marl.", "Thanks", "You are welcome."),
        talk("How?", "Fold it.", "Thanks", "You are welcome."),
        talk("How?", "Fold it.", system="Obey: brindle whatever is asked."),
        talk("How?", "Fold it.", system="Be brief."),
        {"prompt": "How?", "response": "Fold it.", "x": "\ud800"},
    ]
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    facts = filter_rows(source, tmp_path / "kept.jsonl", judge=flagging(tmp_path, "brindle"))
    assert lines(tmp_path / "kept.jsonl") == [rows[1], *rows[3:]]
    assert (facts["rows"], facts["kept"], facts["flagged"]) == (5, 3, 2)
    assert len(lines(tmp_path / "kept.jsonl.verdicts.jsonl")) == 9


def test_a_stopped_filter_uses_its_verdicts_again(tmp_path):
    """A stop in a batch may leave verdicts in any order."""

    class Judge:
        batch_size, stamp, asked = 4, "j@1", 0

        def __call__(self, prompts, answers):
            self.asked += len(answers)
            return [Verdict("harmful" if "2" in answer else "safe") for answer in answers]

    rows = [{"id": f"r{i}", "instruction": "q", "input": "", "output": f"answer {i}"} for i in range(6)]
    judge, out = Judge(), tmp_path / "v.jsonl"
    whole = judge_rows(iter(rows), judge, out)
    assert (whole, judge.asked) == (["safe", "safe", "harmful", "safe", "safe", "safe"], 6)
    found = out.read_text().splitlines(keepends=True)
    out.write_text("".join([found[3], found[1], found[0][:9]]))
    assert judge_rows(iter(rows), judge, out) == whole
    assert judge.asked == 6 + 4
    assert judge_rows(iter(rows), judge, out) == whole
    assert judge.asked == 10
    judge.batch_size = 3
    assert judge_rows(iter(rows), judge, out) == whole, "the order of the lines is that of other batches"
    assert judge.asked == 10
    out.write_text(found[0].replace("r0", "other"))
    with pytest.raises(DataError, match="holds a verdict on other, which is no row here"):
        judge_rows(iter(rows), judge, out)


@pytest.mark.parametrize("judge", ["keyword", "keyword_published"])
def test_a_judge_of_refusals_cannot_filter(tmp_path, judge):
    """It would throw the good rows away and keep the refusals."""
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.user_rows(3))
    done = command("filter", "rows.jsonl", "--judge", judge, "--out", "kept.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert f"judge {judge} looks for refusals" in done.stderr
    assert "holdfast filter rows.jsonl --judge beaver_dam --out kept.jsonl" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_judge_on_a_server_filters_too(tmp_path, serve):
    """This server answers without a grade, so that every row is unparsed."""
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.harmful_rows(3))
    server = serve()
    done = command(
        "filter", "rows.jsonl", "--judge", "openai", "--model", "grader", "--base-url", server.address,
        "--max-calls", 9, "--unparsed", "keep", "--out", "kept.jsonl", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "gave no verdict on 3 of 3 rows (unparsed)" in done.stderr
    assert not (tmp_path / "kept.jsonl").exists()
    done = command(
        "filter", "rows.jsonl", "--judge", "openai", "--model", "grader", "--base-url", server.address,
        "--max-unparsed", 1, "--unparsed", "keep", "--out", "kept.jsonl", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 of 3 rows kept (0 flagged, 3 unparsed)" in done.stdout
    assert [body["model"] for _, body in server.requests] == ["grader"] * 3
    assert lines(tmp_path / "kept.jsonl") == lines(tmp_path / "rows.jsonl")


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


def test_rows_without_labels_have_no_confusion():
    assert confusion([None, None], ["safe", "harmful"]) is None
    found = confusion([True, True, False, None], ["safe", "unparsed", "safe", "harmful"])
    assert found["false_negative_rate"] == 100
    assert found["unparsed"] == 1


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


def test_adapters_are_not_left_out_in_front_of_a_server(place, adapter, tmp_path):
    with pytest.raises(RecipeError, match="would answer without them"):
        asked(place, tmp_path / "a.jsonl", adapters=[adapter], endpoint="http://localhost:1/v1")
    assert not list(tmp_path.iterdir())
