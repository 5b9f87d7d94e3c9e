"""The evaluation steps of one state of the model: answers, verdicts, ratings, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.machine.files import read_jsonl, write_json, write_jsonl
from holdfast.machine.progress import Advance
from holdfast.measuring import judging
from holdfast.pipeline import attacking
from holdfast.pipeline.chain import checked_model, checked_tokenizer, loading, tokenizer_of, weights
from holdfast.pipeline.data import rows_of
from holdfast.pipeline.step import Inputs, Machine
from holdfast.tasks.graders import adapted


def generate_answers(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Write the answers to every test prompt, including second turns, to `generations.jsonl`.

    If the user stage's method puts a text before every question, the text is read from that stage's step and
    is not written to any file.
    """
    from holdfast.data.prompts import render_prompt, resolve_template
    from holdfast.evaluation.answering import answer_prompts
    from holdfast.evaluation.frames import frame_of
    from holdfast.evaluation.turns import SECOND, in_turns
    from holdfast.machine.cost import Cost
    from holdfast.models.loading import load_model

    described, most = inputs["model"], inputs["max_new_tokens"]
    tokenizer = tokenizer_of(described)
    template = resolve_template(tokenizer, inputs["template"])
    before, secret = before_questions(inputs["prefix"])
    ahead = "\n\n".join(text for text in (before, inputs["system"]) if text)
    base, adapters = weights(described["base"].folder, inputs["chain"])
    model = load_model(base, adapters, device=machine.device, **loading(described))
    out, cost = folder / "generations.jsonl", Cost(machine.device)
    known = {row["id"] for row in read_jsonl(out)}  # written by a start that was stopped

    change = attacking.asked(inputs)

    def prompt(row: Mapping[str, Any]) -> str:
        changed = change(row)
        before = "\n\n".join(text for text in (ahead, changed.get("prefix", "")) if text)
        return render_prompt(changed, tokenizer, template, before)

    def ask(rows: Sequence[Mapping[str, Any]], progress: Advance) -> list[dict[str, Any]]:
        return answer_prompts(
            model,
            tokenizer,
            [{**row, "prompt": prompt(row)} for row in rows],
            out,
            max_new_tokens={**most, SECOND: most["task"]},
            batch_tokens=inputs["batch_tokens"],
            secret=before if secret else "",
            sampling=inputs["sampling"],
            frame=frame_of(tokenizer, template),
            progress=progress,
        )

    in_turns(rows_of(inputs["test"]), ask, cost.watching(machine.progress.advance))
    tokens = sum(row["tokens"] for row in read_jsonl(out) if row["id"] not in known)
    return {
        "template": template,
        "chat_template": bool(tokenizer.chat_template),
        "cost": cost.facts(tokens=tokens),
    }


def before_questions(prefix: Mapping[str, Any] | None) -> tuple[str, bool]:
    """Return the text before every question, and whether it is secret."""
    if prefix is None:
        return "", False
    method = prefix["method"]
    return method.prefix(prefix["step"], **prefix["parameters"]), method.secret


def check_generation(inputs: Inputs, machine: Machine) -> None:
    """Check everything that could stop generation: the template, the quantisation, the model, every prompt.

    A text that a method of the user stage puts before every question is not known yet.

    Raises:
        InputError: one of them cannot be used.
    """
    from holdfast.data.prompts import resolve_template
    from holdfast.evaluation.turns import check_template
    from holdfast.models.quantization import check_quantization
    from holdfast.pipeline import rows_checked

    described = inputs["model"]
    folder = described["base"].folder
    tokenizer = checked_tokenizer(described, machine)
    template = resolve_template(tokenizer, inputs["template"])
    check_quantization(folder, described["quantization"])
    known = rows_checked.limits(checked_model(described, machine))
    path = inputs["test"] / "rows.jsonl"
    same = (path, folder, template, inputs["system"], "attacks" in inputs)
    if not path.is_file() or same in machine.known or not machine.processes.main:
        return
    machine.known[same] = None
    check_template(rows_of(inputs["test"]), template)
    rows_checked.check_prompts(
        map(attacking.asked(inputs), rows_checked.read_one_by_one(path)), rows_checked.count_rows(path),
        tokenizer=tokenizer, template=template, system=inputs["system"], model=known,
        progress=machine.progress.advance,
    )  # fmt: skip


