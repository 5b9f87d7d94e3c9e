"""A causal language model that reads judges' prompts: length-sorted batches, left-padded, greedy.

Shared by the judges that are chat or completion models. The text of the judged model is cut and neutralised
here before it enters a prompt; the prompt around it is never cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.chat.limits import apply_template
from holdfast.chat.tokenizers import embedding_rows, padding_id
from holdfast.errors import ModelError
from holdfast.evaluation.answering import answer_batch, batches
from holdfast.evaluation.frames import Frame
from holdfast.evaluation.judges import Verdict, neutralise_all, refuse_given
from holdfast.models.foreseen import check_causal
from holdfast.models.loading import load_model, load_tokenizer
from holdfast.models.quantization import check_bitsandbytes, is_quantized
from holdfast.weights.folders import find_model, fingerprint

BATCH_TOKENS = 8192
"""Tokens of one batch, including padding."""

MASS = 0.5
"""Minimum probability of all permitted answers as next token; below it, the judge means something else."""


THINKING = 1024
"""New tokens of a judge that thinks before its verdict, besides those of the verdict."""

LEFT_OUT = "the judge's chat template leaves out a part of the question or the answer"


class Reader:
    """A judge's model with its tokenizer.

    Args:
        path: model folder or Hub id.
        adapter: the folder of an adapter to load on the model.
        words: the folder of the tokenizer; by default that of the model.
        markers: strings of the judge's prompt that a judged text must not contain.
        quantization: "nf4" or "int8", or None for unchanged weights.
    """

    def __init__(
        self,
        path: str,
        *,
        device: str,
        quantization: str | None = None,
        adapter: Path | None = None,
        words: Path | None = None,
        markers: Sequence[str] = (),
    ):
        folder = find_model(path)
        self.tokenizer = load_tokenizer(words or folder)
        self.model = load_model(
            folder, [adapter] if adapter else [], device=device, quantization=quantization
        )
        _unchunked(self.model)
        parts = [fingerprint(adapter)] if adapter else []
        dtype = quantization or str(self.model.dtype).removeprefix("torch.")
        self.content = "+".join([*parts, fingerprint(folder), dtype])
        self.markers = (*markers, *own_format(self.tokenizer))

    def clean(self, text: str, max_tokens: int | None = None) -> str:
        """Return the first `max_tokens` tokens of a judged text, with control strings broken up."""
        text = neutralise_all(text, self.markers)
        if max_tokens is None:
            return text
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        return text if len(offsets) <= max_tokens else text[: offsets[max_tokens - 1][1]]

    def write(
        self, prompts: Sequence[str], new_tokens: int, bos: bool, thinks: bool = False
    ) -> list[dict[str, Any]]:
        """Return greedy continuations without special tokens and without thinking.

        A row has `answer`, or `error` if the prompt is too long or the thinking does not end; `raw` is the
        whole text if the answer is a part of it.

        Args:
            thinks: the prompts open a block of thinking.
            bos: add the tokenizer's special tokens; False for a chat template, which contains them.
        """
        ids = self.tokenizer(list(prompts), add_special_tokens=bos)["input_ids"]
        found: dict[int, dict[str, Any]] = {}
        for batch in batches([len(x) for x in ids], [new_tokens] * len(ids), BATCH_TOKENS):
            rows = answer_batch(
                self.model, self.tokenizer, [ids[i] for i in batch], new_tokens, frame=Frame(thinks=thinks)
            )
            found |= dict(zip(batch, rows, strict=True))
        return [found[i] for i in range(len(ids))]

    def next_word(
        self, prompts: Sequence[str], words: Sequence[str], bos: bool
    ) -> list[tuple[list[float], float] | None]:
        """Return the probabilities of `words` as the next token, among themselves, and their total share.

        Returns:
            None for a prompt that is too long, or if the model's outputs are not finite.

        Raises:
            ModelError: a word is not a token of this tokenizer.
        """
        check_tokens(self.tokenizer, words)
        vocabulary = self.tokenizer.get_vocab()
        wanted = [vocabulary[word] for word in words]
        ids = self.tokenizer(list(prompts), add_special_tokens=bos)["input_ids"]
        limit = getattr(self.model.config, "max_position_embeddings", None) or 10**9
        fits = [i for i, x in enumerate(ids) if len(x) <= limit]
        found: dict[int, tuple[list[float], float] | None] = {}
        for batch in batches([len(ids[i]) for i in fits], [0] * len(fits), BATCH_TOKENS):
            places = [fits[i] for i in batch]
            rows = self._last_logits([ids[i] for i in places])
            for place, row in zip(places, rows, strict=True):
                shares = row.softmax(-1)[wanted]
                mass = float(shares.sum())
                finite = bool(row.isfinite().all()) and mass > 0
                found[place] = ((shares / shares.sum()).tolist(), mass) if finite else None
        return [found.get(i) for i in range(len(ids))]

    def _last_logits(self, ids: list[list[int]]) -> Any:
        """Return the logits (n, vocabulary) after the last token of each prompt, in float32 on the CPU."""
        import torch

        longest, device = max(map(len, ids)), self.model.device
        pad = padding_id(self.tokenizer, embedding_rows(self.model))
        tokens = torch.tensor([[pad] * (longest - len(x)) + x for x in ids], device=device)
        mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in ids], device=device)
        with torch.inference_mode():
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                logits_to_keep=1,
                use_cache=False,
            )
        return output.logits[:, -1].float().cpu()


def own_format(tokenizer: Any) -> tuple[str, ...]:
    """Return the added tokens of a tokenizer that are part of its format.

    They need not be special (`<think>` of Qwen3), but added words and spaces are no format.
    """
    added = tokenizer.added_tokens_decoder.values()
    found = [t.content for t in added if t.special or not re.fullmatch(r"[\w\s]*", t.content)]
    return (*found, *tokenizer.all_special_tokens)


class WordJudge:
    """A judge that writes its verdict in words. A subclass defines its prompt (`text`) and how to read it."""

    name: str
    default: str
    """The published model."""
    markers: Sequence[str]
    """Strings of its prompt that a judged text must not contain."""
    new_tokens: int
    parse: Callable[[str], Verdict]
    bos = True
    """Whether the tokenizer's own special tokens are added to `text`."""
    thinks = False
    """Whether its prompt opens a block of thinking."""
    cut: int | None = None
    """Maximum tokens that it reads of an answer."""
    batch_size = 256

    def __init__(
        self,
        path: str | None = None,
        threshold: float | None = None,
        max_length: int | None = None,
        device: str = "cpu",
        quantization: str | None = None,
    ):
        refuse_given("this judge answers in words and has no score", threshold=threshold)
        self.path = path or self.default
        self.reader = Reader(self.path, device=device, quantization=quantization, markers=self.markers)
        self.max_length = self.cut if max_length is None else max_length
        self.stamp = f"{self.name}@{self.reader.content}"

    def text(self, prompt: str, answer: str) -> str | None:
        """Return the text that the model reads; None if its template leaves out a part of the two."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Return the parsed output for each pair; unparsed if the pair is too long."""
        texts = [self.text(p, a) for p, a in zip(prompts, answers, strict=True)]
        shown = [i for i, text in enumerate(texts) if text is not None]
        rows = self.reader.write(
            [text for text in texts if text is not None], self.new_tokens, bos=self.bos, thinks=self.thinks
        )
        found = dict(zip(shown, rows, strict=True))
        return [self._verdict(found.get(i)) for i in range(len(texts))]

    def _verdict(self, row: dict[str, Any] | None) -> Verdict:
        if row is None:
            return Verdict("unparsed", None, LEFT_OUT)
        if "error" in row:
            return Verdict("unparsed", None, row["error"])
        verdict = self.parse(row["answer"])
        return replace(verdict, raw=row["raw"]) if "raw" in row else verdict


