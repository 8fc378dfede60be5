"""Several copies of serve.py behind one address, with Ray Serve: more machines, more GPUs, or a copy that may die alone.

    pip install "ray[serve]"
    serve run examples.ray_serve:build min_replicas=2 max_replicas=8
    serve run examples.ray_serve:build gpus=1 flags="--device cuda --max_sessions 32"

Run it in the repository's folder; on a cluster every node needs that folder (or a `working_dir` of Ray's runtime environment). Each
replica is one process with the model, its own places and its own queue. Ray starts more while conversations come, and takes
away idle ones; what does not fit waits, and beyond that gets 503.

Who stays where: a conversation is one WebSocket, so it stays at its replica until it ends; where a replica dies, its conversations end
and may begin again at another, and no other conversation notices. Single requests are spread evenly, unless they carry the header
`x-session-id: ANY_NAME`: then all of that name go to the same replica, as long as it lives, has room and answers the proxy's question
for its queue in time (0.1 s; RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S in the environment gives busy processors longer).

The proxy listens on loopback. Beyond it (`serve run` of a file with `http_options`, or `serve.start(http_options={"host": ...})`) put a
key into the variable SERVE_API_KEY of every node: without one the replicas answer only those who call them by a loopback name.
"""
from __future__ import annotations

import asyncio
import logging
import os
import shlex

from pydantic import BaseModel, ConfigDict, Field
from ray import serve as ray_serve

# By consistent hashing of the header x-session-id; without it, spread evenly. A full replica sends on to the next two.
STICKY = {"request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter", "request_router_kwargs": {"num_fallback_replicas": 2}}


class Settings(BaseModel):
    """What may follow `examples.ray_serve:build` as name=value."""
    model_config = ConfigDict(extra="forbid")
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    busy: float = Field(4.0, gt=0, description="conversations and requests of a replica beyond which another is started")
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    flags: str = Field("", description="flags of serve.py for every replica; --host and --port have no meaning here")


def make_replica(flags: str):
    """serve.py's application, as its own process would have it, with the model loaded and warm."""
    import serve
    from serve_app import make_app
    args = serve.build_parser().parse_args(shlex.split(flags))
    service = serve.load(args)
    service.warm()
    app = make_app(service, os.environ.get(args.key_env, ""))

    @app.get("/replica", include_in_schema=False)
    async def replica():
        return {"replica": ray_serve.get_replica_context().replica_id.unique_id, "pid": os.getpid()}
    logging.getLogger("ray.serve").info("replica ready: %s", service.model_name)
    return app


def build(settings: Settings):
    """The application that `serve run examples.ray_serve:build` starts."""
    import config
    import serve
    from serve_limits import ServeConfig
    limits = config.from_flags(ServeConfig, serve.build_parser().parse_args(shlex.split(settings.flags)))
    places = limits.max_sessions + limits.queue

    @ray_serve.ingress(lambda: make_replica(settings.flags))
    class Replica:
        async def check_health(self) -> None:
            await asyncio.sleep(0)                               # the event loop turns
    scaling = None if settings.min_replicas == settings.max_replicas else {
        "min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas, "target_ongoing_requests": settings.busy, "upscale_delay_s": 5, "downscale_delay_s": 300}
    deployment = ray_serve.deployment(
        Replica, name="conversations", autoscaling_config=scaling, max_ongoing_requests=places, max_queued_requests=4 * places, request_router_config=STICKY,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus}, health_check_period_s=5, health_check_timeout_s=30,
        graceful_shutdown_timeout_s=limits.grace_seconds, **({"num_replicas": settings.min_replicas} if scaling is None else {}))
    return deployment.bind()
