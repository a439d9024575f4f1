"""Files and folders that are either whole or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glmimg.errors import BadInput, GlmimgError

__all__ = ["atomic_file", "atomic_folder"]

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

    A folder that was there before is replaced as a whole, and stays as it was if the block fails.
    """
    target = Path(target)
    with _explained(target):
        temporary = Path(_beside(target, tempfile.mkdtemp))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            if target.exists():
                replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
                os.rename(target, replaced / target.name)
                os.rename(temporary, target)
                shutil.rmtree(replaced)
            else:
                os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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
