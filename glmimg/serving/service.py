"""What the routes share: from a checked request to a job, the ways in, and the accounts."""

from __future__ import annotations

import asyncio
import io
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from glmimg.config import SHORT_NAMES, parse_size
from glmimg.errors import BadInput, UnknownName
from glmimg.serving import schemas
from glmimg.serving.auth import LOCAL, Client, KeyFile, Limits
from glmimg.serving.dispatcher import Dispatcher, Ticket
from glmimg.serving.jobs import Job
from glmimg.serving.metrics import Ledger, Metrics, Totals
from glmimg.serving.settings import Problem, ServerSettings

__all__ = ["Files", "Service"]

Rule = Callable[[Any], str | None]

logger = logging.getLogger(__name__)

QUALITY = {"low": 0.5, "medium": 1.0, "auto": 1.0, "standard": 1.0, "high": 2.0, "hd": 2.0}
PICTURES = ("PNG", "JPEG", "WEBP")


class Files:
    """Pictures behind urls: in memory, for a while, under names that nobody can guess."""

    def __init__(self, seconds: float, memory: int) -> None:
        self.seconds, self.memory = seconds, memory
        self._files: OrderedDict[str, tuple[float, str, bytes]] = OrderedDict()

    def put(self, data: bytes, kind: str) -> str:
        self._expire()
        self._files[name := secrets.token_urlsafe(32)] = (time.monotonic() + self.seconds, kind, data)
        while sum(len(file[2]) for file in self._files.values()) > self.memory and len(self._files) > 1:
            self._files.popitem(last=False)
        return name

    def get(self, name: str) -> tuple[str, bytes] | None:
        self._expire()
        found = self._files.get(name)
        return None if found is None or found[0] < time.monotonic() else found[1:]

    def _expire(self) -> None:
        while self._files and next(iter(self._files.values()))[0] < time.monotonic():
            self._files.popitem(last=False)


