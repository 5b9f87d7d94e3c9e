"""A chat server on a real socket that fails, waits, cuts answers or refuses, as the question tells it."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any


def completion(text: str | None, **message: Any) -> dict[str, Any]:
    return {
        "id": "c", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}],
    }  # fmt: skip


class Chat:
    """The requests of the server, and its answers: `reply(messages)` unless a question contains "DO:something"."""

    def __init__(self, reply: Callable[[list[dict]], str]):
        self.reply, self.seen, self.headers, self.counts = reply, [], [], Counter()
        self.times: list[float] = []
        self.lock = threading.Lock()

    def answer(self, body: dict) -> tuple[int, dict[str, str], bytes]:
        text = body["messages"][-1]["content"]
        found = re.search(r"DO:(\w+)", text)
        do = found[1] if found else ""
        with self.lock:
            self.counts[do] += 1
            count = self.counts[do]
            self.seen.append(body)
            self.times.append(time.monotonic())
        good = json.dumps(completion(self.reply(body["messages"]))).encode()
        once = count == 1
        if do == "busy_once" and once:
            return 429, {"Retry-After": "0.3"}, b'{"error": {"message": "slow down"}}'
        if do == "broken_once" and once:
            return 500, {}, b"oops"
        if do == "cut_once" and once:
            return 200, {"Content-Length": str(len(good))}, good[: len(good) // 2]
        if do == "slow_once" and once:
            time.sleep(1.0)
        if do == "broken":
            return 503, {"retry-after-ms": "10"}, b'{"error": {"message": "down"}}'
        if do == "torn":
            return 200, {}, good[: len(good) // 2]
        if do == "schema":
            return 200, {}, b'{"hello": "world"}'
        if do == "list":
            return 200, {}, b"[1, 2]"
        if do == "none":
            return 200, {}, json.dumps({**completion(""), "choices": []}).encode()
        if do == "empty":
            return 200, {}, json.dumps(completion(None)).encode()
        if do == "refuse":
            return 200, {}, json.dumps(completion(None, refusal="I will not grade this.")).encode()
        if do == "long":
            return 400, {}, b'{"error": {"message": "maximum context length exceeded"}}'
        if do == "key":
            return 401, {}, b'{"error": {"message": "Incorrect API key provided: sk-secret-1234"}}'
        if do == "model":
            return 404, {}, b'{"error": {"message": "no such model"}}'
        if do == "quota":
            return 429, {"Retry-After": "3600"}, b'{"error": {"message": "come back"}}'
        if do == "busy":
            return 429, {"retry-after-ms": "10"}, b'{"error": {"message": "slow down"}}'
        if do == "new" and "max_tokens" in body:
            return 400, {}, b'{"error": {"message": "Unsupported: use max_completion_tokens instead"}}'
        return 200, {}, good


@contextmanager
def serving(reply: Callable[[list[dict]], str]):
    """The server's address and its requests."""
    chat = Chat(reply)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            chat.headers.append({name.lower(): value for name, value in self.headers.items()})
            status, headers, content = chat.answer(body)
            try:
                self.send_response(status)
                sent = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
                for name, value in sent.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                self.close_connection = sent["Content-Length"] != str(len(content))
            except OSError:  # the client did not wait
                pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
