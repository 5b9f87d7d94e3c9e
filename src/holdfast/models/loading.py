"""Loading a tokenizer, a model with its adapters, or a classifier: every `from_pretrained` is in this file.

Only safetensors files are read. Names, shapes and values are compared with the model: a folder with missing,
unexpected or mismatched tensors, or with numbers that are not finite, is refused. transformers and PEFT would
fill missing tensors with random numbers, leave out unexpected ones, and warn.

Adapters form a chain (alignment, then user). They are stacked as frozen adapters, or merged in memory as the
reference implementations do. A merged model is never saved.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError, first_line
from holdfast.models.quantization import (
    check_quantization,
    is_quantized,
    quantization_config,
    stored_dtype,
)
from holdfast.weights.adapter_folder import CONFIG, AdapterFolder, open_adapter
from holdfast.weights.files import read_config
from holdfast.weights.patterns import check_patterns


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer with a pad token (its end-of-sequence token if it has no pad token)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelError(f"Cannot load a tokenizer from {folder}: {first_line(error)}") from None
    if tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer in {folder} has no end-of-sequence token, so answers cannot end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
        quantization: "nf4" or "int8", or None for unchanged weights.

    Raises:
        ModelError: the model or an adapter cannot be loaded, or lacks weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_quantization(folder, quantization)
    quantized = quantization is not None or is_quantized(folder)
    place: dict[str, Any] = {"device_map": {"": device}} if quantized else {}
    if quantization is not None:
        compute = getattr(torch, stored_dtype(folder) if dtype == "auto" else dtype)
        place["quantization_config"] = quantization_config(quantization, compute)
    model, told = _from_folder(
        AutoModelForCausalLM,
        folder,
        "model",
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        **place,
    )
    _check_names(folder, type(model).__name__, _of_text(folder, told, model))
    if quantized:
        from holdfast.training.quantised import keep_differentiable

        keep_differentiable(model)
    else:
        model = model.to(device)
    _check_finite(folder, model)
    for i, adapter in enumerate(adapters):
        model = _merged(model, adapter) if compose == "merge" else _stacked(model, adapter, f"stage{i}")
    model.requires_grad_(False)
    return model.eval()


def load_classifier(folder: Path, device: str = "cpu") -> Any:
    """A sequence classifier with one sigmoid output for each label.

    Raises:
        ModelError: it cannot be loaded, lacks weights, or has no pad token.
    """
    from transformers import AutoModelForSequenceClassification

    model, told = _from_folder(
        AutoModelForSequenceClassification, folder, "judge", problem_type="multi_label_classification"
    )
    if told["missing_keys"]:
        raise ModelError(
            f"{folder} holds no classifier: its weights lack {_named(told['missing_keys'])}, which would be "
            "random. Expected a sequence classifier in beaver-dam's format."
        )
    _check_names(folder, type(model).__name__, {**told, "unexpected_keys": ()})
    _check_finite(folder, model)
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
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged or foreign config can raise any exception
        raise ModelError(f"Cannot build the model in {folder}: {first_line(error)}") from None


def put_on(model: Any, adapter: Path, name: str = "default", trainable: bool = False) -> Any:
    """The model with the adapter in a folder, under `name`.

    Raises:
        ModelError: it is not a LoRA in safetensors, or its settings, names or shapes do not fit the model.
    """
    from peft import PeftModel

    with open_adapter(adapter) as opened:
        _check_settings(opened, model)
    try:
        if not isinstance(model, PeftModel):
            with warnings.catch_warnings():  # the second call returns the names
                warnings.filterwarnings("ignore", "Found missing adapter keys")
                model = PeftModel.from_pretrained(model, adapter, adapter_name=name, is_trainable=trainable)
        told = model.load_adapter(adapter, adapter_name=name, is_trainable=trainable)
    except KeyError as error:  # a copy of a whole module is missing
        raise ModelError(f"The adapter in {adapter} lacks {error}. Save the adapter again.") from None
    except Exception as error:  # a damaged folder can raise any exception in PEFT
        raise ModelError(f"Cannot load the adapter in {adapter}: {_reason(error)}") from None
    for what, keys in (("lacks", told.missing_keys), ("has", told.unexpected_keys)):
        if keys:
            named = _named(key.replace(f".{name}.", ".") for key in keys)
            why = "" if what == "lacks" else ", which the model would not use"
            raise ModelError(
                f"The adapter in {adapter} {what} {named}{why}. It is for another architecture, was saved "
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
            "the adapter below it. Write model.adapters: merge."
        )
    try:
        model.base_model.set_adapter(list(model.peft_config))
    except ValueError as error:
        raise ModelError(
            f"{adapter} cannot be stacked on the adapters below it: {first_line(error)}. Write "
            "model.adapters: merge."
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
        return model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"Cannot merge the adapter in {adapter}: {first_line(error)}") from None


def _from_folder(kind: Any, folder: Path, what: str, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """A model from a folder's safetensors files, and the names of tensors that do not fit it."""
    try:
        return kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # a damaged folder can raise any exception in the loader
        raise ModelError(f"Cannot load the {what} in {folder}: {first_line(error)}") from None


