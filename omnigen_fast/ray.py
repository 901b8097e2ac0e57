"""The server on Ray Serve: `serve run omnigen_fast.ray:app model=MODEL replicas=2`.

Each replica keeps a model, with a scheduler of its own; Ray Serve sends a request to the one of two
random replicas that has fewer requests.
"""

# No postponed annotations: Ray Serve looks at the class of the argument of `app`.

import os
from functools import partial
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from .errors import RequestError
from .parallel.layout import MAX_RANKS
from .pipeline import OmniGenPipeline
from .server.app import create_app
from .server.gate import allowed_hosts
from .server.options import Options
from .serving.followers import load
from .serving.scheduler import Scheduler, Settings

_JOIN_SECONDS = 10.0  # for the step in progress, when a replica ends


class Arguments(BaseModel):
    """What `serve run` or a config file gives, by name."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(
        "Shitao/OmniGen-v1", description="Folder or hub id, as each machine finds it."
    )
    model_name: str | None = Field(None, description="By which clients ask for it.")
    vae_path: str | None = Field(None, description="Folder, file or hub id of the VAE.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    local_files_only: bool = Field(False, description="Do not download from the hub.")
    lora: list[str] | str = Field(
        [], description="FILE, FOLDER or hub id; a config file may list several."
    )
    dtype: str = Field("bfloat16", description="bfloat16 or float32.")
    weights: str | None = Field(None, description="bfloat16, int8, fp8, nf4 or auto.")
    compute: str | None = Field(None, description="int8 or fp8; by default as dtype.")
    cache: str | None = Field(
        None, description="Of the condition: int8 or fp8; by default as dtype."
    )
    attention: str = Field("auto", description="triton, flash, cudnn or auto.")
    vae_dtype: str = Field("float32", description="float32 or bfloat16.")
    compile: bool | None = Field(
        None, description="On a CPU, run operations in C++; by default for large models."
    )
    memory: str = Field("auto", description="Device memory of a replica: auto, 8GiB, ...")
    condition_cache: str = Field("2GiB", description="Memory for conditions, see `serve`.")
    replicas: int = Field(
        1, ge=1, description="How many models to keep; the least with max_replicas."
    )
    max_replicas: int | None = Field(
        None, ge=1, description="Add replicas up to this many under load."
    )
    target_requests: float = Field(
        4, gt=0, description="Requests per replica that autoscaling aims at."
    )
    gpus: float = Field(1, ge=0, description="Of a replica; 0 runs on the CPU.")
    gpus_per_replica: int = Field(
        1, ge=1, le=MAX_RANKS, description="How many GPUs make each picture; processes with gpus=0."
    )
    cpus: float = Field(1, gt=0, description="Of a replica.")
    api_key_env: str = Field("OMNIGEN_API_KEY", description="Variable that holds the clients' key.")
    no_key: bool = Field(False, description="Serve without a key.")
    allowed_hosts: list[str] | str = Field(
        [], description="Names that are answered besides localhost."
    )
    max_queue: int = Field(64, ge=1, description="Requests of a replica that may run and wait.")
    max_pixels: int = Field(1024 * 1024, description="Of a picture, and of an input image.")
    max_images: int = Field(4, description="Pictures of a request.")
    max_steps: int = Field(100, description="Steps of a request.")
    steps: int = Field(50, description="Steps of a request that does not say how many.")
    quality: str = Field("exact", description="Of a request that names none: exact, high or fast.")
    timeout_seconds: float = Field(600, gt=0, description="After which a request ends.")
    drain_seconds: float = Field(60, ge=0, description="For accepted requests when a replica ends.")
    policy: str = Field("shortest", description="shortest or fcfs.")
    packing: bool = Field(True, description="Run steps of like requests together.")


class Replica:
    """A model with its scheduler; takes requests once it is warm."""

    def __init__(self, arguments: Arguments, settings: Settings, options: Options) -> None:
        self._options = options
        self._scheduler = Scheduler(partial(_load, arguments), settings)
        self._scheduler.wait_until_ready()

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve's name for what makes the application."""
        return create_app(self._scheduler, self._options, closing=self._close)

    def _close(self) -> None:
        self._scheduler.close(join_seconds=_JOIN_SECONDS)

    def check_health(self) -> None:
        """Raises once the model can't be used; Ray Serve then starts another replica."""
        if problem := self._scheduler.state().failure:
            raise RuntimeError(problem)


def app(arguments: Arguments) -> serve.Application:
    """The application that Ray Serve deploys.

    Raises RequestError for an argument that can't be used, or where no key is set.
    """
    settings = Settings(
        policy=arguments.policy,
        packing=arguments.packing,
        max_queue=arguments.max_queue,
        timeout_seconds=arguments.timeout_seconds,
        memory=arguments.memory,
    )
    options = Options(
        model_name=arguments.model_name or arguments.model,
        api_key=_key(arguments),
        hosts=allowed_hosts(_listed(arguments.allowed_hosts), "localhost"),
        max_pixels=arguments.max_pixels,
        max_images=arguments.max_images,
        max_steps=arguments.max_steps,
        steps=min(arguments.steps, arguments.max_steps),
        quality=arguments.quality,
    )
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="omnigen",
        ray_actor_options={
            "num_gpus": arguments.gpus * arguments.gpus_per_replica,
            "num_cpus": arguments.cpus,
        },
        # above what a scheduler accepts: it is what refuses, and says when to come again
        max_ongoing_requests=2 * arguments.max_queue,
        graceful_shutdown_timeout_s=arguments.drain_seconds,
        max_constructor_retry_count=3,
        **_replicas(arguments),
    )
    return deployment.bind(arguments, settings, options)


def _replicas(arguments: Arguments) -> dict[str, Any]:
    least, most = arguments.replicas, arguments.max_replicas
    if most is None:
        return {"num_replicas": least}
    if most < least:
        raise RequestError(f"max_replicas must be at least replicas={least}, got {most}")
    bounds = {"min_replicas": least, "max_replicas": most}
    return {"autoscaling_config": {**bounds, "target_ongoing_requests": arguments.target_requests}}


def _load(arguments: Arguments) -> OmniGenPipeline:
    options = {
        "model_name": arguments.model,
        "vae_path": arguments.vae_path,
        "dtype": arguments.dtype,
        "weights": arguments.weights,
        "compute": arguments.compute,
        "cache": arguments.cache,
        "attention": arguments.attention,
        "vae_dtype": arguments.vae_dtype,
        "compile": arguments.compile,
        "revision": arguments.revision,
        "local_files_only": arguments.local_files_only,
        "condition_cache_bytes": arguments.condition_cache,
        "memory": arguments.memory,
    }
    device = None if arguments.gpus else "cpu"
    return load(arguments.gpus_per_replica, device, _listed(arguments.lora), options)


def _key(arguments: Arguments) -> str | None:
    """The key that clients must send: a proxy of Ray Serve may listen to other machines."""
    if arguments.no_key:
        return None
    key = os.environ.get(arguments.api_key_env)
    if not key:
        raise RequestError(
            f"set an API key in {arguments.api_key_env}, or give no_key=true if a proxy checks "
            "who may use the server"
        )
    return key


def _listed(given: list[str] | str) -> list[str]:
    return [one for one in ([given] if isinstance(given, str) else given) if one]
