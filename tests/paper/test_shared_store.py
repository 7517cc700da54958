"""Runs that several machines share: computed once, by who holds the lease, wherever they are stored."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import obstore
import pytest
from typer.testing import CliRunner

from adaptive_margins import cli, ray_tasks
from adaptive_margins.errors import TrainingError
from adaptive_margins.paper import backends, runner, shared_store
from adaptive_margins.paper.shared_store import LeasedError, open_store
from adaptive_margins.paper.store import Store, StoreError
from conftest import run_config

CONFIGS = [run_config(seed=seed) for seed in range(1, 5)]


@pytest.fixture
def bucket(monkeypatch) -> str:
    """A bucket in memory, or of an S3-compatible server: $ADAPTIVE_MARGINS_TEST_S3, as http://127.0.0.1:5000."""
    if not (server := os.environ.get("ADAPTIVE_MARGINS_TEST_S3")):
        in_memory = functools.cache(lambda url: obstore.store.MemoryStore())
        monkeypatch.setattr(obstore.store, "from_url", lambda url, retry_config: in_memory(url))
        return "s3://bucket/runs"
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "ENDPOINT": server, "ALLOW_HTTP": "true"}.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    name = uuid.uuid4().hex
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT"))
    return f"s3://{name}/runs"


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    """A folder that several machines mount, or a bucket."""
    return str(tmp_path / "mounted") if request.param == "folder" else request.getfixturevalue("bucket")  # fmt: skip


def put(store: Store, config) -> None:
    store.put(config, None, {}, {}, save_model=lambda folder: folder.mkdir())
    store.publish(config)


# ---- the store -------------------------------------------------------------------------------------


def test_a_run_of_one_machine_is_read_on_another(place, tmp_path):
    ours, theirs = (open_store(place, tmp_path / home / "runs") for home in ("ours", "theirs"))
    assert theirs.missing([*CONFIGS, *CONFIGS]) == CONFIGS
    put(ours, CONFIGS[0])
    assert theirs.has(CONFIGS[0])
    assert theirs.missing(CONFIGS) == CONFIGS[1:]
    run = theirs.get(CONFIGS[0])
    assert run.path == tmp_path / "theirs" / "runs" / CONFIGS[0].run_id
    assert run.config == CONFIGS[0]
    assert run.result == ours.get(CONFIGS[0]).result
    assert (run.path / "model").is_dir()
    with pytest.raises(StoreError, match="is not in"):
        theirs.get(CONFIGS[1])


def test_runs_from_before_are_shared_and_one_that_is_half_copied_is_none(bucket, tmp_path, monkeypatch):  # fmt: skip
    alone = Store(tmp_path / "ours")
    put(alone, CONFIGS[0])
    ours, theirs = open_store(bucket, tmp_path / "ours"), open_store(bucket, tmp_path / "theirs")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(shared_store.tarfile.TarFile, "add", lambda *_, **__: 1 / 0)
        ours.missing(CONFIGS)
    assert theirs.missing(CONFIGS) == CONFIGS
    assert ours.missing(CONFIGS) == CONFIGS[1:]
    assert theirs.get(CONFIGS[0]).result == alone.get(CONFIGS[0]).result
    (stamp,) = shared_store._list(ours.bucket)
    theirs.publish(CONFIGS[0])  # who comes second leaves it
    assert shared_store._list(ours.bucket) == [stamp]


def test_many_runs_are_found_by_one_listing(bucket, tmp_path, monkeypatch):
    store = open_store(bucket, tmp_path / "runs")
    put(store, CONFIGS[0])
    asked, listed = [], shared_store._list
    monkeypatch.setattr(shared_store, "_list", lambda *a: asked.append(a) or listed(*a))
    monkeypatch.setattr(store, "_has_archive", lambda *_: pytest.fail("asked for one run"))
    assert store.missing(CONFIGS) == CONFIGS[1:]
    assert len(asked) == 1
    assert store.missing(CONFIGS[:1]) == []  # known by now
    assert len(asked) == 1


# ---- leases ----------------------------------------------------------------------------------------


@pytest.fixture
def leases(place, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_store, "RENEWED", 0.05)
    return open_store(place, tmp_path / "runs").leases


def content(leases, run="run"):
    return leases._read(f"{run}.{leases._generations(run)[-1]}")


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_of_many_holds_a_lease_and_renews_it(leases):
    start, held, refused = threading.Barrier(6), [], []

    def take(owner):
        start.wait()
        try:
            with leases.held("run", owner):
                held.append(owner)
                wait_until(lambda: len(refused) == 5)
        except LeasedError:
            refused.append(owner)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(take, "abcdef"))
    assert len(held) == 1
    assert len(refused) == 5
    with leases.held("run", "b") as check, leases.held("another", "c"):
        first = content(leases)
        wait_until(lambda: content(leases) not in (first, ""))
        check()
    assert leases._generations("run") == []


