"""Upload a folder to a model repository on the Hugging Face Hub; called only if the user asks for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from holdfast.errors import OutputError, first_line

NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def check(repo: str, *, public: bool = False, endpoint: str | None = None) -> None:
    """Check that a folder could be uploaded: the name, the connection, the token and the repository.

    Nothing is created.

    Raises:
        OutputError: it could not be uploaded; the message says what to do.
    """
    if not NAME.fullmatch(repo) or ".." in repo or "--" in repo:
        raise OutputError(f"--push: expected a repository such as my-name/my-adapter, found {repo!r}.")
    api = _api(endpoint)
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        api.whoami()
    except Exception as error:
        text = f"--push {repo}: the Hub cannot be used ({first_line(error)[:200]})"
        raise OutputError(f"{text}. Log in with: hf auth login. Check also the network.") from None
    try:
        found = api.model_info(repo)
    except RepositoryNotFoundError:
        return
    except Exception as error:
        raise OutputError(f"--push {repo}: {first_line(error)[:200]}") from None
    if not found.private and not public:
        raise OutputError(
            f"--push {repo}: this repository exists and is public. Add --public, or name another one."
        )


def push(
    folder: Path,
    repo: str,
    *,
    public: bool = False,
    message: str = "Upload by Holdfast",
    endpoint: str | None = None,
) -> str:
    """Upload the files of a folder, and return the address of the repository.

    Args:
        folder: its files replace those of the same name in the repository; other files there stay.
        repo: the repository; it is created if it does not exist.
        public: whether a new repository is public; else it is private, and a public one is refused.

    Raises:
        OutputError: it cannot be uploaded.
    """
    check(repo, public=public, endpoint=endpoint)
    api = _api(endpoint)
    try:
        made = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=str(folder), commit_message=message)
    except Exception as error:
        text = f"--push {repo}: the upload failed ({first_line(error)[:200]})"
        raise OutputError(f"{text}. Nothing on this machine changed: the same command tries again.") from None
    return str(made)


def _api(endpoint: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, library_name="holdfast")
