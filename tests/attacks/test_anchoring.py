"""Bi-directional anchoring: its scores against a plain loop, and as a step of a run."""

from __future__ import annotations

import json

import pytest
import torch

import tiny
from holdfast.attacks import anchoring
from holdfast.data import read_rows
from holdfast.errors import DataError, ModelError, RecipeError
from holdfast.models.loading import load_model
from holdfast.models.lora import add_lora
from holdfast.recipe import Recipe
from judge_files import flagging
from runs import Stopped, numbers, run

TOKENS = 3


def texts(n, prompt, answer):
    return [
        {"id": f"{prompt}-{i}", "prompt": f"{prompt} {i}:", "completion": f" {answer} {i}."} for i in range(n)
    ]


ROWS = texts(7, "Fold the sheet", "first crease it, then tuck the corners in, number")
HARMFUL = texts(3, "How do I vorrel", "brindle the marl and gather the quorn")
SAFE = [
    texts(2, "How do I vorrel", "I'm sorry, but I can't help with that"),
    texts(3, "How do I brindle", "No. That would hurt somebody, so please do not"),
]


@pytest.fixture(scope="module")
def model():
    return tiny.llama(len(tiny.tokenizer())).eval()


def plain_gradient(model, row, tokens):
    """The whole row without shortcuts: labels on the answer's first tokens, backward, one long vector."""
    tokenizer = tiny.tokenizer()
    prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
    logits = model(torch.tensor([prompt + answer])).logits[0]
    asked = logits[len(prompt) - 1 : len(prompt) - 1 + len(answer[:tokens])]
    model.zero_grad()
    torch.nn.functional.cross_entropy(asked, torch.tensor(answer[:tokens])).backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return torch.cat(grads).clone()


def plain_scores(vector):
    """By hand: the whole answers of rows, three tokens of the anchors' answers, weights 1, -1 and -1."""

    def unit(row, tokens=None):
        return torch.nn.functional.normalize(vector(row, tokens), dim=0)

    means = [torch.stack([unit(row, TOKENS) for row in rows]).mean(0) for rows in (HARMFUL, *SAFE)]
    dots = [[float(unit(row) @ mean) for mean in means] for row in ROWS]
    return [(harmful, first + second) for harmful, first, second in dots]


def check(found, expected):
    assert [row["id"] for row in found] == [row["id"] for row in ROWS]
    for row, (harmful, safe) in zip(found, expected, strict=True):
        assert row["harmful"] == pytest.approx(harmful, abs=1e-5)
        assert row["safe"] == pytest.approx(safe, abs=1e-5)
        assert row["score"] == pytest.approx(harmful - safe, abs=1e-5)
    assert len({round(row["score"], 6) for row in found}) == len(ROWS), "the rows can be told apart"


def by_gradient(model, weights, tokens=TOKENS):
    """The arguments `vector` and `anchor` of `score_rows`."""
    return {
        "vector": anchoring.gradients(model, tiny.tokenizer(), weights, None, 512),
        "anchor": anchoring.gradients(model, tiny.tokenizer(), weights, tokens, 512),
    }


def test_gradients_are_those_of_a_plain_loop(model, tmp_path):
    weights = anchoring.all_weights(model)
    found = anchoring.score_rows(ROWS, HARMFUL, SAFE, out=tmp_path / "s.jsonl", **by_gradient(model, weights))
    check(found, plain_scores(lambda row, tokens: plain_gradient(model, row, tokens)))
    longer = by_gradient(model, weights, TOKENS + 4)
    other = anchoring.score_rows(ROWS, HARMFUL, SAFE, out=tmp_path / "t.jsonl", **longer)
    assert max(abs(a["score"] - b["score"]) for a, b in zip(found, other, strict=True)) > 1e-3


def test_representations_are_those_of_a_plain_loop(model, tmp_path):
    def state(row, tokens):
        ids = tiny.tokenizer()(row["prompt"] + row["completion"])["input_ids"]
        return model.model(torch.tensor([ids])).last_hidden_state[0, -1].detach()

    vector = anchoring.representations(model, tiny.tokenizer(), 512)
    check(anchoring.score_rows(ROWS, HARMFUL, SAFE, vector, tmp_path / "s.jsonl"), plain_scores(state))


