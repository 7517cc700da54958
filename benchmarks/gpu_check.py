"""Does this project compute correctly on this GPU, how fast, and how long would the profiles take? At most 8 minutes.

    python benchmarks/gpu_check.py [--device cuda] [--output FILE] [--json] [--parts PART …]

`make gpu-check` and ``adaptive-margins check-gpu`` start this. No network is used: encoders are random, texts synthetic. Each
part runs in a process of its own, which ends when its time is over: a part that fails or takes too long stops no other.
Exit status 1 if a check fails, and 2 without a CUDA device. ``--device cpu`` tries all of it in miniature.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTRACT = 1
"""Of the JSON; raised if a key gets another meaning."""
DEFAULT = Path(__file__).resolve().parents[1] / "_build" / "gpu-check.json"
PACKAGES = (
    *("adaptive-margins", "torch", "transformers", "sentence-transformers", "accelerate"),
    *("bitsandbytes", "faiss-cpu", "faiss-gpu-cu12", "triton", "numpy"),
)


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name, title: for the JSON and the table.
        work: module:function that yields its lines.
        check: whether it must pass.
        seconds: that it may take, with what earlier parts have left.
        about: what is computed, and the reason for its limits or what it leaves out.
    """

    name: str
    title: str
    work: str
    check: bool
    seconds: float
    about: str


PARTS = (
    Part(
        "gradients", "Gradient of a training step", "gpu_correct:gradients", True, 110,
        "Relative L2 error of the whole gradient of a step of this project's trainer, dropout off, against float32 on the CPU"
        " by other code (a padded forward a column, eager attention, the loss written out). On a CPU these encoders have 4e-6 in"
        " fp32, .003 to .004 in fp16 and .02 to .04 in bf16; TF32 in place of fp32, or bf16 in place of fp16, would exceed its limit.",
    ),
    Part(
        "optimizer", "8-bit Adam", "gpu_correct:optimizer", True, 45,
        "Relative L2 distance between what bitsandbytes' 8-bit Adam and torch's AdamW have changed after the same steps. On a CPU"
        " it is .013 after 8 steps of this encoder, and .02 after 40 of one with 2 layers of 256 dimensions.",
    ),
    Part(
        "cached", "CachedMarginLoss", "gpu_correct:cached", True, 35,
        "Against MarginLoss, the larger of the relative errors of loss and gradient; limits as above.",
    ),
    Part(
        "waits", "Waits for the device", "gpu_correct:waits", True, 35,
        "Operations in a bf16 step that make the host wait, by the line that calls them; none may be in this project's code."
        " torch reports most of them, not all.",
    ),
    Part(
        "throughput", "Training and encoding", "gpu_speed:throughput", False, 130,
        "bf16 and 8-bit Adam as in the profile paper, a batch repeated, collating included. Passages have 80 tokens on average."
        " The share counts what real tokens need (matrix products of the layers, backward twice the forward), so padding"
        " lowers it. FlashAttention has no dropout within the attention, the others have the encoder's.",
    ),
    Part(
        "indexes", "FAISS", "gpu_speed:indexes", False, 85,
        "Indexes of this project's kind over random vectors in 256 clusters; recall of the exact top 100. Recall on real"
        " embeddings is another one.",
    ),
    Part(
        "hours", "Expected time of the profiles", "gpu_speed:hours", False, 20,
        "The plan of each profile with the rates above (those of the profiles' way, at its batch size). Not in it: early"
        " stopping, which saves time; training and searching indexes; downloads, tokenising, BM25's candidates; the fine-tuning"
        " and scores of a teacher, whose speed is the profile's assumption. DPR and ANCE count as RoBERTa, TAS-B as distilBERT.",
    ),
)  # fmt: skip


# ---- one part in its process -----------------------------------------------------------------------------------------


def _work(work: str, context: Any, sending: Connection) -> None:
    """Send the lines of a part, then how it ended. The process of a part."""
    from adaptive_margins.processes import end_with_parent

    end_with_parent()
    gc.freeze()  # each trainer collects garbage; not among what was imported
    try:
        module, name = work.split(":")
        with redirect_stdout(sys.stderr):  # trainers print
            for line in getattr(importlib.import_module(module), name)(context):
                sending.send(("row", line))
        sending.send(("done", ""))
    except BaseException as error:
        traceback.print_exc()
        sending.send(("error", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]))


def run(part: Part, context: Any) -> dict[str, Any]:
    """The result of a part; its process is ended at ``context.ends``."""
    # A GPU cannot be used after a fork. On a CPU, a fork need not import everything again.
    forks = context.device == "cpu" and "fork" in multiprocessing.get_all_start_methods()
    processes = multiprocessing.get_context("fork" if forks else "spawn")
    receiving, sending = processes.Pipe(duplex=False)
    started, budget = time.time(), context.left
    process = processes.Process(target=_work, args=(part.work, context, sending), daemon=True)
    process.start()
    sending.close()
    rows: list[dict[str, Any]] = []
    status, reason = "cut", f"its {budget:.0f} s were over"
    while context.left > 0 and receiving.poll(context.left):
        try:
            kind, value = receiving.recv()
        except EOFError:
            process.join()
            status, reason = "error", f"its process ended with {process.exitcode}"
            break
        if kind != "row":
            status, reason = kind, value
            break
        rows.append(value)
    process.join(5 if status in ("done", "error") else 0)
    if process.is_alive():
        process.kill()
        process.join()
    passed = [line["passed"] for line in rows]
    if False in passed:
        status, reason = "failed", ""
    elif status == "done" and part.check:
        status = "passed" if True in passed else "not run"
    return {
        "name": part.name, "title": part.title, "about": part.about, "check": part.check, "status": status,
        "reason": reason, "seconds": time.time() - started, "budget_seconds": budget, "rows": rows,
    }  # fmt: skip


