"""A plan in words, for a terminal."""

from __future__ import annotations

from adaptive_margins.paper.experiments import Plan
from adaptive_margins.profiles.config import IrDatasetsSettings, Profile
from adaptive_margins.progress import clock
from adaptive_margins.text_tables import aligned, size


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
    lines += aligned([header, *rows], left=2)
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
