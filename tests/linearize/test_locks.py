"""One process at a time in a folder, and removal of what killed processes left there."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from lineardit.linearize import locks
from lineardit.linearize.folders import write_atomically
from lineardit.linearize.locks import folder_lock, remove_leftovers


def test_folder_lock_error_names_the_process_that_holds_the_lock(tmp_path: Path) -> None:
    error = rf"another process is using .*run \(process {os.getpid()} on {socket.gethostname()}\): wait for it, stop it"
    with folder_lock(tmp_path / "run"):
        with pytest.raises(ValueError, match=error), folder_lock(tmp_path / "run"):
            pass
        with folder_lock(tmp_path / "run", name=".other"):
            pass
    assert not (tmp_path / "run").exists()


def test_folder_lock_works_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to("/dev/full")
    with folder_lock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_folder_lock_retries_when_the_lock_file_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The previous holder removes it after we open it and before we lock it."""
    lock, calls = locks._lock, []

    def slow(file: locks.IO[bytes]) -> bool:
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return lock(file)

    monkeypatch.setattr(locks, "_lock", slow)
    with folder_lock(tmp_path):
        assert "process" in (tmp_path / ".lock").read_text()
    assert len(calls) == 2


def test_remove_leftovers_removes_the_files_of_a_killed_writer(tmp_path: Path) -> None:
    def hang(path: Path) -> None:
        path.write_text("half")
        path.with_name(".tmpAbCdEf").write_text("as safetensors does")
        time.sleep(60)

    writer = os.fork()
    if not writer:
        write_atomically(tmp_path / "shard-1.safetensors", hang)
    while not list(tmp_path.glob(".shard*/.tmp*")):
        time.sleep(0.01)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    (tmp_path / ".index.json.7.tmp").write_text("half")
    (tmp_path / ".adapter.abc.old").mkdir()
    (tmp_path / ".shards.old").mkdir()
    (tmp_path / ".mine.txt.7.tmp").write_text("mine")
    names = ("shard-*", "index*", "adapter.*")
    with folder_lock(tmp_path, name=".one.lock"):
        with folder_lock(tmp_path, name=".two.lock"):
            remove_leftovers(tmp_path, names, locks=".*.lock")
            assert len(list(tmp_path.glob(".*.tmp"))) == 3
        remove_leftovers(tmp_path, names, locks=".*.lock")
    left = {".adapter.abc.old", ".mine.txt.7.tmp", ".shards.old"}  # the first may be the only copy of an adapter
    assert {path.name for path in tmp_path.iterdir()} == left
    (tmp_path / "adapter").mkdir()
    with folder_lock(tmp_path):
        remove_leftovers(tmp_path, names)
    assert not (tmp_path / ".adapter.abc.old").exists()


def test_remove_leftovers_removes_nothing_without_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    (tmp_path / ".index.json.7.tmp").write_text("half")
    with folder_lock(tmp_path):
        remove_leftovers(tmp_path, ("index*",))
    assert (tmp_path / ".index.json.7.tmp").exists()