def test_a_lease_that_is_taken_over_is_lost(leases):
    with leases.held("run", "a") as check:
        with pytest.raises(LeasedError):
            leases.held("run", "b", "what it was long ago").__enter__()
        for _ in range(3):  # it is renewed between
            with (
                contextlib.suppress(LeasedError),
                leases.held("run", "b", content(leases)) as theirs,
            ):
                wait_until(lambda: raises(check))
                theirs()
                break
        else:
            raise AssertionError("it was never taken over")
    assert leases._generations("run") == []


def test_a_driver_takes_over_from_its_worker_that_died(leases):
    leases._write("run.1", "driver machine 1", "create")
    with pytest.raises(LeasedError):
        leases.held("run", "another").__enter__()
    with leases.held("run", "driver") as check:
        assert leases._generations("run") == [1, 2]
        check()
    assert leases._generations("run") == []


def test_a_lease_of_the_same_number_is_not_ones_own(leases):
    with leases.held("run", "a") as check:
        leases._write("run.1", "another, after all leases were released")
        wait_until(lambda: raises(check))
    assert content(leases).startswith("another")


def raises(check):
    try:
        check()
    except LeasedError:
        return True
    return False


# ---- several drivers -------------------------------------------------------------------------------


def worker(place, home, computed, seconds=0.02):
    """A runner that stores empty runs."""
    inputs = SimpleNamespace(home=home, profile=SimpleNamespace(teacher=None), teacher=None)
    one = runner.Runner(inputs, open_store(place, home / "runs"))

    def compute(config, work):
        computed.append(config)
        time.sleep(seconds)
        one.store.put(config, None, {}, {})

    one._compute_one = compute
    return one


def test_two_drivers_do_no_run_twice(place, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "POLL", 0.05)
    computed, homes = [], [tmp_path / name for name in "ab"]
    workers = [worker(place, home, computed) for home in homes]

    def drive(one):
        done = list(backends.compute(partial(backends.at_once, one.execute), 1, CONFIGS))
        return Counter(done), [one.store.get(config).config for config in CONFIGS]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(drive, workers))
    assert found == [(Counter(CONFIGS), CONFIGS)] * 2
    assert Counter(computed) == Counter(CONFIGS)
    assert workers[0].store.leases._generations(CONFIGS[0].run_id) == []


def test_a_run_of_a_driver_that_died_is_taken_over_only_once_its_lease_is_old(place, tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.setattr(backends, "POLL", 0.02)
    monkeypatch.setattr(backends, "EXPIRY", 0.5)
    computed = []
    one = worker(place, tmp_path / "a", computed)
    one.store.leases._write(f"{CONFIGS[0].run_id}.1", "dead", "create")
    stamps = {}
    for config in backends.compute(partial(backends.at_once, one.execute), 1, CONFIGS[:2]):
        stamps[config] = time.monotonic()
    assert computed == [CONFIGS[1], CONFIGS[0]]  # others first
    assert stamps[CONFIGS[0]] - stamps[CONFIGS[1]] > 0.4


def test_a_run_that_another_took_over_is_given_up(place, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_store, "RENEWED", 0.02)
    one = worker(place, tmp_path / "a", [])
    config, put = CONFIGS[0], one.store.put

    def compute(config, work):
        one.store.leases._write(f"{config.run_id}.2", "another", "create")
        wait_until(lambda: raises(one._check))
        put(config, None, {}, {}) if "://" in place else one._evaluate({}, "", [])

    one._compute_one = compute
    with pytest.raises(LeasedError):
        one.execute(config)
    assert open_store(place, tmp_path / "b" / "runs").missing([config]) == [config]


# ---- wrong use -------------------------------------------------------------------------------------


def test_stores_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    for name in ("ALLOW_HTTP", "SKIP_SIGNATURE"):
        monkeypatch.setenv(f"AWS_{name}", "true")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    for url, message in {
        "ftp://host/runs": "cannot be written: .*Unable to recognise URL",
        "s3://bucket/runs": "cannot be written: .*error sending request",
        str(tmp_path / "file" / "runs"): "cannot be written: .*",
        str(tmp_path / "other"): "full exists; move its runs to .*other, and remove it",
    }.items():
        with pytest.raises(StoreError, match=message):
            open_store(url, tmp_path / "full")
    assert not list((tmp_path / "full").iterdir())


def test_ray_that_cannot_be_used(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert ray_tasks.ray_options("local,gpus=0.5,cpus=2", "") == ("local", {"num_gpus": 0.5, "num_cpus": 2})  # fmt: skip
    for text, message in {
        "local,gpus": "expected ADDRESS",
        "local,gpus=some": "expected ADDRESS",
        "local,memory=3": "expected ADDRESS",
        "local,cpus=0": "expected ADDRESS",
        "127.0.0.1:1": "does not answer: .*refused",
    }.items():
        with pytest.raises(ray_tasks.RayError, match=message):
            ray_tasks.ray_options(text, "a store")
    with pytest.raises(ray_tasks.RayError, match="need --store"):
        ray_tasks.ray_options("head:6379", "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ray_tasks.RayError, match="leave out torchrun"):
        ray_tasks.ray_options("local", "")
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ray_tasks.RayError, match="is not installed: pip install"):
        ray_tasks.ray_options("local", "")


def test_the_command_refuses_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path))
    for name in ("STORE", "RAY"):
        monkeypatch.setenv(f"ADAPTIVE_MARGINS_{name}", "")  # removed again
    for option, value, message in (
        ("--store", "nosuch://here", "nosuch://here"),
        ("--ray", "head:6379", "need --store"),
    ):
        done = CliRunner().invoke(cli.app, ["reproduce", "--profile", "smoke", option, value])
        assert done.exit_code == 1
        assert message in str(done.exception)
        monkeypatch.setenv("ADAPTIVE_MARGINS_STORE", "")
    assert list(tmp_path.iterdir()) == []


