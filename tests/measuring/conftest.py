"""A tiny model with prompts, an adapter with its own template, and a server that misbehaves by a script."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure")
    tiny.save_model(folder / "model")
    tiny.write_jsonl(folder / "prompts.jsonl", tiny.harmful_rows(7))
    tiny.write_jsonl(folder / "task.jsonl", tiny.user_rows(6))
    return folder


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
