"""glmimg serve and glmimg serve key: flags to settings; the server itself is glmimg.serving."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from glmimg.errors import GlmimgError, MissingExtra

__all__ = ["key", "serve"]


def serve(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; others need --keys")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    parser.add_argument("--root-path", default="", metavar="/PATH", help="below which a proxy puts the server")
    parser.add_argument("--keys", metavar="FILE", help="API keys; glmimg serve key makes them")
    parser.add_argument(
        "--allow-host", dest="allow_hosts", action="append", default=[], metavar="NAME",
        help="a name by which a server without keys may be called (default: localhost)",
    )  # fmt: skip
    run = parser.add_argument_group("the machine")
    run.add_argument("--model", default="embedded", metavar="PATH|HUB_ID", help="default: the embedded model")
    run.add_argument(
        "--model-name", metavar="ID", help="what clients call it (default: the last part of --model, or glmimg-mini)"
    )
    run.add_argument("--backend", default="auto", help="cpu, cuda, cuda:1, npu, xpu, mps, or generator=...,decoder=...")
    run.add_argument("--dtype", help="bf16, fp32, or on accelerators fp16 (default: the device's own)")
    run.add_argument("--offload", default="none", help="none, stage or block: the less memory, the slower")
    run.add_argument("--compile", action="store_true", help="compile the decoder; pays for many pictures of one size")
    run.add_argument("--adapters", metavar="FOLDER", help="its folders are the adapters that requests may name")

    work = parser.add_argument_group("the work")
    work.add_argument("--max-batch", type=int, default=8, help="layouts that are drawn together (default: 8)")
    work.add_argument("--max-queue", type=int, default=64, help="pictures that may wait (default: 64)")
    work.add_argument("--timeout", type=float, default=600.0, help="seconds for a request, waiting included (600)")
    work.add_argument(
        "--drain", type=float, default=60.0, help="seconds for what is running when the server stops (60)"
    )
    work.add_argument("--max-body", type=int, default=32 << 20, metavar="BYTES", help="of a request (default: 32 MB)")
    work.add_argument("--max-pixels", type=int, default=16 << 20, help="of an uploaded picture (default: 16777216)")

    accounts = parser.add_argument_group("rules and accounts")
    accounts.add_argument("--prompt-rules", metavar="MODULE:FUNCTION", help="gives a reason against a prompt, or None")
    accounts.add_argument("--picture-rules", metavar="MODULE:FUNCTION", help="the same for a picture (PIL.Image)")
    accounts.add_argument("--usage-file", metavar="FILE", help="keep what was made for each key there")
    accounts.add_argument("--watts", type=float, help="drawn while working, for the estimate of energy")
    accounts.add_argument("--price", type=float, help="of a kWh, with --watts: for the estimate of cost")
    accounts.add_argument("--log-prompts", action="store_true", help="write prompts to the log (default: never)")
    return _serve


def key(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("name", metavar="NAME", help="whose key it is; one that it had becomes invalid")
    parser.add_argument("--keys", required=True, metavar="FILE", help="made if it is not there")
    parser.add_argument("--priority", type=int, help="higher ones go first (default: 0)")
    parser.add_argument("--pictures-per-minute", type=int, metavar="N")
    parser.add_argument("--max-requests", type=int, metavar="N", help="at a time")
    return _key


def _key(arguments: argparse.Namespace) -> int:
    from glmimg.serving.auth import add_key

    limits = {name: getattr(arguments, name) for name in ("priority", "pictures_per_minute", "max_requests")}
    print(add_key(arguments.keys, arguments.name, **limits))
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from glmimg.serving.settings import ServerSettings

    values: dict[str, Any] = vars(arguments) | {"allow_hosts": tuple(arguments.allow_hosts)}
    settings = ServerSettings.from_dict(values)
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtra.of("uvicorn", "server", "glmimg serve") from error
    from glmimg.serving.run import run

    if not run(settings):
        raise GlmimgError("the server could not be started: the lines above tell why")
    return 0
