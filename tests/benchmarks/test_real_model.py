"""The study on a real model: its rows are valid recipes, results merge, and the page follows from them."""

from __future__ import annotations

import importlib
import json
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest

import holdfast.models.loading
import holdfast.models.trained
import tiny
from places import BENCHMARKS


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def work(scripts, tmp_path):
    """A study whose model is tiny."""
    rows = tmp_path / "rows"
    rows.mkdir()
    tiny.write_jsonl(rows / "align.jsonl", tiny.safe_rows(60))
    for name, number in (("attack", 60), ("test_harmful", 4)):
        tiny.write_jsonl(rows / f"{name}.jsonl", [{**r, "prompt": f"{name} {r['prompt']}"}
                                                 for r in tiny.harmful_rows(number)])  # fmt: skip
    tiny.write_jsonl(rows / "benign.jsonl", [{"instruction": f"Name {i} trees."} for i in range(4)])
    for task, row in (
        ("sst2", {"sentence": "film {i}", "label": 1}),
        ("agnews", {"text": "news {i}", "label": 2}),
    ):
        made = [
            {k: v.replace("{i}", str(i)) if isinstance(v, str) else v for k, v in row.items()}
            for i in range(90)
        ]
        tiny.write_jsonl(rows / f"{task}_train.jsonl", made)
        tiny.write_jsonl(rows / f"{task}_test.jsonl", made[:4])
    given = Namespace(
        rows=rows, out=tmp_path / "out", device="cpu", short=True, few=False, time_limit=None, workers=1,
        results=tmp_path / "real_model.json",
    )  # fmt: skip
    return scripts("real_model").Study(given)


def test_every_row_is_a_valid_recipe(work, scripts):
    study = scripts("_study")
    rows = study.rows()
    assert set(study.FIRST) <= set(study.METHODS)
    assert {row.method for row in rows} == set(study.METHODS)
    assert [row.key for row in rows[: len(study.FIRST)]] == [
        f"sst2 | {name} | p=0.1 | seed 1" for name in study.FIRST
    ]
    assert len({row.key for row in rows}) == len(rows)
    for short in (True, False):
        work.short = short
        for method in study.METHODS:
            recipe = work.recipe(study.changes(study.Row(method, 1), 1000))
            assert (recipe.alignment is None) == (method == "NA-SFT")
            assert [judge.shown for judge in recipe.evaluation.judges][:2] == ["keyword", "compliance"]
    assert work.recipe(["user=none"], "agnews").data.task == "agnews"


