"""BEA (backdoor enhanced alignment): a few safety rows with a secret prompt, which is used again at serving.

Wang et al., NeurIPS 2024, arXiv 2402.14968: 11 safety examples with a secret prompt of 150 random tokens are
added to the user rows. At serving, the secret is put before every question, harmful or not, and works like
the trigger of a backdoor that leads to refusals. Users who fine-tune never see it.

The secret is drawn once per training from the randomness of the system, not from the seed. It is stored in
`bea_secret.txt` next to the adapter's folder, readable only by its owner. No other file holds it: if the
model repeats it in an answer, a run writes "[secret]" instead.

Where we differ from the authors' code:

- Their secret is one published text of 150 tokens of Llama-2's vocabulary. Ours is 150 random words of two
  letters, which are one or two tokens each in common vocabularies and read the same under all of them.
- The secret is a system message of its own, or comes before an existing system message with a blank line in
  between (theirs: a space). If the chat template has no system message, it comes before the question.
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
    """Number of safety rows and length of the secret; defaults of the paper (11 rows, 150 random tokens)."""

    alignment_size: int = field(default=11, metadata={"help": "Alignment rows to add with the secret."})
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
    """Mix `alignment_size` alignment rows, with the secret of `folder` before them, into the user rows.

    The secret is created at the first call and kept in `folder / "bea_secret.txt"` (mode 0600).

    In rows of `messages`, or with messages as their prompt, it becomes the system message. In rows with texts
    as prompt and completion, the prompt begins with it and a blank line (add a beginning-of-sequence token
    yourself). In rows of instruction + output it becomes the `prefix`, for `holdfast.data.prompts.render`.

    Raises:
        DataError: fewer alignment rows than requested, or `folder` has a secret of another length.
    """
    text = _kept_secret(Path(folder), secret_length)
    return mix_rows(
        user_rows, alignment_rows, alignment_size, seed=seed, name="bea", change=lambda row: behind(row, text)
    )


def _with_system(turns: list[Any], text: str) -> list[Any]:
    """Return turns with `text` as the system message, or before the text of their own."""
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{text}\n\n{turns[0]['content']}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def behind(row: Row, text: str) -> Row:
    """Return `row` with `text` before its question; see `mix` for each kind of row."""
    if "instruction" in row:
        return {**row, "prefix": text}
    for name in ("messages", "prompt"):  # TRL's rows have a list of messages as their prompt
        if isinstance(row.get(name), list | tuple):
            return {**row, name: _with_system(list(row[name]), text)}
    if isinstance(row.get("prompt"), str):
        return {**row, "prompt": f"{text}\n\n{row['prompt']}"}
    raise DataError(
        f"bea: an alignment row has the columns {', '.join(sorted(row))}; expected instruction and output, "
        "messages, or prompt and completion (tokenised rows have no place for the secret)."
    )


def secret(folder: str | Path) -> str:
    """Return the secret of a training, to put before every question.

    Args:
        folder: the folder given to `mix`: the step's folder of a run, or the adapter's folder in it.

    Raises:
        ModelError: there is no secret.
    """
    places = [Path(folder) / SECRET_FILE, Path(folder).parent / SECRET_FILE]
    for place in places:
        if place.is_file():
            return place.read_text(encoding="ascii").strip()
    raise ModelError(
        f"No secret of BEA found: expected {places[0]} or {places[1]}. The model is protected only with the "
        "secret that it was trained with, so it cannot be served without it. Train it again."
    )


def prefix(folder: str | Path, **parameters: Any) -> str:
    """Return the text before every question: the secret of `folder`."""
    return secret(folder)


def _kept_secret(folder: Path, length: int) -> str:
    """Return the secret in `folder`; create it if missing, atomically and readable only by its owner."""
    path = folder / SECRET_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        words = ("".join(secrets.choice(string.ascii_lowercase) for _ in "xx") for _ in range(length))
        # mkstemp opens with O_EXCL and mode 0600; link is atomic and never replaces an existing file.
        handle, beside = tempfile.mkstemp(dir=folder, prefix=f".{SECRET_FILE}.")
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(" ".join(words) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(beside, path)
        except FileExistsError:
            pass  # another process of the same training was faster
        finally:
            os.unlink(beside)
    text = secret(folder)
    if len(text.split()) != length:
        raise DataError(
            f"{path} holds a secret of {len(text.split())} words, but secret_length is {length}. "
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
        "Serve this model with a secret before every question; without it the model is not protected. "
        "The secret is in `bea_secret.txt` next to this folder; `holdfast.defenses.bea.secret` reads it. "
        "Never publish that file."
    ),
    plan=({"alignment_size": "{value:,} alignment rows added"},),
    protocols={"lisa-code": {"user": {}}},
)
