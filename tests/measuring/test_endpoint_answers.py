"""Answers from a server instead of a model: what is asked, what is asked again, and which errors end it."""

from __future__ import annotations

import pytest

from answers_made import asked, lines
from holdfast import generate, moderate, score
from holdfast.errors import ModelError, OutputError, RecipeError, StepFailed


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
    with pytest.raises(RecipeError, match="quantization is about weights that are loaded here"):
        generate(
            {"path": "m", "quantization": "nf4"},
            tmp_path / "none.jsonl",
            harmful=str(place / "prompts.jsonl"),
            endpoint="http://127.0.0.1:9/v1",
        )
    assert not list(tmp_path.iterdir()), "a file without answers would not take another address"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ModelError, match="does not accept a call without a key; set OPENAI_API_KEY"):
        asked(place, tmp_path / "key.jsonl", endpoint=serve([401]).address)
    assert len(asked(place, tmp_path / "own.jsonl", endpoint=serve().address)) == 13


def test_adapters_are_not_left_out_in_front_of_a_server(place, adapter, tmp_path):
    with pytest.raises(RecipeError, match="would answer without them"):
        asked(place, tmp_path / "a.jsonl", adapters=[adapter], endpoint="http://localhost:1/v1")
    assert not list(tmp_path.iterdir())
