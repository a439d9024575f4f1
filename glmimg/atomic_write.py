"""Files and folders that are either whole or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from glmimg.errors import BadInput, GlmimgError

__all__ = [
    "atomic_file",
    "atomic_folder",
    "clear_leftovers",
    "disk_full",
    "expanded",
    "locked",
    "require_absent",
    "reserve",
    "write_text",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MADE = "glmimg-"  # in the names of folders that are being written, and of nobody's own
_FULL_TEXT = ("No space left", "os error 28", "Disk quota", "os error 122", "File too large", "os error 27")


@contextmanager
def atomic_file(target: str | Path, *, replace: bool = True, mode: int | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `target`, renamed to it when the block ends well and deleted when it does not.

    The temporary name keeps the suffix, for writers that choose their format by it. Of a link, what it leads to is
    written. `mode`: its permissions, instead of the usual ones. BadInput if the place cannot be written to, or, without
    `replace`, if the file has appeared meanwhile (what was made is then kept under another name); GlmimgError if the
    disk fills up.
    """
    target = expanded(target)
    if os.path.isdir(target):  # unlike Path.is_dir, no error for a name that is too long
        raise BadInput(f"{target} is a folder: name a file in it, such as {target / 'picture.png'}")
    special = os.path.lexists(target) and not os.path.isfile(target)  # as root even a device would be replaced
    if special or (os.path.islink(target) and os.path.abspath(target).startswith("/dev/")):
        raise BadInput(f"{target} is no regular file: name one that is, or that is not there yet")
    target = Path(os.path.realpath(target)) if os.path.islink(target) else target
    with _explained(target):
        handle, name = _beside(target, tempfile.mkstemp)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("r+b") as stream:  # or after a power cut the name may lead to an empty file
                os.fsync(stream.fileno())
            _open_to(temporary, 0o666 & ~_umask() if mode is None else mode)  # mkstemp's only their owner can read
            if replace or not os.path.lexists(target):
                os.replace(temporary, target)
            else:
                _keep(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(target: str | Path, text: str) -> None:
    """A file of UTF-8 text, as `atomic_file` writes it."""
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(target: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """Yields a temporary folder beside `target` that takes its place when the block ends well.

    A folder that was there before is replaced as a whole, and stays as it was if the block fails. Only where the
    system cannot exchange two folders is there a moment without either. Without `replace`, a folder that has appeared
    meanwhile stays: what was made is kept under another name, and BadInput tells it.
    """
    target = expanded(target)
    with _explained(target), ExitStack() as stack:
        temporary = Path(_beside(target, tempfile.mkdtemp, _MADE))
        _held(temporary, stack)
        _clear_abandoned(target)
        try:
            yield temporary
            _open_to(temporary, 0o777 & ~_umask())
            for file in temporary.rglob("*.safetensors"):  # safetensors' own writer lets only their owner read them
                _open_to(file, 0o666 & ~_umask())
            if not os.path.lexists(target):
                os.rename(temporary, target)
            elif not replace:
                _keep(temporary, target)
            elif not _exchanged(temporary, target):
                replaced = Path(tempfile.mkdtemp(prefix=f".{_short(target.name)}.old.", dir=target.parent))
                os.rename(target, replaced / target.name)
                os.rename(temporary, target)
                shutil.rmtree(replaced, ignore_errors=True)  # on NFS, files that are still open stay
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _held(folder: Path, stack: ExitStack) -> bool:
    """Locks a folder that is being written until the stack ends; False if a process that lives holds it, or unknown."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows; or gone
        return False
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _clear_abandoned(target: Path) -> None:
    """Deletes folders that killed processes left of `target` half-written, as large as a checkpoint."""
    for left in target.parent.glob(f".{glob.escape(_short(target.stem))}.{_MADE}*"):
        with suppress(OSError), ExitStack() as stack:
            if left.is_dir() and time.time() - left.stat().st_mtime > 5 and _held(left, stack):
                shutil.rmtree(left, ignore_errors=True)


def clear_leftovers(target: str | Path) -> None:
    """Deletes what processes that were killed left of `target` half-written; a folder that one put aside comes back."""
    target = Path(target)
    for left in target.parent.glob(f".{glob.escape(_short(target.stem))}.*"):
        if ".old." in left.name and (left / target.name).exists() and not os.path.lexists(target):
            os.rename(left / target.name, target)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def locked(file: str | Path, busy: str = "") -> Iterator[None]:
    """Inside: no other process is inside with the same file, which stays, empty. BadInput(`busy`) if one is; without
    that text it is waited for. Where the system or the file system has no locks, nothing is kept out."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = open(file, "a", encoding="utf-8")  # noqa: SIM115
        except PermissionError:  # another user's, which can be locked all the same
            stream = open(file, encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise BadInput(f"cannot write {file} ({error.strerror}): name a place that you may write to") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise BadInput(busy) from error
        except OSError:  # a file system without locks
            pass
        yield


def disk_full(error: BaseException) -> bool:
    """Whether this says that a disk is full, or a quota or file size limit reached; safetensors tells it in words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    before = error.__context__  # torch's writer raises another error at its end
    return any(sign in str(error) for sign in _FULL_TEXT) or (before is not None and disk_full(before))


def expanded(path: str | Path) -> Path:
    """With the home folder for a ~ at its beginning, as where things are read."""
    return Path(os.path.expanduser(path))


def require_absent(target: str | Path) -> None:
    """BadInput if something of that name is there; a link to nothing is in the way as well."""
    if os.path.lexists(expanded(target)):
        raise BadInput(f"{target} exists already: name one that does not, or delete it first")


def reserve(file: str | Path) -> None:
    """Gives a sparse file its room: GlmimgError if the disk is too full, which through a map would end the process."""
    if hasattr(os, "posix_fallocate"):
        with _explained(Path(file)), open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)


def _keep(temporary: Path, target: Path) -> None:
    number = 2
    stem, suffix = (target.name, "") if temporary.is_dir() else (target.stem, target.suffix)
    while os.path.lexists(other := target.with_name(f"{stem}-{number}{suffix}")):
        number += 1
    os.rename(temporary, other)
    raise BadInput(f"{target} has appeared meanwhile and stays as it is: what was made is in {other}")


def _open_to(path: Path, mode: int) -> None:
    with suppress(PermissionError, NotImplementedError):  # FAT, CIFS and some FUSE mounts have no modes
        os.chmod(path, mode)


def _short(stem: str) -> str:
    """At most 60 bytes of it: with what is added, a name stays within the 255 that a file system allows."""
    return os.fsencode(stem)[:60].decode("utf-8", "ignore") if len(os.fsencode(stem)) > 60 else stem


def _exchanged(one: Path, other: Path) -> bool:
    """Gives two folders each other's name in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # Linux alone has it
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(os.path.abspath(one)), here, os.fsencode(os.path.abspath(other)), exchange) == 0


def _beside(target: Path, make: Callable[..., Any], mark: str = "") -> Any:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.lstat(target)  # its own name may be too long, told before the work
        return make(prefix=f".{_short(target.stem)}.{mark}", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise BadInput(f"cannot write {target} ({error.strerror}): name a place that you may write to") from error


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # OSError, safetensors' own, and what torch's writer and a library make of either
        if isinstance(error, GlmimgError) or not disk_full(error):
            raise
        raise GlmimgError(
            f"the disk is full, or a quota or file size limit is reached: {target} was not written; "
            "free some space and repeat"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
