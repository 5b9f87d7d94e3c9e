"""Control characters from files, models and servers never reach a terminal."""

from __future__ import annotations

import io
import logging

import pytest

import tiny
from commands import holdfast_command as command
from holdfast import errors
from holdfast.cli import app, console, sweeping
from holdfast.recipe import Recipe
from holdfast.study.folder import Status

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eabc\u2028\x7f\r\ud800"


@pytest.fixture
def shown(monkeypatch):
    """A terminal: what `console.out` and `console.err` write to it."""
    file = io.StringIO()
    for name in ("out", "err"):
        screen = console.Screen(file=file, force_terminal=True, color_system=None, width=200)
        monkeypatch.setattr(console, name, screen)
    return file


def test_a_control_character_becomes_a_visible_sign():
    assert errors.visible("\x1b[2J\ta\n") == "\u241b[2J\ta\n"
    assert errors.visible(EVIL) == "␛]0;title␇␛[2J\ufffd31m\ufffdabc\ufffd␡␍\ufffd"
    assert errors.visible("caf\u00e9 \u2713 \u05d0") == "caf\u00e9 \u2713 \u05d0"


@pytest.mark.parametrize("what", [errors.HoldfastError, errors.RecipeError, errors.StepFailed])
def test_an_error_shows_no_control_character(what):
    assert str(what(f"found {EVIL}")) == f"found {errors.visible(EVIL)}"
    assert EVIL not in str(errors.Problems([errors.DataError(EVIL)]))


def test_an_error_about_a_value_of_a_recipe_is_printable(tmp_path):
    recipe = tiny.recipe(tmp_path)
    with pytest.raises(errors.RecipeError) as caught:
        Recipe.load({**recipe, "device\ud800": EVIL, "seed": EVIL})
    assert str(caught.value) == errors.visible(str(caught.value))
    str(caught.value).encode()


def rows():
    one = {"first": 1.0, "second": 2.0, "difference": 1.0, "interval": None, "p_holm": 1.0, "n": 2}
    row = {
        "name": EVIL, "alignment": None, "user": None, "poison_ratio": None, "labels": {}, "steps": {"score": "x"},
        "task_title": EVIL, "alignment_seconds": None, "seconds": None,
    }  # fmt: skip
    judge = {"title": EVIL, "harmful_score": 1.0, "n": 2, "harmful_score_interval": None}
    scores = {"judges": {EVIL: judge}, "task_title": EVIL, "task": EVIL, "n_task": 0}
    return {
        "compare": lambda: console.differences_table({f"{EVIL}[/x]": {**one, "left_out": 0}}),
        "run": lambda: console.rows_table([row]),
        "score": lambda: console.scores_table(scores),
        "list": lambda: console.names_table(EVIL, [(EVIL, EVIL, EVIL)], (EVIL, EVIL, EVIL)),
        "text": lambda: EVIL.replace("[", "\\["),
    }


@pytest.mark.parametrize("name", rows())
def test_what_is_printed(shown, name):
    console.out.print(rows()[name](), highlight=False)
    text = shown.getvalue()
    assert "abc" in text
    assert not set(text) & (set(EVIL) - set("]0;title[2J31mabc"))


def test_the_bar_of_a_step(shown):
    with console.bar(EVIL) as advance:
        advance(1, 2)
    bars = console.Bars(EVIL)
    bars.say(EVIL)
    text = shown.getvalue()
    assert "\x1b]0" not in text
    assert "\x1b[2J" not in text
    assert "\u202e" not in text


