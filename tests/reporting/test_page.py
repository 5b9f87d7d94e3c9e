"""The page: self-contained, foreign content shown as text, missing numbers marked as not measured."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from holdfast.reporting import report
from holdfast.reporting.collect import collect
from holdfast.reporting.page import render
from holdfast.reporting.svg import COLOURS
from holdfast.reporting.table import result_table
from holdfast.reporting.text import bytes_text, clean, duration_text, method_name, score_text, shorten
from synthetic_runs import demo_rows, score_row, write_demo, write_run

EVIL = "<script>alert(1)</script> </textarea></style> <img src=x onerror=alert(2)> {{ 7 * 191 }} {% raw %} &amp; "
ODD = "\u202egnp.exe\u2066 nul\x00 bell\x07 esc\x1b[31m broken\ud800 zero\u200bwidth \u2028line"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements, references and text of a page; asserts that elements close in order."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return render(collect(write_demo(tmp_path_factory.mktemp("page"))))


def test_the_page_is_self_contained(demo):
    page = Page(demo)
    data, [code] = ([one for one in page.all("script") if ("type" in one) is kind] for kind in (True, False))
    assert {one["type"] for one in data} == {"text/plain"}
    assert code == {}
    assert not re.search(r"javascript:|@import|url\((?!#)|<!ENTITY|<iframe|<object|<embed", demo)
    assert demo.count("<!DOCTYPE") == 1
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            if name in attributes:
                assert re.match(r"#|data:,$", attributes[name]), (tag, attributes)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    script = demo[demo.rindex("<script>") + 8 : demo.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.endswith(f"script-src 'sha256-{digest}'"), "no other script runs"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|import", script)


def test_the_page_is_accessible(demo):
    page = Page(demo)
    assert len(page.all("h1")) == 1
    assert page.all("html") == [{"lang": "en"}]
    assert {attributes.get("scope") for attributes in page.all("th")} == {"col", "row"}
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in page.all("svg"))
    assert len(page.all("title")) == 1 + len(page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_has_enough_contrast_in_every_theme(demo, theme):
    blocks = re.findall(r":root \{(.*?)\}", demo, flags=re.DOTALL)
    themes = dict(zip(("light", "dark", "print"), blocks, strict=True))
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", themes[theme]))
    assert set(COLOURS) <= set(colours)
    for text in ("ink", "muted", "defended", "undefended", "reference"):
        for back in ("page", "surface", "tint", "alert"):
            light, dark = sorted((luminance(colours[text]), luminance(colours[back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (theme, text, back)


def test_the_table_shows_scores_errors_and_directions(demo):
    text = " ".join(Page(demo).text.split())
    for shown in (
        "20.5 ± 2.9",
        "20.5± 2.9[15.5, 26.6]n = 200",
        "lower is better",
        "SFT → Lisa",
        "not aligned → SFT",
        "775 MiB",
    ):
        assert shown in text
    assert "raised the harmful score from 3.5 to 91.0" in text
    assert "harmful in alignment12" in text
    assert "beaver_dam@1/0.5" in text


def test_best_is_marked_among_fine_tuned_models_of_one_ratio(tmp_path):
    rows = [
        *demo_rows()["SFT"],
        score_row("Lisa", "sft", "lisa", 20.5, 97.0),
        score_row("BSO", "sft", "bso", 74.5, 97.0),
        score_row("control", "sft", "sft", 1.0, 99.0, ratio=0.0),
        score_row("EWC", "sft", "ewc", 30.0, 97.0, ratio=0.2),
        score_row("SBR", "sft", "sbr", 29.0, 97.0, ratio=0.2),
    ]
    columns = {
        c.title: c for c in result_table(collect([write_run(tmp_path / "a", rows, steps=False)])).columns
    }
    marks = [cell.best for cell in columns["Harmful score"].cells]
    assert marks == [False, False, True, False, False, False, False], "EWC and SBR are within their errors"
    assert not any(cell.best for cell in columns["Finetune accuracy"].cells), "a tie"
    assert not any(cell.best for cell in columns["Training time"].cells)
    assert columns["Harmful rows"].cells[0].text == "–"


@pytest.mark.parametrize(
    ("bso", "best"),
    [
        ((28.0, 30.0, 50.0), False),  # 2.3 standard errors; Student's t with 2 degrees of freedom: p = 0.15
        ((70.0, 75.0, 80.0), True),  # p = 0.003
    ],
)
def test_the_best_of_means_over_seeds_is_found_by_students_t(tmp_path, bso, best):
    runs = []
    for seed, (lisa, other) in enumerate(zip((20.0, 20.0, 20.0), bso, strict=True), 1):
        scores = {"sft": 90.0, "lisa": lisa, "bso": other}
        rows = [score_row(user, "sft", user, hs, 97.0, seed=seed) for user, hs in scores.items()]
        runs.append(write_run(tmp_path / str(seed), rows, steps=False))
    table = result_table(collect(runs))
    cells = next(column.cells for column in table.columns if column.title == "Harmful score")
    assert [cell.best for cell in cells] == [False, best, False]
    assert table.marked is best


def test_what_was_not_measured_is_never_zero(tmp_path):
    row = score_row("mine", "sft", "sft", None, None, ratio=None)
    for key in ("benign_compliance", "gibberish_rate", "true_harmful_score", "peak_memory_bytes", "seconds"):
        row[key] = None
    row["judges"] = {}
    data = collect([write_run(tmp_path / "a", [row], steps=False)])
    cells = [column.cells[0] for column in result_table(data).columns]
    assert [cell.text for cell in cells] == ["not measured"] * 4
    page = Page(render(data)).text
    assert "No harmful score was measured" in page
    assert "No model has both" in page
    assert "No training log was found" in page
    assert "No answers were found" in page


def test_a_run_without_rows_and_without_optional_parts(tmp_path):
    run = write_run(tmp_path / "a", [], steps=False, versions=None, hardware=None, recipe=None, started=None)
    assert "The runs have no rows" in Page(render(collect([run]))).text


def test_everything_from_outside_is_text(tmp_path):
    bad = EVIL + ODD
    rows = demo_rows()["SFT"]
    rows[1]["name"] = bad
    rows[1]["judges"] = {bad: rows[1]["judges"]["beaver_dam"], "keyword": {"version": bad}}
    ids = [*(f"h{i:02}" for i in range(12)), *(f"t{i}" for i in range(6)), *(f"b{i}" for i in range(6))]
    answers = dict.fromkeys(ids, bad) | {"b0": "word " * 2000, "t0": "y" * 10_000}
    run = write_run(
        tmp_path / "a", rows, name=bad, answers=answers, protocol={"judge": bad, bad: bad}, git_commit=bad
    )
    html = report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.all("script")) == 1 + 3, "ours, the index and the answers of two models"
    assert not page.all("img")
    assert page.text.count("<script>alert(1)</script>") > 10
    assert "{{ 7 * 191 }}" in page.text
    assert "1337" not in page.text
    assert "nul␀ bell␇ esc␛[31m broken⟨U+D800⟩ zero⟨U+200B⟩width ⟨U+2028⟩line" in page.text
    assert "⟨U+202E⟩gnp.exe⟨U+2066⟩" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u200b\u2028-\u202e\u2066-\u2069]", html)
    assert "(9,400 more characters)" in page.text
    assert "y" * 601 not in page.text


def test_harmful_answers_stand_behind_a_content_note(tmp_path):
    html = render(collect([write_run(tmp_path / "a", demo_rows()["SFT"])]))
    start = html.index('<details class="note">')
    hidden = html[start : html.index("</details>", start)]
    assert '<details class="note" id="browser">' in html
    assert "moffle" in hidden
    assert "moffle" not in html.replace(hidden, "")
    assert "Content note" in hidden


def test_a_forced_comparison_warns_with_the_differences(tmp_path):
    one = write_run(tmp_path / "one", demo_rows()["SFT"])
    two = write_run(tmp_path / "two", demo_rows()["Lisa"], protocol={"max_new_tokens": 512})
    page = Page(report([one, two], tmp_path / "r.html", force=True).read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    assert "These runs were measured in different ways" in text
    assert "max_new_tokens: 48 (SFT); 512 (Lisa)" in text
    assert "raised the harmful score" not in text
    assert not any(
        cell.best for c in result_table(collect([one, two], force=True)).columns for cell in c.cells
    )


def test_several_seeds_are_explained(tmp_path):
    text = Page(render(collect(write_demo(tmp_path, seeds=(42, 43))))).text
    assert "the standard error over seeds" in text
    assert "seeds 42, 43" in text
    assert "reused by 8 other runs" not in text
    assert "binomial" not in text


def test_the_same_runs_give_the_same_page(tmp_path, demo):
    assert render(collect(write_demo(tmp_path))) == demo


def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/sft"), demo_rows()["SFT"])
    write_run(Path("runs/lisa"), demo_rows()["Lisa"])
    for block in blocks:
        exec(compile(block, "docs/report.md", "exec"), {})
    assert Path("compare.html").is_file()
    assert Path("compare.png").is_file()


def test_texts():
    assert clean("a\tb\nc é 日本 👩‍🔬") == "a\tb\nc é 日本 👩‍🔬"
    assert clean("\x00\x7f\x85") == "␀⟨U+007F⟩⟨U+0085⟩"
    assert shorten("a\n" * 30, 600, 12).endswith("… (37 more characters)")
    assert (score_text(-0.04), score_text(12.25), score_text(100.0)) == ("0.0", "12.2", "100.0")
    assert (duration_text(25.21), duration_text(192), duration_text(7500)) == (
        "25.2 s",
        "3 min 12 s",
        "2 h 5 min",
    )
    assert (bytes_text(10), bytes_text(812_345_678), bytes_text(3 * 2**30)) == ("10 B", "775 MiB", "3.00 GiB")
    assert [method_name(n) for n in ("sft", "lisa", "my_method")] == [
        "SFT",
        "Lisa",
        "My method",
    ]
