"""`holdfast safe-lora` as a user calls it: options, tables, exit codes, no partial output, no heavy imports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from peft import PeftModel

import tiny
from commands import holdfast_command
from pairs import SEVEN, digest, save_adapter, save_pair
from places import DOCS, HEAVY


def command(*arguments, cwd, code=0):
    done = holdfast_command("safe-lora", *arguments, cwd=cwd)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    save_pair(folder)
    save_adapter(folder / "adapter", target_modules=SEVEN)
    return folder


PAIR = ("--base", "base", "--aligned", "aligned")


def test_from_end_to_end(place):
    done = command("adapter", *PAIR, "--out", "out", "--num-layers", 5, "--plot", "plot.png", cwd=place)
    assert "Projected 5 of 21 modules (23.8 %)" in done.stdout
    assert done.stdout.count("projected") == 5
    assert (place / "plot.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((place / "out" / "safe_lora.json").read_text())
    assert record["projected"] == 5
    PeftModel.from_pretrained(tiny.llama(400, layers=3), place / "out")
    assert (
        "is not empty" not in command("adapter", *PAIR, "--out", "out", "--threshold", 0.7, cwd=place).stderr
    )
    assert json.loads((place / "out" / "safe_lora.json").read_text())["options"]["threshold"] == 0.7


def test_a_dry_run_writes_nothing(place):
    before = digest(place)
    for arguments in (["--dry-run"], ["--suggest"], ["--dry-run", "--threshold", "0.7"]):
        done = command("adapter", *PAIR, *arguments, cwd=place)
        assert "Nothing was written" in done.stdout
        assert "what a threshold would project" in done.stdout
        assert ("largest gap" in done.stdout) == ("--suggest" in arguments)
        assert ("would be projected" in done.stdout) == (arguments != ["--dry-run"])
    assert digest(place) == before


def test_suggest_with_a_folder_projects(place, tmp_path):
    done = command("adapter", *PAIR, "--suggest", "--out", tmp_path / "out", cwd=place)
    assert "largest gap" in done.stdout
    assert json.loads((tmp_path / "out" / "safe_lora.json").read_text())["projected"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["threshold or num_layers"]),
        (["--threshold", "0.3"], ["give out"]),
        (["--threshold", "3", "--out", "o"], ["-1 to 1"]),
        (["--threshold", "0.3", "--num-layers", "3", "--out", "o"], ["not both"]),
        (["--threshold", "0.3", "--suggest", "--out", "o"], ["one of them"]),
        (["--num-layers", "22", "--out", "o"], ["only 21 modules"]),
        (["--threshold", "0.3", "--out", "adapter"], ["overlaps adapter"]),
        (["--threshold", "0.3", "--out", "."], ["overlaps"]),
        (["--threshold", "0.3", "--out", "o", "--plot", "x.doc"], [".png, .svg or .pdf"]),
        (["--threshold", "0.3", "--out", "o", "--plot", "adapter/adapter_config.json/x.png"], ["Cannot write"]),
        (["--threshold", "0.3", "--out", "o", "--device", "gpu7"], ["device 'gpu7'"]),
        (["--threshold", "0.3", "--out", "o", "--projection", "exakt"], ["exakt"]),
        (["--threshold", "0.3", "--out", "o", "--base", "bsae"], ["No such model folder|neither a local folder"]),
        (["--threshold", "0.3", "--out", "o", "--aligned", "adapter/../gone/x"], ["No such model folder"]),
        (["--threshold", "0.3", "--out", "o", "--base", "a b/c@d"], ["not a valid Hub name: 'a b/c@d'"]),
        (["--threshold", "0.3", "--out", "o", "--aligned", "adapter"], ["the aligned model .adapter. are the same"]),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_a_sentence(place, arguments, words):
    before = digest(place)
    done = command("adapter", *PAIR, *arguments, cwd=place, code=2)
    message = done.stderr[max(done.stderr.find("holdfast: "), 0) :]
    assert len(message.strip().splitlines()) <= 8
    assert all(re.search(word, done.stderr) for word in words), done.stderr
    assert digest(place) == before


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_ended_from_outside_nothing_half_written_is_left(place, how):
    before = digest(place)
    arguments = ["holdfast", "safe-lora", "adapter", *PAIR, "--out", "stopped", "--threshold", "1"]
    code = (
        f"import os, signal, sys, time; sys.argv = {arguments!r}\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where tests run behind `&`
        "from holdfast.defenses import safe_lora\n"
        f"def ended(*_): os.kill(os.getpid(), signal.{how}); time.sleep(0.1)\n"
        "safe_lora.overwrite = ended\n"
        "from holdfast.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=place)
    assert done.returncode == 130, done.stderr
    assert "holdfast: Stopped. No half-written file is left; run the same command again." in done.stderr
    assert digest(place) == before
    assert not list(place.glob(".*"))


def test_help_has_an_example():
    done = command("--help", cwd=None)
    assert "Example: holdfast safe-lora" in " ".join(done.stdout.split())
    for option in ("--threshold", "--num-layers", "--projection", "--control", "--dry-run", "--suggest"):
        assert option in done.stdout


def test_the_page_on_repairing_does_what_it_says(place, tmp_path, monkeypatch):
    page = (DOCS / "repair.md").read_text()
    for name, folder in (("my-adapter", "adapter"), ("llama", "base"), ("llama-chat", "aligned")):
        shutil.copytree(place / folder, tmp_path / name)
    lines = re.search(r"```bash\n(.*?)```", page, re.S)[1].splitlines()
    for line in lines:
        words = line.replace("0.35", "0.7").split()
        assert words[:2] == ["holdfast", "safe-lora"]
        command(*words[2:], cwd=tmp_path)
    assert {"cosines.png", "repaired"} <= {p.name for p in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    script = re.search(r"```python\n(.*?)```", page, re.S)[1].replace("0.35", "0.7")
    names: dict = {}
    exec(compile(script, "repair.md", "exec"), names)
    assert 0 < names["result"].share < 1


@pytest.mark.parametrize(
    "more", [["--threshold", "0.7", "--out", "light"], ["--dry-run", "--projection", "exact"]]
)
def test_the_cpu_path_imports_neither_torch_nor_transformers_nor_peft(place, more):
    arguments = ["holdfast", "safe-lora", "adapter", *PAIR, *more]
    code = (
        f"import sys; sys.argv = {arguments!r}\nfrom holdfast.cli.app import app; app(standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('LOADED', *sys.modules, file=sys.stderr)"],
        capture_output=True, text=True, check=True, timeout=60, cwd=place,
    )  # fmt: skip
    assert not set(done.stderr.split("LOADED")[1].split()) & (
        HEAVY | {"safetensors", "huggingface_hub", "jinja2"}
    )
