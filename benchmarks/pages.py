"""Write what the book shows of the JSON files next to this script, and RESULTS.md with all of them.

python benchmarks/pages.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from adaptive_margins.book.style import measure_label
from adaptive_margins.corpus.choice import choice_table
from adaptive_margins.files import write_text
from adaptive_margins.progress import clock
from adaptive_margins.retrieval.faiss_index import choose_index

FOLDER = Path(__file__).resolve().parent
BOOK = FOLDER.parent / "book"
COMMAND = "% Written by benchmarks/pages.py.\n\n"
SPEED = """\
# Speed

Every figure is a **ratio** measured in one process, both sides in turns: the median of the rounds,
with quartiles in brackets. Above 1, this project is faster or needs less. `make bench` measures the
first ones again in less than ten minutes, `make bench-full` the others; `NOTES.md` lists what was
tried and rejected.
"""
GROWTH = """\
## Growth

One measurement a size. The exponent is the slope of a straight line through the logarithms: 1 is
growth in proportion.
"""
EXPECT = """\
# What to expect

Fine-tuning helps on some corpora and not on others. These trainings of `adaptive-margins train` are on collections that this
project does not ship. One constant was tuned on three of them, Vaswani, Cranfield and the German man pages: the 1,000 best
passages of each ranking are fused, not the 100 best. Nothing else was.

all-MiniLM-L6-v2 was trained by its authors on more than a billion pairs of English texts. Hundreds of queries in another
language, or from a package's docstrings, improved it for such queries; the few dozen training queries of the classic
collections did not, or hardly.
"""
EXTRAPOLATION = """\
"Memory" is without files that are mapped, whose pages the system drops when others need the room; "with mapped files" is
the peak of resident memory. Embedding is by a lookup in place of a transformer: it shows what writing, checking and
resuming take.

Extrapolated, not measured: bytes by their formula, times in proportion to theirs, from the measured ones in the first
column, without the logarithm of a graph's size. n passages of d dimensions, codes of m bytes.
"""
SETTING = """\
Cranfield and Vaswani are classic test collections of abstracts with questions; the seed splits their queries. networkx is
that package's docstrings (`examples/package_docs.py`) with pseudo-queries, so what its numbers mean for real queries is
unknown. German man pages are Debian's (`examples/man_pages.py`): a page's summary line is the query that has to find it.

Means over the seeds, full ranking of all passages. "Hybrid" fuses the selected encoder with BM25, with the weight that is best
on the validation queries:
"""
EACH = """\
## Each training

Difference between trained and original encoder in nDCG@10 on the test queries, with its 95 % confidence interval. α is the
trained parameters' share in the mixture with the original ones, "weight" that of the encoder in the fusion with BM25; both are
chosen on the validation queries. Verdicts: {doc}`your_corpus`. Times are those of one thread on a machine that others used, too.
"""
AGAIN = """\
{download}`what_to_expect.json` has every report, with p values. `adaptive-margins train SOURCE --output NEW --seed 1` repeats one, SOURCE
being the folder of the collection.
"""
EXTRAPOLATED = (8_841_823, 768), (138_364_198, 768)  # passages of MS MARCO v1 and v2, BERT base
HNSW_LINKS = 272  # bytes of a list's links, FAISS's HNSW32
SMALLER = "B 32, 384 dimensions"  # the loss alone in a smaller batch: in RESULTS.md only
PEERS = ("a forward pass per column", "SentenceTransformer.encode", "MarginMSELoss", "pair by pair")
VERDICTS = {
    "better": "better on the test queries",
    "worse": "**worse** on the test queries",
    "equivalent": "equivalent to it",
    "undecided": "neither shown to be better, nor worse, nor equivalent",
}


def read(name: str) -> Any:
    """A JSON file of this folder."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def trainings() -> Any:
    """The reports behind *What to expect*; the page links the file."""
    return json.loads((BOOK / "what_to_expect.json").read_text("utf-8"))


def table(rows: Any) -> str:
    """Rows (heading → text) as a Markdown table."""
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True) + "\n"


