"""Get answers from an OpenAI-compatible server (vLLM, SGLang, TGI, `transformers serve`), several at a time.

`evaluation.client` says which calls are repeated. An answer that still fails is recorded as a failed row and
counted; after failed rows are removed from the file, they can be asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError
from holdfast.evaluation.client import is_address
from holdfast.evaluation.frames import RESPONSE
from holdfast.evaluation.served import Reply, ServedModel
from holdfast.machine.files import append_jsonl, read_jsonl
from holdfast.machine.progress import Advance, nobody
from holdfast.machine.secrets import shown

TIMEOUT = 600.0
"""Maximum number of seconds for one call."""


def answer_all(
    address: str,
    model: str,
    rows: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    render: Callable[[Mapping[str, Any]], list[dict[str, str]] | str],
    max_new_tokens: Mapping[str, int],
    sampling: Mapping[str, Any] | None = None,
    requests: int = 8,
    timeout: float = TIMEOUT,
    progress: Advance = nobody,
) -> list[dict[str, Any]]:
    """Ask for every row that `out` does not hold yet and return all rows of `out`, like `answer_prompts`.

    Args:
        address: address of the server, ".../v1".
        rows: rows with `id` and `set`, and anything that should be stored with the answer.
        render: turns a row into the messages of a chat, or into the text that a completion continues.
        max_new_tokens: by `set`.
        requests: number of concurrent requests.
        timeout: the time limit of one call in seconds.

    Raises:
        ModelError: the client is missing, or the server refuses the key or the model.
        StepFailed: no server answers, or it answers none of the first questions.
    """
    done = read_jsonl(out)
    known = {row["id"] for row in done}
    missing = [row for row in rows if row["id"] not in known]
    if not missing:
        return done
    check_address(address)
    served = ServedModel(model, address, timeout=timeout)
    how = {"temperature": 0.0} if sampling is None else dict(sampling)
    questions = []
    for row in missing:
        asked = render(row)
        form = {"prompt": asked} if isinstance(asked, str) else {"messages": asked}
        questions.append({**form, **how, "new_tokens": max_new_tokens[row["set"]]})
    for i, reply in served.ask_all(questions, threads=requests):
        append_jsonl(out, [row := {**missing[i], **_answer(reply, "prompt" in questions[i])}])
        done.append(row)
        progress(len(done), len(rows))
    return done


def check_address(address: str) -> None:
    """Raise ModelError if a text is not the address of a server."""
    if not is_address(address):
        raise ModelError(
            "An endpoint begins with http:// or https://, as http://localhost:8000/v1 does; "
            f"found '{shown(address)}'."
        )


def _answer(reply: Reply, continues: bool) -> dict[str, Any]:
    """Return the columns of an answer; with `error` if there is none.

    Args:
        continues: the reply continues the Alpaca prompt, so that a second "### Response:" ends the answer.
    """
    without = {"without": list(reply.without)} if reply.without else {}
    raw = {} if reply.raw is None else {"raw": reply.raw}
    if reply.text is None:
        failed = {"tokens": reply.tokens or 0, "truncated": True, "error": reply.reason}
        return {"answer": "", **failed, **raw, **without}
    found = {"answer": reply.text, "tokens": reply.tokens, "truncated": reply.truncated}
    if continues and RESPONSE in reply.text:
        found |= {"answer": reply.text.partition(RESPONSE)[0].strip(), "truncated": False}
        raw = raw or {"raw": reply.text}
    return {**found, **raw, **without}
