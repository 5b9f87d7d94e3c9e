"""Attacks: changes that an attacker makes to the rows before fine-tuning; one file per attack."""

__all__ = [
    "anchoring",
]
