"""Tasks of Ray: on a cluster, or on this machine."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from adaptive_margins.distributed import processes
from adaptive_margins.errors import AdaptiveMarginsError

RETRIES = 5  # how often Ray starts a task again whose worker or machine died


class RayError(AdaptiveMarginsError, RuntimeError):
    """Ray is not installed, does not answer, or was asked for in a wrong way."""


def ray_options(text: str, store: str | None) -> tuple[str, dict[str, float]]:
    """Address, and what a task needs as Ray names it, from "ADDRESS[,gpus=N][,cpus=N]".

    ``store`` is where the tasks' results are shared; None if they are returned. Raises RayError if
    they are not allowed, Ray is not installed, or the address does not answer.
    """
    address, *rest = text.split(",")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    wrong = ""
    if processes() > 1:
        wrong = "it starts its own workers; leave out torchrun or Ray"
    elif address != "local" and store == "":
        wrong = "its workers need --store, a folder or URL that all machines reach"
    elif importlib.util.find_spec("ray") is None:
        wrong = "it is not installed: pip install 'adaptive-margins[ray]'"
    try:
        options = {f"num_{k}": float(n) for k, n in (part.split("=") for part in rest)}
        if options.keys() - {"num_gpus", "num_cpus"} or min(options.values(), default=1) <= 0:
            raise ValueError
        if port.isdecimal() and not wrong:
            socket.create_connection((host, int(port)), timeout=10).close()
    except ValueError:
        wrong = "expected ADDRESS[,gpus=N][,cpus=N]"
    except OSError as error:
        wrong = f"it does not answer: {error}"
    if wrong:
        raise RayError(f"Ray at {text}: {wrong}")
    return address, options


def ray_task(
    address: str,
    function: Callable[..., Any],
    needs: dict[str, float],
    memory: int = 0,
    store: int | None = None,
) -> Callable[..., Future[Any]]:
    """Join Ray, and return what starts a call of ``function`` as a task; `leave_ray` ends it.

    Ray queues tasks, and starts them again if their worker or machine dies. ``memory`` is an
    estimate in bytes; what no machine has is not asked for. ``store`` are the bytes of `local`
    Ray's memory for arguments and results.
    """
    import ray

    local = {"include_dashboard": False, "object_store_memory": store}
    try:
        ray.init(address, **(local if address == "local" else {}))
    except Exception as error:  # Ray has several
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise RayError(f"Ray at {address} does not answer: {reason}") from error
    most = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    options = {**needs, "memory": min(memory, most) or None, "max_retries": RETRIES}
    task = ray.remote(function).options(**options)
    return lambda *arguments: task.remote(*arguments).future()


def leave_ray() -> None:
    """End the tasks, and Ray if it is `local`."""
    import ray

    ray.shutdown()