def machines(rows: list[dict[str, Any]]) -> str:
    """Where and when the rows were measured."""
    found = dict.fromkeys(f"{row['machine']}, {row['date']}" for row in rows)
    return f"Measured on: {'; '.join(found)}.\n"


def speed() -> str:
    """All measurements."""
    latest, growth = read("latest"), read("growth")
    parts = [SPEED, machines([*latest, *growth]), "## Compared with other code\n"]
    for setting in dict.fromkeys(row["setting"] for row in latest):
        rows = [row for row in latest if row["setting"] == setting]
        parts += [f"### {setting}\n", table(map(ratio, rows))]
    parts += [GROWTH, table(map(grown, growth))]
    return COMMAND + "\n".join(parts)


def speed_table() -> str:
    """The comparisons with Sentence Transformers, for a page of the book."""
    rows = [row for row in read("latest") if any(peer in row["name"] for peer in PEERS)]
    rows = [row for row in rows if not row["setting"].startswith(SMALLER)]
    table_rows = [{"Setting": row["setting"]} | ratio(row) for row in rows]
    shown = ["Setting", "This project / other", "Ratio", "Date"]
    listed = [{k: row[k] for k in shown} for row in table_rows]
    return COMMAND + machines(rows) + "\n" + table(listed)


def faults_table() -> str:
    """What faults.py tried, for a page of the book."""
    rows = [row for part in read("faults").values() for row in part]
    listed = [
        {
            "Work": row["work"],
            "Fault": row["fault"],
            "Trials": str(row["trials"]),
            "Noticed": str(row["noticed"]),
            "Equal afterwards": str(row["equal"]),
            "Ended within": f"{row['seconds']:.1f} s" if row["fault"].startswith("SIG") else "",
        }
        for row in rows
    ]
    return COMMAND + machines(rows) + "\n" + table(listed)


def hosts_table() -> str:
    """What hosts.py tried, for a page of the book."""
    rows = list(read("hosts").values())
    listed = [
        {
            "Work": row["what"],
            "What happened": "; ".join(row["events"]),
            "Runs equal to undisturbed ones": f"{row['equal']} of {row['runs']}",
        }
        for row in rows
    ]
    return COMMAND + machines(rows) + "\n" + table(listed)


def ratio(row: dict[str, Any]) -> dict[str, str]:
    """A row of latest.json."""
    low, high = row["spread"]
    return {
        "This project / other": row["name"],
        "Ratio": f"**{row['ratio']:.2f}** [{low:.2f}, {high:.2f}]",
        "This project": f"{row['ours']:.3g}",
        "Other": f"{row['peer']:.3g}",
        "Unit": row["unit"],
        "Date": row["date"],
    }


def grown(row: dict[str, Any]) -> dict[str, str]:
    """A row of growth.json."""
    sizes, values = row["sizes"], row["values"]
    return {
        "What": f"{row['name']} ({row['unit']})",
        "From … to": f"{sizes[0]:,} … {sizes[-1]:,} {row['size_unit']}",
        "Values": f"{values[0]:.3g} … {values[-1]:.3g}",
        "Exponent": f"{round(row['exponent'], 2) + 0.0:.2f}",  # no minus before a zero
        "Setting": row["setting"],
        "Date": row["date"],
    }


def large() -> str:
    """What a collection larger than memory takes: measured, and extrapolated to other sizes."""
    found = read("large")
    phases, settings = found["phases"], found["settings"]
    words = (
        f"{found['rows']:,} synthetic passages of {found['dim']} dimensions in float16, in"
        f" {found['shards']} shards; {found['queries']} queries. The index"
        f" (`{settings['factory']}`, {settings['nprobe']:,} of {settings['nlist']:,} lists searched,"
        f" {settings['k_factor'] * found['depth']:,} hits by code reranked) finds"
        f" **{found['recall']:.2%}** of the exact top {found['depth']}.\n\n"
        + machines([found]).replace(".\n", f"; OPENBLAS_CORETYPE={found['blas'] or 'unset'}.\n")
    )
    measured = [
        {
            "Phase": name,
            "Wall": f"{phase['wall']:,.0f} s",
            "CPU": f"{phase['cpu']:,.0f} s",
            "Memory": gigabytes(phase["memory"]),
            "With mapped files": gigabytes(phase["with mapped files"]),
        }
        for name, phase in phases.items()
    ]
    return COMMAND + "\n".join([words, table(measured), EXTRAPOLATION, table(extrapolated(found))])


