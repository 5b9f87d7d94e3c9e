"""Attacks: what an attacker does to the rows before fine-tuning; one file per attack."""

__all__ = [
    "anchoring",
]