def _of_text(folder: Path, told: Mapping[str, Any], model: Any) -> Mapping[str, Any]:
    """Leave out unexpected tensors that the checkpoint of this model has for other purposes.

    A multimodal model also has towers for images or sound; some have layers that predict further tokens.
    """
    whole, text = read_config(folder / "config.json"), model.config.get_text_config().to_dict()
    towers = any(f"{part}_config" in whole for part in ("text", "vision", "audio"))
    own = {".".join(name.split(".")[:2]) for name in model.state_dict()}
    first = text.get("num_hidden_layers") or 0
    further = range(first, first + (text.get("num_nextn_predict_layers") or 0))

    def other(name: str) -> bool:
        layer = re.search(r"(?:^|\.)layers\.(\d{1,6})\.", name)
        if layer and int(layer[1]) in further:
            return True
        return towers and ".".join(name.split(".")[:2]) not in own

    return {**told, "unexpected_keys": [name for name in told["unexpected_keys"] if not other(name)]}


def _check_names(folder: Path, kind: str, told: Mapping[str, Any]) -> None:
    """Refuse a model folder with tensors that are missing, of other shapes, or not part of the model."""
    if told["missing_keys"]:
        raise ModelError(
            f"The weights in {folder} lack {_named(told['missing_keys'])}, which would be random. Expected "
            f"all weights of {kind}; save the model again."
        )
    shapes = sorted((name, list(found), list(needed)) for name, found, needed in told["mismatched_keys"])
    if shapes:
        name, found, needed = shapes[0]
        more = f" ({len(shapes) - 1} more do not fit either)" if len(shapes) > 1 else ""
        raise ModelError(
            f"'{name}' has the shape {found} in the weights of {folder}, but config.json asks for {needed}"
            f"{more}. Weights and config.json belong to two models; save the model again."
        )
    if told["unexpected_keys"]:
        raise ModelError(
            f"The weights in {folder} have {_named(told['unexpected_keys'])}, which {kind} would not use. "
            "config.json describes another model; save the model again."
        )


def _check_finite(folder: Path, model: Any) -> None:
    """Refuse a model with NaN or infinity in its weights, whose answers would be arbitrary."""
    import torch

    for name, p in model.named_parameters():
        # A sum needs no memory; one-byte floats belong to quantised weights.
        if p.is_floating_point() and p.element_size() > 1 and not p.sum(dtype=torch.float32).isfinite():
            raise ModelError(
                f"'{name}' in {folder} holds values that are not finite (NaN or infinity). Save or fetch the "
                "weights again."
            )


def _named(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def _reason(error: Exception) -> str:
    """The first line of an error that says something: torch lists shapes from the second line on."""
    lines = str(error).split("\n")
    return next((line.strip()[:300] for line in lines if "size mismatch" in line), first_line(error))


def _silence_dropout(model: Any, name: str) -> None:
    """Turn off the dropout of a frozen adapter, which must stay off while the model trains."""
    import torch

    for module in model.modules():
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(dropout, torch.nn.ModuleDict) and name in dropout:
            dropout[name] = torch.nn.Identity()


def add_lora(model: Any, settings: Mapping[str, Any], base: str) -> Any:
    """Add a fresh, trainable LoRA called "default" on top of the adapters of `model`.

    Args:
        settings: a recipe's `lora` block: `r`, `alpha`, `dropout`, and other fields of `LoraConfig`.

    Raises:
        ModelError: PEFT refuses it.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    renamed = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    config = LoraConfig(task_type="CAUSAL_LM", **{renamed.get(k, k): v for k, v in settings.items()})
    stacked: Any = model
    frozen = list(model.peft_config) if isinstance(model, PeftModel) else []
    try:
        if frozen:
            stacked.add_adapter("default", config)
        else:
            stacked = get_peft_model(model, config)
    except ValueError as error:  # for example a target that is not a layer
        raise ModelError(
            f"PEFT refuses this LoRA ({first_line(error)}). A pattern in target_modules must match layers, "
            "not the modules that contain them."
        ) from None
    if frozen:
        stacked.base_model.set_adapter([*frozen, "default"])
        stacked.active_adapter = "default"  # FSDP saves this adapter in its checkpoints
    # The model to load the adapter on. PEFT itself would write the folder of the local cache.
    stacked.peft_config["default"].base_model_name_or_path = base
    for name in frozen:
        stacked.set_requires_grad(name, False)
    return stacked
