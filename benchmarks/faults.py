"""Interrupt and damage this project's work on purpose, and compare its results with undisturbed ones.

    python benchmarks/faults.py [--trials N] [--parts PART …]

A row of faults.json counts trials: what was noticed, and after how many of them the same call ended with
equal results, bit by bit, all but times and memory. Moments of interruption are random, one in each N-th
part of the time that the undisturbed work takes. Trials are forks of this process: importing torch takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import torch
from timing import stamp
from trials import Rows, Work, full, interrupted, rays, rotten, some, spawned

from adaptive_margins.book.build import Site
from adaptive_margins.data.converted import convert
from adaptive_margins.encoder.embed import embed_shards
from adaptive_margins.encoder.load import open_encoder
from adaptive_margins.files import file_sha256, read_object, write_text
from adaptive_margins.paper.inputs import Inputs
from adaptive_margins.paper.reproduction import RAY_VARIABLE, STORE_VARIABLE, Reproduction
from adaptive_margins.profiles.config import IrDatasetsSettings
from adaptive_margins.profiles.load import load_profile
from adaptive_margins.retrieval.dense import DenseRetriever
from adaptive_margins.retrieval.dense_index import DenseIndex

FOLDER = Path(__file__).resolve().parent
PARTS = ("runs", "disk", "sweep", "ray", "encoding", "book", "files", "caches")
TIMES = ("train_seconds", "eval_seconds", "peak_bytes", "index", "finished")


def run_result(path: Path) -> Any:
    """What a stored run of any kind gives, but for times and memory: rankings and weights by their bytes."""
    result = json.loads((path / "result.json").read_text())
    numbers = {key: value for key, value in result.items() if key not in TIMES}
    numbers["teacher"] = {k: v for k, v in result.get("teacher", {}).items() if "seconds" not in k}
    tables = {file.name: pd.read_parquet(file) for file in sorted(path.glob("*.parquet"))}
    frames = {k: t.drop(columns="seconds", errors="ignore").to_csv() for k, t in tables.items()}
    binary = [*path.rglob("*.gz"), *path.rglob("*.safetensors")]
    return numbers, frames, {file.name: file_sha256(file) for file in binary}


class Parts:
    """What is disturbed: the profile smoke with more steps, in a folder of its own."""

    def __init__(self, folder: Path, trials: int) -> None:
        self.folder, self.trials, self.home = folder, trials, folder / "home"
        values = {"comparison__triples": 64, "comparison__evaluate_every": 16}
        self.smoke = Reproduction(load_profile("smoke", **values), self.home)
        runner, e = self.smoke.runner, self.smoke.experiments
        runner.ensure([e.bm25_run(), e.zero_shot_run("minilm-4")])
        config = e.variant_run("minilm-4", "distributed", False)
        self.id, self.path = config.run_id, self.smoke.store.path(config)
        self.work = self.home / "cache" / "work"
        what = "a run: training, embedding, ranking"
        result, places = (lambda: run_result(self.path)), [self.work, self.path]
        self.run = Work(what, lambda: runner.execute(config), places, result)

    def runs(self) -> Rows:
        """A run in this process."""
        rows = interrupted(self.run, signal.SIGKILL, self.trials)
        return rows + interrupted(self.run, signal.SIGTERM, self.trials)

    def disk(self) -> Rows:
        """A run on disks that are too small for its checkpoints or its embeddings."""
        return full(self.run, self.work, [40 << 10 >> halved for halved in range(8)])

    def sweep(self) -> Rows:
        """Six runs with two workers."""
        profile = self.smoke.profile.model_copy(update={"workers": 2})
        two, configs = Reproduction(profile, self.home), self.smoke.experiments.figure3_runs()[:6]
        places = [two.store.path(config) for config in configs]
        ensure, results = (lambda: two.runner.ensure(configs)), (lambda: [*map(run_result, places)])
        work = Work("a sweep: 6 runs, 2 workers", ensure, [*places, self.work], results)
        rows = interrupted(work, signal.SIGKILL, self.trials // 2)
        rows += interrupted(work, signal.SIGTERM, max(1, self.trials // 20))
        work.name += ", one of which is killed"
        said = "a worker process was killed"
        return rows + interrupted(work, signal.SIGKILL, self.trials // 2, spawned, said)

    def ray(self) -> Rows:
        """Six runs on a cluster of Ray, which outlives their driver; leases of the dead expire first."""
        ray, home = Path(sys.executable).with_name("ray"), self.folder / "ray"
        shared = self.folder / "shared"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared_by = {STORE_VARIABLE: str(shared), RAY_VARIABLE: f"127.0.0.1:{port}"}
        configs = self.smoke.experiments.figure3_runs()[:6]
        places = [shared / self.smoke.store.path(config).name for config in configs]

        def ensure() -> None:  # a driver of its own, with its own leases
            os.environ |= shared_by  # only here: threads of the store would not survive a fork
            Reproduction(self.smoke.profile, home).runner.ensure(configs)

        results = lambda: [*map(run_result, places)]  # noqa: E731
        also = shared / ".leases", home / "cache" / "work"
        work = Work("a sweep: 6 runs on Ray", ensure, [*places, *also], results)
        options = (
            f"--node-ip-address=127.0.0.1 --port={port} --num-cpus=2 --include-dashboard=false"
        )
        os.environ["RAY_AUTH_MODE"] = "disabled"  # it listens on this machine only
        subprocess.run(
            [ray, "start", "--head", "--disable-usage-stats", *options.split()], check=True
        )
        try:
            rows = interrupted(work, signal.SIGKILL, max(1, self.trials // 4))
            work.name += ", one of whose workers is killed"
            return rows + interrupted(work, signal.SIGKILL, self.trials // 2, rays)
        finally:
            subprocess.run([ray, "stop", "--force"], check=False)

    def encoding(self) -> Rows:
        """Embeddings in shards, and the index of a corpus."""
        encoder, place = self.smoke.inputs.encoder("minilm-4"), self.folder / "shards"
        passages, index = self.smoke.inputs.collection.passages, self.folder / "index"
        retriever = DenseRetriever(open_encoder("minilm"), passages, warn=False)

        def embed() -> bytes:
            return embed_shards(encoder.model, encoder.passages, place, shard=16).tobytes()

        def build() -> Any:
            if not index.is_dir():
                DenseIndex.build(retriever, "smoke", "minilm", index)
            DenseIndex.open(index)
            return {
                file.name: file_sha256(file) for file in some(index) if file.name != "index.json"
            }

        shards = Work("embedding in shards", embed, [place], embed)
        built = Work("an index", build, [index, self.folder / "index.work"], build)
        rows = interrupted(shards, signal.SIGKILL, self.trials)
        rows += interrupted(built, signal.SIGKILL, self.trials // 2)
        for work, folder in ((shards, place), (built, index)):
            rows += rotten(work.name, some(folder), work.do)
        return rows

    def book(self) -> Rows:
        """Two notebooks that read a run."""
        self.run.finish()
        site, pages = Site(self.home, "smoke"), self.home / "book" / "_executed"
        notebooks = [self.folder / f"0{number}_reads.ipynb" for number in (1, 2)]
        sources = 'profile = ""\ndata_folder = ""', f"print(open('{self.path}/config.json').read())"
        cells = [nbformat.v4.new_code_cell(text, id=f"c{len(text)}") for text in sources]
        cells[0].metadata["tags"] = ["parameters"]
        kernel = {"name": "python3", "display_name": "Python", "language": "python"}
        book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        for notebook in notebooks:
            nbformat.write(book, notebook)
        read = lambda: [(pages / notebook.name).read_text() for notebook in notebooks]  # noqa: E731
        work = Work("a book: 2 notebooks", lambda: site.execute(notebooks), [pages], read)
        return interrupted(work, signal.SIGKILL, max(1, self.trials // 5))

    def files(self) -> Rows:
        """The files of a run and a checkpoint."""
        self.run.undisturbed()
        files = [file for file in some(self.path) if file.parent == self.path]
        again = lambda: run_result(self.smoke.run_one(self.id).path)  # noqa: E731
        rows = rotten("a finished run", files, again)

        self.run.clean()
        work, copy = self.work / self.id, self.folder / "work"
        process, _ = self.run.begin()
        while not (newest := work / "checkpoint-6" / "COMPLETE").is_file():
            time.sleep(0.005)
        process.kill()
        process.join()
        shutil.copytree(work, copy)
        before = lambda: (self.run.clean(), shutil.copytree(copy, work))  # noqa: E731
        resumed = lambda: (self.run.do(), self.run.result())[1]  # noqa: E731
        return rows + rotten("the newest checkpoint", some(newest.parent), resumed, before)

    def caches(self) -> Rows:
        """The files of a collection, tokens and hidden states."""
        sys.path.append(str(FOLDER.parent / "tests"))
        import irds_miniature

        small = irds_miniature.register(self.folder / "miniature", "am-faults", triples=500)
        settings = IrDatasetsSettings.model_validate(small.settings())
        places = self.folder / "conversion", self.folder / "collections"
        converted = lambda: convert(settings, *places).fingerprint  # noqa: E731
        files = [*(places[1] / converted()).iterdir()]
        rows = rotten("a converted collection", files, converted)
        for name in ("tokens", "states"):
            cache = self.home / "cache" / name

            def opened(cache: Path = cache) -> Any:
                Inputs(self.smoke.profile, self.home).encoder("minilm-4")
                return {file.name: file_sha256(file) for file in some(cache)}

            rows += rotten(f"cached {name}", some(cache), opened)
        return rows


def main() -> None:
    """Write faults.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--parts", nargs="+", default=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("always")  # those of damaged shards
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"IR_DATASETS_HOME": folder, "TOKENIZERS_PARALLELISM": "false"}
        parts = Parts(Path(folder), options.trials)
        for name in options.parts:
            rows = [row | stamp() for row in getattr(parts, name)()]
            if not rows:
                print(f"{name}: a disk cannot be mounted here; faults.json keeps its earlier rows")
                continue
            print(pd.DataFrame(rows).drop(columns=["machine", "date"]).to_string(index=False))
            found = read_object(FOLDER / "faults.json") | {name: rows}
            write_text(FOLDER / "faults.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
