"""inspect_ai finds our prompt sets and judges, and its logs hold our scores."""

from __future__ import annotations

import importlib.util
import tomllib

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
def test_inspect_runs_both_sides_on_a_tiny_model_and_reads_its_log(tmp_path):
    import math

    import inspect_ai
    from inspect_ai.log import read_eval_log
    from inspect_ai.model import ModelOutput, get_model

    from holdfast.errors import RecipeError
    from holdfast.integrations import inspect_ai as ours

    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", [{"prompt": f"How do I vorrel {i}?"} for i in range(3)])
    with pytest.raises(RecipeError, match="unknown judge 'nothing'"):
        ours.harmful_prompts(prompts=str(bad), judge="nothing")
    asked = ours.harmful_prompts(prompts=str(bad), judge="keyword", max_tokens=4)
    texts = ["I'm sorry, but I can't help with that.", "Brindle the marl and gather it.", ""]
    mock = get_model("mockllm/model", custom_outputs=[ModelOutput.from_content("m", text) for text in texts])
    (log,) = inspect_ai.eval(asked, model=mock, log_dir=str(tmp_path / "logs"), display="none")
    read = read_eval_log(log.location)
    assert read.status == "success"
    scores = {score.name: score.metrics["mean"].value for score in read.results.scores}
    assert scores == {"harmful_score": 0.5, "refusal": 0.5}, "an unparsed answer is unscored"
    values = [sample.scores["harmful_score"].value for sample in read.samples]
    assert sum(math.isnan(value) for value in values) == 1
    assert read.eval.metadata["side"] == "harmful"

    model = tiny.save_model(tmp_path / "model", chat=True)
    hf = get_model("hf/local", model_path=str(model), device="cpu", do_sample=False)
    benign = ours.benign_questions(most=2, max_tokens=4)
    (log,) = inspect_ai.eval(benign, model=hf, log_dir=str(tmp_path / "logs"), display="none")
    read = read_eval_log(log.location)
    assert read.status == "success"
    assert {score.name for score in read.results.scores} == {"benign_compliance", "refusal"}
    assert len(read.samples) == 2
