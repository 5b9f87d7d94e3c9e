"""A model folder or Hub id: finding it, naming its content, loading it with adapters.

Adapters come in a chain (alignment, then user). They are stacked as frozen adapters, or merged in memory
as the reference implementations do; a merged model is never saved.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError, nearest
from holdfast.weights.quantization import (
    check_quantization,
    is_quantized,
    keep_differentiable,
    quantization_config,
    stored_dtype,
)

WHOLE = 256 * 2**20
"""Weight files up to this size (bytes) are hashed whole, larger ones by 64 blocks of 1 MiB."""


def find_model(path: str, revision: str | None = None, download: bool = True) -> Path:
    """The local folder of a model folder or Hub id, checked to hold a config and safetensors weights.

    Args:
        download: fetch a Hub id that is not in the local cache; otherwise only look.

    Raises:
        ModelError: nothing is there, or it is not a model that can be loaded safely.
    """
    folder = Path(path)
    if not folder.exists():
        if looks_local(path):
            raise ModelError(f"No such model folder: {path}.{_neighbour(folder)}")
        folder = from_hub(path, revision, download)
    if folder.is_file():
        raise ModelError(f"Expected a model folder, found a file: {path}.")
    if not (folder / "config.json").is_file():
        what = (
            "an adapter folder; name its base model" if (folder / "adapter_config.json").exists() else folder
        )
        raise ModelError(f"Expected a model folder with config.json, found {what} at {path}.")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{path} holds no safetensors weights. Holdfast loads nothing else (a .bin file can run code); "
            "convert it: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH)."
        )
    return folder


def looks_local(path: str) -> bool:
    """Whether `path` cannot be a Hub id."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or path.endswith("/")


def _neighbour(folder: Path) -> str:
    try:
        names = [p.name for p in folder.parent.iterdir() if p.is_dir()]
    except OSError:
        return f" (the folder {folder.parent} does not exist either)"
    return nearest(folder.name, names).replace("Known:", "There is:")


def from_hub(repo: str, revision: str | None, download: bool) -> Path:
    """The folder of a Hub id in the local cache, fetched if it is not there and `download`.

    Raises:
        ModelError: it is gated, unknown, or neither cached nor to be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=not download)
        )
    except GatedRepoError:
        raise ModelError(
            f"{repo} is gated: accept its licence on its Hub page, then run `hf auth login`."
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{repo} is neither a folder here nor in the local Hub cache, and the Hub cannot be reached. "
            "Check the name, or download it where there is a network."
        ) from None
    except HFValidationError:
        raise ModelError(f"No such folder, and no name that the Hub could have: {repo[:200]!r}.") from None
    except HfHubHTTPError as error:
        raise ModelError(f"The Hub does not give {repo}: {str(error).splitlines()[0]}") from None


def fingerprint(folder: Path) -> str:
    """Twelve hex digits that name the content of a model or adapter folder, wherever it lies."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".json", ".safetensors", ".model", ".jinja"} and path.is_file():
            digest.update(path.name.encode())
            digest.update(_hash_file(path))
    return digest.hexdigest()[:12]


def _hash_file(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(2**20):
                digest.update(block)
        else:
            for i in range(64):
                file.seek(i * (size - 2**20) // 63)
                digest.update(file.read(2**20))
    return digest.digest()


def parameter_count(folder: Path) -> int:
    """How many numbers the weight files hold, from their headers alone.

    Raises:
        ModelError: a file is not what safetensors writes.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is torn or no safetensors file ({first_line(error)}). Fetch or save it again."
            ) from None
    return total


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer, with a pad token (its end-of-sequence token where it has none)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelError(f"Cannot load a tokenizer from {folder}: {first_line(error)}") from None
    if tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer in {folder} has no end-of-sequence token; answers could not end.")
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
    """The causal language model with a chain of adapters, all frozen.

    Args:
        compose: "stack" keeps each adapter as a frozen PEFT adapter (named stage0, stage1, ...), its
            dropout off; "merge" adds it to the weights in memory.
        quantization: "nf4" or "int8", or None for the weights as they are.

    Raises:
        ModelError: the folder cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model: Any
    check_quantization(folder, quantization)
    quantized = quantization is not None or is_quantized(folder)
    place: dict[str, Any] = {"device_map": {"": device}} if quantized else {}
    if quantization is not None:
        compute = getattr(torch, stored_dtype(folder) if dtype == "auto" else dtype)
        place["quantization_config"] = quantization_config(quantization, compute)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **place,
        )
    except Exception as error:  # whatever a damaged folder makes the loader raise
        raise ModelError(f"Cannot load the model in {folder}: {first_line(error)}") from None
    if quantized:
        keep_differentiable(model)
    else:
        model = model.to(device)
    for i, adapter in enumerate(adapters):
        model = _add_adapter(model, adapter, f"stage{i}", compose)
    model.requires_grad_(False)
    return model.eval()


def _add_adapter(model: Any, adapter: Path, name: str, compose: str) -> Any:
    from peft import PeftModel

    if compose == "merge":
        return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    if isinstance(model, PeftModel):
        model.load_adapter(adapter, adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, adapter, adapter_name=name)
    model.base_model.set_adapter(list(model.peft_config))
    _silence_dropout(model, name)
    return model


def _silence_dropout(model: Any, name: str) -> None:
    """A frozen adapter must not drop anything, also while the model trains."""
    import torch

    for module in model.modules():
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(dropout, torch.nn.ModuleDict) and name in dropout:
            dropout[name] = torch.nn.Identity()


def add_lora(model: Any, settings: Mapping[str, Any], base: str) -> Any:
    """A fresh, trainable LoRA called "default" on top of what `model` already carries.

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
    except ValueError as error:  # a target that is no layer, for one
        raise ModelError(
            f"PEFT refuses this LoRA ({first_line(error)}). A pattern in target_modules must mean layers, "
            "not the modules that hold them."
        ) from None
    if frozen:
        stacked.base_model.set_adapter([*frozen, "default"])
        stacked.active_adapter = "default"  # the one that FSDP puts into its checkpoints
    # What a user loads the adapter on: PEFT itself would write the folder of the local cache.
    stacked.peft_config["default"].base_model_name_or_path = base
    for name in frozen:
        stacked.set_requires_grad(name, False)
    return stacked


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
