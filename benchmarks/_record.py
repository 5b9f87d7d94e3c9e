"""Save results with the command, versions and hardware that produced them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from holdfast.machine.store import provenance

RESULTS = Path(__file__).parent / "results"


def save(name: str, result: dict[str, Any]) -> None:
    """Write `results/<name>.json` with command, versions and hardware, and print the same text."""
    RESULTS.mkdir(exist_ok=True)
    command = f"python benchmarks/{Path(sys.argv[0]).name}"
    text = json.dumps({"command": command, **result, **provenance()}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
