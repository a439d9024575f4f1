"""Bytes of which there may be more than memory holds: in a nameless temporary file, gone with the last reader."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable

from glmimg.atomic_write import disk_full
from glmimg.errors import GlmimgError

__all__ = ["Spool"]


class Spool:
    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
        self._lock, self._end = threading.Lock(), 0

    def __del__(self) -> None:
        self._file.close()

    def put(self, data: bytes) -> Callable[[], bytes]:
        """What gives them back; GlmimgError if there is no room."""
        begin, length = self._end, len(data)
        try:
            with self._lock:
                self._file.seek(begin)
                self._file.write(data)
                self._file.flush()
        except OSError as error:
            if not disk_full(error):
                raise
            place = tempfile.gettempdir()
            raise GlmimgError(f"{place} is full: TMPDIR names another place for what is read from tables") from error
        self._end += length

        def read() -> bytes:
            with self._lock:
                self._file.seek(begin)
                return self._file.read(length)

        return read
