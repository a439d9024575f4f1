"""Everything that whoever runs the server decides, and the errors that it answers with. Imports no torch."""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from glmimg.config import Config, require

__all__ = ["Problem", "ServerSettings", "problem_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerSettings(Config):
    """Checked once; the command line's flags are these fields."""

    model: str = "embedded"
    model_name: str | None = None  # what clients call it (default: the last part of `model`)
    backend: str = "auto"
    dtype: str | None = None
    offload: str = "none"
    compile: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    root_path: str = ""  # where a proxy has put the server, which takes that off: urls of pictures begin with it
    allow_hosts: tuple[str, ...] = ()  # names by which clients may call a server that needs no keys
    keys: str | None = None
    adapters: str | None = None  # folder whose folders are the adapters that clients may name
    max_batch: int = 8  # pictures whose tokens are drawn together
    max_queue: int = 64  # pictures that wait
    max_body: int = 32 << 20  # bytes of a request
    max_pixels: int = 16 << 20  # of an uploaded picture
    timeout: float = 600.0  # seconds for a request, waiting included
    write_timeout: float = 60.0  # seconds for which a reader may take nothing
    stuck: float = 120.0  # seconds after which a worker that does not let go of a cancelled request is killed
    drain: float = 60.0  # seconds that running requests get when the server is stopped
    url_seconds: int = 3600  # life of a picture behind a url
    url_memory: int = 256 << 20  # bytes of such pictures
    files: bool = True  # whether urls can be served: not where a balancer may ask another replica
    watts: float | None = None  # drawn while working, for the estimate of energy
    price: float | None = None  # of a kWh
    usage_file: str | None = None
    prompt_rules: str | None = None  # "module:function" that gives a reason against a prompt, or None
    picture_rules: str | None = None  # the same for a finished picture (PIL.Image)
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("keys", "adapters", "usage_file"):  # shells leave --keys=~/keys.json as it is
            if value := getattr(self, name):
                object.__setattr__(self, name, os.path.expanduser(value))
        require(0 <= self.port < 65536, f"port {self.port}: use 1 to 65535, or 0 for any that is free")
        require(
            re.fullmatch(r"(/[\w.~-]+)*", self.root_path, re.ASCII) is not None,
            f"root path {self.root_path!r}: give one like /pictures, or none",
        )
        for name in ("max_batch", "max_queue", "max_body", "max_pixels", "url_seconds"):
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: use 1 or more")
        for name in ("timeout", "write_timeout", "stuck"):
            require(getattr(self, name) > 0, f"{name} {getattr(self, name)}: give more than 0 seconds")
        for name in ("watts", "price"):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, f"{name} {value}: give a number from 0")
        require(self.price is None or self.watts is not None, "price is of the energy that watts tells: give both")
        require(self.drain >= 0, f"drain {self.drain}: give 0 seconds or more")
        require(
            self.keys is not None or self.host in ("127.0.0.1", "localhost", "::1"),
            f"host {self.host} can be reached from other machines: give a file of API keys (--keys FILE; "
            "`glmimg serve key NAME --keys FILE` makes one), or keep to 127.0.0.1",
        )

    @property
    def name(self) -> str:
        """The id that clients see: never a path of this machine."""
        if self.model_name:
            return self.model_name
        return "glmimg-mini" if self.model == "embedded" else self.model.rstrip("/\\").replace("\\", "/").split("/")[-1]


class Problem(Exception):
    """An answer other than a picture, in the shape that OpenAI's clients know."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}

    def body(self) -> dict[str, Any]:
        """As JSON can carry it: what a client sent may come back in it, and is not always text."""
        kind = "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        message, param = (
            text and text.encode("utf-8", "backslashreplace").decode() for text in (self.message, self.param)
        )
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def problem_of(error: Exception) -> Problem:
    """What is answered after `error`: a Problem as it is; of others no more than that there was one, and the log."""
    if isinstance(error, Problem):
        return error
    logger.error("a request could not be answered", exc_info=error)
    return Problem(500, "something went wrong here: the server's log tells more", "internal_error")
