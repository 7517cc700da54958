"""Where runs are computed: in this process, by worker processes of this machine, or by Ray."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from adaptive_margins.errors import TrainingError
from adaptive_margins.paper.shared_store import EXPIRY, LeasedError
from adaptive_margins.processes import end_when_asked, end_with_parent
from adaptive_margins.progress import say
from adaptive_margins.ray_tasks import leave_ray, ray_task
from adaptive_margins.runs import RunConfig

C = TypeVar("C", bound=RunConfig)
Submit = Callable[..., "Future[Any]"]
"""Starts a run, given its configuration and a lease that may be taken over, or None."""
POLL = 5.0  # seconds between two looks at runs that others compute


def compute(submit: Submit, slots: int, configs: Iterable[C]) -> Iterator[C]:
    """Compute runs, ``slots`` at a time, and yield each once it is finished, here or elsewhere."""
    waiting, leased, running = deque(configs), list[C](), dict[Future[Any], C]()
    seen: dict[C, tuple[str | None, float]] = {}  # leases of others, and since when
    while waiting or leased or running:
        while waiting and len(running) < slots:
            lease, since = seen.get(config := waiting.popleft(), (None, 0.0))
            stale = time.monotonic() - since > EXPIRY
            running[submit(config, lease if stale else None)] = config
        done, _ = wait(running, POLL if leased else None, FIRST_COMPLETED)
        for future in done:
            config = running.pop(future)
            if (lease := _lease(future)) is None:
                yield config
                continue
            if config not in seen:
                say(f"run {config.run_id} is computed by another process: waiting for it")
            if seen.get(config, (None, 0.0))[0] != lease:
                seen[config] = lease, time.monotonic()
            leased.append(config)
        if not done:
            time.sleep(0 if running else POLL)
            waiting.extend(leased)
            leased.clear()


def _lease(future: Future[Any]) -> str | None:
    """None if a run is finished, or the lease of another process; raises errors of workers."""
    if not (error := future.exception()):
        return None
    error = getattr(error, "cause", error)  # of an error of Ray's
    if isinstance(error, LeasedError):
        return str(error.args[1])
    if isinstance(error, BrokenProcessPool) or type(error).__module__.startswith("ray."):
        raise _killed(error)
    raise error


def _killed(error: BaseException) -> TrainingError:
    return TrainingError(
        "a worker process was killed (out of memory?); finished runs are stored, and the same call"
        f" computes the others ({type(error).__name__})"
    )


def at_once(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call a function in this process."""
    future: Future[Any] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


@contextmanager
def in_processes(workers: int, make: Callable[[], Any], gpus: Sequence[str]) -> Iterator[Submit]:
    """Worker processes of this machine; of n ``gpus``, worker i sees the one of number i mod n."""
    context = multiprocessing.get_context("spawn")
    arguments = (make, 1, gpus, context.Value("i", 0) if gpus else None)
    pool = ProcessPoolExecutor(workers, context, _start, arguments)

    def submit(*arguments: Any) -> Future[Any]:
        try:
            return pool.submit(_execute, *arguments)
        except (BrokenProcessPool, ValueError) as error:  # a worker died while others start
            raise _killed(error) from error  # with another call the pool would start more

    try:
        yield submit
        pool.shutdown()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def on_ray(
    address: str, make: Callable[[], Any], needs: dict[str, float], memory: Callable[[], int]
) -> Iterator[Submit]:
    """Tasks of Ray, which is started or connected to with the first run."""
    task = functools.cache(lambda: ray_task(address, _on_ray, needs, memory(), store=2**27))
    try:
        yield lambda *arguments: task()(make, *arguments)
    finally:
        if task.cache_info().currsize:
            leave_ray()


def visible_gpus() -> list[str]:
    """GPUs of NVIDIA's that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


_worker: Any = None
_made_by = ""


def _start(
    make: Callable[[], Any], threads: int, gpus: Sequence[str] = (), count: Any = None
) -> None:
    """Begin a worker process, which ends when its parent ends, even if that was killed."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if gpus:
        with count.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[count.value % len(gpus)]
            count.value += 1
    torch.set_num_threads(threads)
    _worker = make()
    gc.freeze()  # the trainer collects garbage after each run; half a million imported objects stay
    if multiprocessing.parent_process() is not None:  # Ray ends its own
        end_with_parent()
        end_when_asked()


def _execute(config: RunConfig, stale: str | None) -> None:
    _worker.execute(config, stale)


def _on_ray(make: Any, config: RunConfig, stale: str | None) -> None:
    """A task; a process of Ray's executes many, of one driver or several."""
    global _made_by
    if _made_by != make.keywords["owner"]:
        _start(make, int(os.environ.get("OMP_NUM_THREADS", "1")))
        _made_by = make.keywords["owner"]
    _worker.prepare([config])  # this machine may lack what the run needs
    _execute(config, stale)
