"""The commands for a corpus of one's own: train, evaluate, compare, index, search, collection; and status.

Each prints text for people, or with ``--json`` one JSON object. What they need is imported when they are called.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from adaptive_margins import progress
from adaptive_margins.progress import printable

if TYPE_CHECKING:
    from adaptive_margins.data.collection import Collection, Texts
    from adaptive_margins.data.trec import Run

commands = typer.Typer()

_PANEL = "Your own corpus"
_FIGURES = (".png", ".svg", ".pdf")
_CANDIDATES = 100  # of BM25, reranked if nothing else is asked for


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  adaptive-margins {line}" for line in lines)


def expanded(value: str) -> str:
    """Return the name with ``~`` and ``~user`` at its beginning replaced by the home folder."""
    if not value:
        raise typer.BadParameter("the name is empty")
    path = os.path.expanduser(value)
    if path.startswith("~") and not os.path.lexists(path):
        user = path.split("/")[0]
        raise typer.BadParameter(f"there is no user {user[1:]!r}; a file is called ./{path}")
    return path


def _path(value: str) -> Path:
    return Path(expanded(value))


def _new_file(value: str) -> Path:
    from adaptive_margins.files import check_output

    check_output(path := _path(value))
    return path


def _new_folder(value: str) -> Path:
    from adaptive_margins.files import check_output

    check_output(path := _path(value), folder=True)
    return path


SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        parser=expanded,
        help="A collection: a folder (BEIR's layout, or collection.tsv, queries.tsv, qrels.txt, or a saved Hugging Face"
        " dataset), 'pydocs', or an id of ir_datasets.",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        parser=expanded,
        help="An encoder: 'minilm' (shipped), a Sentence Transformers folder, or ORG/NAME@REVISION of the hub.",
    ),
]
RunOutOption = Annotated[
    Path | None,
    typer.Option(
        parser=_new_file, help="Write the ranking: a TREC run, gzipped if it ends in .gz."
    ),
]
MeasuresOption = Annotated[
    str, typer.Option(help="Measures in ir_measures' notation, with spaces between them.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, … (default: a GPU if there is one).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", help="Say progress even if stderr is not a terminal.")
]
PerQueryOption = Annotated[
    bool, typer.Option("--per-query", help="With --json: also the value of each query.")
]


@commands.command(
    rich_help_panel=_PANEL,
    epilog=_examples(
        "train my_corpus --output my_encoder",
        "train my_corpus --output my_encoder --json > report.json",
        "train pydocs:numpy --output small --triples 512",
        "train my_corpus --output baseline --target 0.3",
    ),
)
def train(
    path: SourceArgument,
    output: Annotated[
        Path, typer.Option(parser=_new_folder, help="A new folder for the trained encoder.")
    ],
    model: ModelOption = "minilm",
    target: Annotated[
        str, typer.Option(help="distributed, adaptive, or a number: the static margin.")
    ] = "distributed",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of split, negatives, order and dropout.")
    ] = 1,
    negatives: Annotated[
        Literal["bm25", "encoder"],
        typer.Option(help="Whose best passages become negatives, if there are no triples."),
    ] = "bm25",
    triples: Annotated[
        int | None,
        typer.Option(min=2, help="Triples to train on (default: as many as make sense)."),
    ] = None,
    measures: MeasuresOption = "nDCG@10 R@100",
    device: DeviceOption = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="Log to tensorboard, wandb, mlflow or trackio. Repeatable."),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Fine-tune an encoder on a corpus, and say whether it became better.

    The test queries are ranked by the encoder before and after, by BM25, and
    by both together; a paired test says whether differences are more than
    chance. If training does not help on validation queries, the original
    encoder is kept. An interrupted call goes on where it was.
    """
    with _working(verbose, model):
        parsed = _target(target)
        names = _measures(measures)
        from adaptive_margins.corpus.finetune import finetune
        from adaptive_margins.training import REPORTERS

        if unknown := set(report_to or ()) - set(REPORTERS):
            raise typer.BadParameter(
                f"expected {', '.join(REPORTERS)}, got {min(unknown)!r}", param_hint="--report-to"
            )
        report = finetune(
            path, output, model=model, target=parsed, seed=seed, measures=names, negatives=negatives, device=device,
            triples=triples, report_to=tuple(report_to or ()),
        ).report  # fmt: skip
    _tell(report, as_json, _trained(report, path))


