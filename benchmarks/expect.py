"""Fine-tune on some collections with several seeds, and save the reports, for the book's page "What to expect".

    python benchmarks/expect.py book/what_to_expect.json WORK NAME=SOURCE… --models "MiniLM=minilm" --seeds 1 2 3

Finished trainings in WORK are read, not repeated, and other trainings in the output stay. `pages.py` then writes the page.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

from timing import stamp

from adaptive_margins.corpus.finetune import finetune
from adaptive_margins.corpus.finetuned import Finetuned
from adaptive_margins.files import read_object, write_text

KEPT = (
    "target", "seed", "triples", "settings", "kept", "best_step", "stop_step", "validation", "merge", "hybrid", "measures",
    "comparisons", "verdict", "seconds", "versions", "choice", "machine", "date",
)  # fmt: skip


def trained(source: str, folder: Path, **given: Any) -> dict[str, Any]:
    """The report of one training, with its machine and date."""
    about = folder.with_name(f"{folder.name}.json")
    if not (folder / "training.json").is_file():
        write_text(about, json.dumps(stamp()))
        finetune(source, folder, **given)
    place = read_object(about) or dict.fromkeys(("machine", "date"), "not recorded")
    return Finetuned.load(folder).report | place


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What distinguishes the row of a training from others."""
    loss = "all" if "choice" in row else row["target"]
    return row["collection"]["name"], row["encoder"], loss, row["seed"]


def main() -> None:
    """Train, and write a row a training."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("sources", nargs="+", type=pair, metavar="NAME=SOURCE")
    parser.add_argument("--models", nargs="+", type=pair, default=[("all-MiniLM-L6-v2", "minilm")])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--targets", nargs="+", default=["distributed"])
    given = parser.parse_args()
    rows = json.loads(given.out.read_text("utf-8")) if given.out.is_file() else []
    choices = (given.models, given.sources, given.targets, given.seeds)
    for (encoder, model), (name, source), target, seed in product(*choices):
        folder = given.work / f"{name}-{encoder.replace(' ', '-')}-{target}-{seed}"
        report = trained(source, folder, model=model, seed=seed, target=target)
        about = {k: v for k, v in report["collection"].items() if k != "source"}
        facts = {k: report[k] for k in KEPT if k in report}  # not all have each
        row = {"collection": {**about, "name": name}, "encoder": encoder, **facts}
        rows = [other for other in rows if key(other) != key(row)] + [row]
        write_text(given.out, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, not {text!r}")
    return name, value


if __name__ == "__main__":
    main()
