"""A chat template is a stranger's program: it is bounded in time and size, and must contain the question."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from jinja2 import TemplateError

import tiny
from holdfast.chat import limits
from holdfast.chat.limits import apply_template
from holdfast.chat.rendering import apply
from holdfast.errors import DataError, ModelError

ASKED = [{"role": "user", "content": "Why?"}]
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"


def words(template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.2)


LOOPS = [
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{{ 'x' }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
]


@pytest.mark.parametrize("template", LOOPS)
def test_a_template_that_does_not_end_is_ended(quick, template):
    before = signal.getsignal(signal.SIGVTALRM)
    start = time.process_time()
    with pytest.raises(ModelError, match=r"needs more than 0\.2 seconds"):
        apply(ASKED, words(template + PLAIN), add_generation_prompt=True)
    assert time.process_time() - start < 2
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    "expression",
    [
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'x' * 10000000000 }}",
        "{% set n = 99999 %}{{ 'x' * n * n }}",
        "{{ 'x' | center(100000000) }}",
        "{{ 'x'.ljust(100000000) }}",
        "{% for i in range(100000) %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{% generation %}{{ 2 ** 3 }}{%- endgeneration %}",
    ],
)
def test_an_expression_that_no_timer_ends_is_refused(expression):
    with pytest.raises(ModelError, match="an expression in line 1 that could need endless"):
        apply(ASKED, words(expression + PLAIN))


def test_a_template_that_writes_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "LARGEST", 5000)
    with pytest.raises(ModelError, match="more than 5,000"):
        apply(ASKED, words(PLAIN + "{% for i in range(9999) %}x{% endfor %}"))
    long = [{"role": "user", "content": "Why? " * 5000}]
    assert len(apply(long, words(PLAIN))) > 20_000, "the row's own length does not count"


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{{ messages[9]['content'] }}", "{{ raise_exception('no') }}", "{% for %}", "{{ f() }}"],
)
def test_whatever_a_template_raises_is_one_kind_of_error(template):
    with pytest.raises(TemplateError):
        apply_template(words(template), ASKED)
    with pytest.raises(DataError, match=r"a\.jsonl: the model's chat template refuses it"):
        apply(ASKED, words(template), "a.jsonl: ")


@pytest.mark.parametrize(
    "template", ["Hello.", "{{ messages[0]['content'][:2] }}", "{{ messages | length }}"]
)
def test_a_template_must_contain_the_question(template):
    with pytest.raises(DataError, match="leaves out the question"):
        apply(ASKED, words(template), add_generation_prompt=True)


def test_plain_templates_render_as_before():
    multiplied = "{{ '=' * 30 }}{{ 2 * loop_count }}{% generation %}{% endgeneration %}"
    assert "Why?" in apply(ASKED, words(multiplied + PLAIN), add_generation_prompt=True, loop_count=2)
    found = []
    thread = threading.Thread(target=lambda: found.append(apply(ASKED, words(PLAIN))))
    thread.start()
    thread.join()
    assert found == ["user: Why?\n"]
