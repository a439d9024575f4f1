"""The same app as replicas of Ray Serve, for several machines: `serve run glmimg.serving.cluster:build model=...`.

Ray starts, places, restarts and balances; each replica is an app with its own worker, queue and model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_origin, get_type_hints

from glmimg.config import require
from glmimg.errors import BadInput, MissingExtra, UnknownName
from glmimg.serving.settings import ServerSettings

__all__ = ["build"]

_RAY = {"replicas": 1, "gpus": 0.0, "cpus": 1.0}
_NOT_HERE = ("host", "port", "root_path", "files", "usage_file")  # Ray listens; files: see below


def build(arguments: dict[str, Any]) -> Any:
    """A Ray Serve application. `arguments` are fields of ServerSettings and `replicas`, `gpus` and `cpus` (of each).

    Urls are refused: the balancer may ask another replica for the picture; so is a file of usage, which replicas would
    write over each other's. Keys, rules and adapters are files that
    every machine needs in the same place. What a machine was making when it died, Ray answers with 500, unless its
    proxies use `glmimg.serving.ray_proxy`.
    """
    own, settings = _arguments(arguments)
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtra.of("ray", "cluster", "replicas on several machines") from error
    from glmimg.serving.app import create_app

    # The queue is each app's own, with its 429: Ray hands over as much as that takes.
    @serve.deployment(
        num_replicas=own["replicas"],
        max_ongoing_requests=settings.max_queue + 4 * settings.max_batch,
        ray_actor_options={"num_gpus": own["gpus"], "num_cpus": own["cpus"]},
        graceful_shutdown_timeout_s=settings.drain + 10,
    )
    @serve.ingress(lambda: create_app(settings))
    class Glmimg:
        app: Any  # ingress puts it there

        def check_health(self) -> None:
            """Ray replaces a replica whose worker was given up."""
            failure = self.app.state.service.dispatcher.failure
            if failure is not None:
                raise failure

    deployment: Any = Glmimg
    return deployment.bind()


def _arguments(given: dict[str, Any]) -> tuple[dict[str, Any], ServerSettings]:
    """What is for Ray, and what for each app; BadInput for what is for neither."""
    hints = {name: hint for name, hint in get_type_hints(ServerSettings).items() if name not in _NOT_HERE}
    hints |= {name: type(usual) for name, usual in _RAY.items()}
    for name in given:
        if name not in hints:
            raise UnknownName.of("argument", name, hints)
    values = {name: _read(name, value, hints[name]) for name, value in given.items()}
    own = _RAY | {name: values.pop(name) for name in _RAY if name in values}
    require(own["replicas"] >= 1, f"replicas {own['replicas']}: at least 1")
    return own, replace(ServerSettings.from_dict(values), files=False)


def _read(name: str, value: Any, hint: Any) -> Any:
    """Ray passes what stands on its command line as text."""
    if not isinstance(value, str):
        return value
    if get_origin(hint) is tuple:
        return tuple(value.split(","))
    kind = next(one for one in (hint, *get_args(hint)) if one in (bool, int, float, str))
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError) as error:
        allowed = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
        raise BadInput(f"{name}={value}: give {allowed}") from error
