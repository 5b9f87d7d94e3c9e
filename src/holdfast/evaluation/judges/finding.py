"""Find a judge's model: a model or adapter folder, a Hub id, or "world" for the embedded judge."""

from __future__ import annotations

from pathlib import Path

from holdfast.weights.adapter_folder import check_adapter
from holdfast.weights.folders import find_model, from_hub, looks_local


def find_judge(path: str, download: bool = True) -> Path:
    """Return the local folder of a judge's model or adapter.

    Args:
        download: fetch a Hub id that is not in the local cache. If False, only search the cache.

    Raises:
        ModelError: nothing is found, or it is neither a model nor an adapter in safetensors.
    """
    if path == "world":
        from holdfast import world

        return world.JUDGE
    folder = Path(path) if Path(path).exists() or looks_local(path) else from_hub(path, None, download)
    if not (folder / "adapter_config.json").is_file():
        return find_model(str(folder), download=download)
    return check_adapter(folder)
