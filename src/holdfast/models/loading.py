"""Loading a tokenizer, a model with its adapters, or a classifier: every `from_pretrained` is in this file.

Only safetensors files are read. Names, shapes and values are compared with the model: a folder with missing,
unexpected or mismatched tensors, or with numbers that are not finite, is refused. transformers and PEFT would
fill missing tensors with random numbers, leave out unexpected ones, and warn.

Adapters form a chain (alignment, then user). They are stacked as frozen adapters, or merged in memory as the
reference implementations do. A merged model is never saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError, first_line
from holdfast.models.dates import fix_date
from holdfast.models.dtypes import say_dtype, used_dtype
from holdfast.models.fitting import check_finite, check_names, fit_embeddings, named, of_text, reason
from holdfast.models.quantization import (
    check_quantization,
    is_quantized,
    quantization_config,
)
from holdfast.weights.adapter_folder import CONFIG, AdapterFolder, open_adapter
from holdfast.weights.chains import check_chain
from holdfast.weights.own_tokenizer import chat_template, tokenizer_folder
from holdfast.weights.patterns import check_patterns


def load_tokenizer(
    folder: Path,
    trust_remote_code: bool = False,
    adapters: Sequence[Path] = (),
    date: str | None = None,
) -> Any:
    """Return the tokenizer with a pad token (its end-of-sequence token if it has no pad token).

    Args:
        folder: the model.
        adapters: the adapters on it. The tokenizer of the last one that has its own is used, with its chat
            template. Its code is never run; `trust_remote_code` is about the model.
        date: what a chat template that writes today's date writes, as in "2026-03-01"; the default is fixed.

    Raises:
        ModelError: the tokenizer cannot be loaded, or an adapter's tokenizer lacks the model's chat template.
    """
    source = tokenizer_folder(folder, adapters)
    tokenizer = _tokenizer(source, trust_remote_code and source == folder)
    template = chat_template(adapters)
    if template is not None:
        tokenizer.chat_template = template
    if source != folder and not tokenizer.chat_template and _tokenizer(folder, False).chat_template:
        raise ModelError(
            f"The tokenizer in the adapter folder {source} has no chat template, but that of {folder} has "
            "one. Copy the template that the adapter was trained with into the adapter folder as "
            "chat_template.jinja, or remove the tokenizer's files from it to use the model's."
        )
    fix_date(tokenizer, date)
    return tokenizer


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file can raise any exception, and the parser raises no subclass
        raise ModelError(f"Cannot load a tokenizer from {folder}: {first_line(error)}") from None
    if tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer in {folder} has no end-of-sequence token, so answers cannot end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(model: Any, tokenizer: Any, source: Path) -> None:
    """Check that a model has an embedding for every token that its adapter's tokenizer added.

    Raises:
        ModelError: the adapter was trained with more embeddings than it holds.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    added = tokenizer.get_added_vocab()
    beyond = sorted(text for text, i in added.items() if i >= rows and text != tokenizer.pad_token)
    if beyond:
        raise ModelError(
            f"The tokenizer in {source} has tokens beyond the {rows:,} embeddings of the model: "
            f"{named(beyond)}. The adapter was trained with more embeddings, which its folder does not hold. "
            "Save it again with its embeddings (modules_to_save), or merge it with PEFT."
        )


