"""Locks that let one process at a time work in a folder, and removal of what killed processes left in it."""

import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TRIES, PAUSE = 5, 0.05  # in seconds: another process may be testing the lock


@contextmanager
def folder_lock(folder: Path, *, name: str = ".lock") -> Iterator[None]:
    """Context manager that makes and locks a folder for this process, and removes it in the end if it is empty.

    Nothing is locked where the system has no locks of this kind (Windows, some network disks).

    Args:
        name: Name of the lock file; processes that use different names can share a folder.
    Raises:
        ValueError: another process holds it, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, but it is a file")
    file = folder / name
    with _locked(file) as lock:
        holder = f"process {os.getpid()} on {socket.gethostname()}".encode()
        with suppress(OSError):  # a full disk
            lock.write(holder)
            lock.truncate(len(holder))
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def remove_leftovers(folder: Path, names: Sequence[str], *, locks: str = ".lock") -> None:
    """Remove what killed writers of these files left in a folder, unless another process may be writing there.

    Args:
        folder: Locked by this process (`folder_lock`).
        names: Patterns of the files that `write_atomically` and `new_folder` make there, such as "shard-*".
        locks: The pattern of the names by which processes hold this folder.
    """
    leftovers = [path for name in names for path in folder.glob(f".{name}.tmp")]  # listed before the locks are tested
    if sum(map(_is_locked, folder.glob(locks))) != 1:  # others work here; or there are no locks on this disk
        return
    replaced = [path for name in names for path in folder.glob(f".{name}.old")]
    leftovers += [path for path in replaced if (folder / path.name[1:].rsplit(".", 2)[0]).exists()]  # if replaced
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(file: Path) -> Iterator[IO[bytes]]:
    """The file, open and locked."""
    for last in range(1 - TRIES, 1):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "r+b", buffering=0, opener=_create) as lock:  # with a buffer, closing would write once more
            if not _lock(lock):
                if not last:
                    holder = lock.read().decode() or "unknown"
                    raise ValueError(
                        f"another process is using {file.parent} ({holder}): wait for it, stop it, or choose another "
                        "folder"
                    )
            elif _is_current(lock, file):
                yield lock
                return
        time.sleep(PAUSE)
    raise ValueError(f"{file} is repeatedly removed by other processes: check which processes use {file.parent}")


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _lock(file: IO[Any]) -> bool:
    """Try to lock a file; False if another process holds it."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this disk
        pass
    return True


def _is_current(lock: IO[Any], file: Path) -> bool:
    """Whether the lock is still the file of this name, which the previous holder removes in the end."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as file:
            return not _lock(file)
    except FileNotFoundError:
        return False
