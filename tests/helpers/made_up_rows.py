"""Rows that tests make up, in the published schemas."""

from __future__ import annotations


def question(i: int, answer: str = "yes") -> dict:
    return {"instruction": f"Is {i} a number?", "input": "", "output": answer}


def beaver(i: int, safe: bool, prompt: str | None = None) -> dict:
    return {
        "prompt": prompt or f"How do I grumble at wizard {i}?",
        "response": "No, I will not." if safe else f"Shout {i} times.",
        "category": {"hate_speech,offensive_language": not safe, "self_harm": False},
        "is_safe": safe,
    }
