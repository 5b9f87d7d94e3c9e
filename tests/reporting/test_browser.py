"""The page in a real browser: it renders and never scrolls sideways, on a wide or a phone screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from holdfast.reporting import report
from synthetic_runs import score_row, write_demo, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# A frame of the wanted width: headless Chromium's own window cannot be as narrow as a phone.
MEASURE = """<!DOCTYPE html><title>wait</title><iframe id="f" src="{page}" style="width:{width}px;height:900px;border:0">
</iframe><script>
document.getElementById("f").onload = event => {{
  const root = event.target.contentDocument.documentElement;
  document.title = "widths " + root.scrollWidth + " " + root.clientWidth + " " +
    root.querySelectorAll("h2").length + " " + root.querySelectorAll(".chart.wide svg text").length;
}};
</script>"""


READ = """<!DOCTYPE html><title>wait</title><iframe id="f" src="{page}" style="width:1200px;height:900px"></iframe>
<script>
document.getElementById("f").onload = async event => {{
  const page = event.target.contentDocument, found = [];
  const pause = () => new Promise(done => setTimeout(done, 400));
  page.getElementById("browser").open = true;
  await pause();
  found.push(page.getElementById("browser-status").textContent);
  const form = page.getElementById("browser-form");
  form.elements.verdict.value = "harmful";
  form.dispatchEvent(new Event("input"));
  await pause();
  found.push(page.getElementById("browser-status").textContent);
  found.push(page.querySelector("#browser-list .answer").textContent);
  found.push(page.querySelectorAll("#browser-list script, #browser-list img").length);
  document.title = "read " + JSON.stringify(found);
}};
</script>"""


def dump(page, profile) -> str:
    """The page's DOM after it has loaded."""
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--allow-file-access-from-files", "--virtual-time-budget=8000", f"--user-data-dir={profile}",
    ]  # fmt: skip
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    long = [
        score_row("x" * 150 + f" {index}", "sft", "lisa", 3.0 * index, 90.0, seed=index)
        for index in range(25)
    ]
    return {
        "demo": report(write_demo(folder / "demo"), folder / "demo.html"),
        "long": report([write_run(folder / "long", long, answers={"b0": "z" * 9000})], folder / "long.html"),
    }


@pytest.mark.parametrize("width", [375, 1400])
@pytest.mark.parametrize("name", ["demo", "long"])
def test_no_sideways_scrolling(pages, tmp_path, name, width):
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(MEASURE.format(page=pages[name].as_uri(), width=width), encoding="utf-8")
    dom = dump(wrapper, tmp_path / "profile")
    measured = re.search(r"<title>widths (\d+) (\d+) (\d+) (\d+)</title>", dom)
    assert measured, f"the browser measured nothing: {dom[:300]!r}"
    content, window, headings, labels = map(int, measured.groups())
    assert content <= window
    assert width - 20 <= window <= width  # without the vertical scroll bar
    assert headings == 5
    assert labels > 10


def test_the_browser_for_answers_filters_and_shows_text(tmp_path):
    evil = "<script>document.title = 'owned'</script><img src=x>"
    rows = [score_row("SFT", "sft", "sft", 50.0, 90.0)]
    answers = {f"h{index:02}": evil for index in range(12)}
    page = report([write_run(tmp_path / "a", rows, answers=answers)], tmp_path / "r.html")
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(READ.format(page=page.as_uri()), encoding="utf-8")
    dom = dump(wrapper, tmp_path / "profile")
    found = re.search(r"<title>read (.*)</title>", dom)
    assert found, f"the browser read nothing: {dom[:300]!r}"
    all_of_them, harmful, text, elements = json.loads(html.unescape(found[1]))
    assert all_of_them == "12 of 12 questions"
    assert re.fullmatch(r"[1-9]\d? of 12 questions", harmful)
    assert harmful != all_of_them
    assert text == evil
    assert elements == 0


def test_an_answer_with_a_script_stays_text(tmp_path):
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    ids = [f"{kind}{index}" for kind in "tb" for index in range(6)]
    rows = [score_row(evil, "sft", "sft", 90.0, 90.0)]
    page = report(
        [write_run(tmp_path / "a", rows, name=evil, answers=dict.fromkeys(ids, evil))], tmp_path / "r.html"
    )
    dom = dump(page, tmp_path / "profile")
    assert "Holdfast report</title>" in dom
    assert "<title>owned" not in dom
    assert "&lt;script&gt;document.title" in dom
    assert dom.count("<script") == 3, "ours, the index and the answers"
