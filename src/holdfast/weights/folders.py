"""A model or adapter folder, or a Hub id: finding it and naming its content; nothing here needs torch."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from holdfast.errors import ModelError, first_line, nearest


def model_path(path: str) -> str | Path:
    """The folder or Hub id of the model; "world" is the embedded one."""
    if path == "world":
        from holdfast import world

        return world.MODEL
    return path


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


def check_adapter(folder: Path) -> Path:
    """The folder itself, checked to hold an adapter that can be loaded safely.

    Raises:
        ModelError: there is no adapter, or its weights are not in safetensors.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"Expected an adapter folder with adapter_config.json, found none at {folder}.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"The adapter in {folder} has no adapter_model.safetensors; nothing else is loaded.")
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
        raise ModelError(f"The Hub does not give {repo}: {first_line(error)}") from None


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
