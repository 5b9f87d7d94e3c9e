"""Keep a language model's safety alignment through fine-tuning.

The public names are imported on first use, so that `import holdfast` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "compare": "holdfast.measuring.comparing",
    "Recipe": "holdfast.recipe",
    "plan": "holdfast.pipeline",
    "run": "holdfast.pipeline",
    "mix": "holdfast.data",
    "report": "holdfast.reporting",
    "Defense": "holdfast.defenses",
    "get_defense": "holdfast.registry",
    "list_defenses": "holdfast.registry",
    "apply_safe_lora": "holdfast.integrations.peft",
    "safe_lora": "holdfast.defenses.safe_lora",
    "SafetyProbe": "holdfast.probe",
    "gate": "holdfast.measuring.gating",
    "generate": "holdfast.measuring.generating",
    "moderate": "holdfast.measuring.on_files",
    "rate": "holdfast.measuring.on_files",
    "score": "holdfast.measuring.on_files",
    "sweep": "holdfast.study.sweeping",
}

__all__ = [
    "Defense",
    "Recipe",
    "SafetyProbe",
    "__version__",
    "apply_safe_lora",
    "compare",
    "gate",
    "generate",
    "get_defense",
    "list_defenses",
    "mix",
    "moderate",
    "plan",
    "rate",
    "report",
    "run",
    "safe_lora",
    "score",
    "sweep",
]

if TYPE_CHECKING:
    from holdfast.data import mix
    from holdfast.defenses import Defense
    from holdfast.defenses.safe_lora import safe_lora
    from holdfast.integrations.peft import apply_safe_lora
    from holdfast.measuring.comparing import compare
    from holdfast.measuring.gating import gate
    from holdfast.measuring.generating import generate
    from holdfast.measuring.on_files import moderate, rate, score
    from holdfast.pipeline import plan, run
    from holdfast.probe import SafetyProbe
    from holdfast.recipe import Recipe
    from holdfast.registry import get_defense, list_defenses
    from holdfast.reporting import report
    from holdfast.study.sweeping import sweep


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'holdfast' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