def load_model(
    folder: Path,
    adapters: Sequence[Path] = (),
    *,
    compose: str = "stack",
    dtype: str = "auto",
    device: str = "cpu",
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return the causal language model with a chain of adapters, all frozen.

    Args:
        compose: "stack" keeps each adapter as a frozen PEFT adapter (named stage0, stage1, ...) without
            dropout; "merge" adds it to the weights in memory.
        dtype: "auto" is the stored dtype, or float32 on a device that is slow in it; another name is obeyed.
        quantization: "nf4" or "int8", or None for unchanged weights.

    Raises:
        ModelError: the model or an adapter cannot be loaded, does not fit, or needs an adapter below it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_chain(adapters)
    check_quantization(folder, quantization)
    quantized = quantization is not None or is_quantized(folder)
    place: dict[str, Any] = {"device_map": {"": device}} if quantized else {}
    used = used_dtype(folder, dtype, device)
    say_dtype(folder, dtype, used, device)
    if quantization is not None:
        compute = getattr(torch, used)
        place["quantization_config"] = quantization_config(quantization, compute)
    model, told = _from_folder(
        AutoModelForCausalLM,
        folder,
        "model",
        dtype=getattr(torch, used, "auto"),
        trust_remote_code=trust_remote_code,
        **place,
    )
    check_names(folder, type(model).__name__, of_text(folder, told, model))
    if quantized:
        from holdfast.training.quantised import keep_differentiable

        keep_differentiable(model)
    else:
        model = model.to(device)
    check_finite(folder, model)
    return with_adapters(model, adapters, compose)


def with_adapters(model: Any, adapters: Sequence[Path], compose: str = "stack") -> Any:
    """Return a base model with a chain of adapters, all frozen; `compose` is that of `load_model`.

    Raises:
        ModelError: an adapter cannot be loaded or does not fit.
    """
    for i, adapter in enumerate(adapters):
        model = _merged(model, adapter) if compose == "merge" else _stacked(model, adapter, f"stage{i}")
    model.requires_grad_(False)
    return model.eval()


def load_classifier(folder: Path, device: str = "cpu", dtype: str = "float32") -> Any:
    """A sequence classifier with one sigmoid output for each label, which computes in `dtype`.

    Raises:
        ModelError: it cannot be loaded, lacks weights, or has no pad token.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    model, told = _from_folder(
        AutoModelForSequenceClassification,
        folder,
        "judge",
        problem_type="multi_label_classification",
        dtype=getattr(torch, dtype),
    )
    if told["missing_keys"]:
        raise ModelError(
            f"{folder} holds no classifier: its weights lack {named(told['missing_keys'])}, which would be "
            "random. Expected a sequence classifier in beaver-dam's format."
        )
    check_names(folder, type(model).__name__, {**told, "unexpected_keys": ()})
    check_finite(folder, model)
    if model.config.pad_token_id is None:
        raise ModelError(
            f"The judge in {folder} has no pad_token_id in config.json; batches could not be read."
        )
    return model.eval().to(device)


def empty_model(folder: Path, trust_remote_code: bool = False) -> Any:
    """The causal language model on "meta": its modules without numbers.

    Raises:
        ModelError: it cannot be built from its config.
    """
    from transformers import AutoModelForCausalLM

    return _empty(AutoModelForCausalLM, "model", folder, trust_remote_code)


def empty_classifier(folder: Path) -> Any:
    """The sequence classifier on "meta": its modules without numbers.

    Raises:
        ModelError: it cannot be built from its config.
    """
    from transformers import AutoModelForSequenceClassification

    return _empty(AutoModelForSequenceClassification, "judge", folder)


def _empty(auto: Any, what: str, folder: Path, trust_remote_code: bool = False) -> Any:
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged or foreign config can raise any exception
        raise ModelError(f"Cannot build the {what} in {folder}: {first_line(error)}") from None


def put_on(model: Any, adapter: Path, name: str = "default", trainable: bool = False) -> Any:
    """The model with the adapter in a folder, under `name`.

    Raises:
        ModelError: it is not a LoRA in safetensors, or its settings, names or shapes do not fit the model.
    """
    from peft import PeftModel

    with open_adapter(adapter) as opened:
        _check_settings(opened, model)
        if not isinstance(model, PeftModel):
            fit_embeddings(model, opened)
    try:
        if not isinstance(model, PeftModel):
            with warnings.catch_warnings():  # the second call returns the names
                warnings.filterwarnings("ignore", "Found missing adapter keys")
                model = PeftModel.from_pretrained(model, adapter, adapter_name=name, is_trainable=trainable)
        told = model.load_adapter(adapter, adapter_name=name, is_trainable=trainable)
    except KeyError as error:  # a copy of a whole module is missing
        raise ModelError(f"The adapter in {adapter} lacks {error}. Save the adapter again.") from None
    except Exception as error:  # a damaged folder can raise any exception in PEFT
        raise ModelError(f"Cannot load the adapter in {adapter}: {reason(error)}") from None
    for what, keys in (("lacks", told.missing_keys), ("has", told.unexpected_keys)):
        if keys:
            shown = named(key.replace(f".{name}.", ".") for key in keys)
            why = "" if what == "lacks" else ", which the model would not use"
            raise ModelError(
                f"The adapter in {adapter} {what} {shown}{why}. It is for another architecture, was saved "
                "from a wrapped model, or is damaged. Give its base model, or save it again with PEFT."
            )
    return model


def _check_settings(opened: AdapterFolder, model: Any) -> None:
    """Refuse patterns that take too long, and settings of a later PEFT, which PEFT would ignore."""
    from peft import LoraConfig

    where = opened.folder / CONFIG
    check_patterns(where, opened.config, [name for name, _ in model.named_modules()])
    known = LoraConfig.__dataclass_fields__
    unknown = sorted(key for key, value in opened.config.items() if value and key not in known)
    if unknown:
        raise ModelError(
            f"{where} has settings that the installed PEFT does not know: {', '.join(unknown)[:200]}. Update "
            "peft, or remove them if they have no effect on the weights."
        )


def _stacked(model: Any, adapter: Path, name: str) -> Any:
    """The model with one more frozen adapter, without dropout."""
    above = hasattr(model, "peft_config")
    model = put_on(model, adapter, name)
    if above and model.peft_config[name].use_dora:
        raise ModelError(
            f"{adapter} is a DoRA adapter on top of another one. DoRA would scale the base weights without "
            "the adapter below it. In a recipe, write model.adapters: merge; on the command line, make one "
            "model of the parts below it first: holdfast merge."
        )
    try:
        model.base_model.set_adapter(list(model.peft_config))
    except ValueError as error:
        raise ModelError(
            f"{adapter} cannot be stacked on the adapters below it: {first_line(error)}. In a recipe, "
            "write model.adapters: merge; on the command line, make one model of the parts below it first: "
            "holdfast merge."
        ) from None
    _silence_dropout(model, name)
    return model


def _merged(model: Any, adapter: Path) -> Any:
    """The model with an adapter added to its weights in memory."""
    model = put_on(model, adapter)
    inside = model.get_base_model()
    table, head = inside.get_input_embeddings(), inside.get_output_embeddings()
    adapted = hasattr(table, "lora_A") or hasattr(head, "lora_A")
    if adapted and getattr(head, "weight", None) is table.weight:
        raise ModelError(
            f"The adapter in {adapter} adapts the embedding or the output head, which share their weights in "
            "this model, so it cannot be merged. Write model.adapters: stack."
        )
    try:
        return without_settings(model.merge_and_unload(safe_merge=True))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"Cannot merge the adapter in {adapter}: {first_line(error)}") from None


def without_settings(model: Any) -> Any:
    """A model that adapters were taken off, without the settings that older versions of PEFT leave on it."""
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _from_folder(kind: Any, folder: Path, what: str, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """A model from a folder's safetensors files, and the names of tensors that do not fit it."""
    try:
        return kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # a damaged folder can raise any exception in the loader
        raise ModelError(f"Cannot load the {what} in {folder}: {first_line(error)}") from None


def _silence_dropout(model: Any, name: str) -> None:
    """Turn off the dropout of a frozen adapter, which must stay off while the model trains."""
    import torch

    for module in model.modules():
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(dropout, torch.nn.ModuleDict) and name in dropout:
            dropout[name] = torch.nn.Identity()