# ---- machine ---------------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """The card, driver, CUDA and versions; nothing that names the machine."""
    import torch

    from adaptive_margins.device import machine
    from adaptive_margins.paper.store import package_versions

    found: dict[str, Any] = {
        **machine(), "python": platform.python_version(), "card": None, "driver": _driver(),
        "cuda": torch.version.cuda, "cudnn": None, "versions": package_versions(PACKAGES),
    }  # fmt: skip
    if device != "cpu":
        about = torch.cuda.get_device_properties(0)
        found |= {
            "card": about.name, "memory_bytes": about.total_memory, "cards": torch.cuda.device_count(),
            "capability": f"{about.major}.{about.minor}", "multiprocessors": about.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return found


def _driver() -> str | None:
    """Version of NVIDIA's driver, if nvidia-smi reports one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout.splitlines() or [""])[0].strip() or None if done.returncode == 0 else None


def why_no_cuda() -> str:
    """What is missing for CUDA; "" if nothing is."""
    import torch

    if torch.cuda.is_available():
        return ""
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    driver = _driver()
    return (
        f"no CUDA device: torch {torch.__version__} is built {built}, and nvidia-smi"
        f" {f'reports driver {driver}' if driver else 'reports no driver'}. The check needs an NVIDIA GPU, its driver,"
        " and torch with CUDA (see environment.yml). To try it in miniature: --device cpu"
    )


# ---- report ----------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    from adaptive_margins.text_tables import aligned

    m = report["machine"]
    card = (
        f"{m['card']}, driver {m['driver']}"
        if m["card"]
        else f"CPU ({m['processor']}), in miniature"
    )
    lines = [f"{card}; torch {m['versions'].get('torch')}, CUDA {m['cuda']}"]
    for part in report["parts"]:
        why = f": {part['reason']}" if part["reason"] else ""
        lines += ["", f"{part['title']}: {part['status']}{why} ({part['seconds']:.0f} s)"]
        rows = [
            [
                r["what"],
                "—" if r["value"] is None else f"{r['value']:.4g}",
                "" if r["limit"] is None else f"≤ {r['limit']:g}",
                r["unit"],
                {True: "passed", False: "FAILED", None: ""}[r["passed"]],
            ]
            for r in part["rows"]
        ]
        notes = [f"not measured: {r['reason']}" if r["reason"] else r["note"] for r in part["rows"]]
        cells = aligned(rows)
        width = max(map(len, cells), default=0)
        lines += [f"  {c:{width}}  {n}".rstrip() for c, n in zip(cells, notes, strict=True)]
        lines.append(f"  ({part['about']})")
    return "\n".join([*lines, "", f"Result: {report['verdict']}"])


def verdict(parts: Sequence[dict[str, Any]]) -> str:
    """Whether all checks passed; if not, which failed, or did not end."""

    def titles(*statuses: str, check: bool) -> str:
        return ", ".join(
            p["title"] for p in parts if p["status"] in statuses and p["check"] == check
        )

    if failed := titles("failed", "error", check=True):
        return f"failed: {failed}"
    if cut := titles("cut", check=True):
        return f"not decided, out of time: {cut}"
    without = ", ".join(
        filter(None, (titles("not run", check=True), titles("error", "cut", check=False)))
    )
    return f"passed; incomplete: {without}" if without else "passed"


def check(device: str, names: Sequence[str]) -> dict[str, Any]:
    """The report: all parts of these names, one after the other."""
    from gpu_material import MINIATURE, REAL, Context

    parts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = MINIATURE if device == "cpu" else REAL
        context = Context(device, sizes, Path(folder), time.time(), parts)
        for part in PARTS:
            context.ends += part.seconds
            if part.name in names:
                print(f"{part.title} …", file=sys.stderr, flush=True)
                parts[part.name] = run(part, context)
    found = list(parts.values())
    return {
        "contract": CONTRACT, "date": datetime.date.today().isoformat(), "device": device, "miniature": device == "cpu",
        "verdict": verdict(found), "machine": machine(device), "parts": found,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print, write; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=DEFAULT)
    parser.add_argument("--json", action="store_true", help="print the JSON in place of the table")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    given = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if given.device == "cuda" and (reason := why_no_cuda()):
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    from adaptive_margins.files import WriteError, check_output, write_text

    try:
        check_output(given.output)
        report = check(given.device, given.parts)
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(given.output, text)
    except WriteError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 1
    print(text if given.json else f"{table(report)}\nWritten to {given.output}")
    return int(not report["verdict"].startswith("passed"))


if __name__ == "__main__":
    raise SystemExit(main())
