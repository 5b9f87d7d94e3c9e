"""Get answers from an OpenAI-compatible server (vLLM, SGLang, TGI, `transformers serve`), several at a time.

`evaluation.client` says which calls are repeated. An answer that still fails is recorded as a failed row and
counted; after failed rows are removed from the file, they can be asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError
from holdfast.evaluation.client import connect
from holdfast.evaluation.frames import RESPONSE, UNFINISHED, spoken
from holdfast.machine.files import append_jsonl, read_jsonl
from holdfast.machine.progress import Advance, nobody

TIMEOUT = 600.0
"""Maximum number of seconds for one answer."""


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
    progress: Advance = nobody,
) -> list[dict[str, Any]]:
    """Ask for every row that `out` does not hold yet and return all rows of `out`, like `answer_prompts`.

    Args:
        address: address of the server, ".../v1".
        rows: rows with `id` and `set`, and anything that should be stored with the answer.
        render: turns a row into the messages of a chat, or into the text that a completion continues.
        max_new_tokens: by `set`.
        requests: number of concurrent requests.

    Raises:
        ModelError: the client, the key or the server is missing, or the server does not know the model.
    """
    done = read_jsonl(out)
    known = {row["id"] for row in done}
    missing = [row for row in rows if row["id"] not in known]
    if not missing:
        return done
    if not address.startswith(("http://", "https://")):
        raise ModelError(f"An endpoint begins with http:// or https://, found '{address}'.")
    client = connect(address, timeout=TIMEOUT)
    how = {"temperature": 0.0} if sampling is None else dict(sampling)

    def ask(row: Mapping[str, Any]) -> dict[str, Any]:
        return {**row, **_answer(client, model, render(row), max_new_tokens[row["set"]], how)}

    with ThreadPoolExecutor(requests) as pool:
        # The first row alone: a wrong address or name gives one error, not one error per row.
        append_jsonl(out, [first := ask(missing[0])])
        done.append(first)
        waiting = [pool.submit(ask, row) for row in missing[1:]]
        try:
            for future in as_completed(waiting):
                append_jsonl(out, [row := future.result()])
                done.append(row)
                progress(len(done), len(rows))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done


def _answer(
    client: Any, model: str, asked: list[dict[str, str]] | str, new_tokens: int, how: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the answer to one row, or its `error`. A failure that affects every row raises ModelError."""
    from openai import (
        APIConnectionError,
        APIError,
        APITimeoutError,
        AuthenticationError,
        NotFoundError,
        PermissionDeniedError,
    )

    try:
        if isinstance(asked, str):
            reply = client.completions.create(model=model, prompt=asked, max_tokens=new_tokens, **how)
            text = reply.choices[0].text
        else:
            reply = client.chat.completions.create(model=model, messages=asked, max_tokens=new_tokens, **how)
            text = reply.choices[0].message.content
        end, used = reply.choices[0].finish_reason, reply.usage
    except APITimeoutError:
        return _failed("the server did not answer in time")
    except (AuthenticationError, PermissionDeniedError):
        raise ModelError(f"{client.base_url} does not accept the key in OPENAI_API_KEY.") from None
    except NotFoundError:
        raise ModelError(
            f"{client.base_url} does not know the model '{model}', or the address is wrong."
        ) from None
    except APIConnectionError:
        raise ModelError(
            f"No server answers at {client.base_url}. Start the server, then run this again."
        ) from None
    except APIError as error:
        return _failed(f"the server refused it: {type(error).__name__}")
    except (AttributeError, IndexError, TypeError, ValueError):
        return _failed("the server's reply is not in OpenAI's format")
    if not isinstance(text, str):
        return _failed("the server's reply holds no text")
    tokens = getattr(used, "completion_tokens", None)
    found = {"answer": text.strip(), "tokens": tokens, "truncated": end == "length"}
    if isinstance(asked, str) and RESPONSE in text:  # a run-on answer to the Alpaca prompt
        text = text.partition(RESPONSE)[0]
        found |= {"answer": text.strip(), "truncated": False}
    said = spoken(text)
    if said is None:
        return {**found, "answer": "", "raw": text, "error": UNFINISHED}
    return found if said == found["answer"] else {**found, "answer": said, "raw": text}


def _failed(why: str) -> dict[str, Any]:
    return {"answer": "", "tokens": 0, "truncated": True, "error": why}
