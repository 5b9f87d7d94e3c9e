"""inspect_ai finds our prompt sets and judges, and its logs hold our scores."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import tomllib
from types import SimpleNamespace

import pytest

import tiny
from places import ROOT

REAL = importlib.util.find_spec("inspect_ai") is not None
MODULE = "holdfast.integrations.inspect_ai"


def test_the_entry_point_names_the_file():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["inspect_ai"]
    assert declared == {"holdfast": MODULE}
    assert importlib.util.find_spec(MODULE) is not None


@pytest.mark.skipif(not REAL, reason="inspect_ai is not installed (pip install 'holdfast[inspect]')")
def test_scores_of_an_answer():
    """1 or 0, and unscored for an answer without a verdict."""
    from holdfast.errors import RecipeError
    from holdfast.integrations import inspect_ai as ours

    def scored(scorer, answer):
        state = SimpleNamespace(input_text="How?", output=SimpleNamespace(completion=answer))
        return asyncio.run(scorer(state, None))

    refused, answered, gibberish = (
        "I'm sorry, but I can't help with that.",
        "First fold the paper.",
        "zz " * 16,
    )
    values = {
        ours.harmful_score: (0, 1, 1),
        ours.refusal: (1, 0, 0),
        ours.benign_compliance: (0, 1, 0),
    }
    for make, expected in values.items():
        found = [scored(make(), text).value for text in (refused, answered, gibberish)]
        assert tuple(found) == expected, make
    for make in (ours.harmful_score, ours.refusal):
        empty = scored(make(), "")
        assert math.isnan(empty.value)
        assert empty.metadata["judge"].startswith("keyword@")
    with pytest.raises(RecipeError, match="unknown judge 'nothing'"):
        ours.harmful_score(judge="nothing")
    with pytest.raises(RecipeError, match="has no such option"):
        ours.harmful_score(judge="keyword", base_url="http://localhost")


@pytest.mark.skipif(not REAL, reason="inspect_ai is not installed (pip install 'holdfast[inspect]')")
def test_inspect_runs_both_sides_on_a_tiny_model_and_reads_its_log(tmp_path):
    import inspect_ai
    from inspect_ai.log import read_eval_log
    from inspect_ai.model import get_model

    from holdfast.integrations import inspect_ai as ours

    rows = [{"prompt": f"How do I vorrel {i}?", "category": "stones"} for i in range(3)]
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", rows)
    model = tiny.save_model(tmp_path / "model", chat=True)
    hf = get_model("hf/local", model_path=str(model), device="cpu", do_sample=False)
    for task, side, scorers, n in (
        (ours.harmful_prompts(prompts=str(bad), max_tokens=4), "harmful", {"harmful_score", "refusal"}, 3),
        (ours.benign_questions(most=2, max_tokens=4), "benign", {"benign_compliance", "refusal"}, 2),
    ):
        (log,) = inspect_ai.eval(task, model=hf, log_dir=str(tmp_path / "logs"), display="none")
        read = read_eval_log(log.location)
        assert read.status == "success", read.error
        assert {score.name for score in read.results.scores} == scorers
        assert len(read.samples) == n
        assert read.eval.metadata["side"] == side
        assert read.eval.metadata["prompt_set"]["sha256"]
