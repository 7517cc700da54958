"""Write one archive of a profile's finished runs, with which somebody else starts: `make archive`.

    python benchmarks/export_runs.py [--profile laptop] [--by "Name, institution"] [--output FILE.tar.gz]

The runs are those of $ADAPTIVE_MARGINS_HOME or this checkout. The archive has the README below, and no path or name of this
machine; the same runs give the same archive.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from export_edition import NAMES, per_query

from adaptive_margins import __version__, paper
from adaptive_margins.book import shown
from adaptive_margins.book.edition import BOOK
from adaptive_margins.book.publish import archive, inside
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import CHECKSUMS, check_folder, checksum_lines, file_sha256, read_object
from adaptive_margins.paper.out_of_domain import FOLDER
from adaptive_margins.paper.runner import describe
from adaptive_margins.paper.shared_runs import ABOUT, needed_runs
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.profiles.config import PyDocsSettings
from adaptive_margins.progress import bar
from adaptive_margins.terminal import expanded, new_file, offline
from adaptive_margins.text_tables import size

SOURCE = BOOK.parent
ABOUT_SOFTWARE = ("LICENSE", "CITATION.cff", "constraints.txt", "environment.yml")
PUBLICATION = {
    "doi": "https://doi.org/10.1145/3731120.3744594",
    "arxiv": "https://arxiv.org/abs/2407.21515v1",
}
README = """# Runs of the profile {name}

{count} finished runs of Adaptive Margins {library}, a runnable companion of Gienapp et al., ICTIR 2025 (`CITATION.cff`).
`about.json` states whose they are, when, where and with what they were computed.

Start from them, in a checkout of Adaptive Margins: only what is missing is computed.

    adaptive-margins reproduce --profile {name} --from ARCHIVE

| file | content |
| --- | --- |
| `book/index.html` | the book, if it was built: figures, tables, each number with its run |
| `runs/ID/` | a run: configuration, results, learning curve, checkpoints, and its checksums |
| `runs/ID/MODE.SET.run.gz` | a ranking in TREC format; `MODE.SET.ir_metadata.yml` describes it (ir-metadata.org) |
| `out_of_domain/ID/` | the same on collections that nothing was trained on |
| `per_query.parquet` | the score of every query in every run; `step` is that of an evaluation during training, else -1 |
| `collections/FINGERPRINT/` | relevance judgements and versions of the texts, if the collection was built from packages |
| `requirements.txt` | installed packages when the archive was written; `result.json` of a run has those that computed it |
| `SHA256SUMS` | `sha256sum -c SHA256SUMS` checks all files |

Check a number: `ir_measures collections/FINGERPRINT/qrels.SET.txt runs/ID/full.SET.run.gz nDCG@10`.
"""


def members(reproduction: paper.Reproduction, profile: str, by: str) -> dict[str, Path | bytes]:
    """Path in the archive → file or content. SystemExit without finished runs."""
    name, home, found = reproduction.profile.name, reproduction.home, dict[str, Path | bytes]()
    if not (runs := list(chosen(reproduction))):
        raise SystemExit(
            f"no run of profile {name} is finished in {home}; compute them first:"
            f" adaptive-margins reproduce --profile {name} --runs-only"
        )
    about = facts(reproduction, runs, by)
    for run in bar("reading runs", runs, unit="runs"):
        check_folder(run.path)
        place = f"{run.path.parent.name}/{run.run_id}"
        if not (run.path / CHECKSUMS).is_file():  # an older run
            found[f"{place}/{CHECKSUMS}"] = checksums(inside(run.path))
        for file in run.path.glob("*.run.gz"):
            mode, query_set = file.name.removesuffix(".run.gz").split(".", 1)
            text = described(reproduction, run, mode, query_set, about)
            found[f"{place}/{mode}.{query_set}.ir_metadata.yml"] = text.encode()
        found |= inside(run.path, f"{place}/")
    for fingerprint in {run.config.collection for run in runs}:
        folder = home / "collections" / fingerprint
        if isinstance(reproduction.profile.collection, PyDocsSettings):
            names = ["sources.json", *(file.name for file in folder.glob("qrels.*.txt"))]
            found |= {f"collections/{fingerprint}/{name}": folder / name for name in names}
    if has_book(home, profile):
        found |= inside(home / "_build" / "html", "book/")
    if profile.endswith((".yaml", ".yml")):
        found["profile.yaml"] = without_paths(Path(profile), home)
    scores = pd.concat(map(per_query, runs), ignore_index=True).astype(
        dict.fromkeys(NAMES, "category")
    )
    scores.to_parquet(table := BytesIO(), index=False, compression="zstd")
    found["per_query.parquet"] = table.getvalue()
    found["requirements.txt"] = installed().encode()
    found[ABOUT] = (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode()
    readme = README.format(name=name, count=len(runs), library=__version__)
    found["README.md"] = readme.encode()
    return found | {name: SOURCE / name for name in ABOUT_SOFTWARE}


def chosen(reproduction: paper.Reproduction) -> Iterator[StoredRun[Any]]:
    """The profile's finished runs, and those on other collections that its trained encoders are compared in."""
    needed = needed_runs(reproduction.experiments)
    folders = [reproduction.store.folder / run_id for run_id in sorted(needed)]
    yield from (StoredRun(folder) for folder in folders if folder.is_dir())
    files = sorted((reproduction.home / FOLDER).glob("*/config.json"))
    others: list[StoredRun[Any]] = [StoredRun(file.parent) for file in files]
    domains = {r.config.collection for r in others if getattr(r.config, "source", "") in needed}
    yield from (run for run in others if run.config.collection in domains)


