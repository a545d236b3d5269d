"""Fetches single files of a Hub repository and lists their names, with errors that say what to do."""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

logger = logging.getLogger(__name__)

PATIENCE = 3  # seconds until the log says what is waited for; without a network, huggingface_hub tries for 25

# base error of huggingface_hub's HTTP library, which differs between its versions
FAILED_REQUEST: Any = HfHubHTTPError.__bases__[0]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def fetch(repository: str, file: str, *, revision: str | None = None, offline: bool = False) -> Path | None:
    """One file of a Hub repository, from the cache or downloaded.

    Args:
        repository: "owner/name".
        file: Its path in the repository.
        revision: Branch, tag or commit; None: the default branch.
        offline: Look only in the cache.
    Returns:
        Path of the file; None: the repository has no such file (offline: or it is not in the cache).
    Raises:
        ValueError: the repository is missing, private, gated or out of reach, or has no such revision.
    """
    at = f" at revision {revision}" if revision else ""
    try:
        with log_if_slow("waiting for the Hub: %s of %s", file, repository):
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        if offline:
            return None
        raise ValueError(
            f"the Hub cannot be reached and {file} of {repository}{at} is not in the local cache: check the network, "
            "use the cache with offline=True (--offline, HF_HUB_OFFLINE=1), or pass the folder of a local copy"
        ) from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise ValueError(
            f"{repository} is gated: accept its terms at https://huggingface.co/{repository}, log in with "
            "`hf auth login`, and try again"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{repository} is neither a local folder nor a public Hub repository: check the name, or log in with "
            "`hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{repository} has no revision {revision!r}: its branches, tags and commits are listed at "
            f"https://huggingface.co/{repository}/commits/main"
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(f"the Hub returned an error for {repository}{at}: {error}; try again later") from error


def list_file_names(
    repository: str, folder: str, *, revision: str | None = None, offline: bool = False
) -> list[str] | None:
    """Names of the files in one folder of a Hub repository; none is downloaded.

    Args:
        repository: "owner/name".
        folder: Its path in the repository; "": the top level.
        revision: As in `fetch`.
        offline: List only what is in the cache.
    Returns:
        Sorted names; None: the Hub sent no list, or nothing of the repository is in the cache.
    """
    try:
        if offline:
            root = Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
            paths = [file.relative_to(root) for file in root.rglob("*")]
        else:
            with log_if_slow("waiting for the Hub: the files of %s", repository):
                paths = [Path(name) for name in huggingface_hub.list_repo_files(repository, revision=revision)]
    except (FAILED_REQUEST, OSError):
        return None
    return sorted(path.name for path in paths if path.parent == Path(folder))


@contextmanager
def log_if_slow(*message: str) -> Iterator[None]:
    """Context manager that logs a message if its body takes long."""
    timer = threading.Timer(PATIENCE, logger.info, message)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_repository(name: str) -> bool:
    """Whether a name has the form of a Hub id, owner/name."""
    return _REPOSITORY.fullmatch(name) is not None


def snapshot_of(path: Path) -> tuple[str, str] | None:
    """(repository, commit) of a path inside the Hub's cache, None for any other path."""
    for folder in (path, *path.parents):
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/", 1), folder.name
    return None
