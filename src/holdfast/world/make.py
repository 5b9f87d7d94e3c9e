"""Make the world: data, tokenizer, base model, judge, and `measured.json`, which describes them all.

`python -m holdfast.world.make [FOLDER]` takes about ten minutes on one thread; the default of FOLDER is this
package. The data are the same on every machine, byte for byte; weights may differ in their last bits.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers

from holdfast.machine.code import code_of
from holdfast.world import VERSION
from holdfast.world.judge import INPUT, train_judge
from holdfast.world.measure import measure_base, measure_judge
from holdfast.world.pretrain import books, pretrain
from holdfast.world.rows import data_files, to_jsonl
from holdfast.world.text import SEED
from holdfast.world.tokenizer import train_tokenizer

HERE = Path(__file__).resolve().parent
VOCABULARY, TOKENIZER_ROWS = 1536, 20_000
FOLDERS = ("data", "model", "judge")


def sha256s(world: Path) -> dict[str, str]:
    """SHA-256 of the code of each script of this package, and of each file in `world`'s three folders."""
    read = {path.name: code_of(path.read_text(encoding="utf-8")) for path in HERE.glob("*.py")}
    for folder in FOLDERS:
        read |= {f"{folder}/{path.name}": path.read_bytes() for path in (world / folder).iterdir()}
    return {name: hashlib.sha256(read[name]).hexdigest() for name in sorted(read)}


def tokenizer_texts() -> list[str]:
    """Return the training texts of the tokenizer: the books, each text at a line start and after a space."""
    rows = list(islice(books("tokenizer"), TOKENIZER_ROWS))
    texts = [f"{space}{text}" for row in rows for text in row for space in ("", " ")]
    return texts + [INPUT.format(prompt="How", answer="First")] * 500


def make(world: Path) -> dict:
    """Make everything in `world`, replacing existing files, and return the measurements."""
    world.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=world) as beside:
        measured = _make(Path(beside))
        for folder in FOLDERS:
            shutil.rmtree(world / folder, ignore_errors=True)
            (Path(beside) / folder).rename(world / folder)
        (Path(beside) / "measured.json").rename(world / "measured.json")
    return measured


def _make(work: Path) -> dict:
    files = data_files()
    for folder in FOLDERS:
        (work / folder).mkdir()
    for name, rows in files.items():
        (work / "data" / name).write_bytes(to_jsonl(rows))
    started = time.perf_counter()
    tokenizer = train_tokenizer(tokenizer_texts(), VOCABULARY)
    # Saved before its first use, because a call with padding leaves traces in tokenizer.json.
    for folder in ("model", "judge"):
        tokenizer.save_pretrained(work / folder)
    model, loss = pretrain(tokenizer)
    base_done = time.perf_counter()
    judge, judge_loss = train_judge(tokenizer, model)
    judge_done = time.perf_counter()
    model.save_pretrained(work / "model")
    judge.save_pretrained(work / "judge")
    for folder in ("model", "judge"):
        (work / folder / "model.safetensors").chmod(0o644)
    measured = {
        "world": VERSION,
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "model": {
            "parameters": model.num_parameters(),
            "vocabulary": len(tokenizer),
            "loss": round(loss, 4),
            "seconds": round(base_done - started),
            **measure_base(model, tokenizer, files),
        },
        "judge": {
            "parameters": judge.num_parameters(),
            "loss": round(judge_loss, 5),
            "seconds": round(judge_done - base_done),
            "errors": measure_judge(judge, model, tokenizer, files),
        },
        "sha256": sha256s(work),
    }
    (work / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return measured


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    print(json.dumps({name: part for name, part in make(target).items() if name != "sha256"}, indent=1))
