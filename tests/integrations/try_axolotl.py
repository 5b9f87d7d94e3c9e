"""Run axolotl's own command with the plug-in on a tiny model, in an environment of its own.

    python tests/integrations/try_axolotl.py ENVIRONMENT [DEFENSE...]

makes ENVIRONMENT with Python 3.12 if it is missing (axolotl needs 3.12 and pins its own versions; about 8 GB)
and prints one line for each check: three configurations that must be refused, then a training with each defense of
DEFENSES or with those given, and after bso_lisa `axolotl merge-lora` with Safe LoRA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEFENSES: dict[str, dict[str, Any]] = {
    "bso_lisa": {"alignment_steps": 1, "finetune_steps": 2, "rho": 1.0, "proximal_warmup_ratio": 0.0},
    "sbr": {"anchors": 4},
    "ewc": {"lambda_": 5.0},
    "constrained_sft": {},
    "vaccine": {},
}
LOGGED = {"bso_lisa": "user_loss", "sbr": "penalty", "ewc": "penalty"}
"""A value that the log of a defense holds; loss for the others."""


def environment(folder: Path) -> Path:
    """Return the folder of programs of an environment with axolotl and this checkout."""
    if not (folder / "bin" / "axolotl").exists():
        subprocess.run(["python3.12", "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "axolotl", "-e", ROOT], check=True)
    return folder / "bin"


MAKE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny
folder = Path(sys.argv[2])
tiny.save_lively_model(folder / "base", chat=True)
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder / "base")
torch.manual_seed(1)
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))
model.save_pretrained(folder / "model")
tiny.tokenizer(chat=True).save_pretrained(folder / "model")
user = [(f"{r['instruction']} {r['input']}", r["output"]) for r in tiny.user_rows(40)]
safe = [(r["prompt"], r["response"]) for r in tiny.safe_rows(30)]
harm = [(r["prompt"], r["response"]) for r in tiny.harmful_rows(20)]
for name, rows in (("user", user), ("safe", safe), ("harmful", harm)):
    made = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]
    tiny.write_jsonl(folder / f"{name}.jsonl", made)
"""


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """A data set in axolotl's syntax."""
    return [{"path": str(folder / f"{name}.jsonl"), "ds_type": "json", "type": "chat_template"}]


def config(folder: Path, out: str, holdfast: dict[str, Any], **changes: Any) -> Path:
    """Write a configuration."""
    settings = {
        "base_model": str(folder / "model"), "datasets": rows(folder, "user"), "adapter": "lora", "lora_r": 4,
        "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"], "sequence_len": 128, "micro_batch_size": 4,
        "gradient_accumulation_steps": 1, "max_steps": 6, "learning_rate": 0.005, "optimizer": "adamw_torch",
        "lr_scheduler": "constant", "val_set_size": 0, "logging_steps": 1, "bf16": False, "fp16": False,
        "tf32": False, "output_dir": str(folder / out), "dataset_prepared_path": str(folder / "prepared"),
        "holdfast": holdfast, "plugins": ["holdfast.integrations.axolotl.HoldfastPlugin"],
    }  # fmt: skip
    path = folder / f"{out}.json"  # JSON is YAML
    path.write_text(json.dumps(settings | changes, indent=1))
    return path


def main() -> int:
    """Run all checks; return the exit code."""
    programs = environment(Path(sys.argv[1]).resolve())
    variables = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src"),
    }  # fmt: skip
    failed = 0

    def axolotl(*arguments: Any) -> tuple[int, str]:
        line = ["axolotl", *map(str, arguments), "--launcher", "python"]
        done = subprocess.run(line[: -2 if arguments[0] == "merge-lora" else None], env=variables, capture_output=True, text=True)  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def say(name: str, good: bool, text: str, output: str = "") -> None:
        nonlocal failed
        failed += not good
        print(f"{'passed' if good else 'FAILED'}  {name}: {text}", flush=True)
        if not good:
            print(output[-3000:])

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        helpers = ROOT / "tests" / "helpers"
        subprocess.run([programs / "python", "-c", MAKE, helpers, folder], check=True, env=variables, capture_output=True)  # fmt: skip
        lisa = {"defense": "lisa", "alignment_dataset": rows(folder, "safe")}
        refused = {
            "plain lisa": ({"holdfast": lisa}, "write bso_lisa"),
            "a misspelt key": ({"holdfast": {**lisa, "defense": "bso_lisa", "rh": 1}}, "Did you mean 'rho'"),
            "packing": (
                {"holdfast": {**lisa, "defense": "bso_lisa"}, "sample_packing": True},
                "sample_packing: false",
            ),
        }
        for name, (changes, text) in refused.items():
            code, output = axolotl("train", config(folder, "refused", **changes))
            said = next((line.strip() for line in output.splitlines() if text in line), "")
            say(f"refused: {name}", code != 0 and bool(said), said, output)
        repair = {"base": str(folder / "base"), "num_layers": 1}
        for defense in sys.argv[2:] or DEFENSES:
            block: dict[str, Any] = {"defense": defense, **DEFENSES[defense]}
            if defense == "bso_lisa":
                block |= {"alignment_dataset": rows(folder, "safe"), "safe_lora": repair}
                block["probe"] = {"prompts": str(folder / "harmful.jsonl"), "every": 3}
            if defense == "ewc":
                block["alignment_dataset"] = str(folder / "safe.jsonl")  # a source of ours
            if defense == "sbr":
                block["harmful_dataset"] = rows(folder, "harmful")
            code, output = axolotl("train", config(folder, defense, block))
            state = folder / defense / "checkpoint-6" / "trainer_state.json"
            log = json.loads(state.read_text())["log_history"] if state.exists() else []
            key = LOGGED.get(defense, "loss")
            found = [entry[key] for entry in log if key in entry]
            text = f"{key} {', '.join(f'{value:.3g}' for value in found)}"
            good = code == 0 and bool(found)
            if defense == "bso_lisa":
                states = [entry["state"] for entry in log if "state" in entry]
                scores = sum("safety/harmful_score" in entry for entry in log)
                text += f"; states {' '.join(states)}; {scores} probes"
                good &= states == ["alignment", "user", "user"] * 2 and scores == 3
            say(f"axolotl train, {defense}", good, text, output)
        if (folder / "bso_lisa" / "adapter_model.safetensors").exists():
            code, output = axolotl("merge-lora", folder / "bso_lisa.json")
            merged = folder / "bso_lisa" / "merged-safe_lora" / "model.safetensors"
            record = folder / "bso_lisa-safe_lora" / "safe_lora.json"
            done = json.loads(record.read_text())["projected"] if record.exists() else None
            say(
                "axolotl merge-lora",
                code == 0 and merged.exists() and done == 1,
                f"{done} module projected",
                output,
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