def receipts(home: Path) -> list[dict[str, Any]]:
    """What the build of the book has noted of each executed notebook."""
    files = sorted((home / "book" / "_executed" / "receipts").glob("*.json"))
    return [receipt for receipt in map(read_object, files) if "finished" in receipt]


def has_book(home: Path, profile: str) -> bool:
    """Whether the built book is that of the profile."""
    path = Path(profile)
    key = str(path.resolve()) if path.suffix else profile
    built = {receipt["key"]["profile"][0] for receipt in receipts(home)}
    return (home / "_build" / "html" / "index.html").is_file() and built == {key}


def facts(
    reproduction: paper.Reproduction, runs: Iterable[StoredRun[Any]], by: str
) -> dict[str, Any]:
    """Whose the runs are, and when, where and with what they were computed."""
    results = [run.result for run in runs]
    # Runs of older versions do not have it; the book was made after them.
    noted = [r for r in results if "finished" in r] or receipts(reproduction.home)
    times = sorted(record["finished"] for record in noted)
    command = ["git", "-C", str(SOURCE), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(
        [*command, "--exclude=*"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "by": by or "not stated",
        "profile": reproduction.profile.name,
        "computed": " to ".join(dict.fromkeys([*times[:1], *times[-1:]])),
        "machines": distinct(record["machine"] for record in noted),
        "packages": distinct(r["versions"] for r in results if "versions" in r),
        "library": __version__,
        "commit": commit,
        "collection": reproduction.inputs.fingerprint,
        "sources": reproduction.inputs.collection.sources,
    }


def distinct(values: Iterable[dict[str, str]]) -> str:
    texts = {", ".join(f"{k} {v}" for k, v in value.items()) for value in values}
    return "; ".join(sorted(texts))


def described(
    reproduction: paper.Reproduction,
    run: StoredRun[Any],
    mode: str,
    query_set: str,
    about: dict[str, Any],
) -> str:
    """A ranking in the YAML of ir_metadata (https://www.ir-metadata.org, schema 0.1)."""
    config, result = run.config, run.result
    machine, measures = result.get("machine", {}), result.get(mode, {}).get(query_set, {})
    encoder = {"name": config.encoder, "method": describe(config)}
    stages = [encoder | {"params": config.model_dump(mode="json")}]
    if mode == "rerank" and config.kind != "bm25":
        first = {"name": "candidates", "method": config.candidates, "params": {"n": config.depth}}
        stages = [first, stages[0] | {"reranks": "candidates"}]
    folder = reproduction.home / "collections" / config.collection
    collection = {"name": read_object(folder / "sources.json").get("name", config.collection)}
    collection["qrels"] = f"collections/{config.collection}/qrels.{query_set}.txt"
    if known := getattr(reproduction.profile.collection, "sets", {}).get(query_set):
        collection = {"name": known, "ir_datasets": f"https://ir-datasets.com/{known}"}
    command = shown.commands(reproduction, run.run_id)[0]
    values = {
        "schema-version": 0.1,
        "run-version": 1.0,
        "tag": run.run_id,
        "platform": {
            "hardware": {
                "cpu": {"model": machine.get("processor"), "number of cores": machine.get("cores")},
                "ram": machine.get("memory"),
            },
            "operating system": {"kernel": machine.get("system")},
            "software": {
                "libraries": {"python": [f"{k}=={v}" for k, v in result["versions"].items()]}
            },
        },
        "research goal": {
            "venue": {"name": "ICTIR", "year": 2025},
            "publication": PUBLICATION,
            "evaluation": {"reported measures": list(measures.get("mean", {}))},
        },
        "implementation": {
            "executable": {"cmd": command},
            "source": {"lang": ["python"], "commit": about["commit"]},
        },
        "method": {"automatic": True, "retrieval": stages},
        "actor": {"name": run.provenance.get("by", about["by"]), "role": "reproducer"},
        "data": {"test collection": collection},
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def installed() -> str:
    """Installed packages with their versions, as ``pip freeze`` lists them without addresses."""
    found = {d.name.lower(): f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
    return "".join(f"{found[name]}\n" for name in sorted(found))


def without_paths(profile: Path, home: Path) -> bytes:
    """The text of a profile. SystemExit if it names a folder of this machine."""
    text = profile.read_text("utf-8")
    for folder in (home, Path.home(), profile.resolve().parent):
        if f"{folder}/" in text:
            raise SystemExit(
                f"{profile} names {folder}, which others do not have; name it otherwise"
            )
    return text.encode()


def checksums(found: dict[str, Path | bytes]) -> bytes:
    """The lines of ``sha256sum``."""
    hashes = {
        name: file_sha256(member) if isinstance(member, Path) else sha256(member).hexdigest()
        for name, member in found.items()
    }
    return checksum_lines(hashes).encode()


def export(reproduction: paper.Reproduction, profile: str, target: Path, by: str = "") -> Path:
    """Write the archive and its checksum."""
    found = members(reproduction, profile, by)
    found[CHECKSUMS] = checksums(found)
    root = f"adaptive-margins-{reproduction.profile.name}"
    return archive({f"{root}/{name}": member for name, member in found.items()}, target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="laptop", type=expanded)
    parser.add_argument("--by", default="", help="whose runs these are, for everybody to read")
    parser.add_argument("--output", type=new_file, help="by default in _build/")
    given = parser.parse_args()
    offline()
    try:
        reproduction = paper.open(given.profile)
        name = f"adaptive-margins-{reproduction.profile.name}-runs.tar.gz"
        target = given.output or reproduction.home / "_build" / name
        written = export(reproduction, given.profile, target, given.by)
    except AdaptiveMarginsError as error:
        raise SystemExit(str(error)) from None
    print(f"{written}: {size(written.stat().st_size)}")


if __name__ == "__main__":
    main()
