"""Building blocks of defenses: the trainer, tokenised rows, layers, passes, perturbation, penalty, Fisher."""

__all__ = [
    "batches",
    "fingerprint",
    "fisher",
    "harmful_rows",
    "inputs",
    "layers",
    "lean_loss",
    "mixing",
    "passes",
    "penalty",
    "perturbation",
    "private",
    "proximal",
    "quantised",
    "questions",
    "shards",
    "streams",
    "tampering",
    "tokenising",
    "trainer",
]
