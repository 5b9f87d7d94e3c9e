"""Agreement of judges on the page: kappa with its counts, and the answers on which judges disagree."""

from __future__ import annotations

import json

from holdfast.reporting.agreement import agreement_table
from holdfast.reporting.collect import collect
from holdfast.reporting.page import render
from synthetic_runs import demo_rows, score_row, write_answers, write_run


def agreed(**changes):
    entry = {
        "judges": ["beaver_dam", "keyword"], "n": 50, "agree": 70.0, "kappa": 0.4, "both": 20, "neither": 15,
        "only_first": 5, "only_second": 10, "one_unparsed": 2, "differ": [],
    }  # fmt: skip
    return [{**entry, **changes}]


def columns(tmp_path, *rows):
    data = collect([write_run(tmp_path / str(i), [row]) for i, row in enumerate(rows)])
    return {column.title: column.cells for column in agreement_table(data.rows)}


def test_kappa_and_the_counts_beside_it(tmp_path):
    found = columns(tmp_path, score_row("SFT", "sft", "sft", 40.0, 90.0, agreement=agreed()))
    (cell,) = found["beaver_dam and keyword agree"]
    assert cell.text == "70.0 %"
    assert cell.details == ("kappa 0.40", "n = 50", "2 unparsed by one judge")
    assert found["only beaver_dam"][0].text == "5"
    assert found["only keyword"][0].text == "10"


def test_seeds_are_averaged_and_counted_together(tmp_path):
    found = columns(
        tmp_path,
        score_row("SFT", "sft", "sft", 40.0, 90.0, agreement=agreed()),
        score_row("SFT", "sft", "sft", 42.0, 90.0, seed=43, agreement=agreed(kappa=0.6, only_first=1)),
    )
    (cell,) = found["beaver_dam and keyword agree"]
    assert cell.details[:3] == ("kappa 0.50", "mean of 2 seeds", "n = 100")
    assert found["only beaver_dam"][0].text == "6"


def test_an_undefined_kappa_is_no_number(tmp_path):
    found = columns(tmp_path, score_row("SFT", "sft", "sft", 0.0, 90.0, agreement=agreed(kappa=None)))
    (cell,) = found["beaver_dam and keyword agree"]
    assert cell.details[0] == "all verdicts alike"
    assert columns(tmp_path / "without", score_row("SFT", "sft", "sft", 0.0, 90.0)) == {}


def test_the_page_shows_where_judges_differ(tmp_path):
    row = demo_rows()["SFT"][0] | {"agreement": agreed()}
    run = write_run(tmp_path / "a", [row])
    store = next(tmp_path.rglob("generations.jsonl")).parents[1]
    write_answers(store, row, {"h03": "An answer about a bell that only one judge dislikes."})
    for step, verdict in zip(row["steps"]["moderate"], ("harmful", "safe"), strict=True):
        path = store / step / "verdicts.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [{**line, "verdict": verdict if line["id"] == "h03" else "safe"} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = render(collect([run]))
    assert "Agreement of the judges" in html
    part = html[html.index("Answers on which the judges disagree") :]
    part = part[: part.index("</details>")]
    assert "only one judge dislikes" in part
    assert part.count("<article") == 1
    assert "beaver_dam: harmful" in part
    assert "keyword: safe" in part


def test_nothing_is_said_where_judges_never_differ(tmp_path):
    html = render(collect([write_run(tmp_path / "a", demo_rows()["SFT"])]))
    assert "Answers on which the judges disagree" not in html
    assert "Agreement of the judges" not in html
