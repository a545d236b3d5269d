"""Atomic writes of files and output folders, and reading of safetensors files with helpful errors."""

import hashlib
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}  # of weights; any other counts as float32


@contextmanager
def new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling to write into, which becomes `path` when the block ends without an exception.

    Raises:
        ValueError: `path` exists and overwrite is False, or it is a file.
        OSError: it cannot be written, for example because the disk is full.
    """
    check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors writes files that only the owner can read
            sync(file)
        sync(temporary)
        _replace_folder(temporary, path)
        sync(path.parent)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's error names no file
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check that an output folder may be written at `path`.

    Raises:
        ValueError: it exists and overwrite is False, or it is a file.
        OSError: its parent folder is not writable.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"the output must be a folder, but {path} is a file")
    if path.exists() and not overwrite and any(path.iterdir()):
        raise ValueError(f"the output folder {path} exists: choose another one, or pass overwrite=True (--overwrite)")
    check_writable(path.parent)


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Check that a file may be written at `path`.

    Raises:
        ValueError: it exists and overwrite is False, or it is a folder.
        OSError: its folder is not writable.
    """
    if path.is_dir():
        raise ValueError(f"the output must be a file, but {path} is a folder")
    if path.exists() and not overwrite:
        raise ValueError(f"the output file {path} exists: choose another one, or pass overwrite=True (--overwrite)")
    check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """Try to write a small file in a folder, or in its nearest parent that exists.

    Raises:
        OSError: it cannot be written.
    """
    existing = next(existing for existing in (folder, *folder.parents) if existing.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:  # unnamed, where the system supports it
            file.write(b"something")
            file.flush()
    except OSError as error:
        raise OSError(f"cannot write in {existing} ({error.strerror}): choose another output") from error


def _replace_folder(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.replace(old)  # an empty folder may be replaced
    temporary.rename(path)
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file in a hidden folder next to `path`, then move it: readers see the old file or the new one.

    Of two writers, the last one wins. It is a folder because some writers make temporary files of their own.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary = folder / path.name
    try:
        folder.mkdir(exist_ok=True)
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors writes files that only the owner can read
        sync(temporary)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's error names no file
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's or folder's bytes are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file.

    Raises:
        ValueError: there is no such file, it is truncated, or not in this format.
    """
    with _opened(path) as file:
        return file.metadata() or {}


def read_tensors(path: Path, *, only: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names pass `only`, on the CPU.

    Raises:
        ValueError: there is no such file, it is truncated, or not in this format.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys() if only(name)}  # noqa: SIM118


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device, by its header.

    Raises:
        ValueError: there is no such file, it is truncated, or not in this format.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: torch.empty(one.get_shape(), dtype=_DTYPES.get(one.get_dtype(), torch.float32), device="meta")
            for name, one in slices.items()
        }


def main_dtype(path: Path) -> torch.dtype:
    """The dtype with the most bytes in a safetensors file, by its header.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    with _opened(path) as file:
        numbers: Counter[torch.dtype] = Counter()
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            numbers[_DTYPES.get(tensor.get_dtype(), torch.float32)] += math.prod(tensor.get_shape())
    return max(numbers, key=lambda dtype: numbers[dtype] * dtype.itemsize)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: copy the missing file again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}): copy or download it again") from error
