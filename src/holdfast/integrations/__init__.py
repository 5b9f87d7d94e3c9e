"""Plug-ins for other tools: PEFT, TRL, axolotl, ms-swift, lm-evaluation-harness, inspect_ai.

Each file imports its host inside functions; only `inspect_ai.py`, which that host imports, does so at its
top.
"""

__all__ = ["axolotl", "lm_eval", "ms_swift", "peft", "prompt_sets", "trl"]
