"""Attacks: what an attacker does to the rows before fine-tuning, one file each."""

__all__ = [
    "anchoring",
]