def extrapolated(found: dict[str, Any]) -> list[dict[str, str]]:
    """Measured values, and those of the formulas at other sizes."""
    sizes = [(found["rows"], found["dim"]), *EXTRAPOLATED]
    chosen = [choose_index(n, dim, depth=found["depth"]) for n, dim in sizes]
    phases, adding = found["phases"], found["adding"]
    build, search = phases["building the index"], phases["searching it"]
    exact = phases["searching exactly"]
    index = [
        n * (s.m + 8) + s.nlist * (4 * s.dim + HNSW_LINKS)
        for (n, _), s in zip(sizes, chosen, strict=True)
    ]
    values = {
        "Embeddings on disk, float16 (2 n d)": (gigabytes, found["bytes"]["embeddings.npy"], [2 * n * d for n, d in sizes]),
        "Index, on disk and in memory (n (m + 8) + lists (4 d + 272))": (gigabytes, found["bytes"]["passages.faiss"], index),
        "Memory of building, above imports (8 d · training passages + index + three blocks)": (gigabytes, build["memory"] - phases["imports alone"]["memory"], [8 * s.dim * s.train + i + 3 * 2**27 for s, i in zip(chosen, index, strict=True)]),
        "Training, one core (d · training passages)": (hours, build["cpu"] - adding, [s.train * s.dim for s in chosen]),
        "Adding, one core (n · d)": (hours, adding, [n * d for n, d in sizes]),
        "Exact search, a query (n · d)": (seconds, exact["a query"], [n * d for n, d in sizes]),
        "Search of the index, a query (n · searched lists / lists)": (seconds, search["a query"], [n * s.nprobe / s.nlist for (n, _), s in zip(sizes, chosen, strict=True)]),
    }  # fmt: skip
    rows = []
    for name, (text, measured, formula) in values.items():
        scale = 1 if text is gigabytes else measured / formula[0]
        columns = [f"{n / 1e6:.1f} M × {d}" for n, d in sizes]
        shown = [text(scale * value) for value in formula]
        if scale == 1:
            shown[0] += f" (measured {text(measured)})"
        rows.append({"What (formula)": name, **dict(zip(columns, shown, strict=True))})
    return rows


def gigabytes(count: float) -> str:
    """Bytes as text."""
    return f"{count / 1e9:,.2f} GB"


def hours(count: float) -> str:
    """Seconds as text in hours."""
    return f"{count / 3600:,.2f} h"


def seconds(count: float) -> str:
    """Seconds as text."""
    return f"{count:,.3f} s"


def expect(reports: list[dict[str, Any]]) -> str:
    """The page *What to expect*. ``reports``: one of `finetune` for each training (expect.py)."""
    rows = [row for row in reports if "choice" not in row]
    each = pd.DataFrame(map(training, rows))
    measured = [means for row in rows for means in scores(row)]
    frame = pd.DataFrame(measured)
    grouped = frame.groupby(["Collection, encoder", "Measure", "Queries"], sort=False)
    means = grouped.mean(numeric_only=True).map("{:.3f}".format)
    selected = grouped["selected"].agg(lambda x: f"{sum(x == 'yes')} of {len(x)}")
    parts = [EXPECT, f"## {len(rows)} trainings\n", summary(rows), fused(rows), SETTING]
    parts += [table(means.assign(**{"Trained one selected": selected}).reset_index())]
    parts += [EACH, table(each)]
    parts += [losses(row) for row in reports if "choice" in row]
    return COMMAND + "\n".join([*parts, machines(reports), AGAIN])