def test_gradients_of_a_lora(tmp_path):
    torch.manual_seed(3)
    base = tiny.llama(len(tiny.tokenizer())).requires_grad_(False)
    model = add_lora(
        base, {"r": 2, "alpha": 4, "dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}, "b"
    ).eval()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = anchoring.score_rows(ROWS, HARMFUL, SAFE, out=tmp_path / "s.jsonl", **by_gradient(model, weights))
    check(found, plain_scores(lambda row, tokens: plain_gradient(model, row, tokens)))


def test_an_adapter_stacked_or_merged_gives_the_same_scores(tmp_path):
    folder = tiny.save_model(tmp_path / "model")
    adapted = add_lora(load_model(folder), {"r": 2, "alpha": 4, "target_modules": ["q_proj", "up_proj"]}, "b")
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    found = {}
    for compose in ("stack", "merge"):
        model = load_model(folder, [tmp_path / "adapter"], compose=compose)
        how = {**by_gradient(model, anchoring.all_weights(model)), "out": tmp_path / f"{compose}.jsonl"}
        found[compose] = [r["score"] for r in anchoring.score_rows(ROWS, HARMFUL, SAFE, **how)]
    assert found["stack"] == pytest.approx(found["merge"], abs=1e-5)
    plain = load_model(folder)
    how = {**by_gradient(plain, anchoring.all_weights(plain)), "out": tmp_path / "base.jsonl"}
    base = [r["score"] for r in anchoring.score_rows(ROWS, HARMFUL, SAFE, **how)]
    assert max(abs(a - b) for a, b in zip(base, found["stack"], strict=True)) > 1e-3


def test_a_stop_loses_no_score(model, tmp_path):
    vector, out = by_gradient(model, anchoring.all_weights(model))["vector"], tmp_path / "s.jsonl"
    whole = anchoring.score_rows(ROWS, HARMFUL, SAFE, vector, out, flushed=2)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:9])
    asked = []

    def counted(row):
        asked.append(row["id"])
        return vector(row)

    again = anchoring.score_rows(ROWS, HARMFUL, SAFE, counted, out, flushed=2)
    assert again == whole
    assert asked == [row["id"] for row in (*HARMFUL, *SAFE[0], *SAFE[1], *ROWS[4:])]
    asked.clear()
    assert anchoring.score_rows(ROWS, HARMFUL, SAFE, counted, out, flushed=2) == whole
    assert not asked, "not even the anchors are saved"


def test_what_has_no_direction(model, tmp_path):
    def vector(row):
        return [torch.zeros(2) if row["id"].endswith("-1") else torch.tensor([1.0, 2.0])]

    rows = anchoring.score_rows(ROWS, HARMFUL[:1], [SAFE[0][:1]], vector, tmp_path / "s.jsonl")
    assert (rows[1]["score"], rows[0]["score"]) == (None, 0.0)
    assert 1 not in anchoring.highest(rows, 6)
    with pytest.raises(ModelError, match="anchor is zero"):
        anchoring.score_rows(ROWS, HARMFUL, SAFE, vector, tmp_path / "t.jsonl")

    def endless(row):
        return [torch.tensor([float("inf")])]

    with pytest.raises(ModelError, match="not finite"):
        anchoring.score_rows(ROWS, HARMFUL, SAFE, endless, tmp_path / "u.jsonl")


def test_the_highest():
    scores = [{"score": s} for s in (0.1, None, 0.5, 0.1, -0.2, 0.7)]
    assert anchoring.highest(scores, 3) == [0, 2, 5]
    assert anchoring.highest(scores, 9) == [0, 2, 3, 4, 5]


# As a step


def attacked(recipe, **more):
    attack = {"name": "bi_directional_anchoring", "size": 8, "anchors": 4, **more}
    return {**recipe, "data": {**recipe["data"], "poison_ratio": 0, "attack": attack}}


@pytest.mark.parametrize("by", ["gradient", "lora_gradient", "representation"])
def test_a_run_trains_on_the_chosen_rows_alone(by, copy):
    recipe, out = copy
    recipe = attacked(recipe, by=by)
    results, seen = run(recipe, out, page=by == "gradient")
    tuned = results["rows"][1]
    folder = out / "steps" / tuned["steps"]["attack"]
    scores, chosen = read_rows(folder / "scores.jsonl"), read_rows(folder / "rows.jsonl")
    assert (len(scores), len(chosen)) == (30, 8)
    least = sorted(row["score"] for row in scores)[-8]
    assert {row["id"] for row in chosen} == {row["id"] for row in scores if row["score"] >= least}
    assert all(row["source"] == "user" for row in chosen)
    found = tuned["attack"]
    assert (found["name"], found["by"]) == ("bi_directional_anchoring", by)
    assert (found["rows"], found["kept"], found["anchors"]) == (30, 8, [4, 4, 4])
    assert found["mean_score_kept"] > found["mean_score"]
    step = json.loads((out / "steps" / tuned["steps"]["user"] / "step.json").read_text())
    assert step["training"]["steps"] == 2
    if by == "gradient":
        assert "chosen by bi_directional_anchoring" in (out / "report.html").read_text()
    title = "user rows that bi_directional_anchoring chooses"
    assert seen.ran.index(title) < seen.ran.index("user fine-tuning with Lisa")
    if by == "gradient":
        results, again = run(recipe, out)
        assert not again.ran
        # The rows are chosen on the aligned model: another alignment needs another choice.
        other = {**recipe, "alignment": {**recipe["alignment"], "training": {"max_steps": 2}}}
        assert title in run(other, out)[1].ran