@commands.command(
    rich_help_panel=_PANEL,
    epilog=_examples(
        "evaluate my_corpus --model my_encoder",
        "evaluate my_corpus --model minilm --run-out minilm.run",
        "evaluate my_corpus --model minilm --mode rerank --json",
        'evaluate my_corpus --model minilm --measures "AP RR@10"',
    ),
)
def evaluate(
    path: SourceArgument,
    model: ModelOption,
    mode: Annotated[
        Literal["full", "rerank"],
        typer.Option(help="Rank all passages (exact search), or order candidates again."),
    ] = "full",
    query_set: Annotated[
        str | None,
        typer.Option("--set", help="Which queries (default: test, or the only set)."),
    ] = None,
    candidates: Annotated[
        Path | None,
        typer.Option(
            parser=_path,
            help="With --mode rerank: a TREC run to order again, in the place of BM25's.",
        ),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            min=1, help="Passages ranked for a query (default: 100, or what the measures need)."
        ),
    ] = None,
    run_out: RunOutOption = None,
    measures: MeasuresOption = "nDCG@10 R@100",
    exclude_self: Annotated[
        bool,
        typer.Option(
            "--exclude-self",
            help="Leave out the passage whose id is the query's, as BEIR does where queries are passages.",
        ),
    ] = False,
    device: DeviceOption = None,
    per_query: PerQueryOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Rank a set of queries with an encoder and score the ranking.

    If the encoder was trained on a part of these very queries, only its test queries are ranked.
    """
    if candidates and mode == "full":
        raise typer.BadParameter(
            "candidates are ordered with --mode rerank", param_hint="--candidates"
        )
    with _working(verbose, model):
        names = _measures(measures)
        result = _evaluated(
            path, model, mode, query_set, candidates, depth, run_out, names, device, exclude_self
        )
    if not per_query:
        del result["per_query"]
    found = result["collection"]
    about = (
        f"{model} on {found['name']}, {result['set']}: {_judged(result)}, {found['passages']:,} passages,"
        f" {'full ranking' if mode == 'full' else 'candidates reranked'}, depth {result['depth']:,}"
    )
    rows = [["measure", "mean"], *([m, f"{value:.4f}"] for m, value in result["measures"].items())]
    from adaptive_margins.text_tables import aligned

    lines = [about, *([result["split"]] if result["split"] else []), "", *aligned(rows)]
    _tell(result, as_json, "\n".join(lines + ([f"\nRun: {run_out}"] if run_out else [])), run_out)


def _judged(result: Mapping[str, Any]) -> str:
    """The number of queries, and of those with a relevant passage if it is another one."""
    text = f"{result['queries']:,} queries"
    fewest = min(result["relevant_queries"].values())
    if fewest < result["queries"]:
        text += f" ({fewest:,} with a relevant passage)"
    return text


def _evaluated(
    path: str,
    model: str,
    mode: str,
    query_set: str | None,
    candidates_path: Path | None,
    depth: int | None,
    run_out: Path | None,
    measures: list[str],
    device: str | None,
    exclude_self: bool,
) -> dict[str, Any]:
    from adaptive_margins.data.sources import open_collection
    from adaptive_margins.data.text import DataError
    from adaptive_margins.data.trec import read_marked_run, run_tag, top, write_run
    from adaptive_margins.encoder.load import default_device, encoder_identity, open_encoder
    from adaptive_margins.evaluation.external_runs import finds_relevant, score
    from adaptive_margins.evaluation.measures import cutoff, evaluate, relevant
    from adaptive_margins.retrieval.bm25 import BM25, without_hits
    from adaptive_margins.retrieval.dense import DenseRetriever
    from adaptive_margins.retrieval.exact import count_self, without_self

    collection = open_collection(path)
    candidates, complete = read_marked_run(candidates_path) if candidates_path else (None, True)
    collection, split = _held_out(model, collection)
    name = _set(collection, query_set)
    queries, qrels = collection.queries[name], collection.qrels[name]
    if not qrels:
        raise DataError(
            f"{path}: none of the queries of {name!r} is judged; there is nothing to evaluate"
        )
    judged_relevant = {measure: relevant(qrels, measure) for measure in measures}
    evaluate(qrels, {}, measures)  # what cannot be computed is told before encoding
    deepest = max(map(cutoff, measures))
    if depth is None and candidates is None:
        depth = max(_CANDIDATES, deepest) if mode == "full" else _CANDIDATES
    if depth is not None and depth < min(deepest, len(collection.passages)):
        raise typer.BadParameter(
            f"{depth} passages a query are too few for {' '.join(measures)}: {deepest} are needed",
            param_hint="--depth",
        )
    if candidates is not None:
        _check_candidates(str(candidates_path), candidates, queries, collection.passages)
    encoder = open_encoder(model, device=device or default_device())
    retriever = DenseRetriever(encoder, collection.passages)
    if not exclude_self and (count := count_self(queries, collection.passages)):
        warnings.warn(
            f"{count:,} of {len(queries):,} queries are themselves passages, with the same id, and"
            " are ranked like others; --exclude-self leaves them out, as BEIR does",
            stacklevel=2,
        )
    if mode == "full":
        assert depth
        run = retriever.search(queries, depth, exclude_self=exclude_self)
    else:
        if candidates is None:
            assert depth
            candidates = BM25(collection.passages).search(queries, depth + exclude_self)
            without_hits({qid: hits for qid, hits in candidates.items() if qid in qrels})
        candidates = {qid: hits for qid, hits in candidates.items() if qid in queries}
        if exclude_self:
            candidates = without_self(candidates)
        candidates = {qid: dict(top(hits, depth)) for qid, hits in candidates.items()}
        run = retriever.rerank(queries, candidates)
    # The ranking of this call has all hits that could be found; other candidates may be cut off.
    complete = complete and not (candidates_path and depth)
    passages = len(collection.passages) - exclude_self
    scored = score(run, qrels, measures, passages=passages, complete=complete)
    if scored.refused:
        raise DataError(f"{candidates_path}: {'; '.join(scored.refused.values())}")
    if candidates_path and scored.missing:
        warnings.warn(
            f"judged queries without candidates count 0: {scored.missing:,} of {len(qrels):,}",
            stacklevel=2,
        )
    for level in {str(judged): judged for judged in judged_relevant.values()}.values():
        if not finds_relevant(run, level):
            count = sum(map(len, level.values()))
            warnings.warn(
                f"none of the {count:,} relevant passages is among the hits", stacklevel=2
            )
            break
    if run_out:
        most = max(map(len, run.values()), default=0)
        asked = depth if depth and not candidates_path else most + complete
        write_run(run, run_out, run_tag("adaptive-margins", run, asked, passages))
    return {
        "measures": scored.evaluation.mean,
        "queries": len(qrels),
        "relevant_queries": {measure: len(judged) for measure, judged in judged_relevant.items()},
        "missing": scored.missing,
        "run": str(run_out) if run_out else None,
        "mode": mode,
        "set": name,
        "depth": depth or max(map(len, run.values())),
        "model": model,
        "identity": encoder_identity(model),
        "collection": {
            "name": collection.name,
            "source": path,
            "fingerprint": collection.fingerprint,
            "passages": len(collection.passages),
        },
        "split": split,
        "excluded_self": exclude_self,
        "truncated": {
            **{what: count for what, (count, _) in retriever.truncated.items()},
            "limit": retriever.query_length,
        },
        "per_query": scored.evaluation.per_query,
    }


def _check_candidates(path: str, candidates: Run, queries: Texts, passages: Texts) -> None:
    """Raise DataError if candidates have none of the queries, or one of them has a passage that is unknown."""
    from adaptive_margins.data.text import DataError, alike

    asked = {qid: hits for qid, hits in candidates.items() if qid in queries}
    if not asked:
        hint = alike(candidates, queries.ids)
        what = f"{path} has none of the {len(queries):,} queries that are asked"
        raise DataError(f"{what}; {hint}" if hint else what)
    unknown = [docid for hits in asked.values() for docid in hits if docid not in passages]
    if unknown:
        hint = alike(unknown, passages.ids)
        count = sum(map(len, asked.values()))
        what = f"{path}: {len(unknown):,} of {count:,} candidates are unknown passages, first {unknown[0]!r}"
        raise DataError(f"{what}; {hint or 'is it a run of this collection?'}")


def _held_out(model: str, collection: Collection) -> tuple[Collection, str]:
    """The collection with the split that the encoder was trained with, and what it was; the collection itself if there is none.

    `train` splits a collection without training queries. To test such an encoder on all of its queries would be to test it
    on what it was trained on.
    """
    from adaptive_margins.data.sources import split_queries
    from adaptive_margins.data.text import DataError

    if not (Path(model) / "training.json").is_file():
        return collection, ""
    from adaptive_margins.corpus.finetune import Finetuned

    report = Finetuned.load(Path(model)).report
    if not report.get("collection", {}).get("split"):
        return collection, ""
    try:
        parts, split = split_queries(collection, seed=report["seed"])
    except DataError:
        return collection, ""
    same = parts.fingerprint == report["collection"]["fingerprint"]
    return (
        (parts, f"The encoder was trained on this collection. {split}")
        if same
        else (collection, "")
    )


def _set(collection: Collection, wanted: str | None) -> str:
    """The set of queries that is meant."""
    there = [name for name, queries in collection.queries.items() if len(queries)]
    if not there:
        from adaptive_margins.data.text import DataError

        raise DataError(f"{collection.name} has passages, but no queries to evaluate with")
    if wanted is None and len(there) == 1:
        return there[0]
    name = wanted or "test"
    if name not in there:
        raise typer.BadParameter(
            f"{collection.name} has no queries {name!r}; it has {', '.join(there)}",
            param_hint="--set",
        )
    return name


@commands.command(
    rich_help_panel=_PANEL,
    epilog=_examples(
        "compare --qrels qrels.txt bm25.run mine.run",
        "compare --qrels qrels.txt a.run b.run --plot a_and_b.svg",
        "compare --qrels qrels.txt a.run b.run c.run.gz --json",
    ),
)
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", parser=_path, help="TREC runs, two or more.")
    ],
    qrels: Annotated[
        Path,
        typer.Option(
            parser=_path, help="Judgements: TREC's four columns, or BEIR's three with their header."
        ),
    ],
    measure: Annotated[str, typer.Option(help="A measure in ir_measures' notation.")] = "nDCG@10",
    margin: Annotated[
        float, typer.Option(help="The largest mean difference that counts as equivalent.")
    ] = 0.05,
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=_new_file, help="Draw the differences per query: NAME.png, .svg or .pdf."
        ),
    ] = None,
    complete: Annotated[
        bool,
        typer.Option(
            "--complete",
            help="The runs have all hits that could be found, though fewer than the measure looks at.",
        ),
    ] = False,
    per_query: PerQueryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare runs pair by pair: equivalent, different or undecided.

    By a paired t test and TOST (two one-sided tests, within ±margin) over all
    judged queries, corrected for the number of pairs (Bonferroni). A query
    that a run has no hits for counts 0.
    """
    if len(runs) < 2:
        raise typer.BadParameter(f"two or more are needed, got {len(runs)}", param_hint="RUN")
    if not 0 < margin < math.inf:
        raise typer.BadParameter(f"expected a number above 0, got {margin}", param_hint="--margin")
    if plot and plot.suffix not in _FIGURES:
        raise typer.BadParameter(
            f"expected a name that ends in {', '.join(_FIGURES)}, got {plot}", param_hint="--plot"
        )
    with _working():
        (name,) = _measures(measure, "--measure", most=1)
        from adaptive_margins.book.per_query import per_query_figure
        from adaptive_margins.data.trec import read_marked_run, read_qrels
        from adaptive_margins.evaluation.comparison import compare_runs, comparison_text, run_names

        judged = read_qrels(qrels)
        read = {n: read_marked_run(p) for n, p in zip(run_names(runs), runs, strict=True)}
        result = compare_runs(
            judged,
            {n: run for n, (run, _) in read.items()},
            name,
            margin,
            complete=[n for n, (_, marked) in read.items() if marked or complete],
        )
        if plot:
            import matplotlib

            from adaptive_margins.files import whole_file

            matplotlib.use("agg")

            with whole_file(plot) as partial:
                per_query_figure(result).savefig(partial, format=plot.suffix[1:])
    result["plot"] = str(plot) if plot else None
    if not per_query:
        del result["per_query"]
    text = comparison_text(result)
    _tell(result, as_json, f"{text}\n\nPlot: {plot}" if plot else text, plot)


