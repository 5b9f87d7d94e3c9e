"""Control characters from files, models and servers never reach a terminal."""

from __future__ import annotations

import io

import pytest

import tiny
from commands import holdfast_command as command
from holdfast import errors
from holdfast.cli import app, console
from holdfast.recipe import Recipe

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
        "... 3 of 20, loss 1.500, 350 tokens/s, about 11 min left",
        "... 5 of 20, loss 1.500, 350 tokens/s, about 10 min left",
    ]