# ---- worker processes ------------------------------------------------------------------------------


def test_workers_see_one_gpu_each(monkeypatch):
    count, seen = multiprocessing.get_context("spawn").Value("i", 0), []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(backends, "_worker", None)
    gpus = backends.visible_gpus()
    for _ in range(3):
        backends._start(lambda: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]), 1, gpus, count)  # fmt: skip
    assert seen == ["4", "7", "4"]


@pytest.mark.parametrize("error", [BrokenProcessPool(), ValueError("bad value(s) in fds_to_keep")])
def test_a_worker_that_is_killed_while_others_start(monkeypatch, error):
    """Python's pool then fails to take a run, in one of two ways."""

    def fail(*_):
        raise error

    pool = SimpleNamespace(submit=fail, shutdown=lambda **_: None)
    monkeypatch.setattr(backends, "ProcessPoolExecutor", lambda *_: pool)
    with (
        pytest.raises(TrainingError, match="a worker process was killed"),
        backends.in_processes(2, dict, []) as submit,
    ):
        list(backends.compute(submit, 2, CONFIGS[:2]))


class Slow:
    """Computes runs on Ray; the first attempt at the first one takes forever."""

    def __init__(self, place: str, home: Path, owner: str) -> None:
        self.inputs, self.owner = SimpleNamespace(home=home), owner
        self.store = open_store(place, home / "runs")

    def prepare(self, configs) -> None:
        pass

    def execute(self, config, stale=None) -> None:
        with self.store.leases.held(config.run_id, self.owner, stale):
            note = self.inputs.home / config.run_id
            first = not note.exists()
            with note.open("a") as file:
                file.write(f"{os.getpid()}\n")
            if first and config.seed == 1:
                time.sleep(600)
            self.store.put(config, None, {}, {})


@pytest.mark.timeout(280)
def test_a_worker_of_ray_that_is_killed(tmp_path):
    """Its run is computed by another at once, though the lease of the dead one has not expired."""
    pytest.importorskip("ray.cloudpickle").register_pickle_by_value(sys.modules[__name__])
    place, home = str(tmp_path / "mounted"), tmp_path / "home"
    make, done = partial(Slow, place, home, owner="driver"), []
    note = home / CONFIGS[0].run_id

    def kill():
        while not note.exists() or not note.read_text():
            time.sleep(0.05)
        os.kill(int(note.read_text()), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    address, needs = os.environ.get("ADAPTIVE_MARGINS_TEST_RAY", "local"), {"num_cpus": 1}
    try:
        with backends.on_ray(address, make, needs, lambda: 10**8) as submit:
            done += backends.compute(submit, 2, CONFIGS[:2])
    except ray_tasks.RayError as error:  # its raylet ends itself where an agent needs 15 s to start
        pytest.skip(f"Ray does not start here: {error}")
    assert set(done) == set(CONFIGS[:2])
    assert open_store(place, home / "runs").missing(CONFIGS) == CONFIGS[2:]
    attempts = [len((home / c.run_id).read_text().split()) for c in CONFIGS[:2]]
    assert attempts == [2, 1]