def test_messages_and_warnings(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        app._fail(EVIL, 2)
    app._show_warning(EVIL, UserWarning, "", 0)
    monkeypatch.setattr("sys.argv", ["holdfast", "score", f"{EVIL}.jsonl", "--debug"])
    with pytest.raises(SystemExit):
        app.main()
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "control character" in text
    assert not set(text) & (set(EVIL) - set("]0;title[2J31mabc"))


def test_names_in_files(tmp_path):
    """A column, and the name of a score."""
    tiny.write_jsonl(tmp_path / "c.jsonl", [{"id": i, "score": "\x1b[31mX", "value": True} for i in "ab"])
    done = command("compare", "c.jsonl", "c.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "X" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_a_log_file_gets_a_line_of_progress_with_an_estimate(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.Bars() as bars:
        bars.begin("user fine-tuning", False)
        for done in range(1, 6):
            bars.advance(done, 20, loss=1.5, tokens_per_second=350.0)
            now[0] += 40
    lines = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert lines == [
        "...    user fine-tuning: 3 of 20, loss 1.500, 350 tokens/s, about 11 min left",
        "...    user fine-tuning: 5 of 20, loss 1.500, 350 tokens/s, about 10 min left",
    ]


@pytest.mark.parametrize("verbose", [False, True])
def test_a_log_file_has_one_line_a_step_and_counts_the_cached_ones(capsys, verbose):
    with console.Bars(verbose=verbose) as bars:
        for index in range(3):
            bars.end(f"old {index}", True, None)
        bars.begin("new", True)
        bars.say("once")
        bars.say("once")
        bars.end("new", False, 2.0)
    cached = [f"cached old {index}" for index in range(3)]
    rest = ["once", "done   new (resumed) 2.0 s"]
    count = "cached 3 steps were complete before (-v lists them)"
    assert capsys.readouterr().err.splitlines() == ([*cached, *rest] if verbose else [*rest, count])


def test_a_warning_of_the_library_is_printed_once(capsys):
    app._quiet()
    for _ in range(2):
        logging.getLogger("holdfast.defenses.bso").warning("%s: scaled", "LisaTrainer")
    assert capsys.readouterr().err == "LisaTrainer: scaled\n"


def test_a_sweep_in_a_log_file_says_what_is_done_and_when_it_may_end(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    titles = {name: f"step {name}" for name in "abcd"}
    workers = {"0": {"step": "c", "done": 5, "total": 10}}

    def status(*states):
        return Status(dict(zip(titles, states, strict=True)), titles, workers, {}, (1, 0))

    with sweeping.Shown() as shown:
        shown.show(status("complete", "running", "waiting", "waiting"))
        now[0] = 59.0
        shown.show(status("complete", "complete", "running", "waiting"))
        now[0] = 61.0
        shown.show(status("complete", "complete", "running", "waiting"))
    assert capsys.readouterr().err.splitlines() == [
        "1 of 4 steps are complete at the start.",
        "2 of 4  done   step b (b)",
        "2 of 4  ...    step c 5 of 10, about 2 min left",
    ]
    assert shown.ran == 1


@pytest.mark.parametrize("several", [False, True])
def test_no_name_is_cut_in_80_columns(several):
    name = "a-very-long-name-of-a-run-with-everything-in-it-and-a-seed-of-42 and words"
    share = {"harmful_score": 100.0, "harmful_score_stderr": 10.0, "benign_compliance": 100.0}
    row = {
        **share, "name": name, "alignment": "sft", "user": None, "poison_ratio": 0.125, "labels": {"sft": "SFT"},
        "steps": {"score": "x"}, "finetune_accuracy": 100.0, "finetune_accuracy_stderr": 10.0,
        "benign_compliance_stderr": 10.0, "alignment_seconds": 12345.0, "seconds": 12345.0,
    }  # fmt: skip
    rows = [row, {**row, "alignment": "vaccine", "labels": {"vaccine": "Vaccine"}, "steps": {"score": "y"}}]
    file = io.StringIO()
    console.Screen(file=file, width=80).print(console.rows_table(rows if several else rows[:1]))
    text = file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.count("100.0 ± 10.0") == 3 * (1 + several), "no number is broken"
    width = text.index("harmful")
    names = "".join(line[:width] for line in text.splitlines())
    assert "".join(name.split()) in "".join(names.split())


def test_runs_of_several_seeds_are_told_apart():
    row = {
        "name": "lisa", "alignment": "sft", "user": "lisa", "poison_ratio": 0.1, "labels": {},
        "seconds": None, "finetune_accuracy": None, "benign_compliance": None, "harmful_score": None,
    }  # fmt: skip
    rows = [{**row, "seed": seed, "steps": {"score": str(seed)}} for seed in (1, 2)]
    table = console.rows_table(rows)
    assert table.columns[1].header == "seed"
    assert list(table.columns[1].cells) == ["1", "2"]
    assert "seed" not in [column.header for column in console.rows_table(rows[:1]).columns]
