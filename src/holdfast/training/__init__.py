"""What defenses are made of: the trainer, rows as tokens, layers, passes, perturbation, penalty, Fisher."""

__all__ = [
    "fisher",
    "harmful_rows",
    "layers",
    "lean_loss",
    "mixing",
    "passes",
    "penalty",
    "perturbation",
    "private",
    "proximal",
    "shards",
    "tampering",
    "tokenising",
    "trainer",
]