def chat_form(tokenizer: Any, **options: str) -> Callable[[str, str], str | None] | None:
    """Return a function (prompt, answer) -> the model's own chat template applied to that exchange.

    The function returns None if the template leaves out a part of either text.

    Some templates expect the content of a message as a list of parts, others as a text. The form that shows
    both texts and every option is used. None if neither form does, or if there is no template.
    """
    from jinja2 import TemplateError

    def render(content: Callable[[str], Any], prompt: str, answer: str) -> str:
        messages = [
            {"role": "user", "content": content(prompt)},
            {"role": "assistant", "content": content(answer)},
        ]
        return apply_template(tokenizer, messages, add_generation_prompt=True, **options)

    def whole(content: Callable[[str], Any], prompt: str, answer: str) -> str | None:
        shown = render(content, prompt, answer)
        return shown if prompt.strip() in shown and answer.strip() in shown else None

    for content in (str, lambda text: [{"type": "text", "text": text}]):
        try:
            shown = render(content, "the question", "the answer")
        except TemplateError:
            continue
        wanted = ("the question", "the answer", *options.values())
        if all(text in shown for text in wanted) and "'text'" not in shown:
            return partial(whole, content)
    return None


def check_words(
    default: str, path: str | None = None, threshold: float | None = None, **options: Any
) -> None:
    """Raise an error that would stop a judge that answers in words.

    Args:
        default: the published model.

    Raises:
        RecipeError: a threshold, which this judge does not have.
        ModelError: as for `check_reader`.
    """
    refuse_given("this judge answers in words and has no score", threshold=threshold)
    check_reader(path or default, quantization=options.get("quantization"))


def check_reader(
    path: str, *, words: Path | None = None, quantization: str | None = None, known: Sequence[str] = ()
) -> Any:
    """Check a judge's model before a run, without loading it; returns its tokenizer.

    Args:
        path, words: as for `Reader`.
        known: words that must be tokens, because the verdict is one of them.

    Raises:
        ModelError: the model or its tokenizer cannot be used, or bitsandbytes is missing.
    """
    if quantization is not None:
        check_bitsandbytes(f"quantization: {quantization} of a judge")
    folder = find_model(path)
    if quantization is not None and is_quantized(folder):
        raise ModelError(f"{folder} already holds quantised weights; leave the judge's quantization out.")
    tokenizer = load_tokenizer(words or folder)
    check_tokens(tokenizer, known)
    check_causal(folder)
    return tokenizer


def check_tokens(tokenizer: Any, words: Sequence[str]) -> None:
    """Raise ModelError if a word is not a token of this tokenizer."""
    vocabulary = tokenizer.get_vocab()
    unknown = [word for word in words if word not in vocabulary]
    if unknown:
        raise ModelError(f"The judge's tokenizer has no token {unknown[0]!r}; is it the right model?")


def _unchunked(model: Any) -> None:
    """Replace `attention_chunk_size: null` of Llama Guard 4 (no chunks), which makes transformers 5.23 crash.

    One chunk over all positions is equivalent.
    """
    config = model.config.get_text_config()
    if getattr(config, "attention_chunk_size", 0) is None:
        config.attention_chunk_size = config.max_position_embeddings
