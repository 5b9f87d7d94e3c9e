"""Trainers with tiny models, for every defense in the registry."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import tiny
from holdfast import registry

TOKENIZER = tiny.tokenizer()


def pairs(rows: list[dict[str, Any]], long_answers: bool = False) -> list[dict[str, str]]:
    """Prompt + completion rows."""
    made = []
    for row in rows:
        prompt = row.get("prompt") or f"{row['instruction']} {row['input']}"
        answer = row.get("response") or row["output"]
        made.append(
            {"prompt": prompt + "\n", "completion": (answer * 5 if long_answers else answer) + "</s>"}
        )
    return made


USER = pairs(tiny.user_rows(24))
ALIGNMENT = pairs(tiny.safe_rows(20))
HARMFUL = pairs(tiny.harmful_rows(18))


def model(dropout: float = 0.0, seed: int = 3) -> Any:
    """A tiny Llama with a trainable LoRA; random numbers continue as after it was made."""
    made, state = _made(dropout, seed)
    torch.set_rng_state(state)
    return copy.deepcopy(made)


@cache
def _made(dropout: float, seed: int) -> tuple[Any, torch.Tensor]:
    """The model, made once, and the state of the random numbers after that."""
    base = tiny.llama(len(TOKENIZER))
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"]
    )
    return get_peft_model(base, config), torch.get_rng_state()


@cache
def alignment_adapter() -> Path:
    """The folder of an alignment adapter on the modules that `model` trains."""
    folder = Path(tempfile.mkdtemp(prefix="aligned-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng():
        made = model(seed=21)
        for key, p in made.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.3)
        made.save_pretrained(folder)
    return folder


def trainer(
    name: str, out: Path, *, net: Any = None, rows: Any = None, alignment: Any = None, **options: Any
) -> Any:
    """A trainer of the defense `name`; `options` go to its Config."""
    defense = registry.get_defense(name)
    settings = {
        "output_dir": str(out), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 11,
        "learning_rate": 5e-3, "per_device_train_batch_size": 4, "max_steps": 12, "logging_steps": 1,
        "save_strategy": "no", "lr_scheduler_type": "cosine", "logging_nan_inf_filter": False,
    } | options  # fmt: skip
    if "alignment_steps" in registry.faces("defenses")[name].parameters:
        settings = {"alignment_steps": 3, "finetune_steps": 4} | settings
    extra = {}
    if "alignment_dataset" in defense.needs and defense.mix is None:
        extra["alignment_dataset"] = alignment or ALIGNMENT
    if "harmful_dataset" in defense.needs:
        extra["harmful_dataset"] = HARMFUL
    if "aligned" in defense.needs:
        extra["aligned"] = alignment_adapter()
    made = defense.trainer(
        model=model() if net is None else net,
        args=defense.config(**settings),
        train_dataset=rows or USER,
        processing_class=TOKENIZER,
        **extra,
    )
    return made


def ended(
    name: str, out: Path, *, net: Any = None, dropout: float = 0.3, **options: Any
) -> tuple[list[torch.Tensor], int]:
    """Weights after a training with dropout, and how often the language model ran."""
    made = trainer(name, out, net=model(dropout=dropout) if net is None else net, **options)
    runs: list[int] = []
    made.model.get_base_model().register_forward_hook(lambda *_: runs.append(1))
    made.train()
    return weights(made), len(runs)


def weights(made: Any) -> list[torch.Tensor]:
    """Copies of the trainable weights."""
    return [p.detach().clone() for p in made.model.parameters() if p.requires_grad]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether two lists of weights are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """The largest absolute difference."""
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
