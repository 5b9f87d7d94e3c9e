"""Save results with the command, versions and hardware that produced them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from holdfast.machine.files import write_text
from holdfast.machine.store import provenance

RESULTS = Path(__file__).parent / "results"


def save(name: str, result: dict[str, Any]) -> None:
    """Write `results/<name>.json` with command, versions and hardware, and print the same text."""
    RESULTS.mkdir(exist_ok=True)
    command = f"python benchmarks/{Path(sys.argv[0]).name}"
    text = json.dumps({"command": command, **result, **provenance()}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def add(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Add rows to `results/<name>.json`, each with the versions and hardware of its run, and print them."""
    path = RESULTS / f"{name}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    own = {key: value for key, value in provenance().items() if key != "command"}
    result["rows"] |= {row: {**found, "measured": own} for row, found in rows.items()}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


def write_page(page: Path, made: dict[str, str]) -> None:
    """Replace the parts between `<!-- NAME: made by ... -->` and `<!-- end of NAME -->`."""
    text = page.read_text(encoding="utf-8")
    for name, part in made.items():
        marks = re.compile(rf"(<!-- {name}: made by [^>]*-->\n).*?(<!-- end of {name} -->)", re.S)
        text = marks.sub(lambda marked, part=part: f"{marked[1]}{part}\n{marked[2]}", text)
    write_text(page, text)
