"""Refusal tasks for lm-evaluation-harness, harmful and harmless: YAML files, and the functions they name.

lm_eval --include_path $(holdfast lm-eval-tasks) --tasks holdfast_refusal --model hf ...
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLDER", "questions"]

FOLDER = Path(__file__).parent
"""The folder with the tasks, for `--include_path`."""