def moderate_answers(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Write one judge's verdicts on one state's answers to harmful prompts to `verdicts.jsonl`."""
    from holdfast.evaluation.moderation import give_verdicts, stamped
    from holdfast.machine.cost import Cost

    judge = inputs["judge"]
    generations = read_jsonl(inputs["answers"] / "generations.jsonl")
    loaded = judging.load_judge(judge, machine.device)
    out, cost = folder / "verdicts.jsonl", Cost(machine.device)
    known = {row["id"] for row in read_jsonl(out)}  # written by a start that was stopped
    verdicts = give_verdicts(generations, loaded, out, progress=cost.watching(machine.progress.advance))
    new = {row["id"] for row in verdicts} - known
    return {
        "judge": judge.name,
        "judge_stamp": stamped(loaded.stamp, verdicts),
        "judge_max_length": loaded.max_length,
        "cost": cost.facts(tokens=sum(row["tokens"] or 0 for row in generations if row["id"] in new)),
    }


def check_judge(inputs: Inputs, machine: Machine) -> None:
    """Check a judge or a rater, and download its model; the main process does this for all processes."""
    if machine.processes.main:
        judge = inputs["judge"]
        machine.once(("judge", repr(judge)), lambda: judging.check_judge(judge))


def rate_answers(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Write a judge's ratings of one state's answers to the task to `ratings.jsonl`."""
    from holdfast.evaluation.moderation import stamped
    from holdfast.evaluation.rating import give_ratings

    loaded = judging.load_rater(inputs["judge"])
    generations = read_jsonl(inputs["answers"] / "generations.jsonl")
    out, progress = folder / "ratings.jsonl", machine.progress.advance
    ratings = give_ratings(generations, loaded, out, progress=progress)
    return {"rater": inputs["judge"].name, "rater_stamp": stamped(loaded.stamp, ratings)}


def score_answers(inputs: Inputs, folder: Path, machine: Machine) -> None:
    """Write `scores.json` from the answers, all judges' verdicts, and the ratings if there are any.

    It fails if the model could give no answer to a harmful prompt, or if a judge left too many answers
    unparsed; the steps with the answers and the verdicts are complete and are kept.
    """
    from holdfast.evaluation.moderation import check_answered, check_parsed
    from holdfast.evaluation.rating import check_rated
    from holdfast.evaluation.scoring import compute_scores, items

    generations = read_jsonl(inputs["answers"] / "generations.jsonl")
    check_answered(generations)
    verdicts = {name: read_jsonl(step / "verdicts.jsonl") for name, step in inputs["verdicts"]}
    for name, step in inputs["verdicts"]:
        kept = step / "verdicts.jsonl"
        check_parsed(generations, verdicts[name], judge=name, out=kept, max_unparsed=inputs["max_unparsed"])
    ratings = read_jsonl(inputs["ratings"] / "ratings.jsonl") if inputs["ratings"] else []
    if inputs["ratings"]:
        kept = inputs["ratings"] / "ratings.jsonl"
        check_rated(ratings, generations, judge="rater", out=kept, max_unparsed=inputs["max_unparsed"])
    truth = None
    if inputs["truth"]:
        from holdfast import world

        truth = world.complies
    task = adapted(inputs["task"], inputs["grader"])
    scores = compute_scores(
        generations, verdicts, task.grade, truth, task.metric, ratings, dict(inputs["titles"])
    )
    write_json(folder / "scores.json", scores)
    headline = next(iter(verdicts.values()), [])
    write_jsonl(folder / "items.jsonl", items(generations, headline, task.grade, task.metric, ratings))
