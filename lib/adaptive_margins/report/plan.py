"""A plan in words, for a terminal."""

from __future__ import annotations

from adaptive_margins.experiments import Plan
from adaptive_margins.profiles import IrDatasetsSettings, Profile
from adaptive_margins.progress import clock

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def plan_text(profile: Profile, plan: Plan, *, every: bool = False) -> str:
    """The plan: a line per kind of run (or per run), totals, downloads, and what the times rest on."""
    runs = plan.runs
    todo = runs[~runs["done"]]
    header = ["encoder", "what", "runs", "done", "triples", "seconds", "disk", "scratch", "memory"]
    rows = []
    for key, group in runs.groupby(["encoder", "what"] + ["run_id"] * every, sort=False):
        encoder, *words = map(str, key)
        missing = group[~group["done"]]
        rows.append(
            [
                encoder,
                " ".join(words),
                f"{len(group)}",
                f"{int(group['done'].sum())}",
                f"{group['triples'].iloc[0]:,}",
                clock(missing["seconds"].mean()) if len(missing) else "—",
                size(group["disk"].sum()),
                size(group["scratch"].max()) if group["scratch"].max() else "—",
                size(group["memory"].max()),
            ]
        )
    lines = [f"Profile {profile.name}: {len(runs)} runs, {len(runs) - len(todo)} are there.", ""]
    lines += _aligned([header, *rows])
    lines += [
        "",
        "seconds: a run, h:mm:ss or m:ss; disk: kept, all runs of the line; scratch: disk while a run is made; memory: host.",
        f"Time for what is missing: about {clock(plan.seconds)} with {profile.workers} worker(s). A run with early stopping is"
        " counted as if it took all its triples.",
        f"Disk: {size(runs['disk'].sum())} for the runs, {size(plan.shared_disk)} for the collection and its tokens,"
        f" and up to {size(runs['scratch'].max() * profile.workers)} while runs are made.",
        f"Memory: up to {size(runs['memory'].max() * profile.workers)} with {profile.workers} worker(s).",
    ]
    total = sum(count for _, count in plan.downloads)
    if plan.downloads:
        lines.append(f"To be fetched: {size(total)}.")
        lines += [f"  {size(count):>9}  {what}" for what, count in plan.downloads]
    else:
        lines.append("Nothing has to be fetched.")
    collection = profile.collection
    if plan.downloads and isinstance(collection, IrDatasetsSettings) and collection.licence:
        lines.append(f"Terms: {collection.licence} (accept them with --accept-licence)")
    if plan.stated:
        lines.append(
            f"Speeds of {', '.join(plan.stated)} are those that the profile states, not measured here."
        )
    elif len(todo):
        lines.append("Speeds were measured on this machine just now.")
    return "\n".join(lines)


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
