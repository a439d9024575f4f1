"""Files and folders that are whole or absent: links, modes, names, locks, full disks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmimg.atomic_write import atomic_file, atomic_folder, clear_leftovers, disk_full, locked, reserve
from glmimg.checkpoint import Checkpoint, save_component
from glmimg.errors import BadInput, GlmimgError
from glmimg.serving.auth import KeyFile, add_key

posix = pytest.mark.skipif(os.name != "posix", reason="links and modes")


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_what_appears_meanwhile_is_kept_and_so_is_what_was_made(tmp_path: Path) -> None:
    for kind, name, kept in ((atomic_folder, "made", "made-2"), (atomic_file, "made.gguf", "made-2.gguf")):
        with pytest.raises(BadInput, match=kept), kind(tmp_path / name, replace=False) as temporary:
            if kind is atomic_folder:
                (temporary / "x").write_text("ours")
                (tmp_path / name).mkdir()
                (tmp_path / name / "x").write_text("theirs")
            else:
                temporary.write_text("ours")
                (tmp_path / name).write_text("theirs")
        files = [tmp_path / name, tmp_path / kept]
        assert [(f / "x" if f.is_dir() else f).read_text() for f in files] == ["theirs", "ours"]
    assert len(list(tmp_path.iterdir())) == 4


@posix
def test_of_a_link_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "keys").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "keys")
    with atomic_file(tmp_path / "link") as temporary:
        assert temporary.parent == tmp_path / "real"
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "keys").read_text() == "new"


def test_long_names_fit(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".png", "画" * 80 + ".png"):
        with atomic_file(tmp_path / name) as temporary:
            temporary.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"
        left = temporary.with_name(temporary.name)
        left.write_text("half")
        clear_leftovers(tmp_path / name)
        assert not left.exists()


@posix
def test_weights_can_be_read_by_others(tiny_checkpoint: Path, tmp_path: Path, usual_umask: None) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    save_component(tmp_path, "vae", checkpoint.vae())
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "vae").iterdir()}
    assert set(modes.values()) == {0o644} and len(modes) > 1, modes


@posix
def test_where_modes_are_forbidden_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Any, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", forbidden)  # as FAT and CIFS do
    with atomic_file(tmp_path / "a.png") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a.png").read_text() == "whole"


def test_a_folder_that_was_put_aside_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".adapter.old.abc"
    (aside / "adapter").mkdir(parents=True)
    (aside / "adapter" / "x").write_text("kept")
    clear_leftovers(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "x").read_text() == "kept" and not aside.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="locks")
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom glmimg.atomic_write import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder:\n    (folder / 'x').write_text('x' * 100)\n    os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    (left,) = tmp_path.iterdir()
    mine = tmp_path / ".out.20261130"  # somebody's own
    mine.mkdir()
    with atomic_folder(tmp_path / "out") as folder:  # just made: it may be a process's that has not locked it yet
        assert left.is_dir()
    for path in (left, mine):
        os.utime(path, (0, 0))
    with atomic_folder(tmp_path / "out") as folder:
        os.utime(folder, (0, 0))
        with atomic_folder(tmp_path / "out"):  # another's that lives is let alone
            assert folder.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"out", mine.name}


def test_full_disks_are_told_by_number_and_in_words(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    full = [OSError(errno.ENOSPC, "x"), SafetensorError("I/O error: No space left on device (os error 28)")]
    full += [RuntimeError("write failed: No space left on device")]  # a library's own kind
    for error in full:
        assert disk_full(error)
        with pytest.raises(GlmimgError, match="disk is full"), atomic_folder(tmp_path / "out"):
            raise error
    assert not disk_full(OSError(errno.EACCES, "No space left")) and not list(tmp_path.iterdir())


def test_a_sparse_file_is_given_its_room(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 20)
    reserve(tmp_path / "a")
    if hasattr(os, "posix_fallocate"):
        assert (tmp_path / "a").stat().st_blocks * 512 >= 1 << 20


@posix
def test_one_at_a_time(tmp_path: Path) -> None:
    lock, busy = tmp_path / "run" / ".lock", "another is at work"
    with locked(lock, busy), pytest.raises(BadInput, match=busy), locked(lock, busy):
        pass
    with locked(lock, busy):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write"), locked(tmp_path / "file" / ".lock"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="locks")
def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    program = "import sys; from glmimg.serving.auth import add_key; "
    program += "[add_key(sys.argv[1], f'client {sys.argv[2]} {k}') for k in range(3)]"
    command = [sys.executable, "-c", program, str(tmp_path / "keys.json")]
    children = [subprocess.Popen([*command, str(who)], cwd=tmp_path) for who in range(3)]
    assert [child.wait(120) for child in children] == [0, 0, 0]
    assert len(KeyFile(tmp_path / "keys.json")._clients) == 9
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600


@posix
def test_a_new_key_leaves_the_files_mode(tmp_path: Path) -> None:
    add_key(tmp_path / "keys.json", "ada")
    os.chmod(tmp_path / "keys.json", 0o640)
    add_key(tmp_path / "keys.json", "bob")
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o640
