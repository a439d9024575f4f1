"""API keys: a file of hashes, read again when it changes; and what each key may ask for.

Keys are 256 random bits, so that a plain SHA-256 keeps them: there is nothing to guess that a slow hash would protect.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glmimg.atomic_write import atomic_file, locked
from glmimg.config import Config, parse_json, require
from glmimg.errors import BadInput, printable
from glmimg.serving.settings import Problem

__all__ = ["LOCAL", "Client", "KeyFile", "Limits", "add_key"]

PREFIX = "gi-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Client(Config):
    """Who asks. `pictures_per_minute` and `max_requests` (at a time) None: no limit; a higher priority goes first."""

    name: str
    sha256: str = ""
    priority: int = 0
    pictures_per_minute: int | None = None
    max_requests: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "a key needs a name")
        plain = self.name == printable(self.name) and self.name.splitlines() == [self.name] and "\t" not in self.name
        require(plain, f"key name {self.name!r}: use letters, digits and spaces in one line; logs and tables show it")
        for limit in (self.pictures_per_minute, self.max_requests):
            require(limit is None or limit >= 1, f"a limit of {limit}: use 1 or more, or leave it out")


LOCAL = Client("local")  # everybody, where there are no keys


class KeyFile:
    """The clients of a file {"keys": [{"name": ..., "sha256": ...}, ...]}; BadInput if it cannot be read at first."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._seen = self._stamp()
        self._clients = _read(self.path)

    def find(self, key: str) -> Client | None:
        """Whose key that is. Takes the same time whichever it is, and whether there is one."""
        self._reload()
        digest = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
        found = None
        for client in self._clients:
            if hmac.compare_digest(client.sha256.lower().encode(), digest.encode()):
                found = client
        return found

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _reload(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._clients = [] if stamp is None else _read(self.path)
        except BadInput as error:
            logger.error("the keys stay as they were: %s", error)


def _read(path: Path) -> list[Client]:
    try:
        rows = parse_json(path.read_text(encoding="utf-8"))["keys"]
        clients = [Client.from_dict(row) for row in rows]
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; glmimg serve key NAME --keys {path} makes one") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is no file of keys ({error})") from error
    require(len({client.name for client in clients}) == len(clients), f"{path} holds two keys of one name")
    return clients


def add_key(path: str | Path, name: str, **limits: int | None) -> str:
    """Makes a key for `name` and returns it: only its hash is kept. In place of one it had, with what was allowed then.

    Limits that are None stay as they were.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    path = Path(os.path.realpath(os.path.expanduser(path)))
    with locked(path.with_name(f".{path.name}.lock")):  # of several at once none may be lost
        _put_key(path, key, name, limits)
    return key


def _put_key(path: Path, key: str, name: str, limits: Mapping[str, int | None]) -> None:
    clients = _read(path) if path.exists() else []
    before = next((one.to_dict() for one in clients if one.name == name), {"name": name})
    given = {limit: value for limit, value in limits.items() if value is not None}
    client = Client.from_dict(before | given | {"sha256": hashlib.sha256(key.encode()).hexdigest()})
    rows = [one.to_dict() for one in clients if one.name != name] + [client.to_dict()]
    owner = path.stat() if path.exists() else None
    with atomic_file(path, mode=0o600 if owner is None else owner.st_mode & 0o7777) as temporary:
        temporary.write_text(json.dumps({"keys": rows}, indent=2) + "\n", encoding="utf-8")
        if owner is not None and hasattr(os, "chown"):
            with suppress(PermissionError):  # as the server's own user it is that already
                os.chown(temporary, owner.st_uid, owner.st_gid)


class Limits:
    """What each client has under way, and how many pictures it may ask for right now."""

    def __init__(self) -> None:
        self._requests: dict[str, int] = {}
        self._left: dict[str, tuple[float, float]] = {}  # pictures, at that time

    def enter(self, client: Client) -> None:
        """Counts a request; 429 if it is one too many. Every `enter` that returns needs a `leave`."""
        if client.max_requests is not None and self._requests.get(client.name, 0) >= client.max_requests:
            raise Problem(429, f"{client.max_requests} requests at a time are allowed", "rate_limit_exceeded", None, 2)
        self._requests[client.name] = self._requests.get(client.name, 0) + 1

    def leave(self, client: Client) -> None:
        left = self._requests[client.name] - 1
        if left:
            self._requests[client.name] = left
        else:
            del self._requests[client.name]

    def take(self, client: Client, pictures: int) -> None:
        """Counts pictures; 429 if they are too many for now."""
        if client.pictures_per_minute is None:
            return
        now, most = time.monotonic(), float(client.pictures_per_minute)
        left, then = self._left.get(client.name, (most, now))
        left = min(most, left + (now - then) * most / 60)
        if pictures > most:
            raise Problem(400, f"n {pictures}: {most:g} pictures a minute are allowed", "invalid_value", "n")
        if pictures > left:
            wait = (pictures - left) * 60 / most
            raise Problem(429, f"{most:g} pictures a minute are allowed", "rate_limit_exceeded", None, wait)
        self._left[client.name] = left - pictures, now

    def give_back(self, client: Client, pictures: int) -> None:
        """Pictures that were not even begun do not count."""
        if client.pictures_per_minute is not None:
            before, then = self._left[client.name]
            self._left[client.name] = min(float(client.pictures_per_minute), before + pictures), then
