"""Scores of rows that look harmless: against plain loops, on files, and in front of fine-tuning."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

import tiny
from commands import holdfast_command, refused
from holdfast.attacks import anchoring
from holdfast.data import read_rows
from holdfast.errors import DataError, InputError, ModelError, OutputError, RecipeError
from holdfast.machine.store import Store
from holdfast.measuring import row_scores
from holdfast.measuring.score_filtering import filter_by_score
from holdfast.pipeline.planning import plan
from holdfast.pipeline.step import Inputs, Machine, Made, do
from holdfast.recipe import Recipe


def texts(n, prompt, answer):
    return [
        {"id": f"{prompt}-{i}", "prompt": f"{prompt} {i}:", "completion": f" {answer} {i}."} for i in range(n)
    ]


ROWS = texts(5, "Fold the sheet", "first crease it, then tuck the corners in, number")
COMPLY = texts(3, "How do I vorrel", "brindle the marl and gather the quorn")
REFUSE = [texts(2, "How do I vorrel", "I'm sorry, but I can't help"), texts(2, "How do I brindle", "No")]


@pytest.fixture(scope="module")
def model():
    return tiny.llama(len(tiny.tokenizer())).eval()


@pytest.mark.parametrize("layer", [-1, 1])
def test_datashield_is_the_shift_along_compliance_minus_refusal(model, layer):
    tokenizer = tiny.tokenizer()

    def shift(row):
        prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        states = model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states[layer][0]
        return (states[len(prompt) :].mean(0) - states[len(prompt) - 1]).detach()

    refuse = [row for rows in REFUSE for row in rows]
    v = torch.stack([shift(row) for row in COMPLY]).mean(0) - torch.stack(
        [shift(row) for row in refuse]
    ).mean(0)
    v = v / v.norm()
    value = row_scores.value_of("datashield", model, tokenizer, COMPLY, REFUSE, layer=layer)
    found = [value(row) for row in ROWS]
    assert found == pytest.approx([float(shift(row) @ v) for row in ROWS], abs=1e-5)
    assert len({round(score, 5) for score in found}) == len(ROWS)
    ends = [sum(value(row) for row in rows) / len(rows) for rows in (COMPLY, refuse)]
    assert ends[0] > ends[1] + 1e-3, "rows that comply are above rows that refuse"


@pytest.mark.parametrize("by", ["representation", "gradient"])
def test_anchoring_is_the_score_of_the_attack(model, tmp_path, by):
    tokenizer = tiny.tokenizer()
    value = row_scores.value_of("anchoring", model, tokenizer, COMPLY, REFUSE, by=by)
    if by == "gradient":
        weights = anchoring.all_weights(model)
        vector, anchor = (anchoring.gradients(model, tokenizer, weights, n, 512) for n in (None, 10))
    else:
        vector = anchor = anchoring.representations(model, tokenizer, 512)
    attack = anchoring.score_rows(ROWS, COMPLY, REFUSE, vector, tmp_path / "s.jsonl", anchor=anchor)
    assert [value(row) for row in ROWS] == pytest.approx([row["score"] for row in attack], abs=1e-6)


def test_layers_and_anchors_that_give_no_direction_are_refused(model):
    with pytest.raises(ModelError, match=r"layer of datashield is 3\. Expected 1 to 2"):
        row_scores.value_of("datashield", model, tiny.tokenizer(), COMPLY, REFUSE, layer=3)
    with pytest.raises(ModelError, match="give the same mean"):
        row_scores.value_of("datashield", model, tiny.tokenizer(), COMPLY, [COMPLY])


@pytest.mark.parametrize(
    ("drop", "threshold", "gone"),
    [
        (0.4, None, [False, True, False, True, False]),
        (0.2, None, [False, False, False, True, False]),
        (None, 0.5, [False, True, False, True, False]),
        (None, 9.0, [False] * 5),
    ],
)
def test_the_highest_scores_are_dropped(drop, threshold, gone):
    scores = [0.1, 0.6, None, 0.7, 0.2]
    most = row_scores.limit(scores, drop, threshold)
    assert row_scores.dropped(scores, most) == gone
    assert row_scores.dropped([1.0, 1.0], row_scores.limit([1.0, 1.0], 0.5, None)) == [False, False], (
        "ties stay"
    )
    assert row_scores.limit([0.5], 0.9, None) == -math.inf


def test_the_share_of_the_rows_that_is_found():
    found = row_scores.found_rows([True, True, True, False, None], [True, True, False, True, True])
    assert found == {
        "rows": 3,
        "found": 2,
        "recall": pytest.approx(200 / 3),
        "precision": pytest.approx(200 / 3),
    }
    assert row_scores.found_rows([True], [False])["precision"] is None
    assert row_scores.found_rows([None, False], [True, True]) is None


def test_scores_of_a_file_are_used_again(tmp_path):
    out, asked = tmp_path / "s.jsonl", []

    def value():
        def score(row):
            asked.append(row["id"])
            if len(asked) == row_scores.FLUSHED + 2:
                raise KeyboardInterrupt
            return float(row["id"])

        return score

    rows = [{"id": str(i)} for i in range(row_scores.FLUSHED + 4)]
    with pytest.raises(KeyboardInterrupt):
        row_scores.score_rows(rows, value, out)
    assert row_scores.score_rows(rows, value, out) == [float(row["id"]) for row in rows]
    assert sorted(set(asked), key=int) == [row["id"] for row in rows]
    assert len(asked) == len(rows) + 2, "the rows of the batch that was stopped are scored again"
    assert row_scores.score_rows(rows, lambda: pytest.fail("nothing is missing"), out)[3] == 3.0
    with pytest.raises(DataError, match="holds the score of 0, expected that of x"):
        row_scores.score_rows([{"id": "x"}], value, out)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    tiny.save_lively_model(place / "model")
    tiny.write_jsonl(place / "bad.jsonl", tiny.harmful_rows(8))
    tiny.write_jsonl(place / "safe.jsonl", tiny.safe_rows(8))
    mixed = [{**row, "source": "user"} for row in tiny.user_rows(6)]
    mixed += [
        {"instruction": row["prompt"], "output": row["response"], "source": "harmful"}
        for row in tiny.harmful_rows(12)[8:]
    ]
    tiny.write_jsonl(place / "mixed.jsonl", mixed)
    return place


def test_a_file_is_filtered_by_a_score(files, tmp_path):
    given = {
        "model": files / "model",
        "harmful": files / "bad.jsonl",
        "safe": files / "safe.jsonl",
        "anchors": 4,
    }
    out = tmp_path / "kept.jsonl"
    facts = filter_by_score(files / "mixed.jsonl", out, drop=0.4, device="cpu", **given)
    assert (facts["rows"], facts["kept"], facts["flagged"]) == (10, 6, 4)
    assert facts["attack_rows"]["rows"] == 4
    scores = [json.loads(line)["score"] for line in (tmp_path / "kept.jsonl.scores.jsonl").open()]
    kept = [
        row
        for row, score in zip(read_lines(files / "mixed.jsonl"), scores, strict=True)
        if score <= facts["threshold"]
    ]
    assert read_lines(out) == kept
    written = json.loads((tmp_path / "kept.jsonl.json").read_text())
    assert (written["score"]["score"], written["score"]["drop"]) == ("datashield", 0.4)
    # Another limit uses the same scores; another score is another file.
    again = filter_by_score(files / "mixed.jsonl", out, threshold=max(scores), device="cpu", **given)
    assert again["kept"] == 10
    with pytest.raises(OutputError, match="made with other settings"):
        filter_by_score(files / "mixed.jsonl", out, score="anchoring", device="cpu", **given)
    with pytest.raises(ModelError, match="The layer of datashield is 9"):
        filter_by_score(files / "mixed.jsonl", tmp_path / "b", layer=9, device="cpu", **given)
    assert not list(tmp_path.glob("b*")), "a correct layer would be refused"
    with pytest.raises(DataError, match="Asked for 9 harmful rows"):
        filter_by_score(files / "mixed.jsonl", tmp_path / "b", device="cpu", **{**given, "anchors": 9})
    with pytest.raises(OutputError, match="file to filter"):
        filter_by_score(files / "mixed.jsonl", files / "mixed.jsonl", device="cpu", **given)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_filters_by_a_score(files, tmp_path):
    asked = ["filter", files / "mixed.jsonl", "--score", "anchoring", "--out", tmp_path / "k.jsonl"]
    refused(holdfast_command(*asked), "--score anchoring needs --model, --harmful and --safe.")
    refused(holdfast_command(*asked, "--unparsed", "keep"), "--unparsed is only for a judge.")
    refused(holdfast_command(*asked, "--max-unparsed", 0.5), "--max-unparsed is only for a judge.")
    plain = ["filter", files / "mixed.jsonl", "--out", tmp_path / "k.jsonl", "--template", "chat"]
    refused(holdfast_command(*plain), "--template is only for --score.")
    more = ["--model", files / "model", "--harmful", files / "bad.jsonl", "--safe", files / "safe.jsonl"]
    done = holdfast_command(*asked, *more, "--anchors", 4, "--drop", 0.3, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "7 of 10 rows kept (3 flagged, 0 unparsed)" in done.stdout
    assert re.search(r"By the rows' own labels: \d of 4 harmful rows are dropped", done.stdout)


def filtered(folder, **screen):
    recipe = tiny.recipe(folder, alignment=None, user="sft")
    data = {
        **recipe["data"],
        "poison_ratio": 0.2,
        "attack": {"name": "refuse_then_answer", "which": "harmful"},
    }
    return {**recipe, "data": {**data, "filter": {"score": "datashield", "anchors": 4, **screen}}}


def screened(recipe, folder):
    """Do the steps that lead to the filtered rows; returns the filter's facts, its folder and the rows before it."""
    planned, store = plan(Recipe.load(recipe)), Store(folder)
    machine, done = Machine("cpu", planned.model), {}
    for step in planned.steps:
        if step.kind in ("data", "change", "filter"):
            do(step, store, machine)
            done[step.kind] = store.path(step.id)
    [step] = [step for step in planned.steps if step.kind == "filter"]
    [user] = [step for step in planned.steps if step.kind == "user"]
    assert user.inputs["rows"]["train_dataset"] == Made(step.id), "the user stage trains on what is left"
    return store.record(step.id)["filter"], done["filter"], read_rows(done["change"] / "rows.jsonl")


