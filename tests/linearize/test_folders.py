"""Folders that appear complete or not at all."""

import errno
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lineardit.linearize.folders import check_output_file, check_writable, new_folder, read_tensors, write_atomically


def test_new_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    with new_folder(path, overwrite=False) as temporary:
        (temporary / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(errno.ENOSPC, "No space left")])
def test_new_folder_error_names_the_folder_on_a_full_disk(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(OSError, match=r"folder.*No space left|No space left.*folder"),
        new_folder(tmp_path / "folder", overwrite=False),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_new_folder_has_the_default_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "ours", overwrite=False):
        pass
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_new_folder_keeps_the_old_one_when_its_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(error), new_folder(path, overwrite=True) as temporary:
        (temporary / "new").touch()
        raise error
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_new_folder_replaces_all_of_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with new_folder(path, overwrite=True) as temporary:
        (temporary / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_new_folder_refuses_existing_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"folder exists: .*overwrite=True"),
        new_folder(tmp_path / "folder", overwrite=False),
    ):
        pass
    with pytest.raises(ValueError, match="is a file"), new_folder(tmp_path / "file", overwrite=True):
        pass


def test_write_atomically_error_names_the_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "report.json").write_text("old")
    with pytest.raises(OSError, match=r"No space left on device: '.*/report.json'"):
        write_atomically(tmp_path / "report.json", full)
    with pytest.raises(FileNotFoundError, match=r"missing/report.json'"):
        write_atomically(tmp_path / "missing" / "report.json", lambda temporary: temporary.write_text("new"))
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_check_writable_leaves_no_files_and_names_the_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "new" / "deep")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write in .*/file \(Not a directory\): choose another output"):
        check_output_file(tmp_path / "file" / "deep" / "out.png", overwrite=False)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("tempfile.TemporaryFile", Mock(side_effect=full))
    with pytest.raises(OSError, match=r"\(No space left on device\): choose another output"):
        check_writable(tmp_path)


def test_read_tensors_refuses_missing_and_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"x.safetensors does not exist"):
        read_tensors(file)
    save_file({"a": torch.ones(3), "b": torch.zeros(2)}, file)
    assert set(read_tensors(file, only=lambda name: name != "a")) == {"b"}
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"x.safetensors is damaged"):
        read_tensors(file)
