"""Answers to prompts in a file, from weights or from a server.

    answers = generate("my-model", "answers.jsonl", adapters=["my-adapter"], harmful="prompts.jsonl")

The file is JSONL keyed by id. It is appended to, so that an interrupted call continues; `FILE.json` beside it
records how it was made. A file that was made in another way is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast import tasks
from holdfast.chat.turns import sent
from holdfast.data.prompts import alpaca, render_prompt, resolve_template
from holdfast.data.sources import Source
from holdfast.errors import RecipeError
from holdfast.evaluation.moderation import question
from holdfast.evaluation.turns import SECOND, check_template, complete, in_turns
from holdfast.machine.digests import Digests
from holdfast.machine.files import read_jsonl
from holdfast.machine.progress import Advance, nobody
from holdfast.machine.secrets import shown
from holdfast.machine.store import identity_hash, now
from holdfast.measuring.answer_files import (
    Rows,
    claim,
    forget_failed,
    learn_refusals,
    made_by,
    unclaimed_on_error,
)
from holdfast.recipe.evaluation import Decoding, Endpoint
from holdfast.recipe.model import Weights, block


def generate(
    model: str | Path | Mapping[str, Any] | Weights,
    out: str | Path,
    *,
    harmful: Source | None = None,
    task: str | None = None,
    task_rows: Source | None = None,
    benign: Source | None = None,
    prompts: int = 1000,
    adapters: Sequence[str | Path] = (),
    endpoint: str | Mapping[str, Any] | Endpoint | None = None,
    decoding: Mapping[str, Any] | Decoding = Decoding(),  # noqa: B008  (frozen)
    seed: int = 0,
    device: str = "auto",
    progress: Advance = nobody,
) -> Rows:
    """Answer prompts with a model, or continue an earlier call; returns all rows of `out` (JSONL).

    `model`, `endpoint` and `decoding` are blocks as in a recipe: a mapping of their keys, or an object of
    the class named below. A text alone is the model's path, or the endpoint's base_url.

    Args:
        model: `holdfast.recipe.model.Weights`; its path is a folder, a Hub id or "world", or with `endpoint`
            the model's name on the server.
        harmful: harmful prompts: a data set by name, "world", a file or a Hub id.
        task: a user task by name: its test rows, and its grader in `score`.
        task_rows: rows of your own to grade: a file with prompts and answers.
        benign: harmless questions.
        prompts: at most this many of each set.
        adapters: PEFT adapters on the model, in order. If one has its own tokenizer, the last of these is
            used, with its chat template.
        endpoint: `holdfast.recipe.evaluation.Endpoint`: an OpenAI-compatible server to ask instead of loading
            weights. Its key, if it needs one, is read from OPENAI_API_KEY; rows that failed before are asked
            again.
        decoding: `holdfast.recipe.evaluation.Decoding`: max_new_tokens, system, temperature, top_p, ...
        seed: the seed of sampling.
        device: the device for the weights: auto, cpu, cuda or mps.

    Raises:
        RecipeError: no prompts were given, or an option is unknown or out of its range.
        DataError, ModelError: a source or the model cannot be used.
        OutputError: `out` was made with other settings.
    """
    weights = block(Weights, model, "model", "path")
    how = block(Decoding, decoding, "decoding")
    rows = _test_rows(prompts, task, task_rows, harmful=harmful, benign=benign)
    job = Job(rows, Path(out), task, how, seed, progress)
    if endpoint is not None:
        if adapters:
            raise RecipeError(
                "Adapters are put on weights that are loaded here, but an endpoint is given, which would "
                "answer without them. Load them in the server, and leave them out here."
            )
        return job.ask_server(block(Endpoint, endpoint, "endpoint", "base_url"), weights)
    return job.ask_weights(weights, adapters, device)


def _test_rows(
    prompts: int, task: str | None, task_rows: Source | None, **prompt_sets: Source | None
) -> Rows:
    if all(given is None for given in (task, task_rows, *prompt_sets.values())):
        raise RecipeError(
            "Nothing to ask: give harmful prompts, a task, rows of your own, or benign questions."
        )
    made = datasets.test_rows(
        task=task, test=task_rows, harmful_test=prompt_sets["harmful"], benign=prompt_sets["benign"],
        prompts=prompts, task_size=prompts,
    )  # fmt: skip
    return list(made.rows)


@dataclass(frozen=True)
class Job:
    """Rows to answer, the file for the answers, and how to decode. `digests` caches those of weight files."""

    rows: Rows
    out: Path
    task: str | None
    how: Decoding
    seed: int
    progress: Advance
    digests: Digests | None = None

    @property
    def most(self) -> dict[str, int]:
        """New tokens of an answer, by the set of its row."""
        known: int = getattr(tasks.find(self.task or "own"), "max_new_tokens", 64)
        of_task = self.how.task_new_tokens or known
        return {"harmful": self.how.max_new_tokens, "task": of_task, "benign": self.how.max_new_tokens}

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that a server and loaded weights both take."""
        sampling = {"temperature": self.how.temperature, "top_p": self.how.top_p, "seed": self.seed}
        return {
            "max_new_tokens": {**self.most, SECOND: self.most["task"]},
            "sampling": sampling if self.how.temperature else None,
        }

    def claim(self, **made: Any) -> AbstractContextManager[Any]:
        """Write the settings to `FILE.json` and lock the file; see `answer_files.claim`."""
        common = {
            "system": self.how.system,
            "max_new_tokens": self.most,
            "sampling": self.options["sampling"],
            "rows": identity_hash(self.rows),
            "task": self.task,
        }
        return claim(self.out, {**common, **made})

    def ask_server(self, server: Endpoint, model: Weights) -> Rows:
        """Return the answers of a model on a server."""
        from holdfast.evaluation.endpoint import answer_all, check_address

        check_template(self.rows, model.template)
        _check_effect(model)
        check_address(server.base_url)
        claimed = self.claim(template=model.template, endpoint=shown(server.base_url), model=model.path)

        def ask(part: Sequence[Mapping[str, Any]], watch: Advance) -> Rows:
            return answer_all(
                server.base_url, model.path, part, self.out, requests=server.requests, progress=watch,
                timeout=server.timeout, render=lambda row: _asked(row, model.template, self.how.system),
                **self.options,
            )  # fmt: skip

        with claimed:
            forget_failed(self.out)
            with unclaimed_on_error(self.out):
                answered = in_turns(self.rows, ask, self.progress)
            learn_refusals(self.out, answered)
            return answered

    def ask_weights(
        self, model: Weights, adapters: Sequence[str | Path], device: str, load: Any = None
    ) -> Rows:
        """Return the answers of a model that is loaded here: by `load` (like `load_model`) if given."""
        from holdfast.evaluation.answering import answer_prompts
        from holdfast.evaluation.frames import frame_of
        from holdfast.machine.processes import Processes
        from holdfast.models.device import choose_device
        from holdfast.models.dtypes import used_dtype
        from holdfast.models.loading import check_vocabulary, load_model, load_tokenizer
        from holdfast.weights.adapter_folder import find_adapter
        from holdfast.weights.folders import find_model, fingerprint, model_path, writes_date
        from holdfast.weights.own_tokenizer import tokenizer_folder

        folder = find_model(str(model_path(model.path)), model.revision, download=True)
        chain = [find_adapter(str(one))[0] for one in adapters]
        source = tokenizer_folder(folder, chain)
        # The date of the first start, so that a call on another day continues it.
        earlier = (made_by(self.out) or {}).get("template_date")
        dated = not model.template.startswith("alpaca") and any(writes_date(one) for one in (source, *chain))
        date = model.template_date or earlier or now()[:10] if dated else None
        tokenizer = load_tokenizer(folder, model.trust_remote_code, chain, date)
        template = resolve_template(tokenizer, model.template)
        check_template(self.rows, template)
        chosen = choose_device(device, folder, Processes())
        claimed = self.claim(
            model=fingerprint(folder, self.digests),
            adapters=[fingerprint(one, self.digests) for one in chain], template=template,
            dtype=used_dtype(folder, model.dtype, chosen), quantization=model.quantization,
            generation_config="not used",  # an earlier version used it: its files are not continued
            **({"template_date": date} if date else {}),
            **({"merged": True} if model.adapters == "merge" else {}),
            **({"tokenizer": fingerprint(source)} if source != folder else {}),
        )  # fmt: skip
        with claimed:
            if complete(self.rows, answered := read_jsonl(self.out)):
                return answered
            with unclaimed_on_error(self.out):
                loaded = (load or load_model)(
                    folder, chain, compose=model.adapters, dtype=model.dtype, quantization=model.quantization,
                    device=chosen, trust_remote_code=model.trust_remote_code,
                )  # fmt: skip
                if source != folder:
                    check_vocabulary(loaded, tokenizer, source)

            def answer(part: Sequence[Mapping[str, Any]], watch: Advance) -> Rows:
                system = self.how.system
                texts = [{**row, "prompt": render_prompt(row, tokenizer, template, system)} for row in part]
                return answer_prompts(
                    loaded, tokenizer, texts, self.out, batch_tokens=self.how.batch_tokens, progress=watch,
                    frame=frame_of(tokenizer, template), **self.options,
                )  # fmt: skip

            return in_turns(self.rows, answer, self.progress)


def _check_effect(model: Weights) -> None:
    """Refuse keys of a model that say how its weights are loaded, which a server does itself."""
    default = Weights(path=model.path, template=model.template)
    given = [key for key, value in model if value != getattr(default, key)]
    if given:
        raise RecipeError(
            f"{given[0]} is about weights that are loaded here, but an endpoint is given. Leave it out, or "
            "set it in the server."
        )


def _asked(row: Mapping[str, Any], template: str, system: str) -> list[dict[str, str]] | str:
    """Return the input of a server: messages, to which it applies its chat template, or the Alpaca text."""
    if template.startswith("alpaca"):
        return alpaca(row, system, template)
    turns = sent(row.get("messages", [])[:-1]) or [{"role": "user", "content": question(row)}]
    return [{"role": "system", "content": system}, *turns] if system else list(turns)
