"""ms-swift: `use_defense` and `use_probe`, for a file that `--external_plugins` names.

    from holdfast.integrations.ms_swift import use_defense, use_probe
    use_defense("bso_lisa", alignment_dataset="safe.jsonl", rho=1.0)
    use_probe("harmful.jsonl", every=50)   # and --callbacks holdfast_probe

Both change ms-swift's own tables, as its documentation describes for plug-ins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.errors import RecipeError
from holdfast.integrations.composing import rows_of
from holdfast.integrations.hosted import hosted, named_method, own_rows
from holdfast.integrations.prompt_sets import read_questions
from holdfast.probe import SafetyProbe
from holdfast.registry import faces

CALLBACK = "holdfast_probe"


def use_defense(
    defense: str,
    *,
    alignment_dataset: str | None = None,
    harmful_dataset: str | None = None,
    **parameters: Any,
) -> None:
    """Train with a method: `swift sft` then makes its trainer.

    Args:
        defense: bso_lisa, sbr, ewc, constrained_sft, or another method with a trainer.
        alignment_dataset: alignment rows; a file, the name of a data set of ours or a Hub id.
        harmful_dataset: harmful questions with answers, in the same forms.
        parameters: the parameters of the method.

    Raises:
        RecipeError: the name or a parameter is unknown, or rows are missing.
    """
    found = named_method(defense, "ms-swift")
    sources = rows_of(found, alignment_dataset, harmful_dataset)
    known = faces("defenses")[found.name].parameters
    for name in parameters:
        if name not in known:
            raise RecipeError(f"{defense} has no parameter '{name}'. Known: {', '.join(sorted(known))}.")
    from swift.trainers import Seq2SeqTrainer
    from swift.trainers.trainer_factory import TrainerFactory
    from transformers import Trainer

    class PlainLoader:
        """Uses transformers' own loader, which methods with two sources of batches divide."""

        def get_train_dataloader(self: Any) -> Any:
            """Return the loader of `transformers.Trainer`."""
            return Trainer.get_train_dataloader(self)

    def load_rows(made: Mapping[str, Any]) -> dict[str, Any]:
        args, template = made["args"], made["template"]
        if template.packing or template.padding_free:
            raise RecipeError(f"{defense} does not work with packing and padding_free. Leave them out.")
        return {kind: encoded(own_rows(kind, place, args.seed), template) for kind, place in sources.items()}

    globals()["Defended"] = hosted(found, parameters, load_rows, (PlainLoader, Seq2SeqTrainer), "Swift")
    TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.Defended"


def use_probe(prompts: str, **options: Any) -> None:
    """Measure the harmful score during the training, with `--callbacks holdfast_probe`.

    Args:
        prompts: harmful prompts; a data set of ours, a file or a Hub id.
        options: arguments of `SafetyProbe`, such as judge, every and limit.
    """
    from swift.callbacks import callbacks_map

    questions = [row["question"] for row in read_questions(prompts, "harmful").rows]
    callbacks_map[CALLBACK] = lambda args, trainer: SafetyProbe(questions, trainer=trainer, **options)


def encoded(rows: list[dict[str, Any]], template: Any) -> list[dict[str, Any]]:
    """Return rows as ms-swift encodes its own: with its template."""
    found = []
    for row in rows:
        if "messages" in row:
            messages = [dict(message) for message in row["messages"]]
        else:
            asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        made = template.encode({"messages": messages})
        found.append({name: list(made[name]) for name in ("input_ids", "labels")})
    return found
