"""Files and folders that are either whole or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glmimg.errors import BadInput, GlmimgError

__all__ = ["atomic_file", "atomic_folder", "clear_leftovers"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`, renamed to it when the block ends well and deleted when it does not.

    The temporary name keeps the suffix, for writers that choose their format by it. BadInput if the place cannot be
    written to, GlmimgError if the disk fills up.
    """
    target = Path(target)
    if os.path.isdir(target):  # unlike Path.is_dir, no error for a name that is too long
        raise BadInput(f"{target} is a folder: name a file in it, such as {target / 'picture.png'}")
    special = os.path.lexists(target) and not os.path.isfile(target)  # as root even a device would be replaced
    if special or (os.path.islink(target) and os.path.abspath(target).startswith("/dev/")):
        raise BadInput(f"{target} is no regular file: name one that is, or that is not there yet")
    with _explained(target):
        handle, name = _beside(target, tempfile.mkstemp)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `target` that takes its place when the block ends well.

    A folder that was there before is replaced as a whole, and stays as it was if the block fails. Only where the
    system cannot exchange two folders is there a moment without either.
    """
    target = Path(target)
    with _explained(target):
        temporary = Path(_beside(target, tempfile.mkdtemp))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            if not target.exists():
                os.rename(temporary, target)
            elif not _exchanged(temporary, target):
                replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
                os.rename(target, replaced / target.name)
                os.rename(temporary, target)
                shutil.rmtree(replaced)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(target: str | Path) -> None:
    """Deletes what processes that were killed left of `target` half-written."""
    target = Path(target)
    for left in target.parent.glob(f".{glob.escape(target.stem)}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Gives two folders each other's name in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # Linux alone has it
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(os.path.abspath(one)), here, os.fsencode(os.path.abspath(other)), exchange) == 0


def _beside(target: Path, make: Callable[..., Any]) -> Any:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return make(prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise BadInput(f"cannot write {target} ({error.strerror}): name a place that you may write to") from error


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise GlmimgError(
            f"the disk is full, or a quota or file size limit is reached: {target} was not written; "
            "free some space and repeat"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
