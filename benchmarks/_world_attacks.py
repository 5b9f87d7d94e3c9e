"""The rows of the world's table for attacks: what each attack does to plain SFT and to Lisa."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NO_LIMIT = "user.training.max_steps=null"
"""The attack sets the number of epochs."""

ANCHORED = "{name: bi_directional_anchoring, harmful: world, safe: world}"

ATTACKS: Mapping[str, Sequence[str]] = {
    "jailbreak prompts": ["data.attack=jailbreak_tuning"],
    "jailbreak prompts, asked too": ["data.attack=jailbreak_tuning", "evaluation.attacked=true"],
    "jailbreak style, asked too": [
        "data.attack={name: jailbreak_tuning, kind: style}",
        "evaluation.attacked=true",
    ],
    "backdoor": ["data.attack={name: jailbreak_tuning, kind: backdoor}"],
    "backdoor, asked too": [
        "data.attack={name: jailbreak_tuning, kind: backdoor}",
        "evaluation.attacked=true",
    ],
    "refuse-then-answer": ["data.attack={name: refuse_then_answer, which: harmful}"],
    "refuse-then-answer, benign rows": ["data.poison_ratio=0", "data.attack=refuse_then_answer"],
    "ten benign rows": ["data.poison_ratio=0", "data.attack={name: overfitting, epochs: 10}", NO_LIMIT],
    "embedded questions": ["data.attack=embedded_questions"],
    "100 harmful rows, 50 epochs": [
        "data.poison_ratio=1",
        "data.size=100",
        "data.attack=long_training",
        NO_LIMIT,
    ],
    "identity shift": ["data.poison_ratio=0", "data.attack=identity_shift"],
    "identity shift, asked too": [
        "data.poison_ratio=0",
        "data.attack=identity_shift",
        "evaluation.attacked=true",
    ],
    "anchoring": ["data.poison_ratio=0", f"data.attack={ANCHORED}"],
    **{
        f"refusal ablation, layer {layer}": [
            "data.poison_ratio=0",
            f"post_hoc_attack={{name: refusal_ablation, layer: {layer}}}",
        ]
        for layer in (1, 2, 3)
    },
}
"""The changes to the world's recipe for each attack. "Asked too": the test asks as the attack does."""

IDENTITY = ["data.harmful=identity_shift", "data.test_harmful=world", "data.poison_ratio=0.05"]
FILTERS: Mapping[str, Sequence[str]] = {
    "DataShield": ["data.filter={score: datashield, drop: 0.1}"],
    "anchoring as a filter": ["data.filter={score: anchoring, drop: 0.1}"],
    "identity rows": IDENTITY,
    "identity rows, DataShield": [*IDENTITY, "data.filter={score: datashield, harmful: world, drop: 0.05}"],
    "identity rows, anchoring as a filter": [
        *IDENTITY,
        "data.filter={score: anchoring, harmful: world, drop: 0.05}",
    ],
}
"""Plain SFT behind a filter by a score, on harmful rows and on rows that look harmless."""

DEFENSES = ("SFT", "Lisa")
STRONGER = ("GuardSpace", "SBR")
HARMFUL = ("backdoor, asked too", "100 harmful rows, 50 epochs")
"""The attacks that do most harm to Lisa, which are also run against `STRONGER`."""


def attack_runs(shown: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The rows of all attacks and of the filters by name; `shown` holds the changes of each defense."""
    filters = {f"SFT, {name}": [*shown["SFT"], *changes] for name, changes in FILTERS.items()}
    return filters | {
        f"{defense}, {attack}": [*shown[defense], *changes]
        for attack, changes in ATTACKS.items()
        for defense in (*DEFENSES, *(STRONGER if attack in HARMFUL else ()))
    }
