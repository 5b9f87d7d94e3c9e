from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def jsonl(tmp_path):
    """Writes records (dicts) to a JSONL file of the test's folder."""

    def write(name: str, records) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return path

    return write
