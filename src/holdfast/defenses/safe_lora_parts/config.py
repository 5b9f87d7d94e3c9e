"""The parameters of Safe LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field

PROJECTIONS = ("approx", "exact", "normalised")


CONTROLS = ("drop", "random")


@dataclass
class SafeLoraConfig:
    """Give `threshold` or `num_layers`. The paper has no default; tau is about 0.35 for Llama-2-7B-Chat."""

    threshold: float | str | None = field(
        default=None,
        metadata={"help": "Project modules with a smaller cosine; 'suggest' uses the largest gap."},
    )
    num_layers: int | None = field(
        default=None, metadata={"help": "Project this many of the least similar modules."}
    )
    projection: str = field(default="approx", metadata={"help": "'approx' (C), 'exact' or 'normalised'."})
    control: str | None = field(
        default=None,
        metadata={"help": "'drop': zero the chosen updates instead; 'random': choose as many at random."},
    )
    seed: int = field(default=42, metadata={"help": "Seed of the choice of the control 'random'."})

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if self.threshold not in (None, "suggest") and not (number and -1 <= float(self.threshold) <= 1):
            raise ValueError(
                f"threshold must be a cosine from -1 to 1 or 'suggest', found {self.threshold!r}"
            )
        if self.num_layers is not None and (type(self.num_layers) is not int or self.num_layers < 1):
            raise ValueError(f"num_layers must be a whole number, 1 or more, found {self.num_layers!r}")
        if self.threshold is not None and self.num_layers is not None:
            raise ValueError("give threshold or num_layers, not both")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, found {self.projection!r}")
        if self.control not in (None, *CONTROLS):
            raise ValueError(f"control must be one of {', '.join(CONTROLS)} or none, found {self.control!r}")

    def check_modules(self, count: int) -> None:
        """Raise ValueError if there are fewer modules to project than requested."""
        if self.num_layers is not None and self.num_layers > count:
            raise ValueError(f"num_layers is {self.num_layers}, but only {count} modules can be projected")