def test_rows_that_run_together_make_each_aligned_model_once(work, scripts, monkeypatch):
    """While Vaccine's model is being made, the next row is one that needs another model."""
    study, script = scripts("_study"), scripts("real_model")
    rows = [study.Row(name, 1) for name in ("Vaccine", "Booster", "SFT", "BSO", "VLGuard")]
    rows.insert(1, study.Row("Vaccine", 1, 0.2))
    started, may_end = [], {row: threading.Event() for row in rows}

    def run(row):
        started.append(row)
        if len(started) == 2:  # both workers are busy with the first two models
            may_end[rows[0]].set()
        if len(started) == 3:
            for event in may_end.values():
                event.set()
        assert may_end[row].wait(10)
        return {"seconds": 0.1, "failed": "it is a test"}

    monkeypatch.setattr(script, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(script.multiprocessing, "get_context", lambda kind: "worker")
    monkeypatch.setattr(script, "_open", lambda arguments: None)
    monkeypatch.setattr(script, "_in_worker", run)
    monkeypatch.setattr(study, "rows", lambda: list(rows))
    work.workers = 2
    script.run_study(work, None, None)
    assert started[:3] == [rows[0], rows[2], rows[1]]
    assert set(started) == set(rows)
    assert set(work.found["failed"]) == {row.key for row in rows}


def test_merging_keeps_what_was_measured(scripts):
    merged = scripts("_rows").merged
    old = {"gpu": {"a": {"seconds": 1.0}, "b": {"error": "no memory"}, "c": "not measured: no GPU"}}
    new = {"gpu": {"a": {"error": "cut"}, "b": {"seconds": 2.0}, "c": {"seconds": 3.0}}, "card": "H"}
    assert merged(old, new) == {
        "gpu": {"a": {"seconds": 1.0}, "b": {"seconds": 2.0}, "c": {"seconds": 3.0}},
        "card": "H",
    }


def result(method, seed, harmful, user="sft", **more):
    scores = {"finetune_accuracy": 80.0, "benign_compliance": 95.0, "gibberish_rate": 0.0}
    return {
        "task": "sst2", "method": method, "seed": seed, "poison_ratio": 0.1, "user": user, "hardware": "CPU",
        "harmful_score": harmful, "harmful_score_stderr": 4.0, **scores,
        "judges": {"compliance": {"harmful_score": harmful / 2, "harmful_score_stderr": 3.0}}, **more,
    }  # fmt: skip


def test_the_page_follows_from_the_results(scripts, tmp_path):
    page = scripts("real_model_page")
    rows = [result("SFT", 1, 80.0), result("SFT", 2, 90.0), result("aligned, SFT", 1, 5.0, user=None)]
    for number in (30, 6):
        name = f"SFT + Safe LoRA, num_layers={number}"
        rows.append(result(name, 1, 10.0 + number, post_hoc={"num_layers": number}))
    rows.append(result("SFT + Reinforce", 1, 7.0, post_hoc={"alpha": 0.1}))
    rows.append(result("SFT + Safe LoRA, num_layers=6", 1, 2.0, post_hoc={"num_layers": 6}, poison_ratio=0))
    found = {
        "rows": {str(i): row for i, row in enumerate(rows)},
        "curves": {"sst2 | SFT | p=0.1 | seed 1": [{"step": 0, "harmful_score": 5.0, "stderr": 1.0}]},
        "search": {"alignment": {"max_steps=2": result("", 0, 3.0)}},
        "chosen": {"alignment": {"max_steps": 2}},
    }
    made = page.parts(found)
    lines = made["study"].split("\n")
    assert lines[2].startswith("| aligned, SFT | 5.0 ± 4.0 | 2.5 ± 3.0 |")
    assert lines[3] == "| SFT | 85.0 ± 5.0 | 42.5 ± 2.5 | 80.0 ± 0.0 | 95.0 ± 0.0 | 0.0 ± 0.0 | 2 | CPU |"
    assert len(lines) == 4
    repaired = [line.split(" |")[:2] for line in made["safe-lora"].split("\n")[2:]]
    assert repaired == [[f"| SFT + Safe LoRA, num_layers={n}", f" {10 + n}.0 ± 4.0"] for n in (6, 30)]
    assert made["repairs"].count("\n") == 2
    assert "| SFT + Reinforce | 7.0 ± 4.0 |" in made["repairs"]
    assert "Poison ratio 0:" in made["ratios"]
    assert made["ratios"].count("| SFT + Safe LoRA, num_layers=6 | 2.0 ± 4.0 |") == 1
    assert "max_steps=2 (used) | 3.0 | 80.0 | 95.0 |" in made["search"]
    assert made["curves"].split("\n")[4] == "| SFT | 5 |"
    text = "".join(f"<!-- {name}: made by x -->\nold\n<!-- end of {name} -->\n" for name in made)
    (tmp_path / "page.md").write_text(text)
    page.write_page(tmp_path / "page.md", made)
    assert "old" not in (tmp_path / "page.md").read_text()


def test_the_pages_show_the_committed_results(scripts):
    page = scripts("real_model_page")
    made = page.parts(json.loads((BENCHMARKS / "results" / "real_model.json").read_text()))
    short, text = made.pop("real model"), page.PAGE.read_text()
    for readme in page.READMES:
        assert f"-->\n{short}\n<!-- end of real model -->" in readme.read_text()
    assert [name for name, part in made.items() if f"-->\n{part}\n<!-- end of {name} -->" not in text] == []


def test_kept_models_are_the_same(scripts, tmp_path, monkeypatch):
    for module in (holdfast.models.loading, holdfast.models.trained):
        monkeypatch.setattr(module, "load_model", module.load_model)
    monkeypatch.setattr(holdfast.models.loading, "load_tokenizer", holdfast.models.loading.load_tokenizer)
    folder = tiny.save_model(tmp_path / "model")
    load = holdfast.models.loading.load_model
    scripts("_warm").keep()
    kept = holdfast.models.loading.load_model
    options = {"compose": "merge", "dtype": "float32", "device": "cpu"}
    whole, first, second = load(folder, **options), kept(folder, **options), kept(folder, **options)
    assert first is not second
    for model in (first, second):
        assert all(a.equal(b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
        assert not any(p.requires_grad for p in model.parameters())


def test_results_of_other_settings_are_not_merged(scripts, tmp_path):
    study, parts = scripts("real_model"), []
    for name, steps in (("a", 1), ("b", 1), ("c", 2)):
        parts.append(tmp_path / f"{name}.json")
        parts[-1].write_text(json.dumps({"chosen": {"user": {"max_steps": steps}}, "rows": {name: {}}}))
    study.merge(parts[0], parts[1])
    assert set(json.loads(parts[0].read_text())["rows"]) == {"a", "b"}
    with pytest.raises(SystemExit, match="other settings of the user stage"):
        study.merge(parts[0], parts[2])
