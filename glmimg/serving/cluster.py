"""The same app as replicas of Ray Serve, for several machines: `serve run glmimg.serving.cluster:build model=...`.

Ray starts, places, restarts and balances; each replica is an app with its own worker, queue and model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from glmimg.errors import BadInput, MissingExtra
from glmimg.serving.settings import ServerSettings

__all__ = ["build"]

_RAY = {"replicas": 1, "gpus": 0.0, "cpus": 1.0}


def build(arguments: dict[str, Any]) -> Any:
    """A Ray Serve application. `arguments` are fields of ServerSettings and `replicas`, `gpus` and `cpus` (of each).

    Urls are refused: the balancer may ask another replica for the picture. Keys, rules and adapters are files that
    every machine needs in the same place.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtra.of("ray", "cluster", "replicas on several machines") from error
    from glmimg.serving.app import create_app

    own = {name: type(usual)(arguments.get(name, usual)) for name, usual in _RAY.items()}
    settings = _settings({name: value for name, value in arguments.items() if name not in _RAY})
    if own["replicas"] < 1:
        raise BadInput(f"replicas {own['replicas']}: at least 1")

    # The queue is each app's own, with its 429: Ray hands over as much as that takes.
    @serve.deployment(
        num_replicas=int(own["replicas"]),
        max_ongoing_requests=settings.max_queue + 4 * settings.max_batch,
        ray_actor_options={"num_gpus": own["gpus"], "num_cpus": own["cpus"]},
        graceful_shutdown_timeout_s=settings.drain + 10,
    )
    @serve.ingress(lambda: create_app(settings))
    class Glmimg:
        pass

    deployment: Any = Glmimg
    return deployment.bind()


def _settings(arguments: dict[str, Any]) -> ServerSettings:
    """Ray passes what stands on its command line as text."""
    from typing import get_type_hints

    values: dict[str, Any] = {}
    for name, value in arguments.items():
        hint = str(get_type_hints(ServerSettings).get(name, ""))
        if isinstance(value, str) and "int" in hint and "tuple" not in hint:
            value = int(value)
        elif isinstance(value, str) and "float" in hint:
            value = float(value)
        elif isinstance(value, str) and "bool" in hint:
            value = value.lower() in ("1", "true", "yes")
        elif isinstance(value, str) and "tuple" in hint:
            value = tuple(value.split(","))
        values[name] = value
    return replace(ServerSettings.from_dict(values), files=False)
