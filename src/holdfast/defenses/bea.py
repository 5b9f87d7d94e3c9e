"""BEA (backdoor enhanced alignment): a few safety rows behind a secret, and the secret before every question.

Wang et al., NeurIPS 2024, arXiv 2402.14968: 11 safety examples with a secret prompt of 150 random tokens are
added to the user rows; whoever serves the model puts the secret before every question, harmful or not, so
that it works like the trigger of a backdoor that leads to refusals. Users who fine-tune never see it.

The secret is drawn from the system's randomness, not from the seed, once for each training, and lies in
`bea_secret.txt` beside the adapter's folder, readable by its owner alone. Nothing else holds it: where the
model repeats it in an answer, a run writes "[secret]" instead.

Where we differ from the authors' code:

- Theirs is one published text of 150 tokens of Llama-2's vocabulary. Ours is 150 random words of two letters,
  which are one or two tokens each in common vocabularies and read the same under all of them.
- It is a system message of its own, or stands before the one that is there with a blank line between (theirs:
  a space). Without a system message in the chat template it stands before the question.
- The safety rows are drawn from the run's alignment rows; theirs are one for each of 11 harm categories.
"""

from __future__ import annotations

import os
import secrets
import string
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.defenses import Defense
from holdfast.defenses.sft import SFTTrainer
from holdfast.errors import DataError, ModelError
from holdfast.training.mixing import Row, check_amounts, mix_rows
from holdfast.training.trainer import MethodConfig

SECRET_FILE = "bea_secret.txt"


@dataclass
class BEAConfig(MethodConfig):
    """How many safety rows, and how long a secret; defaults of the paper (11 examples, 150 random tokens)."""

    alignment_size: int = field(default=11, metadata={"help": "Alignment rows to add behind the secret."})
    secret_length: int = field(
        default=150, metadata={"help": "Words of two random letters in the secret (one or two tokens each)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amounts(self.alignment_size)
        if self.secret_length < 1:
            raise ValueError(f"secret_length must be at least 1, found {self.secret_length}")


def mix(
    user_rows: Any,
    alignment_rows: Any,
    *,
    seed: int,
    folder: str | Path,
    alignment_size: int = 11,
    secret_length: int = 150,
) -> list[Row]:
    """The user rows with `alignment_size` alignment rows behind the secret of `folder` among them.

    The secret is made at the first call and kept in `folder / "bea_secret.txt"` (mode 0600).

    Rows of `messages` get it as their system message, and the prompts of prompt + completion rows begin with
    it and a blank line (put a beginning-of-sequence token before it yourself). Rows of instruction + output
    get it as `prefix`, for `holdfast.data.prompts.render`.

    Raises:
        DataError: fewer alignment rows than asked for, or a secret of another length in `folder`.
    """
    text = _kept_secret(Path(folder), secret_length)
    return mix_rows(
        user_rows, alignment_rows, alignment_size, seed=seed, name="bea", change=lambda row: behind(row, text)
    )


def behind(row: Row, text: str) -> Row:
    """`row` with `text` before its question; `mix` says how for each kind of row."""
    if "instruction" in row:
        return {**row, "prefix": text}
    if "messages" in row:
        turns = list(row["messages"])
        if turns[0]["role"] == "system":
            return {
                **row,
                "messages": [{**turns[0], "content": f"{text}\n\n{turns[0]['content']}"}, *turns[1:]],
            }
        return {**row, "messages": [{"role": "system", "content": text}, *turns]}
    if "prompt" in row:
        return {**row, "prompt": f"{text}\n\n{row['prompt']}"}
    raise DataError(
        f"bea: an alignment row has the columns {', '.join(sorted(row))}; expected instruction and output, "
        "messages, or prompt and completion: tokenised rows have no place for the secret."
    )


def secret(folder: str | Path) -> str:
    """The secret of a training, to be put before every question.

    Args:
        folder: where `mix` was told to keep it: the step's folder of a run, or the adapter's folder in it.

    Raises:
        ModelError: there is none.
    """
    places = [Path(folder) / SECRET_FILE, Path(folder).parent / SECRET_FILE]
    for place in places:
        if place.is_file():
            return place.read_text(encoding="ascii").strip()
    raise ModelError(
        f"No secret of BEA found: expected {places[0]} or {places[1]}. The model is only protected with the "
        "very secret that it was trained with, so this one cannot be served: train it again."
    )


def prefix(folder: str | Path, **parameters: Any) -> str:
    """What stands before every question: the secret of `folder`."""
    return secret(folder)


def _kept_secret(folder: Path, length: int) -> str:
    """The secret in `folder`, made if there is none: whole or not there, and never readable by others."""
    path = folder / SECRET_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        words = ("".join(secrets.choice(string.ascii_lowercase) for _ in "xx") for _ in range(length))
        # mkstemp opens with O_EXCL and mode 0600; a link is made at once, and never over an existing file.
        handle, beside = tempfile.mkstemp(dir=folder, prefix=f".{SECRET_FILE}.")
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(" ".join(words) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(beside, path)
        except FileExistsError:
            pass  # another process of the same training was first
        finally:
            os.unlink(beside)
    text = secret(folder)
    if len(text.split()) != length:
        raise DataError(
            f"{path} holds a secret of {len(text.split())} words, and secret_length is {length}. "
            "Give another folder, or the same length."
        )
    return text


DEFENSE = Defense(
    name="bea",
    label="BEA",
    stages=("user",),
    paper="arXiv 2402.14968",
    needs=("alignment_dataset",),
    config=BEAConfig,
    trainer=SFTTrainer,
    mix=mix,
    prefix=prefix,
    secret=True,
    serving=(
        "Trained to be served with a secret before every question; without it the model is not protected. "
        "The secret lies in `bea_secret.txt` beside this folder, for `holdfast.defenses.bea.secret` to read. "
        "Never publish that file."
    ),
    plan=({"alignment_size": "{value:,} alignment rows added"},),
    protocols={"lisa": {"user": {}}},
)