class Service:
    """Everything behind one app."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.started = int(time.time())
        self.metrics = Metrics()
        self.ledger = Ledger(None if settings.usage_file is None else Path(settings.usage_file))
        self.dispatcher = Dispatcher(settings, watch=self._watch)
        self.keys = None if settings.keys is None else KeyFile(settings.keys)
        self.limits = Limits()
        self.files = Files(settings.url_seconds, settings.url_memory)
        self.prompt_rules = _rule(settings.prompt_rules)
        self.picture_rules = _rule(settings.picture_rules)
        if settings.adapters is not None and not Path(settings.adapters).is_dir():
            raise BadInput(f"{settings.adapters} is no folder: name the one that holds the adapters' folders")

    def client(self, authorization: str | None) -> Client:
        """Who asks; 401 if a key is needed and none that is known was given."""
        if self.keys is None:
            return LOCAL
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Problem(401, "send an API key: Authorization: Bearer KEY", "invalid_api_key")
        client = self.keys.find(key.strip())
        if client is None:
            raise Problem(401, "this API key is not known here", "invalid_api_key")
        return client

    def adapter_names(self) -> list[str]:
        if self.settings.adapters is None:
            return []
        folders = [path for path in Path(self.settings.adapters).iterdir() if path.is_dir()]
        return sorted(path.name for path in folders if not path.name.startswith("."))  # those are being written

    # From requests to jobs.

    def job(self, body: schemas.TokenFields, **more: Any) -> Job:
        """The job of a checked request; Problem for what only this server refuses."""
        if body.model not in (None, self.settings.name):
            raise Problem(
                404, f"model {body.model!r}: this server has {self.settings.name!r}", "model_not_found", "model"
            )
        fields = body.model_dump(exclude_none=True)
        for name, value, advice in (
            ("background", "transparent", "pictures are opaque: leave it out, or say auto or opaque"),
            ("input_fidelity", "low", "references are always followed closely: leave it out, or say high"),
        ):
            if fields.get(name) == value:
                raise Problem(400, f"{name} {value!r}: {advice}", "unsupported_value", name)
        if "style" in fields:
            raise Problem(
                400, "style is not a setting here: describe it in the prompt", "unsupported_parameter", "style"
            )
        if fields.get("response_format") == "url":
            if not self.settings.files:
                raise Problem(400, "this server gives no urls: use b64_json", "unsupported_value", "response_format")
            if fields.get("stream"):
                raise Problem(400, "streams carry pictures as b64_json", "unsupported_value", "response_format")
        if fields.get("progress") and not fields.get("stream"):
            raise Problem(400, "progress is sent as events: ask for stream as well", "invalid_value", "progress")
        options = {ours: fields[name] for name, ours in SHORT_NAMES.items() if name in fields}
        size = fields.get("size", "auto")
        if size != "auto":
            options["width"], options["height"] = parse_size(size)
        if "steps" not in fields and isinstance(body, schemas.ImageRequest) and self.dispatcher.about:
            usual = self.dispatcher.about["defaults"]["num_inference_steps"]
            options["num_inference_steps"] = min(1000, max(1, round(usual * QUALITY[fields.get("quality", "auto")])))
        if "tokens" in fields:
            more["tokens"] = fields["tokens"]
        return Job(
            prompt=body.prompt,
            negative_prompt=fields.get("negative", ""),
            n=fields.get("n", 1),
            seed=secrets.randbits(32) if body.seed is None else body.seed,
            options=options,
            adapters=tuple(self._adapter(use) for use in body.adapters or ()),
            partial_images=fields.get("partial_images", 0) if fields.get("stream") else 0,
            progress=bool(fields.get("progress")),
            output_format=fields.get("output_format", "png"),
            compression=fields.get("output_compression", 100),
            **more,
        )

    def _adapter(self, use: schemas.AdapterUse) -> tuple[str, str, float]:
        names = self.adapter_names()
        if use.name not in names:
            raise Problem(400, str(UnknownName.of("adapter", use.name, names)), "unknown_adapter", "adapters")
        assert self.settings.adapters is not None
        # Absolute: what looks like owner/name could be asked of the hub if the folder went away meanwhile.
        return use.name, str(Path(self.settings.adapters).absolute() / use.name), use.strength

    def require_picture(self, data: bytes) -> None:
        """Refuses what is no picture, or one of too many pixels, from its first bytes."""
        try:
            with Image.open(io.BytesIO(data), formats=PICTURES) as image:
                width, height = image.size
        except Image.DecompressionBombError as error:
            raise Problem(400, f"an image is far too large: {error}", "image_too_large", "image") from error
        except Exception as error:  # PIL's readers raise whatever they like
            raise Problem(400, "an image is not a PNG, JPEG or WebP file", "invalid_image_file", "image") from error
        if width * height > self.settings.max_pixels:
            allowed = f"{self.settings.max_pixels:,} pixels are allowed"
            raise Problem(400, f"an image has {width}x{height} pixels: {allowed}", "image_too_large", "image")

    # The ways in.

    @asynccontextmanager
    async def ticket(self, job: Job, client: Client) -> AsyncIterator[Ticket]:
        """A request in the queue, taken out again if the block is left before its end."""
        if self.settings.log_prompts:
            logger.info("%s asks for %r", client.name, job.prompt)
        if self.prompt_rules is not None:
            for name, text in (("prompt", job.prompt), ("negative", job.negative_prompt)):
                if text and (reason := await asyncio.to_thread(self.prompt_rules, text)):
                    raise Problem(400, reason, "moderation_blocked", name)
        self.limits.take(client, job.n)
        try:
            ticket = await self.dispatcher.submit(job, client.name, client.priority)
        except BaseException as error:
            self.limits.give_back(client, job.n)
            if isinstance(error, Problem):
                error.param = error.param or _param(error)
            raise
        try:
            yield ticket
        finally:
            self.dispatcher.cancel(ticket)

    async def judge(self, data: bytes | None) -> None:
        """The operator's rules about pictures."""
        if self.picture_rules is None or data is None:
            return
        rules = self.picture_rules

        def reason() -> str | None:
            with Image.open(io.BytesIO(data), formats=PICTURES) as image:
                return rules(image)

        if found := await asyncio.to_thread(reason):
            raise Problem(400, found, "moderation_blocked")

    # The accounts.

    def account(self, ticket: Ticket, message: dict[str, Any]) -> schemas.Usage:
        """Books a finished picture as it arrives, whatever becomes of the answer."""
        about, n, before = ticket.about, ticket.job.n, ticket.booked
        amount = Totals(
            requests=int(not before.requests),
            pictures=int(message["data"] is not None),
            prompt_tokens=0 if before.requests else about["prompt_tokens"],
            tokens=about["tokens"] // n,
            steps=message["steps"],
            seconds=max(0.0, message["seconds"] - before.seconds),
        )
        self._book(ticket, amount)
        return self.usage(amount, about)

    def _watch(self, name: str, value: Any) -> None:
        """For the dispatcher."""
        if name == "made":
            ticket, message = value
            message["usage"] = self.account(ticket, message)
        elif name == "abandoned":
            self._account_rest(*value)
        elif name == "waited":
            self.metrics.waited.observe(value)
        elif name == "restarted":
            self.metrics.restarts.inc()

    def _account_rest(self, ticket: Ticket, cost: dict[str, Any]) -> None:
        """Books what a request had taken, beside its pictures, when nobody waited for it any more."""
        done = ticket.booked
        amount = Totals(
            tokens=max(0, cost.get("drawn", 0) - done.tokens),
            steps=max(0, cost.get("steps", 0) - done.steps),
            seconds=max(0.0, cost.get("seconds", 0.0) - done.seconds),
        )
        if amount.tokens or amount.steps:
            amount.requests = int(not done.requests)
            amount.prompt_tokens = 0 if done.requests else ticket.about["prompt_tokens"]
            self._book(ticket, amount)

    def _book(self, ticket: Ticket, amount: Totals) -> None:
        if self.settings.watts is not None:
            amount.energy_wh = amount.seconds * self.settings.watts / 3600
            amount.cost = amount.energy_wh / 1000 * (self.settings.price or 0.0)
        ticket.booked.add(amount)
        self.ledger.add(ticket.client, amount)
        self.metrics.pictures.inc(amount.pictures)
        self.metrics.tokens.inc(amount.tokens)
        self.metrics.steps.inc(amount.steps)
        self.metrics.busy.inc(amount.seconds)

    def usage(self, amount: Totals, about: dict[str, Any]) -> schemas.Usage:
        pictures = min(amount.prompt_tokens, about["reference_tokens"])
        priced = self.settings.watts is not None
        return schemas.Usage(
            input_tokens=amount.prompt_tokens,
            output_tokens=amount.tokens,
            total_tokens=amount.prompt_tokens + amount.tokens,
            input_tokens_details=schemas.TokenDetails(
                text_tokens=amount.prompt_tokens - pictures, image_tokens=pictures
            ),
            steps=amount.steps,
            seconds=round(amount.seconds, 4),
            energy_wh=round(amount.energy_wh, 6) if priced else None,
            cost=round(amount.cost, 8) if priced and self.settings.price is not None else None,
        )


def _rule(name: str | None) -> Rule | None:
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"rules {name!r}: give module:function of something that can be imported ({error})") from error
    if not callable(found):
        raise BadInput(f"rules {name!r}: {function} cannot be called")
    return found


def _param(problem: Problem) -> str | None:
    """The field that a message of the worker's begins with."""
    first = problem.message.split(" ", 1)[0]
    names = {"negative_prompt": "negative"}
    names |= dict.fromkeys(("these", "this", "tokens", "token", "target", "preview"), "tokens")
    known = ("size", "seed", "region", "sampler", "temperature", "prompt")
    return names.get(first) or (first if first in known else None)
