"""`omnigen-fast serve`: OpenAI's image API."""

from __future__ import annotations

import ipaddress
import os
from typing import TYPE_CHECKING

import click

from ..errors import OmniGenError, RequestError
from ..fewer_steps import QUALITIES
from ..parallel.launch import check_devices
from ..parallel.layout import MAX_RANKS
from .failure import failure
from .loading import loading_options

if TYPE_CHECKING:
    from ..pipeline import OmniGenPipeline

_PACKAGES = {"fastapi", "uvicorn", "pydantic", "python_multipart", "prometheus_client"}
_KEY_VARIABLE = "OMNIGEN_API_KEY"


@click.command()
@loading_options()
@click.option("--model-name", help="By which clients ask for it; by default as --model.")
@click.option(
    "--memory", default="auto", show_default=True, help="Device memory to use: auto, 8GiB, ..."
)
@click.option(
    "--condition-cache",
    default="2GiB",
    show_default=True,
    help="Memory for the conditions of requests under way and earlier ones.",
)
@click.option("--lora", multiple=True, help="A LoRA's FILE, FOLDER or hub id. May be repeated.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address of this machine to listen at."
)
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: a free one."
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="A name that the server answers to, besides --host and localhost. May be repeated.",
)
@click.option(
    "--api-key-env",
    default=_KEY_VARIABLE,
    show_default=True,
    help="Variable of the environment that holds the key which clients must send.",
)
@click.option("--no-key", is_flag=True, help="Serve without a key, also beyond this machine.")
@click.option(
    "--max-queue",
    default=64,
    show_default=True,
    type=click.IntRange(1, 100_000),
    help="Requests that may run and wait.",
)
@click.option(
    "--max-pixels",
    default=1024 * 1024,
    show_default=True,
    type=click.IntRange(256),
    help="Of a picture, and of an input image after it is shrunk.",
)
@click.option(
    "--max-images",
    default=4,
    show_default=True,
    type=click.IntRange(1, 10),
    help="Pictures of a request.",
)
@click.option(
    "--max-steps",
    default=100,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Steps of a request.",
)
@click.option(
    "--steps",
    default=50,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Steps of a request that does not say how many.",
)
@click.option(
    "--timeout-seconds",
    default=600.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="After which a request ends.",
)
@click.option(
    "--drain-seconds",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0),
    help="For accepted requests, once SIGTERM has come.",
)
@click.option(
    "--quality",
    default=QUALITIES[0],
    show_default=True,
    type=click.Choice(QUALITIES),
    help="Of a request that names none; below exact: less work.",
)
@click.option(
    "--policy",
    default="shortest",
    show_default=True,
    type=click.Choice(["shortest", "fcfs"]),
    help="Which request goes first: the shortest one, or the one that came first.",
)
@click.option(
    "--ageing",
    default=0.35,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds of a request's time that a second of waiting outweighs.",
)
@click.option(
    "--packing/--no-packing",
    default=True,
    show_default=True,
    help="Run steps of like requests together where that is faster.",
)
@click.option(
    "--gpus-per-replica",
    default=1,
    show_default=True,
    type=click.IntRange(1, MAX_RANKS),
    help="How many GPUs make each picture; with --device cpu, processes.",
)
@click.option("--log-prompts", is_flag=True, help="Write prompts to the log.")
def serve(
    model: str,
    model_name: str | None,
    vae_path: str | None,
    revision: str | None,
    cache_dir: str | None,
    local_files_only: bool,
    device: str | None,
    dtype: str,
    weights: str | None,
    compute: str | None,
    cache: str | None,
    attention: str,
    vae_dtype: str,
    compile: bool | None,
    memory: str,
    condition_cache: str,
    lora: tuple[str, ...],
    host: str,
    port: int,
    allowed_hosts: tuple[str, ...],
    api_key_env: str,
    no_key: bool,
    max_queue: int,
    max_pixels: int,
    max_images: int,
    max_steps: int,
    steps: int,
    quality: str,
    timeout_seconds: float,
    drain_seconds: float,
    policy: str,
    ageing: float,
    packing: bool,
    gpus_per_replica: int,
    log_prompts: bool,
) -> None:
    """Serves OpenAI's image API, on 127.0.0.1 only unless --host is given."""
    key = _api_key(api_key_env, no_key, host)
    try:
        from ..server.app import create_app
        from ..server.gate import allowed_hosts as hosts_of
        from ..server.options import Options
        from ..server.run import Server, log_to_stderr
        from ..serving.followers import load
        from ..serving.metrics import Metrics
        from ..serving.scheduler import Scheduler, Settings
        from ..web.connections import listen
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _PACKAGES:
            raise
        needed = f"the server needs {error.name}"
        message = f"{needed}; install it with: pip install 'omnigen_fast[serve]'"
        raise failure(OmniGenError(message)) from error

    def load_model() -> OmniGenPipeline:
        options = {
            "model_name": model,
            "vae_path": vae_path,
            "dtype": dtype,
            "weights": weights,
            "compute": compute,
            "cache": cache,
            "attention": attention,
            "vae_dtype": vae_dtype,
            "compile": compile,
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "condition_cache_bytes": condition_cache,
            "memory": memory,
        }
        return load(gpus_per_replica, device, lora, options)

    try:
        if gpus_per_replica > 1:
            check_devices(gpus_per_replica, device)
        settings = Settings(
            policy=policy,
            packing=packing,
            ageing=ageing,
            max_queue=max_queue,
            timeout_seconds=timeout_seconds,
            memory=memory,
        )
        options = Options(
            model_name=model_name or model,
            api_key=key,
            hosts=hosts_of(list(allowed_hosts), host),
            max_pixels=max_pixels,
            max_images=max_images,
            max_steps=max_steps,
            steps=min(steps, max_steps),
            quality=quality,
            log_prompts=log_prompts,
        )
        opened = listen(host, [port], f"port {port} is in use; give another --port")
    except (OmniGenError, OSError) as error:
        raise failure(error) from error
    with opened:
        log_to_stderr()
        metrics = Metrics()
        scheduler = Scheduler(load_model, settings, metrics)
        app = create_app(scheduler, options, metrics)
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"The server is at http://{shown}:{opened.getsockname()[1]}/")
        Server(app, scheduler, drain_seconds).serve_until_told(opened)
    if problem := scheduler.state().failure:
        raise failure(OmniGenError(problem))


def _api_key(variable: str, no_key: bool, host: str) -> str | None:
    """The key that clients must send.

    Raises a failure where other machines could use the server without one.
    """
    key = os.environ.get(variable)
    if no_key:
        return None
    if key is None and not _is_local(host):
        text = (
            f"--host {host} lets other machines in: set an API key in {variable}, or give "
            "--no-key if a proxy checks who may"
        )
        raise failure(RequestError(text))
    if key == "":
        raise failure(RequestError(f"{variable} is set but empty; set a key, or give --no-key"))
    return key


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