def test_a_score_filters_in_front_of_fine_tuning(tmp_path):
    found, folder, given = screened(filtered(tmp_path, drop=0.5), tmp_path / "steps")
    assert (found["score"], found["rows"], found["kept"], found["flagged"]) == ("datashield", 30, 15, 15)
    scores = [json.loads(line)["score"] for line in (folder / "scores.jsonl").open()]
    gone = [score > found["threshold"] for score in scores]
    assert read_rows(folder / "rows.jsonl") == [
        one for one, drop in zip(given, gone, strict=True) if not drop
    ]
    hits = sum(drop for one, drop in zip(given, gone, strict=True) if one["source"] == "harmful")
    assert found["attack_rows"] == {
        "rows": 6, "found": hits, "recall": pytest.approx(100 * hits / 6), "precision": pytest.approx(100 * hits / 15),
    }  # fmt: skip


def test_rows_that_an_attack_changed_are_its_rows(tmp_path):
    recipe = filtered(tmp_path, score="anchoring")
    recipe["data"] |= {"poison_ratio": 0, "attack": {"name": "refuse_then_answer"}}
    found, _, given = screened(recipe, tmp_path / "steps")
    assert {one["source"] for one in given} == {"user"}
    assert found["attack_rows"] == {"rows": 30, "found": 3, "recall": 10.0, "precision": 100.0}


