"""What a home folder holds: finished and unfinished runs, collections, executed notebooks, the book. Only reads, and little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adaptive_margins.files import folder_bytes, read_object
from adaptive_margins.text_tables import aligned, size


def status(home: Path) -> dict[str, Any]:
    """What lies in a home folder now. Damaged or foreign files count as not being there.

    Returns:
        ``home``; ``runs``: their number ``finished``, ``bytes``, ``newest`` (id, encoder, target, time; None if there is none)
        and ``collections`` (fingerprint → number); ``unfinished``: id, time and bytes of each run under way or interrupted;
        ``collections``: fingerprint, name, bytes; ``notebooks``: name, profile, time, seconds of each executed one; ``book``:
        its first page, or None. Times are of the last change, in UTC.
    """
    runs = [
        (path, config)
        for path in _folders(home / "runs")
        if (config := read_object(path / "config.json")) and (path / "result.json").is_file()
    ]
    newest = max(runs, key=lambda run: (run[0] / "result.json").stat().st_mtime, default=None)
    book = home / "_build" / "html" / "index.html"
    return {
        "home": str(home),
        "runs": {
            "finished": len(runs),
            "bytes": sum(folder_bytes(path) for path, _ in runs),
            "newest": newest
            and {
                "run_id": newest[0].name,
                "encoder": newest[1].get("encoder"),
                "target": newest[1].get("target"),
                "time": _time(newest[0] / "result.json"),
            },
            "collections": Counter(str(config.get("collection")) for _, config in runs),
        },
        "unfinished": [
            {"run_id": path.name, "time": _newest(path), "bytes": folder_bytes(path)}
            for path in _folders(home / "cache" / "work")
        ],
        "collections": [
            {
                "fingerprint": path.name,
                "name": read_object(path / "sources.json").get("name"),
                "bytes": folder_bytes(path),
            }
            for path in _folders(home / "collections")
        ],
        "notebooks": [
            {
                "name": path.stem,
                "profile": receipt["key"]["profile"][0],
                "time": receipt["finished"],
                "seconds": receipt["seconds"],
            }
            for path in sorted((home / "book" / "_executed" / "receipts").glob("*.json"))
            if {"key", "finished", "seconds"} <= (receipt := read_object(path)).keys()
        ],
        "book": str(book) if book.is_file() else None,
    }


def status_text(found: Mapping[str, Any]) -> str:
    """What `status` returned, for a terminal."""
    runs, newest = found["runs"], found["runs"]["newest"]
    lines = [f"Home: {found['home']}", "", f"Runs finished: {runs['finished']:,}"]
    if newest:
        lines[-1] += f" ({size(runs['bytes'])})"
        lines.append(
            f"  newest: {newest['run_id']}, {newest['encoder']}, target {newest['target']}, {newest['time']}"
        )
    lines.append(f"Runs unfinished: {len(found['unfinished']):,}")
    lines += [
        f"  {run['run_id']}, last change {run['time']}, {size(run['bytes'])}"
        for run in found["unfinished"]
    ]
    lines.append(f"Collections: {len(found['collections'])}")
    lines += [
        f"  {c['fingerprint']}, {c['name'] or 'not known by name'}, {size(c['bytes'])},"
        f" {runs['collections'].get(c['fingerprint'], 0)} runs"
        for c in found["collections"]
    ]
    lines.append(f"Notebooks executed: {len(found['notebooks'])}")
    table = [
        [n["name"], n["profile"], n["time"], f"{n['seconds']:.0f} s"] for n in found["notebooks"]
    ]
    lines += [f"  {line}" for line in aligned(table, left=3)]
    lines.append(f"Book: {found['book'] or 'not built'}")
    return "\n".join(lines)


def _folders(folder: Path) -> list[Path]:
    """The folders in one, without those that are still being written (their names begin with a dot)."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _newest(folder: Path) -> str:
    return max((_time(path) for path in folder.rglob("*")), default=_time(folder))


def _time(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
