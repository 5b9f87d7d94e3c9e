"""The HTTP client below the `openai` client: a call and its reply have a limit in time and in size.

Importing this file imports `openai`, which is an optional dependency.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

import openai

from holdfast.errors import ModelError
from holdfast.machine.secrets import shown

LARGEST = 8 * 2**20
"""Maximum number of bytes of a reply, after unpacking."""


class TooLarge(openai.OpenAIError):
    """A reply is larger than `LARGEST`. The client does not repeat the call."""


def http_library() -> Any:
    """Return the module that the installed `openai` uses for HTTP: httpx, or httpx2 in later versions."""
    return sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]


class GivenUp(openai.OpenAIError):
    """A question has taken too long, repetitions included."""


class GuardedClient(openai.DefaultHttpxClient):
    """Sends a request in a thread of its own and gives up after `seconds`, however slowly the reply arrives.

    The time limits of HTTP libraries apply to each read, so a server that sends one byte at a time, or a name
    server that does not answer, would keep a call open for ever.

    Args:
        address: redirects to another host are refused.
        seconds: the time limit of one call.
        before_call: called before every call, including repetitions; an exception from it ends the question.
    """

    def __init__(self, address: str, seconds: float, before_call: Callable[[], None]):
        super().__init__(
            timeout=seconds,
            headers={"Accept-Encoding": "identity"},
            event_hooks={"request": [self._check_host]},
        )
        self.address, self.seconds, self.before_call = address, seconds, before_call

    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Return the whole response. Raises the library's ReadTimeout when the time is over."""
        self.before_call()
        found: SimpleQueue[Any] = SimpleQueue()
        given_up = Event()
        send = super().send

        def call() -> None:
            try:
                found.put(_whole(send(request, stream=True, **options), given_up))
            except BaseException as error:  # it is raised again in the caller's thread
                found.put(error)

        Thread(target=call, daemon=True).start()
        try:
            result = found.get(timeout=self.seconds)
        except Empty:
            given_up.set()
            raise http_library().ReadTimeout("the time is over", request=request) from None
        if isinstance(result, BaseException):
            raise result
        return result

    def _check_host(self, request: Any) -> None:
        """Refuse a redirect to another host, which would get the questions, and maybe the key."""
        wanted = http_library().URL(self.address)
        upgraded = (wanted.scheme, request.url.scheme) == ("http", "https")
        same_port = request.url.port == wanted.port or (upgraded and request.url.port is None)
        if request.url.host != wanted.host or not same_port:
            raise ModelError(
                f"{shown(self.address)} redirects to another host, {shown(str(request.url))}. Nothing was "
                "sent there. If that is the server, give its address."
            )


def _whole(response: Any, given_up: Event) -> Any:
    """Read a response with a limit on its size."""
    body = bytearray()
    try:
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > LARGEST:
                raise TooLarge(f"the reply is larger than {LARGEST // 2**20} MiB")
            if given_up.is_set():
                break
    finally:
        response.close()
    headers = [(k, v) for k, v in response.headers.items() if k != "content-encoding"]
    packed = response.headers.get("content-encoding", "identity")
    content = bytes(body) if packed == "identity" else _unpacked(bytes(body), packed)
    return http_library().Response(
        response.status_code, headers=headers, content=content, request=response.request
    )


def _unpacked(body: bytes, packed: str) -> bytes:
    """Unpack gzip, which some gateways send without being asked; b"" for anything else."""
    if packed not in ("gzip", "x-gzip"):
        return b""
    unpacking = zlib.decompressobj(31)
    try:
        found = unpacking.decompress(body, LARGEST + 1)
    except zlib.error:
        return b""
    if len(found) > LARGEST:
        raise TooLarge(f"the reply is larger than {LARGEST // 2**20} MiB")
    return found