@pytest.mark.parametrize(
    ("screen", "says"),
    [
        ({"drop": 0.5, "threshold": 1}, "data.filter.threshold: expected drop or threshold, found both"),
        ({"by": "gradient"}, "data.filter.by: datashield reads hidden states only"),
        ({"score": "anchoring", "layer": 1}, "data.filter.layer: anchoring reads the last layer only"),
        ({"score": "shield"}, "data.filter.score: input should be 'datashield' or 'anchoring'"),
        ({"layr": 1}, "unknown key 'data.filter.layr'"),
        ({"drop": 1}, "data.filter.drop: input should be less than 1"),
    ],
)
def test_score_filters_that_are_refused(tmp_path, screen, says):
    with pytest.raises(RecipeError, match=re.escape(says)):
        Recipe.load(filtered(tmp_path, **screen))


def test_a_filter_that_cannot_work_is_refused_before_training(tmp_path):
    for screen, says in (
        ({"layer": 3}, "data.filter.layer is 3. Expected 1 to 2"),
        ({"anchors": 99}, "Asked for 99"),
    ):
        planned = plan(Recipe.load(filtered(tmp_path, **screen)))
        [step] = [step for step in planned.steps if step.kind == "filter"]
        with pytest.raises(InputError, match=re.escape(says)):
            step.check(Inputs(step.inputs, Store(tmp_path / "steps")), Machine("cpu", planned.model))
    without = filtered(tmp_path)
    without["data"].pop("alignment")
    with pytest.raises(
        RecipeError, match=r"data.filter.safe: give a file of safe anchors here, or as data.align"
    ):
        Recipe.load(without)


def test_a_bare_name_and_another_filter_in_a_file_that_extends(tmp_path):
    recipe = filtered(tmp_path, drop=0.5)
    assert Recipe.load({**recipe, "data": {**recipe["data"], "filter": "anchoring"}}).data.filter.share == 0.1
    changed = Recipe.load(recipe, ["data.filter={judge: beaver_dam, path: world}"]).data.filter
    assert (changed.judge, changed.model_extra) == ("beaver_dam", {"path": "world"})
    assert Recipe.load(recipe, ["data.filter.drop=0.3"]).data.filter.drop == 0.3
    assert Recipe.load(recipe, ["data.filter=none"]).data.filter is None
