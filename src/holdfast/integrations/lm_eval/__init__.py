"""Refusal tasks for lm-evaluation-harness, harmful and harmless: YAML files, and the functions that they name.

    lm_eval --model hf --model_args pretrained=my-model --tasks holdfast_refusal \
        --include_path $(holdfast lm-eval-tasks)
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLDER", "questions"]

FOLDER = Path(__file__).parent
"""The folder with the tasks, for `--include_path`."""
