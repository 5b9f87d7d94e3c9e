"""Read data sets on the Hugging Face Hub with `datasets`; errors say what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.data.tables import BATCH, table_records
from holdfast.errors import DataError

_ID = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?$")


@dataclass(frozen=True)
class HubId:
    """A data set on the Hub: `owner/name`, with an optional configuration and revision."""

    repo: str
    config: str | None = None
    revision: str | None = None

    @classmethod
    def read(cls, text: str) -> HubId | None:
        """Parse `owner/name[:config][@revision]`; None if `text` has another form."""
        match = _ID.match(text)
        if match is None or text.startswith((".", "~")):
            return None
        return cls(match["repo"], match["config"], match["revision"])

    def __str__(self) -> str:
        return self.repo + (f":{self.config}" if self.config else "")


def hub_records(hub: HubId, split: str) -> list[dict[str, Any]]:
    """Read every record of one split, from the Hub or its cache. Raises DataError."""
    import datasets

    try:
        found = datasets.load_dataset(hub.repo, hub.config, split=split, revision=hub.revision)
        tables = found.with_format("arrow").iter(BATCH)
        return [record for table in tables for record in table_records(str(hub), table)]
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"The data set '{hub}' (split {split}) cannot be loaded. {_advice(error)}") from error


def hub_files(hub: HubId, pattern: str) -> list[Path]:
    """The files of the repository that match `pattern`, downloaded or cached. Raises DataError."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub.repo, repo_type="dataset", revision=hub.revision, allow_patterns=[pattern]
        )
    except Exception as error:
        raise DataError(f"The data set '{hub}' ({pattern}) cannot be loaded. {_advice(error)}") from error
    found = sorted(Path(folder).glob(pattern))
    if not found:
        raise DataError(f"The data set '{hub}' has no file {pattern}. Give a local file instead.")
    return found


def hub_revision(hub: HubId) -> str:
    """The commit that `hub_records` reads: the pinned commit, the Hub's newest, or the cached one."""
    from huggingface_hub import HfApi, constants, file_download

    if hub.revision and re.fullmatch(r"[0-9a-f]{40}", hub.revision):
        return hub.revision
    try:
        revision = HfApi().dataset_info(hub.repo, revision=hub.revision, timeout=20).sha
        if revision:
            return revision
    except Exception as error:
        folder = file_download.repo_folder_name(repo_id=hub.repo, repo_type="dataset")
        cached = Path(constants.HF_HUB_CACHE) / folder / "refs" / (hub.revision or "main")
        if cached.is_file():
            return cached.read_text(encoding="utf-8").strip()
        text = f"The data set '{hub}' cannot be reached. {_advice(error)}"
        raise DataError(text).not_here() from error
    raise DataError(f"The Hub gives no revision of '{hub}'. Pin one: {hub}@<commit>.")


def _advice(error: Exception) -> str:
    """One or two sentences: what is wrong, and what to do."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    kinds = {kind.__name__ for item in chain for kind in type(item).__mro__}
    text = " ".join(str(item) for item in chain)
    # Only the first line is repeated: the rest of these messages is links and request ids.
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if "GatedRepoError" in kinds or "gated" in text.lower():
        return "It is gated: accept its terms on its Hub page, then log in with `hf auth login`."
    if kinds & {"OfflineModeIsEnabled", "ConnectionError", "ConnectError", "LocalEntryNotFoundError"}:
        return (
            "The Hub cannot be reached (no network, or HF_HUB_OFFLINE is set), and the data set is not in "
            "the cache. Download it once while online, or give a local file."
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return (
            "The Hub has no such data set, or it is private. Check the spelling, or log in with "
            "`hf auth login`; a local file needs its file extension, as in my/rows.jsonl."
        )
    return f"{reason} Check the configuration (owner/name:config) and the split, or give a local file."
