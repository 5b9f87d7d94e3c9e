"""A server on a real socket that answers as a hostile or broken one does; a question names the misbehaviour."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from misbehaving import completion


def http(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {size}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def says(text: Any, **more: Any) -> bytes:
    return http(json.dumps({**completion("x"), **more}).replace('"x"', json.dumps(text)).encode())


class Hostile:
    """What the server sent and saw. `done` ends the calls that hang."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.done = threading.Event()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}/v1"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while not self.done.is_set():
            try:
                talk, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(talk,), daemon=True).start()

    def answer(self, talk: socket.socket) -> None:
        with talk:
            data = b""
            while b"\r\n\r\n" not in data:
                data += talk.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            size = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
            while len(body) < size:
                body += talk.recv(65536)
            asked = json.loads(body)
            self.bodies.append(asked)
            name = asked["messages"][-1]["content"]
            does = BEHAVIOURS.get(name.removeprefix("DO:"), says("Fine. [[7]]"))
            if b"/moved/" in head.split(b"\r\n")[0]:
                does = says("moved")
            with contextlib.suppress(OSError):  # the client did not wait
                does(self, talk, asked) if callable(does) else talk.sendall(does)


def slowly(data: bytes) -> Callable[..., None]:
    def send(server: Hostile, talk: socket.socket, _: Any) -> None:
        for i in range(len(data)):
            talk.sendall(data[i : i + 1])
            if server.done.wait(0.05):
                return

    return send


def endless(server: Hostile, talk: socket.socket, _: Any) -> None:
    talk.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not server.done.is_set():
        talk.sendall(b"1000\r\n" + b" " * 0x1000 + b"\r\n")


GOOD = says("Fine. [[7]]")
ERROR = b'{"error": {"message": "flagged: sk-SECRETKEY-0123456789 and SECRETKEY-01"}}'
BEHAVIOURS: dict[str, Any] = {
    "hang": lambda server, talk, _: server.done.wait(30),
    "slow body": slowly(GOOD[:60] + b"\r\n\r\n" + b" " * 2000),
    "slow head": slowly(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200),
    "endless": endless,
    "bomb": http(gzip.compress(b" " * 4_000_000), "200 OK", "Content-Encoding: gzip"),
    "packed": http(gzip.compress(json.dumps(completion("packed")).encode()), "200 OK", "Content-Encoding: gzip"),
    "odd packing": http(b"xyz", "200 OK", "Content-Encoding: br"),
    "away": http(b"", "307 Temporary Redirect", "Location: http://127.0.0.2:1/v1/chat/completions"),
    "other port": http(b"", "307 Temporary Redirect", "Location: http://127.0.0.1:1/v1/chat/completions"),
    "moved": http(b"", "307 Temporary Redirect", "Location: /moved/chat/completions"),
    "in a circle": http(b"", "307 Temporary Redirect", "Location: /v1/chat/completions"),
    "wait a year": http(b"{}", "429 Too Many Requests", "Retry-After: 31536000"),
    "wait nan": http(b"{}", "429 Too Many Requests", "Retry-After: nan"),
    "wait 9^400": http(b"{}", "429 Too Many Requests", f"Retry-After: {'9' * 400}"),
    "deep": http(b'{"choices": ' + b"[" * 100_000),
    "deep error": http(b'{"error": ' + b"[" * 100_000, "400 Bad Request"),
    "nan": http(b'{"choices": NaN}'),
    "digits": http(b'{"choices": [' + b"9" * 5000 + b"]}"),
    "nan tokens": says("Fine.", usage={"completion_tokens": float("nan")}),
    "true tokens": says("Fine.", usage={"completion_tokens": True}),
    "usage list": says("Fine.", usage=[1]),
    "surrogate": says("half \ud800 of one"),
    "object": http(b'{"choices": {"0": 1}}'),
    "null choice": http(b'{"choices": [null]}'),
    "numbers": says(5),
    "parts": says([{"type": "text", "text": "Fine"}, {"type": "text", "text": "."}, 3, {"text": None}]),
    "null": says(None),
    "thinks": says("<think>\nWhat?\n</think>\n\nFine. [[7]]"),
    "thinks on": says("<think>\nWhat? [[7]]"),
    "cut": says(None, choices=[{"message": {"content": ""}, "finish_reason": "length"}]),
    "html": http(b"<!doctype html><title>Hello</title>"),
    "nothing": http(b"", "204 No Content"),
    "not utf-8": http(b'{"choices": "\xff\xfe"}'),
    "short length": http(GOOD.partition(b"\r\n\r\n")[2], length=40),
    "long length": http(b"{}", length=4000),
    "cut chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n{",
    "no http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "closed": b"",
    "key in words": http(ERROR, "400 Bad Request"),
    "flagged": http(b'{"error": "flagged"}', "403 Forbidden"),
    "words list": http(b'{"detail": [{"loc": ["body"], "msg": "too long"}]}', "422 Unprocessable Entity"),
}  # fmt: skip


@contextmanager
def hostile() -> Iterator[Hostile]:
    """The server. A question "DO:name" gets the misbehaviour of that name, any other a good answer."""
    server = Hostile()
    try:
        yield server
    finally:
        server.done.set()
        server.listening.close()
