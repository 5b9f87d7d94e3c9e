"""Generation, moderation and scores on files: the parts of a run's evaluation, each alone.

    answers = generate("my-model", "answers.jsonl", adapters=["my-adapter"], harmful="prompts.jsonl")
    verdicts = moderate("answers.jsonl", "verdicts.jsonl", judge="keyword")
    ratings = rate("answers.jsonl", "ratings.jsonl", judge="mt_bench", model="my-judge", base_url="http://...")
    scores = score("answers.jsonl", ["verdicts.jsonl"], ratings="ratings.jsonl")

Each file is JSONL keyed by id and is appended to, so that what was stopped goes on; beside it stands
`FILE.json`, which says what made it. A file that something else made is refused, never mixed into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast import registry, tasks
from holdfast.data.prompts import alpaca
from holdfast.data.sources import Source
from holdfast.errors import DataError, RecipeError, nearest
from holdfast.evaluation.moderation import question
from holdfast.evaluation.turns import SECOND, check_template, complete, in_turns
from holdfast.machine.files import read_jsonl, write_json, write_text
from holdfast.machine.progress import Advance, nobody
from holdfast.machine.store import identity_hash, provenance
from holdfast.measuring.answer_files import Rows, claim, forget_failed, made_by, read_answers, read_whole
from holdfast.recipe.evaluation import RaterRecipe
from holdfast.tasks.graders import GRADERS, adapted


def generate(
    model: str | Path,
    out: str | Path,
    *,
    harmful: Source | None = None,
    task: str | None = None,
    task_rows: Source | None = None,
    benign: Source | None = None,
    prompts: int = 1000,
    adapters: Sequence[str | Path] = (),
    endpoint: str | None = None,
    template: str = "auto",
    system: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 8192,
    requests: int = 8,
    dtype: str = "auto",
    quantization: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Advance = nobody,
) -> Rows:
    """Answer prompts with a model, or go on answering; returns all rows of `out` (JSONL).

    Args:
        model: a folder, a Hub id or "world"; with `endpoint`, the model's name there.
        harmful: harmful prompts: "world", "beavertails", a file or a Hub id.
        task: a user task by name: its test rows, and its grader in `score`.
        task_rows: rows of your own to grade: a file with prompts and answers.
        benign: harmless questions.
        prompts: at most this many of each set.
        adapters: PEFT adapters on the model, in order.
        endpoint: the address of an OpenAI-compatible server (".../v1") to ask instead of loading weights;
            its key is read from OPENAI_API_KEY by the client.
        template: "chat", "alpaca" or "auto" (chat where the tokenizer has a template, and at an endpoint).
        system: a text to stand before every question.
        max_new_tokens: tokens of an answer to harmful and benign prompts; a task has its own.
        temperature, top_p, seed: 0 decodes greedily; above it samples, with this seed.
        batch_tokens: prompt and new tokens, padding included, of one batch.
        requests: how many requests an endpoint gets at once. What it failed on before is asked again.

    Raises:
        RecipeError: nothing to ask, or an option out of its range.
        DataError, ModelError: a source or the model cannot be used.
        OutputError: `out` was made by something else.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise RecipeError("Expected temperature of at least 0, and top_p above 0 and at most 1.")
    rows = _test_rows(harmful=harmful, task=task, task_rows=task_rows, benign=benign, prompts=prompts)
    grader = tasks.find(task or "own")
    most = {
        "harmful": max_new_tokens,
        "task": getattr(grader, "max_new_tokens", 64),
        "benign": max_new_tokens,
    }
    new_tokens = {**most, SECOND: most["task"]}
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed} if temperature else None
    asked = {
        "template": template,
        "system": system,
        "max_new_tokens": most,
        "sampling": sampling,
        "rows": identity_hash(rows),
        "task": task,
    }
    if endpoint is not None:
        from holdfast.evaluation.endpoint import answer_all

        check_template(rows, template)
        claim(Path(out), {**asked, "endpoint": endpoint, "model": str(model)})
        forget_failed(Path(out))

        def ask(part: Sequence[Mapping[str, Any]], watch: Advance) -> Rows:
            return answer_all(
                endpoint, str(model), part, Path(out), render=lambda row: _asked(row, template, system),
                max_new_tokens=new_tokens, sampling=sampling, requests=requests, progress=watch,
            )  # fmt: skip

        return in_turns(rows, ask, progress)

    from holdfast.data.prompts import render, resolve_template
    from holdfast.evaluation import answering as engine
    from holdfast.machine.processes import Processes
    from holdfast.models.device import choose_device
    from holdfast.models.loading import load_model, load_tokenizer
    from holdfast.weights.folders import find_model, fingerprint, model_path

    folder = find_model(str(model_path(str(model))), download=True)
    chain = [find_adapter(one) for one in adapters]
    tokenizer = load_tokenizer(folder, trust_remote_code)
    chosen = resolve_template(tokenizer, template)
    check_template(rows, chosen)
    claim(
        Path(out),
        {
            **asked,
            "model": fingerprint(folder),
            "adapters": [fingerprint(one) for one in chain],
            "template": chosen,
            "dtype": dtype,
            "quantization": quantization,
        },
    )
    if complete(rows, answered := read_jsonl(Path(out))):
        return answered
    device = choose_device(device, folder, Processes())
    loaded = load_model(
        folder, chain, device=device, dtype=dtype, quantization=quantization,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip

    def answer(part: Sequence[Mapping[str, Any]], watch: Advance) -> Rows:
        texts = [{**row, "prompt": render(row, tokenizer, chosen, system)[0]} for row in part]
        return engine.answer_prompts(
            loaded, tokenizer, texts, Path(out), max_new_tokens=new_tokens, batch_tokens=batch_tokens,
            sampling=sampling, progress=watch,
        )  # fmt: skip

    return in_turns(rows, answer, progress)


def moderate(
    generations: str | Path,
    out: str | Path,
    *,
    judge: str = "keyword",
    device: str = "auto",
    progress: Advance = nobody,
    **options: Any,
) -> Rows:
    """Judge the answers to harmful prompts, or go on judging; returns all rows of `out` (JSONL).

    Args:
        generations: what `generate` wrote, or rows with `id`, `set` ("harmful"), `instruction`, `answer`.
        judge: its name (`holdfast list judges`).
        options: of the judge: path, threshold, max_length, ...

    Raises:
        RecipeError: no such judge. DataError: no harmful prompts were answered.
        OutputError: `out` holds another judge's verdicts, or those of other answers.
    """
    from holdfast.evaluation import moderation as engine
    from holdfast.measuring import judging

    rows = read_answers(Path(generations))
    if not any(row["set"] == "harmful" for row in rows):
        raise DataError(f"{generations} has no answers to harmful prompts (rows with set: harmful).")
    loaded = judging.ready(judge, device, options)
    answers = [[row["id"], row["answer"]] for row in rows if row["set"] == "harmful"]
    claim(
        Path(out),
        {"judge": judge, "judge_stamp": loaded.stamp, "answers": identity_hash(answers)},
    )
    return engine.give_verdicts(rows, loaded, Path(out), progress=progress)


def rate(
    generations: str | Path,
    out: str | Path,
    *,
    judge: str,
    task: str | None = None,
    progress: Advance = nobody,
    **options: Any,
) -> Rows:
    """Have a judge rate the answers to a task, or go on; returns all rows of `out` (JSONL: id, rating, raw).

    Args:
        generations: what `generate` wrote, or rows with `id`, `set` ("task"), `instruction`, `answer`, and
            for `alpaca_eval` `target`, the reference's answer.
        judge: one that rates: alpaca_eval, mt_bench, or a file of your own.
        task: whose answers they are; by default the one that `generate` was told of. The judge must measure
            what the task asks for.
        options: of the judge: model, base_url, max_calls, ...

    Raises:
        RecipeError: no such judge. DataError: no row of a task. StepFailed: the server is gone.
        OutputError: `out` holds another judge's ratings, or those of other answers.
    """
    from holdfast.evaluation import rating as engine
    from holdfast.measuring import judging

    rows = read_answers(Path(generations))
    answers = [[talk["id"], talk["answers"], talk.get("target")] for talk in engine.talks(rows)]
    if not answers:
        raise DataError(f"{generations} has no answers to a task (rows with set: task).")
    named = judging.checked(RaterRecipe, judge, options)
    asked = tasks.find(task or (made_by(Path(generations)) or {}).get("task") or "own")
    if isinstance(asked, tasks.Task) and asked.grade is None:
        judging.check_rater(named, asked)
    judging.check_judge(named)
    loaded = judging.load_rater(named)
    claim(Path(out), {"judge": judge, "judge_stamp": loaded.stamp, "answers": identity_hash(answers)})
    return engine.give_ratings(rows, loaded, Path(out), progress=progress)


def score(
    generations: str | Path,
    verdicts: Sequence[str | Path] = (),
    *,
    ratings: str | Path | None = None,
    task: str | None = None,
    grader: str | None = None,
    out: str | Path | None = None,
    items: str | Path | None = None,
) -> dict[str, Any]:
    """Scores of one model from its answers and the judges' verdicts, in percent; see `evaluation.score`.

    Args:
        generations: what `generate` wrote.
        verdicts: what `moderate` wrote, the headline's judge first; none: only the task is scored.
        ratings: what `rate` wrote: the task is scored by them.
        task: whose grader it is; by default the one that `generate` was told of, else exact match.
        grader: another one for the same rows: exact, number, rouge1, or judge (`ratings` say).
        out: a JSON file to write the scores to.
        items: a JSONL file for what each answer scored, which `compare` reads.

    Raises:
        DataError: verdicts or ratings of other answers. RecipeError: no such task.
    """
    from holdfast.evaluation import scoring as engine
    from holdfast.measuring import judging

    rows = read_answers(Path(generations))
    made = made_by(Path(generations)) or {}
    name = task or made.get("task") or "own"
    task_itself = tasks.find(name)
    if not isinstance(task_itself, tasks.Task):
        raise RecipeError(f"'{name}' grades no answers: it is no user task (holdfast list tasks).")
    if grader is not None and grader not in GRADERS:
        raise RecipeError(f"Unknown grader '{grader}'.{nearest(grader, GRADERS)}")
    known = adapted(task_itself, grader)
    rated: Rows = []
    if ratings is not None:
        rated = read_whole(Path(ratings))
        known = _rated(known, Path(ratings), rated, {row["id"] for row in rows if row["set"] == "task"})
    harmful = {row["id"] for row in rows if row["set"] == "harmful"}
    judged: dict[str, Rows] = {}
    titles: dict[str, str] = {}
    for path in map(Path, verdicts):
        found = read_whole(path)
        if {row["id"] for row in found} != harmful:
            raise DataError(
                f"{path} holds {len(found)} verdicts, which are not those of the {len(harmful)} answers to "
                f"harmful prompts in {generations}. Run holdfast moderate {generations} --out {path}."
            )
        judge = (made_by(path) or {}).get("judge")
        judged[judge or path.stem] = found
        if judge:
            titles[judge] = judging.title(judge)
    scores = {
        **engine.compute_scores(rows, judged, known.grade, metric=known.metric, ratings=rated, titles=titles),
        "task": known.stamp,
        "provenance": provenance(),
    }
    if out is not None:
        write_json(Path(out), scores)
    if items is not None:
        found = engine.items(rows, next(iter(judged.values()), []), known.grade, known.metric, rated)
        write_text(Path(items), engine.as_lines(found))
    return scores


def _rated(task: tasks.Task, path: Path, rated: Rows, answered: set[str]) -> tasks.Task:
    """`task` as the judge that made the ratings grades it; raises DataError for those of other answers."""
    if {row["id"] for row in rated} != answered:
        raise DataError(
            f"{path} holds {len(rated)} ratings, which are not those of the {len(answered)} answers to the "
            "task. Rate those answers: holdfast rate."
        )
    if task.grade is None:
        return task
    judge = (made_by(path) or {}).get("judge", "alpaca_eval")
    metric = registry.face("judges", judge).facts.get("metric", "win_rate")
    return replace(task, name=f"{task.name}-judge", metric=metric, grade=None)


def _asked(row: Mapping[str, Any], template: str, system: str) -> list[dict[str, str]] | str:
    """A row as an endpoint is asked it: the server has the chat template; Alpaca's text is ours."""
    if template == "alpaca":
        return alpaca(row, system)
    turns = row["messages"][:-1] if row.get("messages") else [{"role": "user", "content": question(row)}]
    return [{"role": "system", "content": system}, *turns] if system else list(turns)


def find_adapter(path: str | Path) -> Path:
    """The local folder of an adapter folder or Hub id."""
    from holdfast.weights.folders import from_hub, looks_local

    if Path(path).is_dir() or looks_local(str(path)):
        return Path(path)
    return from_hub(str(path), None, True)


def _test_rows(**sources: Any) -> Rows:
    task, rows = sources["task"], sources["task_rows"]
    if task is None and rows is None and sources["harmful"] is None and sources["benign"] is None:
        raise RecipeError(
            "Nothing to ask: give harmful prompts, a task, rows of your own, or benign questions."
        )
    prepared = datasets.test_rows(
        task=task, test=rows, harmful_test=sources["harmful"], benign=sources["benign"],
        prompts=sources["prompts"], task_size=sources["prompts"],
    )  # fmt: skip
    return prepared.rows