@commands.command(
    rich_help_panel=_PANEL,
    epilog=_examples(
        "index my_corpus --model my_encoder --output my_index",
        'search my_index "how do I sort an array?"',
    ),
)
def index(
    path: SourceArgument,
    model: ModelOption,
    output: Annotated[Path, typer.Option(parser=_new_folder, help="A new folder for the index.")],
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Embed all passages and write an index to search in. An interrupted call goes on where it was."""
    with _working(verbose, model):
        from adaptive_margins.data.sources import open_collection
        from adaptive_margins.encoder.load import default_device, open_encoder
        from adaptive_margins.files import folder_bytes
        from adaptive_margins.retrieval.dense import DenseRetriever
        from adaptive_margins.retrieval.dense_index import DenseIndex
        from adaptive_margins.text_tables import size

        collection = open_collection(path)
        encoder = open_encoder(model, device=device or default_device())
        retriever = DenseRetriever(encoder, collection.passages)
        built = DenseIndex.build(
            retriever, collection.name, model, output, fingerprint=collection.fingerprint
        )
        result = {
            "index": str(output),
            "passages": len(built.passages),
            "kind": built.settings.factory,
            "bytes": folder_bytes(output),
            "encoder": {"name": built.encoder, "identity": built.identity},
            "collection": built.about["collection"],
            "truncated": {
                "passages": retriever.truncated["passages"][0],
                "limit": retriever.passage_length,
            },
        }
    text = (
        f"{output}: {result['passages']:,} passages of {collection.name}, {result['kind']}, {size(folder_bytes(output))}\n\n"
        f'adaptive-margins search {_quoted(output)} "…"'
    )
    _tell(result, as_json, text)


@commands.command(
    rich_help_panel=_PANEL,
    epilog=_examples(
        'search my_index "how do I sort an array?"',
        "search my_index --queries queries.tsv --run-out my.run",
    ),
)
def search(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", parser=_path, help="What `index` wrote.")
    ],
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="One query.")] = None,
    queries: Annotated[
        Path | None, typer.Option(parser=_path, help="Many queries: a line each, id, tab, text.")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Passages for a query.")] = 10,
    run_out: RunOutOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            parser=expanded,
            help="The index's encoder, if it lies elsewhere than when the index was built.",
        ),
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Search an index: one query, or a file of queries."""
    if (query is None) == (queries is None):
        raise typer.BadParameter("give one of QUERY and --queries", param_hint="QUERY")
    if query is not None and not query.strip():
        raise typer.BadParameter("the query is empty", param_hint="QUERY")
    with _working(verbose):
        from adaptive_margins.data.collection import Texts, read_queries
        from adaptive_margins.data.trec import top, write_run
        from adaptive_margins.encoder.load import default_device
        from adaptive_margins.retrieval.dense_index import DenseIndex

        asked = read_queries(queries) if queries else Texts(["1"], [query or ""])
        opened = DenseIndex.open(folder)
        _offline(model or opened.encoder)
        encoder = opened.open_encoder(model, device=device or default_device())
        run = opened.search(encoder, asked, depth)
        if run_out:
            write_run(run, run_out, "adaptive-margins")
        hits = [
            {
                "qid": qid,
                "rank": rank,
                "score": score,
                "docid": docid,
                "text": opened.passages[docid],
            }
            for qid in asked.ids
            for rank, (docid, score) in enumerate(top(run[qid]), start=1)
        ]
    result = {
        "index": str(folder),
        "encoder": opened.encoder,
        "depth": depth,
        "queries": dict(zip(asked.ids, asked.texts, strict=True)),
        "truncated": {"queries": opened.truncated[0], "limit": opened.about["lengths"]["query"]},
        "run": str(run_out) if run_out else None,
        "hits": hits,
    }
    if query is None and run_out:
        text = f"{run_out}: {len(hits):,} hits of {len(asked):,} queries"
    else:
        text = _hits(asked, hits, titles=query is None)
    _tell(result, as_json, text, run_out)


def _hits(queries: Texts, hits: Sequence[Mapping[str, Any]], *, titles: bool) -> str:
    """Rank, score, docid and as much of the passage as the terminal is wide."""
    from adaptive_margins.text_tables import aligned

    if not hits:
        return "No passage was found."
    width = shutil.get_terminal_size().columns
    table = [[f"{hit['rank']}", f"{hit['score']:.4f}", hit["docid"]] for hit in hits]
    lines = [
        f"{start}  {printable(' '.join(hit['text'].split()))}"[:width]
        for start, hit in zip(aligned(table, left=3), hits, strict=True)
    ]
    if not titles:
        return "\n".join(lines)
    parts = []
    for qid, text in zip(queries.ids, queries.texts, strict=True):
        of_query = [line for line, hit in zip(lines, hits, strict=True) if hit["qid"] == qid]
        parts.append("\n".join([printable(f"{qid}: {text}")[:width], *of_query]))
    return "\n\n".join(parts)


@commands.command(
    rich_help_panel=_PANEL,
    epilog=_examples(
        "collection my_corpus",
        "collection my_corpus --output my_corpus.html",
        "collection beir/scifact --json",
    ),
)
def collection(
    path: SourceArgument,
    output: Annotated[
        Path | None,
        typer.Option(parser=_new_file, help="Write the whole data sheet: a page, NAME.html."),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check a collection and describe it: a data sheet.

    Runs in its folder (NAME.run or NAME.trec) are listed, too.
    """
    with _working(verbose):
        from adaptive_margins.book import sheet
        from adaptive_margins.data.folder import read_runs
        from adaptive_margins.data.sources import open_collection
        from adaptive_margins.files import write_text

        opened = open_collection(path)
        runs = read_runs(Path(path)) if Path(path).is_dir() else {}
        facts = sheet.collection_facts(opened, runs)
        if output:
            write_text(output, sheet.collection_page(opened, runs=facts["runs"]))
    text = sheet.facts_text(facts)
    _tell(
        {**facts, "page": str(output) if output else None},
        as_json,
        f"{text}\n\nPage: {output}" if output else text,
        output,
    )


@commands.command(epilog=_examples("status", "status --json"))
def status(as_json: JsonOption = False) -> None:
    """What the home folder holds: runs, collections, notebooks, book. Only reads."""
    from adaptive_margins.files import home
    from adaptive_margins.paper.status import status as status_of
    from adaptive_margins.paper.status import status_text
    from adaptive_margins.profiles.config import available

    found = {**status_of(home()), "profiles": available()}
    _tell(found, as_json, status_text(found))


# ---- what the commands share ---------------------------------------------------------------------------------------


@contextmanager
def _working(verbose: bool = False, model: str = "") -> Iterator[None]:
    """While a command computes: stdout is kept clean, progress goes to a terminal only, and a warning is one line."""
    _offline(model)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    progress.quiet(not (verbose or sys.stderr.isatty()))
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.showwarning = _warn
            yield
    finally:
        progress.clear()
        progress.quiet(False)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    progress.clear()
    line = printable(" ".join(str(message).splitlines()))
    print(f"adaptive-margins: warning: {line}", file=sys.stderr, flush=True)


def _offline(model: str) -> None:
    """The hub is not reached, unless an encoder of the hub is named."""
    if "@" not in model:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _measures(text: str, option: str = "--measures", most: int | None = None) -> list[str]:
    """Measures with their levels in their names, each once."""
    from adaptive_margins.evaluation.measures import named

    try:
        names = list(dict.fromkeys(named(measure) for measure in text.split()))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
    if not names or len(names) > (most or len(names)):
        expected = f"{most} measure" if most else "at least one measure"
        raise typer.BadParameter(f"expected {expected}, got {text!r}", param_hint=option)
    return names


def _target(text: str) -> float | Literal["adaptive", "distributed"]:
    if text == "adaptive":
        return "adaptive"
    if text == "distributed":
        return "distributed"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise typer.BadParameter(
            f"expected distributed, adaptive or a number, got {text!r}", param_hint="--target"
        )
    return value


def _trained(report: Mapping[str, Any], path: str) -> str:
    """The report of `train` for a terminal."""
    from adaptive_margins.text_tables import aligned

    measures = list(report["measures"]["start"])
    table = [["test queries", *measures]]
    table += [
        [name, *(f"{values[measure]:.4f}" for measure in measures)]
        for name, values in report["measures"].items()
    ]
    compared = [[f"difference in {measures[0]}", "mean", "95 % interval", "p (t)", "p (TOST)", ""]]
    for name, found in report["comparisons"].items():
        numbers = ["—", "—", "—"]
        if found["ci"] is not None:
            low, high = found["ci"]
            numbers = [
                f"[{low:+.4f}, {high:+.4f}]",
                f"{found['p_t']:.4f}",
                f"{found['p_tost']:.4f}",
            ]
        compared.append([name, f"{found['difference']:+.4f}", *numbers, found["verdict"]])
    place, source = _quoted(report["model_dir"]), _quoted(path)
    runs = " ".join(f"{place}/runs/{name}.test.run.gz" for name in ("start", "trained"))
    split = [report["collection"]["split"], ""] if report["collection"]["split"] else []
    return "\n".join(
        [
            *split,
            *aligned(table),
            "",
            *aligned(compared),
            "",
            report["verdict"],
            "",
            f"The encoder is in {report['model_dir']}: SentenceTransformer({report['model_dir']!r}) opens it. Next:",
            f"  adaptive-margins index {source} --model {place} --output {place}.index",
            f'  adaptive-margins search {place}.index "…"',
            f"  adaptive-margins compare --qrels {place}/qrels.test.txt {runs}",
        ]
    )


def _quoted(value: object) -> str:
    return shlex.quote(str(value))


def _tell(result: Mapping[str, Any], as_json: bool, text: str, written: Path | None = None) -> None:
    """The outcome: an object for machines, or text for people. On stdout, unless a file was ``written`` there."""
    from adaptive_margins.files import is_stdout

    stream = sys.stderr if written and is_stdout(written) else sys.stdout
    if as_json:
        unicode = (stream.encoding or "utf-8").lower().startswith("utf")
        text = json.dumps(result, indent=1, ensure_ascii=not unicode, allow_nan=False)
    print(text if as_json else printable(text), file=stream)
