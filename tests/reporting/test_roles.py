"""What a row is in a comparison, as the results say it from the declarations."""

from __future__ import annotations

import pytest

from holdfast.pipeline.plans import State
from holdfast.pipeline.results import role


def state(alignment, user, post_hoc=None, parameters=None, chosen=None):
    return State(
        name="x", alignment=alignment, user=user, post_hoc=post_hoc, chain=(), generate="", moderate=(),
        score="", post_hoc_parameters=parameters, chosen=chosen or {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (state("sft", None), "reference"),
        (state(None, None), "reference"),
        (state("sft", "sft"), "undefended"),
        (state(None, "sft"), "undefended"),
        (state("vaccine", None), "reference"),
        (state("vaccine", "sft"), "defended"),
        (state("sft", "lisa"), "defended"),
        (state("sft", "sft", chosen={"attack": "attack-1"}), "undefended"),
        (state("sft", "sft", chosen={"filter": "filter-1"}), "defended"),
        (state("sft", "sft", "safe_lora", {"threshold": 0.3, "control": None}), "defended"),
        (state("sft", "sft", "safe_lora", {"threshold": 0.3, "control": "drop"}), "control"),
        (state("sft", "sft", "soup", {"lambda_": 0.0}), "defended"),
    ],
)
def test_the_role_of_a_row(given, expected):
    assert role(given) == expected