def losses(row: dict[str, Any]) -> str:
    """A training with all losses."""
    head, *lines = choice_table(row)
    shown = table([dict(zip(head, line, strict=True)) for line in lines])
    found, about = row["comparisons"]["trained vs start"], row["collection"]
    return (
        f"## All losses on {about['name']}, seed {row['seed']}\n\n"
        f"`--target all` trains with six losses on the same {row['triples']['chosen']:,} triples, and selects"
        f" one by {about['sets']['validation']} validation queries:\n\n{shown}\n"
        f"The gain of the selected encoder was {row['choice']['validation_gain']:+.3f} on the validation queries,"
        f" after mixing (α = {row['merge']['alpha']:g}), and {interval(found)}"
        f" on the test queries: {found['verdict']}.\n"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """How often training helped."""
    tested = [
        row["comparisons"]["trained vs start"]["verdict"]
        for row in rows
        if row["kept"] == "trained"
    ]
    text = f"In {len(rows) - len(tested)} of {len(rows)} trainings the original encoder was kept"
    parts = [
        f"in {tested.count(verdict)} the trained one was {words}"
        for verdict, words in VERDICTS.items()
        if verdict in tested
    ]
    return "; ".join([text, ", ".join(parts)] if parts else [text]) + ".\n"


def fused(rows: list[dict[str, Any]]) -> str:
    """How often fusion helped."""
    alone = [
        [row["comparisons"][f"hybrid vs {other}"]["verdict"] for other in ("trained", "bm25")]
        for row in rows
    ]
    encoder, bm25 = (list(verdicts) for verdicts in zip(*alone, strict=True))
    return (
        f"Fusing the encoder with BM25 was better than the encoder alone in {encoder.count('better')},"
        f" better than BM25 alone in {bm25.count('better')}, and better than both in"
        f" {alone.count(['better', 'better'])}; it was worse than one of them in"
        f" {sum('worse' in verdicts for verdicts in alone)}.\n"
    )


def name(row: dict[str, Any]) -> str:
    """What was trained, and on which collection."""
    target = "" if row["target"] == "distributed" else f", target {row['target']}"
    return f"{row['collection']['name']}, {row['encoder']}{target}"


def scores(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores of a training, a row a measure."""
    systems = {"start": "Original", "trained": "Trained", "bm25": "BM25", "hybrid": "Hybrid"}
    return [
        {
            "Collection, encoder": name(row),
            "Measure": measure_label(measure),
            "Queries": str(row["collection"]["sets"]["test"]),
            **{label: row["measures"][system][measure] for system, label in systems.items()},
            "selected": "yes" if row["kept"] == "trained" else "no",
        }
        for measure in row["measures"]["start"]
    ]


def interval(found: dict[str, Any]) -> str:
    """A difference of means and its confidence interval."""
    low, high = found["ci"]
    return f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def training(row: dict[str, Any]) -> dict[str, str]:
    """A row a training."""
    found, selected = row["comparisons"]["trained vs start"], row["kept"] == "trained"
    return {
        "Collection, encoder": name(row),
        "Seed": str(row["seed"]),
        "Triples": f"{row['triples']['used']:,}",
        "α": f"{row['merge']['alpha']:g}",
        "Weight": f"{row['hybrid']['weight']:g}",
        "Difference": interval(found) if selected else "original kept",
        "Against original": found["verdict"] if selected else "",
        "Against BM25": row["comparisons"]["trained vs bm25"]["verdict"],
        "Hybrid against BM25": row["comparisons"]["hybrid vs bm25"]["verdict"],
        "Time": clock(sum(row["seconds"].values())),
        "Date": row["date"],
    }


def main() -> None:
    """Write the files."""
    write_text(FOLDER / "RESULTS.md", speed())
    write_text(BOOK / "speed_table.md", speed_table())
    write_text(BOOK / "scale_table.md", large())
    write_text(BOOK / "faults_table.md", faults_table())
    write_text(BOOK / "hosts_table.md", hosts_table())
    write_text(BOOK / "what_to_expect.md", expect(trainings()))


if __name__ == "__main__":
    main()
