"""The result of a gate as text, JUnit XML, or the annotations and the job summary of GitHub Actions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree

WORDS = {
    "passed": "passed",
    "failed": "FAILED",
    "undecided": "not enough prompts to say",
    None: "measured",
}


def title_of(name: str, score: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return the title of a score; the harmful score of a refusal judge is the attack success rate."""
    return str(result["judge"]["title"] if name == "harmful_score" else score["title"])


def reason(name: str, score: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return one sentence about a score and its decision."""
    title, sure = title_of(name, score, result), f"{100 * result['limits']['confidence']:g} %"
    low, high = score["bounds"]
    if name == "task_score" or score["difference"] is None:
        text = f"{title} {score['second']:.1f} ({low:.1f} to {high:.1f}), n = {score['n']}"
        if score["limit"] is not None:
            text += f"; required: at least {score['limit']:g}"
    else:
        text = (
            f"{title} {score['first']:.1f} to {score['second']:.1f}: {score['difference']:+.1f} points "
            f"({low:+.1f} to {high:+.1f}), n = {score['n']}, p = {score['p']:.2g}"
        )
        if score["limit"] is not None:
            text += f"; permitted: at most {score['limit']:+g}"
    if score["outcome"] == "undecided":
        needed = score["needed"]
        text += (
            f". Too few prompts to decide at {sure}; if the shares stay as they are, about {needed:,} decide"
            if needed
            else f". The score is so close to the limit that no number of prompts decides at {sure}"
        )
    return text + (f"; {score['left_out']} without a value from both models" if score["left_out"] else "")


def as_text(result: Mapping[str, Any]) -> str:
    """Return the result as lines of text."""
    return "\n".join(_lines(result))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    against, judge = result["against"], result["judge"]
    yield "Before: " + (against["name"] if against else "not given")
    yield "Judge:  " + judge["name"] + (f" (default: {judge['why']})" if judge["why"] else "")
    for name, one in result["questions"].items():
        yield f"{name.capitalize()} questions: {one['n']} from {one['source']}" + (
            " (default)" if one["default"] else ""
        )
    for one in result["results"]:
        yield ""
        yield f"{one['name']}: {WORDS[one['outcome']]}"
        if one["adapter"]:
            yield "  adapter: " + _adapter(one["adapter"])
        for name, score in one["scores"].items():
            mark = f"[{WORDS[score['outcome']]}] " if score["outcome"] else ""
            yield f"  {mark}{reason(name, score, result)}"
        yield from (f"  {note}" for note in one["notes"])


def _adapter(facts: Mapping[str, Any]) -> str:
    parts = [f"LoRA of rank {facts.get('r')}", f"alpha {facts.get('lora_alpha')}"]
    if isinstance(facts.get("target_modules"), list):
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in facts["target_modules"])
        parts.append("on " + ", ".join(kinds))
    parts += ["DoRA"] if facts.get("use_dora") else []
    parts.append(f"base model {facts.get('base') or 'not named'}")
    parts.append("all numbers finite")
    return ", ".join(parts)


MEANING = {
    "harmful_score": "share of harmful prompts with a harmful answer; lower is better",
    "over_refusal_rate": "share of harmless questions that are refused; lower is better",
    "task_score": "score on your task; higher is better",
}
BY_WORDS = "share of harmful prompts that are not refused, by the words of the answer; lower is better"
SURE = 0.05


def as_check(result: Mapping[str, Any]) -> str:
    """Return the result of `holdfast check`: scores, what they mean, and what to do next."""
    lines = [*list(_lines(result))[: 2 + len(result["questions"])], ""]
    (one,) = result["results"]
    lines.append(f"{one['name']}")
    lines += ["  adapter: " + _adapter(one["adapter"])] if one["adapter"] else []
    lines += ["", f"  {'':24}{'before':>10}{'after':>10}{'difference':>14}   n"]
    for name, score in one["scores"].items():
        before = "-" if score["first"] is None else f"{score['first']:.1f}"
        moved = "-" if score["difference"] is None else f"{score['difference']:+.1f}"
        title = title_of(name, score, result)
        lines.append(f"  {title:24}{before:>10}{score['second']:>10.1f}{moved:>14}   {score['n']}")
    lines.append("")
    for name, score in one["scores"].items():
        title = title_of(name, score, result)
        by_words = name == "harmful_score" and title != "harmful score"
        lines.append(f"  {title}: {BY_WORDS if by_words else MEANING[name]}")
    return "\n".join([*lines, *(f"  {note}" for note in one["notes"]), "", *_advice(one["scores"])])


def _advice(scores: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the scores say and what to do next."""
    harm, refused = scores.get("harmful_score"), scores.get("over_refusal_rate")
    if harm is None:
        yield "Harm was not measured: no answer to a harmful prompt has a verdict."
    elif harm["difference"] is None:
        low, high = harm["bounds"]
        yield f"The true score is between {low:.1f} and {high:.1f} (95 %). --against shows what changed."
    elif harm["p"] <= SURE:
        more = f"{harm['only_second']} prompts, p = {harm['p']:.2g}"
        yield f"Fine-tuning made the model more harmful ({more}). Next:"
        yield "  repair this adapter:            holdfast safe-lora (docs/repair.md)"
        yield "  train again with a defense:     holdfast run, with user.defense: lisa (docs/recipes.md)"
        yield "  find harmful rows in your data: holdfast filter"
    else:
        up = max(harm["bounds"][1], 0)
        yield f"No rise in harm was found. Up to {up:.1f} points are possible with {harm['n']} prompts:"
        yield "ask more prompts to narrow this down, and decide in CI with holdfast gate."
    if refused and refused["difference"] is not None and refused["p"] <= SURE:
        yield "The model refuses more harmless questions than before: its answers are less useful."


def as_junit(result: Mapping[str, Any]) -> str:
    """Return the result as JUnit XML: one suite for each model, one case for each score with a limit."""
    root = ElementTree.Element("testsuites", name="holdfast gate")
    for one in result["results"]:
        suite = ElementTree.SubElement(root, "testsuite", name=_clean(one["name"]))
        bad = {"failed": 0, "undecided": 0}
        decided = {name: score for name, score in one["scores"].items() if score["outcome"]}
        for name, score in decided.items():
            case = ElementTree.SubElement(suite, "testcase", classname=_clean(one["name"]), name=name)
            if score["outcome"] in bad:
                bad[score["outcome"]] += 1
                kind = "failure" if score["outcome"] == "failed" else "error"
                text = _clean(reason(name, score, result))
                ElementTree.SubElement(case, kind, message=text, type=WORDS[score["outcome"]]).text = text
        if one["outcome"] == "undecided" and not any(bad.values()):
            case = ElementTree.SubElement(suite, "testcase", classname=_clean(one["name"]), name="questions")
            ElementTree.SubElement(
                case, "error", message=_clean(" ".join(one["notes"])), type=WORDS["undecided"]
            )
            bad["undecided"] += 1
        suite.set("tests", str(len(list(suite))))
        suite.set("failures", str(bad["failed"]))
        suite.set("errors", str(bad["undecided"]))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode")


def as_annotations(result: Mapping[str, Any]) -> str:
    """Return workflow commands of GitHub Actions: a notice, or an error for each score that did not pass."""
    lines = []
    for one in result["results"]:
        if one["outcome"] not in ("failed", "undecided"):
            text = "; ".join(reason(name, score, result) for name, score in one["scores"].items())
            lines.append(_command("notice", f"holdfast gate: {one['name']} {WORDS[one['outcome']]}", text))
        for name, score in one["scores"].items():
            if score["outcome"] in ("failed", "undecided"):
                head = f"holdfast gate: {one['name']}: {WORDS[score['outcome']]}"
                lines.append(_command("error", head, reason(name, score, result)))
        for note in one["notes"]:
            kind = "error" if note.startswith("Undecided") else "warning"
            lines.append(_command(kind, f"holdfast gate: {one['name']}", note))
    return "\n".join(lines)


def as_summary(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown, for the summary of a job."""
    lines = [f"### holdfast gate: {WORDS[result['outcome']]}", ""]
    lines += [f"- {_cell(line)}" for line in as_text(result).split("\n\n")[0].splitlines()] + [""]
    lines += [
        "| model | score | before | after | difference | n | outcome |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result["results"]:
        for name, score in one["scores"].items():
            before = "" if score["first"] is None else f"{score['first']:.1f}"
            moved = "" if score["difference"] is None else f"{score['difference']:+.1f}"
            cells = (
                one["name"], title_of(name, score, result), before, f"{score['second']:.1f}", moved,
                str(score["n"]), WORDS[score["outcome"]],
            )  # fmt: skip
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    for one in result["results"]:
        told = [reason(n, s, result) for n, s in one["scores"].items() if s["outcome"] == "undecided"]
        lines += [f"\n{_cell(one['name'])}: {_cell(text)}" for text in [*told, *one["notes"]]]
    return "\n".join(lines) + "\n"


def _command(kind: str, head: str, text: str) -> str:
    """Return a workflow command. Line breaks and separators are escaped, so that a name adds no command."""
    return f"::{kind} title={_escaped(head).replace(':', '%3A').replace(',', '%2C')}::{_escaped(text)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _cell(text: str) -> str:
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return plain.replace("|", "\\|")


def _clean(text: str) -> str:
    """Replace characters that XML does not permit."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
