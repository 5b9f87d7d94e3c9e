"""The result of Safe LoRA: per module, in total, as JSON, and as a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from holdfast.weights.card import is_hub_id, public_name

RECORD = "safe_lora.json"
"""The file that holds the result; it also distinguishes our folders from others."""

IDENTITY = "V has full row rank, so that the exact projector is the identity,"
"""The note of a module whose update the projection does not change."""


@dataclass(frozen=True)
class ModuleResult:
    """The result for one module.

    Attributes:
        cosine: cosine of dW and C dW, 0 to 1; None if V or dW is zero.
        projected: whether the update was replaced (with the control "drop", by zero); in a dry run, whether
            it would be.
        norm_before: ||dW||_F with the scaling of LoRA.
        norm_after: the same after projection; in a dry run, as before.
        direction_norm: ||V||_F.
        lora_rank: r; None for full weights.
        direction_rank: the numerical rank of V, if the exact projector was computed.
        note: anything special about the module.
    """

    name: str
    kind: str
    layer: int | None
    cosine: float | None
    projected: bool
    norm_before: float
    norm_after: float
    direction_norm: float
    lora_rank: int | None
    direction_rank: int | None = None
    note: str | None = None


@dataclass(frozen=True)
class Suggestion:
    """A threshold in the middle of the largest gap between sorted cosines, with the reason."""

    threshold: float
    projected: int
    below: float
    above: float
    why: str


@dataclass(frozen=True)
class SafeLoraResult:
    """The return value of `safe_lora`.

    Attributes:
        out: the folder that was written; None for a dry run.
        modules: the modules by layer.
        options: the options of the call.
        sources: path as given and fingerprint, by role ("adapter", "base", "aligned"). The files that are
            written have only the last part of a path.
        notes: sentences that the user should read.
        left_alone: tensors that were copied unchanged and not examined.
    """

    out: Path | None
    modules: tuple[ModuleResult, ...]
    options: Mapping[str, Any]
    sources: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...]
    left_alone: tuple[str, ...]
    versions: Mapping[str, str]

    @property
    def projected(self) -> tuple[ModuleResult, ...]:
        """The modules whose update was replaced."""
        return tuple(module for module in self.modules if module.projected)

    @property
    def changed(self) -> tuple[ModuleResult, ...]:
        """The projected modules whose update is another one now."""
        return tuple(module for module in self.projected if module.note != IDENTITY)

    @property
    def share(self) -> float:
        """The share of projected modules, 0 to 1."""
        return len(self.projected) / len(self.modules)

    def sweep(self) -> list[tuple[float, int]]:
        """Thresholds over the range of the cosines, and how many modules each would project."""
        return sweep(cosines(self.modules))

    def suggest(self) -> Suggestion | None:
        """The suggested threshold; see `suggest`."""
        return suggest(cosines(self.modules))

    def to_json(self) -> dict[str, Any]:
        """The content of `safe_lora.json`."""
        return {
            "holdfast": self.versions["holdfast"],
            "kind": "safe_lora",
            "paper": "arXiv 2405.16833",
            "options": dict(self.options),
            "sources": {
                role: {**source, "path": public_name(source["path"])} for role, source in self.sources.items()
            },
            "versions": dict(self.versions),
            "projected": len(self.projected),
            "share": self.share,
            "notes": list(self.notes),
            "left_alone": list(self.left_alone),
            "modules": [asdict(module) for module in self.modules],
        }

    def card(self) -> str:
        """Return a model card that says what was done, and that safety was not measured."""
        options, adapter = self.options, self.options["kind"] == "adapter"
        gate = (
            f"the {options['num_layers']} least similar"
            if options["num_layers"] is not None
            else f"cosine < {options['threshold']}"
        )
        notes = "\n".join(f"- {note}" for note in self.notes) or "- none"
        aligned = self.sources["aligned"]["path"]
        on = f"base_model: {aligned}\n" if is_hub_id(aligned) else ""
        read = {
            role: f"{public_name(source['path'])} (fingerprint `{source['fingerprint']}`)"
            for role, source in self.sources.items()
        }
        return f"""---
{on}library_name: {"peft" if adapter else "transformers"}
tags: [holdfast, safe_lora]
---
# {self._title("LoRA adapter" if adapter else "Fine-tuned model")}

{self._done()}

- {"adapter" if adapter else "fine-tuned model"}: {read["adapter"]}
- base: {read["base"]}
- aligned: {read["aligned"]}
- modules: {gate}; projection {options["projection"]}, control {options["control"] or "none"}
- per module: `{RECORD}`

Notes:

{notes}

This step did not measure whether the result is safer, or what it costs in accuracy. Measure both before you
rely on it.
"""

    def _title(self, what: str) -> str:
        if not self.changed:
            return f"{what}, not changed by Safe LoRA"
        if self.options["control"]:
            return f"{what}, a control of Safe LoRA"
        return f"{what} repaired by Safe LoRA"

    def _done(self) -> str:
        """Say what happened to the weights."""
        count = f"{len(self.projected)} of {len(self.modules)} modules"
        if not self.changed:
            why = "no module was chosen" if not self.projected else "the projection is the identity for them"
            return (
                f"Nothing was changed: Safe LoRA (arXiv 2405.16833) projected {count}; {why}. The weights "
                "are those of the source, byte for byte."
            )
        if self.options["control"] == "drop":
            done = f"A control: the updates of {count} were set to zero"
        else:
            how = "A control: the updates" if self.options["control"] else "The updates"
            done = f"{how} of {count} were projected onto the direction from the base to the aligned model"
        return f"{done} (arXiv 2405.16833); all other weights are byte for byte unchanged."


def cosines(modules: Sequence[ModuleResult]) -> list[float]:
    """Return the defined cosines, sorted."""
    return sorted(module.cosine for module in modules if module.cosine is not None)


def sweep(found: Sequence[float], most: int = 14) -> list[tuple[float, int]]:
    """Return round thresholds from below the smallest cosine to above the largest, about `most` at most."""
    if not found:
        return []
    span = max(found[-1] - found[0], 1e-6)
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first, last = math.floor(found[0] / step), math.floor(found[-1] / step) + 1
    thresholds = [round(i * step, 9) for i in range(first, last + 1)]
    return [(threshold, sum(cosine < threshold for cosine in found)) for threshold in thresholds]


def suggest(found: Sequence[float]) -> Suggestion | None:
    """Suggest the middle of the largest gap between neighbouring sorted cosines; None if there is no gap."""
    gaps = sorted(((b - a, i) for i, (a, b) in enumerate(pairwise(found))), reverse=True)
    if not gaps or gaps[0][0] <= 0:
        return None
    gap, i = gaps[0]
    below, above = found[i], found[i + 1]
    threshold = next(
        (round(t, d) for d in range(2, 17) if below < round(t := (below + above) / 2, d) <= above), above
    )
    second = gaps[1][0] if len(gaps) > 1 else 0.0
    why = f"the largest gap between sorted cosines is {gap:.3g}, from {below:.4g} to {above:.4g}"
    if second:
        why += f"; the next largest is {second:.3g}"
    if second > gap / 1.5:
        why += ". That is hardly smaller: the cosines do not form two groups, so compare several thresholds"
    if (i + 1) * 2 > len(found):
        why += f". It would project {i + 1} of {len(found)} modules, most of the update"
    return Suggestion(threshold, i + 1, below, above, why)
