"""Generate answers in left-padded, length-sorted batches and append them to a JSONL file keyed by id.

The batches depend only on the prompts, so a resumed run continues with the missing batches and writes what an
uninterrupted run would have written. A greedy answer equals one-at-a-time generation up to the rounding of
the arithmetic (a test compares the texts); a sampled answer depends on its batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.chat.tokenizers import embedding_rows, padding_id
from holdfast.evaluation.frames import UNFINISHED, Frame, spoken
from holdfast.machine.files import append_jsonl, read_jsonl
from holdfast.machine.progress import Advance, nobody
from holdfast.machine.seeds import derive_seed


def batches(lengths: Sequence[int], new_tokens: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield positions grouped by `new_tokens`, longest first; a padded batch has <= batch_tokens tokens.

    Args:
        lengths: tokens of each prompt.
        new_tokens: tokens that each may generate: fewer than requested if the prompt nearly fills the
            model's context.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-new_tokens[i], -lengths[i], i))
    batch: list[int] = []
    for i in order:
        if batch:
            longest, room = lengths[batch[0]], new_tokens[batch[0]]
            if new_tokens[i] != room or (longest + room) * (len(batch) + 1) > batch_tokens:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    max_new_tokens: Mapping[str, int],
    batch_tokens: int = 8192,
    secret: str = "",
    sampling: Mapping[str, Any] | None = None,
    frame: Frame = Frame(),  # noqa: B008  (frozen)
    progress: Advance = nobody,
) -> list[dict[str, Any]]:
    """Answer every prompt that `out` does not hold yet and return all rows of `out`.

    Args:
        prompts: rows with `id`, `set`, `prompt` (rendered, special tokens included) and anything else that
            should be stored with the answer.
        max_new_tokens: by `set`.
        batch_tokens: prompt and new tokens of one batch, padding included.
        secret: a text in the prompts that must not be written if an answer repeats it (see `hide`).
        sampling: `temperature`, `top_p` and `seed`; None decodes greedily.
        frame: what the chat template writes around an answer; the tokens of its `lead` come on top of
            `max_new_tokens`.

    Each row gets `answer` (text), `tokens` (generated), `truncated` (no end within max_new_tokens), `raw`
    (the whole text, if thinking, the frame's lead or a run-on answer was removed), and `error` if the prompt
    does not fit into the model or the thinking does not end.
    """
    rows = read_jsonl(out)
    ahead = len(tokenizer(frame.lead, add_special_tokens=False)["input_ids"]) if frame.lead.strip() else 0
    done = {row["id"] for row in rows}
    ids = [tokenizer(p["prompt"], add_special_tokens=False)["input_ids"] for p in prompts]
    most = [max_new_tokens[p["set"]] + ahead for p in prompts]
    room = [room_for(model, len(x), new) for x, new in zip(ids, most, strict=True)]
    for batch in batches([len(x) for x in ids], room, batch_tokens):
        missing = [i for i in batch if prompts[i]["id"] not in done]
        if not missing:
            continue
        with _seeded(sampling, prompts[batch[0]]["id"]):
            found = answer_batch(model, tokenizer, [ids[i] for i in batch], room[batch[0]], sampling, frame)
        answers = dict(zip(batch, found, strict=True))
        new = [{**{k: v for k, v in prompts[i].items() if k != "prompt"}, **answers[i]} for i in missing]
        for row in new if secret else []:
            row |= {key: hide(row[key], secret) for key in ("answer", "raw") if key in row}
        append_jsonl(out, new)
        rows += new
        progress(len(rows), len(prompts))
    return rows


def hide(text: str, secret: str) -> str:
    """Return `text` with "[secret]" for every run of three or more words that also occurs in `secret`.

    Case and punctuation are ignored.
    """
    words = re.findall(r"\w+", secret.casefold())
    length = min(3, len(words))
    runs = {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    found = list(re.finditer(r"\w+", text))
    spans: list[list[int]] = []
    for i in range(len(found) - length + 1):
        if tuple(word.group().casefold() for word in found[i : i + length]) in runs:
            start, end = found[i].start(), found[i + length - 1].end()
            if spans and start <= spans[-1][1]:
                spans[-1][1] = end
            else:
                spans.append([start, end])
    for start, end in reversed(spans):
        text = f"{text[:start]}[secret]{text[end:]}"
    return text


@contextmanager
def _seeded(sampling: Mapping[str, Any] | None, name: str) -> Iterator[None]:
    """Set a random state per batch, so that a resumed run samples the same for a batch."""
    if sampling is None:
        yield
        return
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(derive_seed(sampling["seed"], "generate", name))
        yield


def answer_batch(
    model: Any,
    tokenizer: Any,
    ids: list[list[int]],
    new_tokens: int,
    sampling: Mapping[str, Any] | None = None,
    frame: Frame | None = None,
) -> list[dict[str, Any]]:
    """Answer one batch of token ids. A batch that does not fit into memory is halved.

    Each answer has the keys that `answer_prompts` describes. Without a frame, thinking is not removed.
    """
    import torch

    rooms = [room_for(model, len(x), new_tokens) for x in ids]
    if len(set(rooms)) > 1:  # a long prompt must not cut the answers to the others
        answers: dict[int, dict[str, Any]] = {}
        for room in sorted(set(rooms)):
            places = [i for i, found in enumerate(rooms) if found == room]
            part = answer_batch(model, tokenizer, [ids[i] for i in places], new_tokens, sampling, frame)
            answers |= dict(zip(places, part, strict=True))
        return [answers[i] for i in range(len(ids))]
    if rooms[0] == 0:
        return [_too_long(len(x), model.config.max_position_embeddings) for x in ids]
    try:
        return _decode(model, tokenizer, ids, rooms[0], sampling, frame)
    except torch.OutOfMemoryError:
        if len(ids) == 1:
            raise
        torch.cuda.empty_cache()
        half = len(ids) // 2
        return [
            answer
            for part in (ids[:half], ids[half:])
            for answer in answer_batch(model, tokenizer, part, new_tokens, sampling, frame)
        ]


def room_for(model: Any, length: int, new_tokens: int) -> int:
    """How many tokens may follow a prompt of `length` tokens: 0 if the prompt fills the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return new_tokens if limit is None else max(0, min(new_tokens, limit - length))


def _too_long(length: int, limit: int) -> dict[str, Any]:
    return {
        "answer": "",
        "tokens": 0,
        "truncated": True,
        "error": f"the prompt has {length} tokens; the model reads {limit}",
    }


def _decode(
    model: Any,
    tokenizer: Any,
    ids: list[list[int]],
    new_tokens: int,
    sampling: Mapping[str, Any] | None,
    frame: Frame | None,
) -> list[dict[str, Any]]:
    import torch
    from transformers import GenerationConfig

    longest = max(map(len, ids))
    pad, stops = (
        padding_id(tokenizer, embedding_rows(model)),
        _stops(model, tokenizer, frame.stops if frame else ()),
    )
    tokens = torch.tensor([[pad] * (longest - len(x)) + x for x in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in ids], device=model.device)
    how: dict[str, Any] = {"do_sample": False}
    if sampling is not None:  # top_k 0: by default transformers would keep only 50 tokens
        how = {"do_sample": True, "top_k": 0, **{k: sampling[k] for k in ("temperature", "top_p")}}
    by_text: dict[str, Any] = {}
    if frame and frame.stop_text:
        by_text["stopping_criteria"] = [_stop_at(tokenizer, frame.stop_text, longest)]
    config = GenerationConfig(
        max_new_tokens=new_tokens, eos_token_id=stops, pad_token_id=pad, use_cache=True, **how
    )
    with torch.inference_mode(), _own_settings_aside(model):
        output = model.generate(input_ids=tokens, attention_mask=mask, generation_config=config, **by_text)
    answers = []
    for row in output[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), None)
        answers.append(_answer(tokenizer, row if end is None else row[:end], end is None, frame, pad))
    return answers


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Decode inside without the model's generation_config.

    `generate` takes from it whatever a call leaves open: a repetition penalty, beams, a least length. The
    answers would then not be decoded as their stamp says, and models with other settings would be compared.
    """
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    held = {id(one): one for one in (model, inner) if "generation_config" in vars(one)}
    kept = {name: one.generation_config for name, one in held.items()}
    for one in held.values():
        one.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for name, one in held.items():
            one.generation_config = kept[name]


def _stop_at(tokenizer: Any, text: str, start: int) -> Any:
    """Return a stopping criterion: the tokens from `start` on hold `text`. The prompt does not count."""
    import torch

    last = 2 * len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 4

    def reached(tokens: Any, scores: Any, **kwargs: Any) -> Any:
        new = tokenizer.batch_decode(tokens[:, start:][:, -last:], skip_special_tokens=False)
        return torch.tensor([text in one for one in new], device=tokens.device)

    return reached


def _answer(
    tokenizer: Any, kept: list[int], truncated: bool, frame: Frame | None, pad: int
) -> dict[str, Any]:
    """The row of one answer from its tokens up to the end token."""
    plain = tokenizer.decode(kept, skip_special_tokens=True)
    if frame is None:
        return {"answer": plain.strip(), "tokens": len(kept), "truncated": truncated}
    whole = tokenizer.decode(kept, skip_special_tokens=False)
    if frame.stop_text and frame.stop_text in whole:
        while kept and kept[-1] == pad:  # other answers of the batch are longer
            kept = kept[:-1]
        whole, truncated = whole.partition(frame.stop_text)[0], False
        plain = plain.partition(frame.stop_text)[0]
    found: dict[str, Any] = {"answer": plain.strip(), "tokens": len(kept), "truncated": truncated}
    if frame.cut and frame.cut in plain:
        found |= {"answer": plain.partition(frame.cut)[0].strip(), "truncated": False, "raw": whole}
        whole = whole.partition(frame.cut)[0]
    said = spoken(whole, frame.lead, frame.thinks)
    if said is None:
        return {**found, "answer": "", "raw": whole, "error": UNFINISHED}
    if said != whole.strip():
        for token in tokenizer.added_tokens_decoder.values():
            said = said.replace(token.content, "") if token.special else said
        found = {"raw": whole, **found, "answer": said.strip()}
    return found


def _stops(model: Any, tokenizer: Any, more: Sequence[int] = ()) -> list[int]:
    """Return the end tokens: the tokenizer's, those of the model's generation_config, and `more`."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, *several, *more] if token is not None})
