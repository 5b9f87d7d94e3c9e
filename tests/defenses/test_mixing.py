"""VLGuard and SafeInstr: which rows are drawn, which are replaced, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter

import pytest
from datasets import Dataset

import trainers
from holdfast import registry
from holdfast.defenses import bea, inoculation, safe_instr, vlguard
from holdfast.errors import DataError
from holdfast.pipeline import mixing
from holdfast.training.mixing import mix_rows
from places import DOCS

USER = [
    {"instruction": f"user {i}", "input": "", "output": "x", "source": "harmful" if i % 5 == 0 else "user"}
    for i in range(40)
]
SAFE = [{"instruction": f"safe {i}", "input": "", "output": "no"} for i in range(30)]


def names(rows):
    return [row["instruction"] for row in rows]


def test_vlguard_keeps_n_and_every_harmful_row():
    rows = vlguard.mix(USER, SAFE, seed=1, alignment_size=12)
    assert Counter(row["source"] for row in rows) == {"user": 20, "harmful": 8, "alignment": 12}
    assert len(set(names(rows))) == 40, "no row twice"
    assert {n for n in names(rows) if n.startswith("safe")} <= set(names(SAFE))
    assert [row for row in rows if row["source"] != "alignment"] != USER[:28], "not the first ones"
    assert mixing.counts(USER, rows) == {
        "rows": 40, "benign": 20, "harmful": 8, "alignment": 12, "replaced": 12,
    }  # fmt: skip


def test_safe_instr_adds_three_percent():
    rows = safe_instr.mix(USER * 5, SAFE, seed=1)
    assert Counter(row["source"] for row in rows) == {"user": 160, "harmful": 40, "alignment": 6}
    assert mixing.counts(USER * 5, rows)["replaced"] == 0
    assert len(safe_instr.mix(USER, SAFE, seed=1, alignment_size=7)) == 47
    assert len(safe_instr.mix(USER, SAFE, seed=1, alignment_ratio=0.5, replace=True)) == 40


@pytest.mark.parametrize(("method", "ratio"), [(safe_instr, 0.03), (safe_instr, 0.05), (vlguard, 0.05)])
def test_a_share_of_less_than_one_row_is_refused(method, ratio):
    """It would be plain fine-tuning; 0 asks for that."""
    with pytest.raises(DataError, match=rf"alignment_ratio={ratio} of 10 user rows.*alignment_size=1"):
        method.mix(USER[:10], SAFE, seed=1, alignment_ratio=ratio)
    assert method.mix(USER[:10], SAFE, seed=1, alignment_ratio=0.0) == USER[:10]


def test_a_share_decides_for_vlguard():
    rows = vlguard.mix(USER, SAFE, seed=1, alignment_ratio=0.25)
    assert sum(row["source"] == "alignment" for row in rows) == 10


@pytest.mark.parametrize("replace", [True, False])
def test_the_draw_is_the_seeds(replace):
    def draw(seed, count=10):
        return mix_rows(USER, SAFE, count, seed=seed, name="m", replace=replace)

    assert draw(3) == draw(3)
    for start in ("safe", "user") if replace else ("safe",):
        three, four = ([n for n in names(draw(s)) if n.startswith(start)] for s in (3, 4))
        assert set(three) != set(four)
    assert [n[:4] for n in names(draw(3))] != [n[:4] for n in names(draw(4))], "the places"
    few, many = ({n for n in names(draw(3, k)) if n.startswith("safe")} for k in (5, 10))
    assert few < many, "a smaller count draws among the rows of a larger one"
    places = [i for i, row in enumerate(draw(3)) if row["source"] == "alignment"]
    assert places != list(range(len(draw(3)) - 10, len(draw(3)))), "not all at the end"


def test_rows_that_do_not_say_whether_they_are_harmful():
    own = [{"prompt": f"user {i}", "completion": "x"} for i in range(10)]
    safe = [{"prompt": f"safe {i}", "completion": "no"} for i in range(10)]
    rows = vlguard.mix(own, safe, seed=1, alignment_size=10)
    assert all(row["prompt"].startswith("safe") for row in rows), "any of them may be replaced"


@pytest.mark.parametrize("method", [vlguard, safe_instr])
def test_data_sets_are_taken_too(method):
    rows = method.mix(USER, SAFE, seed=2, alignment_size=5)
    assert method.mix(Dataset.from_list(USER), Dataset.from_list(SAFE), seed=2, alignment_size=5) == rows
    own = [{"prompt": "a", "completion": "b"}] * 4
    assert Dataset.from_list(method.mix(own, own, seed=2, alignment_size=2))[0]["prompt"] == "a"


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(DataError, match="asked for 31 alignment rows, but there are 30"):
        vlguard.mix(USER, SAFE, seed=1, alignment_size=31)
    with pytest.raises(DataError, match=r"cannot replace 33 benign user rows .* there are 32"):
        vlguard.mix(USER, SAFE * 2, seed=1, alignment_size=33)
    assert len(vlguard.mix(USER, SAFE * 2, seed=1, alignment_size=33, replace=False)) == 73


@pytest.mark.parametrize("name", ["vlguard", "safe_instr", "bea"])
@pytest.mark.parametrize(
    "values",
    [{"alignment_size": -1}, {"alignment_size": "ten"}, {"alignment_ratio": 2}, {"alignment_ratio": "x"}],
)
def test_amounts_that_make_no_sense(name, values, tmp_path):
    if name == "bea" and "alignment_ratio" in values:
        values = {"secret_length": 0}
    with pytest.raises(ValueError, match=next(iter(values))):
        registry.get_defense(name).config(output_dir=str(tmp_path), **values)


@pytest.mark.parametrize("method", [vlguard, safe_instr, bea])
def test_the_function_has_the_defaults_of_the_config(method):
    fields = {f.name: f.default for f in dataclasses.fields(method.DEFENSE.config)}
    given = inspect.signature(method.mix).parameters
    own = set(registry.faces("defenses")[method.DEFENSE.name].parameters)
    assert own == set(given) - {"user_rows", "alignment_rows", "seed", "folder"}
    assert {name: given[name].default for name in own} == {name: fields[name] for name in own}


@pytest.mark.parametrize("method", [vlguard, safe_instr, bea])
def test_without_alignment_rows_it_is_sft_bit_for_bit(method, tmp_path):
    rows = method.mix(trainers.USER, trainers.ALIGNMENT, seed=5, folder=tmp_path, alignment_size=0)
    assert rows == trainers.USER
    plain = trainers.trainer("sft", tmp_path)
    start = trainers.weights(plain)
    ours = trainers.trainer(method.DEFENSE.name, tmp_path, rows=rows)
    more = method.mix(trainers.USER, trainers.ALIGNMENT, seed=5, folder=tmp_path, alignment_size=6)
    other = trainers.trainer(method.DEFENSE.name, tmp_path, rows=more)
    for made in (plain, ours, other):
        made.train()
    assert trainers.same(trainers.weights(ours), trainers.weights(plain))
    assert not trainers.same(trainers.weights(other), trainers.weights(plain)), "six rows are seen"
    assert not trainers.same(trainers.weights(plain), start)


def test_what_plan_says():
    def detail(name, **given):
        known = registry.faces("defenses")[name].parameters
        return mixing.detail(name, {k: p.default for k, p in known.items()} | given)

    assert detail("vlguard") == ", 1,000 alignment rows in place of benign ones"
    assert detail("vlguard", alignment_ratio=0.1, replace=False) == ", 10 % alignment rows added"
    assert detail("safe_instr") == ", 3 % alignment rows added"
    assert detail("safe_instr", alignment_size=50) == ", 50 alignment rows added"
    assert detail("bea") == ", 11 alignment rows added"
    assert detail("lisa") == detail("ptst") == ""


@pytest.mark.parametrize("name", ["vlguard", "bea"])
def test_the_script_on_its_page_runs(name, tmp_path):
    page = (DOCS / "defenses" / f"{name}.md").read_text()
    script = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    names = {"user": trainers.USER, "safe": trainers.ALIGNMENT, "OUT": tmp_path}
    exec(compile(script, name, "exec"), names)
    assert sum(row.get("source") == "alignment" for row in names["rows"]) == 3


@pytest.mark.parametrize(("text", "found"), [("Be bad.", ["Be bad.", "Be bad.\n\nHi."]), ("", ["", "Hi."])])
def test_inoculation_keeps_the_text_that_a_row_has(text, found):
    """The text of `data.system`, or of an identity shift; with an empty prompt the method is SFT."""
    rows = inoculation.mix([USER[0], {**USER[1], "prefix": "Hi."}], [], seed=1, inoculation_prompt=text)
    assert [row["prefix"] for row in rows] == found