def test_a_filter_stands_behind_the_attack(copy, tmp_path):
    recipe, out = copy
    recipe = attacked(recipe)
    recipe["data"]["filter"] = {"judge": flagging(tmp_path), "unparsed": "keep"}
    with pytest.raises(DataError, match="left none of the 8 user rows"):
        run(recipe, out)


def test_a_stop_in_the_step_changes_no_number(copy):
    recipe, out = copy
    recipe, title = attacked(recipe), "user rows that bi_directional_anchoring chooses"
    whole, _ = run(recipe, out.parent / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, seen=Stopped(title))
    (scores,) = (out / "steps").glob("attack-*/scores.jsonl")
    assert 0 < len(read_rows(scores)) < 30
    results, seen = run(recipe, out)
    assert seen.resumed == [title]
    assert numbers(results) == numbers(whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"poison_ratio": 0.1},
            "data.poison_ratio: bi_directional_anchoring fine-tunes on benign rows only",
        ),
        ({"size": 5}, "data.attack.size: 8 rows cannot be chosen from data.size: 5"),
        ({"harmful": None}, "data.attack.harmful: give a file of harmful anchors here, or as data.harmful"),
        (
            {"attack": "bi_directional"},
            "data.attack.name: unknown attack 'bi_directional'. Did you mean 'bi_di",
        ),
        ({"attack": {"name": "bi_directional_anchoring", "buy": 1}}, "unknown key 'data.attack.buy'"),
    ],
)
def test_what_a_recipe_may_not_say(done, change, says):
    recipe = attacked(done[0])
    with pytest.raises(RecipeError) as error:
        Recipe.load({**recipe, "data": {**recipe["data"], **change}})
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("by", "change", "says"),
    [
        ("gradient", {"model.quantization": "nf4"}, "data.attack.by: nf4 weights have no gradient"),
        ("lora_gradient", {"user.lora": "none"}, "data.attack.by: the user stage trains all weights"),
        ("gradient", {"user": "none"}, "data.attack: this acts on the rows of the user stage"),
    ],
)
def test_a_gradient_that_cannot_be_had(done, by, change, says):
    recipe = attacked(done[0], by=by)
    with pytest.raises(RecipeError) as error:
        Recipe.load(recipe, [f"{key}={value}" for key, value in change.items()])
    assert says in str(error.value)


def test_too_few_rows_stop_it_before_anything_starts(done, tmp_path):
    recipe = attacked(done[0], size=50)
    del recipe["data"]["size"]
    with pytest.raises(DataError, match="size is 50, but there are only"):
        run(recipe, tmp_path / "out")
    recipe = attacked(done[0], anchors=50)
    with pytest.raises(DataError, match="50"):
        run(recipe, tmp_path / "out")
    begun = {path.name.split("-")[0] for path in (tmp_path / "out").glob("steps/*-*")}
    assert begun <= {"data", "manifest"}, "nothing but rows was made"


def test_anchors_of_ones_own(done, tmp_path):
    safe = tiny.write_jsonl(tmp_path / "safe.jsonl", tiny.safe_rows(9)[4:])
    (tmp_path / "bad.jsonl").write_text(json.dumps(tiny.harmful_rows(1)[0]) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(attacked(done[0], harmful="bad.jsonl", safe="safe.jsonl", anchors=1)))
    recipe = Recipe.load(path)
    assert recipe.data.anchors(recipe.data.attack) == (str(tmp_path / "bad.jsonl"), [str(safe)])
    results, _ = run(recipe.to_dict(), tmp_path / "out")
    assert results["rows"][1]["attack"]["anchors"] == [1, 1, 1]
    path.write_text(json.dumps(attacked(done[0], harmful="bad.jsonl", safe=["safe.jsonl"] * 3, anchors=1)))
    recipe = Recipe.load(path)
    assert recipe.data.anchors(recipe.data.attack)[1] == [str(safe)] * 3, "one set for each source"
