"""Find a model or adapter folder or Hub id and fingerprint its content. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from holdfast import lab
from holdfast.errors import ModelError, first_line, nearest
from holdfast.machine.digests import Digests
from holdfast.weights.files import check_regular

NAMED_BY = (".json", ".safetensors", ".model", ".jinja", ".txt", ".tiktoken", ".py")
"""Suffixes of the files that determine the behaviour of a model or adapter."""
MOST = 10
"""The largest number of folders that a message lists."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def model_path(path: str) -> str | Path:
    """Return the folder or Hub id of a model; "world" is the embedded model, "smollm2" the lab model."""
    if path == "world":
        from holdfast import world

        return world.MODEL
    if path == lab.NAME and not Path(path).exists():
        return lab.cached() or path
    return path


def find_model(path: str, revision: str | None = None, download: bool = True) -> Path:
    """Return the local folder of a model that has a config and safetensors weights.

    Args:
        path: a folder, a Hub id, or a name of `model_path`.
        download: fetch a Hub id that is not in the local cache. If False, only search the cache.

    Raises:
        ModelError: nothing is found, or the folder is not a model that can be loaded safely.
    """
    folder = Path(model_path(path))
    check_revision(path, folder, revision)
    if not folder.exists() and path == lab.NAME:
        folder = _lab_model(download)
    elif not folder.exists():
        if looks_local(path):
            raise ModelError(f"No such model folder: {path}.{_neighbour(folder)}")
        folder = from_hub(path, revision, download)
    if not folder.is_dir():
        raise ModelError(f"Expected a model folder, found a file: {path}.")
    check_regular(folder, NAMED_BY)
    if holds_adapter(folder):
        raise ModelError(
            f"Expected a model folder with config.json and weights, found an adapter folder; give its base "
            f"model, and {path} as the adapter."
        )
    if not (folder / "config.json").is_file():
        at = "" if str(folder) == path else f" ({folder})"
        raise ModelError(
            f"Expected a model folder with config.json, found none in {path or 'an empty path'}{at}."
        )
    if not _model_weights(folder):
        raise ModelError(
            f"{path} holds no safetensors weights. Holdfast loads nothing else (a .bin file can run code); "
            "convert it: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH)."
        )
    return folder


def check_revision(name: str, folder: Path, revision: str | None) -> None:
    """Raise ModelError for a revision of a folder on this machine, which has none."""
    if revision is not None and (folder.exists() or name == lab.NAME):
        raise ModelError(
            f"{name} is on this machine, so the revision '{revision}' has no effect. Leave it out, or "
            "give an id of the Hub."
        )


def _lab_model(make: bool) -> Path:
    """Return the folder of the lab model, which is made if it is missing and `make` is true."""
    folder = lab.model_folder() if make else lab.cached()
    if folder is None:
        lab.gguf_file()
        raise ModelError(
            "The lab model has not been made yet. `holdfast lab` and `holdfast run` make it from the "
            "installed package."
        )
    return folder


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter; trainers may save the base model's config.json beside it.

    Raises:
        ModelError: it holds a model and an adapter.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        return False
    if _model_weights(folder):
        raise ModelError(
            f"{folder} holds a model and an adapter, and transformers would put the adapter on the model. "
            f"Move {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} into a folder of their own."
        )
    return True


def _model_weights(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS]


def looks_local(path: str) -> bool:
    """Whether `path` cannot be a Hub id."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or path.endswith("/")


def _neighbour(folder: Path) -> str:
    try:
        names = [p.name for p in folder.parent.iterdir() if p.is_dir()]
    except OSError:
        return f" (the folder {folder.parent} does not exist either)"
    close = nearest(folder.name, names)
    many = len(names) > MOST and "Known:" in close
    return "" if many else close.replace("Known:", "There is:")


def from_hub(repo: str, revision: str | None, download: bool) -> Path:
    """Return the folder of a Hub id in the local cache. If it is missing and `download` is true, fetch it.

    Raises:
        ModelError: the repository is gated or unknown, or it is not cached and the Hub cannot be reached.
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
        ).not_here() from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{repo} is neither a local folder nor in the local Hub cache, and the Hub cannot be reached. "
            "Check the name, or download it on a machine with network access."
        ).not_here() from None
    except HFValidationError:
        raise ModelError(f"Not an existing folder and not a valid Hub name: {repo[:200]!r}.") from None
    except HfHubHTTPError as error:
        raise ModelError(f"The Hub did not return {repo}: {first_line(error)}") from None


def writes_date(folder: Path) -> bool:
    """Whether the chat template of a model folder writes today's date."""
    places = [folder / "tokenizer_config.json", folder / "chat_template.json", *folder.rglob("*.jinja")]
    for path in places:
        try:
            if path.is_file() and "strftime_now" in path.read_text(encoding="utf-8"):  # a pipe would wait
                return True
        except (OSError, ValueError):  # the loader reports a damaged file
            continue
    return False


def fingerprint(folder: Path, digests: Digests | None = None) -> str:
    """Return twelve hex digits that identify the content of a model or adapter folder, for any path.

    Args:
        digests: caches the SHA-256 of large files; without it every file is read.
    """
    digests = digests or Digests()
    files = sorted(path for path in folder.iterdir() if path.suffix in NAMED_BY and path.is_file())
    content = "".join(f"{path.name} {digests.of(path)}\n" for path in files)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def parameter_count(folder: Path) -> int:
    """Return how many numbers the weight files hold, from their headers alone.

    Raises:
        ModelError: a file is not a valid safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        if not path.is_file():
            continue
        try:
            with safe_open(path, framework="numpy") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is damaged or not a safetensors file ({first_line(error)}). Fetch or save it again."
            ) from None
    return total
