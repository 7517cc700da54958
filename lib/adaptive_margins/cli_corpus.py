"""The commands for a custom corpus: train, evaluate, index, search, collection.

Each parses its arguments, calls the library, and prints text or, with ``--json``, one JSON object.
What a command needs is imported when it is called, so that ``--help`` is quick.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.processes import end_when_asked
from adaptive_margins.progress import printable
from adaptive_margins.terminal import (
    encoder_options,
    expanded,
    new_file,
    new_folder,
    old_path,
    show,
    working,
)
from adaptive_margins.text_tables import aligned, size

if TYPE_CHECKING:
    from adaptive_margins.data.collection import Texts

commands = typer.Typer()

_EXAMPLES = """\
train my_corpus --output my_encoder
train my_corpus --output my_encoder --json > report.json
train pydocs:numpy --output small --triples 512
train my_corpus --output baseline --target 0.3
train my_corpus --output best --target all
train my_corpus --output tested --folds 5
evaluate my_corpus --model my_encoder
evaluate my_corpus --model minilm --run-out minilm.run
evaluate my_corpus --model minilm --mode rerank --json
evaluate my_corpus --model minilm --mode hybrid
evaluate my_corpus --model minilm --measures "AP RR@10"
index my_corpus --model my_encoder --output my_index
search my_index "how do I sort an array?"
search my_index --queries queries.tsv --run-out my.run
collection my_corpus
collection my_corpus --output my_corpus.html
collection beir/scifact --json
compare --qrels qrels.txt bm25.run mine.run
compare --qrels qrels.txt --baseline a.run b.run c.run.gz
compare --qrels qrels.txt a.run b.run --format latex
compare --qrels qrels.txt a.run b.run --plot a_and_b.svg
mine my_corpus --output my_corpus/triples.tsv
mine my_corpus --output tuples.parquet --negatives 5
mine pydocs --output mined --cross-encoder my_reranker
"""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Add a function as a command, with its examples below its help."""
    name = function.__name__
    lines = [line for line in _EXAMPLES.splitlines() if line.startswith(f"{name} ")]
    shown = "\n".join(f"  adaptive-margins {line}" for line in lines)
    epilog = f"\b\nExamples:\n{shown}"
    return commands.command(rich_help_panel="Your corpus", epilog=epilog)(function)


Mode = Literal["full", "rerank", "hybrid"]
Searched = Literal["dense", "bm25", "hybrid"]
Miner = Literal["bm25", "encoder"]
MOST_SEED = 2**32 - 1
Source = Annotated[
    str,
    Argument(
        metavar="PATH",
        parser=expanded,
        help="A collection: a folder (BEIR's layout, or collection.tsv, queries.tsv, qrels.txt),"
        " rows of texts (.jsonl, .parquet, a saved Hugging Face dataset), 'pydocs', or an id of"
        " ir_datasets.",
    ),
]
_ENCODER = "'minilm' (shipped), a Sentence Transformers folder, or ORG/NAME@REVISION of the hub."
Model = Annotated[str, Option(parser=expanded, help=f"An encoder: {_ENCODER}")]
RunOut = Annotated[
    Path | None, Option(parser=new_file, help="Write the ranking: a TREC run, gzipped if .gz.")
]
Measures = Annotated[str, Option(help="In ir_measures' notation, separated by spaces.")]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1, … (default: a GPU if any).")]
Json = Annotated[bool, Option("--json", help="Print one JSON object.")]
Verbose = Annotated[bool, Option("--verbose", help="Show progress even if stderr is no terminal.")]
NoCache = Annotated[bool, Option("--no-cache", help="Do not use the cache of embeddings.")]
PerQuery = Annotated[bool, Option("--per-query", help="With --json: each query's value, too.")]


# ---- train and evaluate -----------------------------------------------------------------------


@command
@encoder_options
def train(
    path: Source,
    options: EncoderOptions,
    output: Annotated[Path, Option(parser=new_folder, help="A new folder for the encoder.")],
    model: Model = "minilm",
    target: Annotated[
        str, Option(help="distributed, adaptive, a margin ε, or softmax; all: the best of six.")
    ] = "distributed",
    seed: Annotated[int, Option(min=0, max=MOST_SEED, help="Seeds split, triples, dropout.")] = 1,
    negatives: Annotated[Miner, Option(help="Retriever that negatives are mined with.")] = "bm25",
    triples: Annotated[
        int | None, Option(min=2, help="Number of triples (default: for some minutes).")
    ] = None,
    batch_size: Annotated[int | None, Option(min=1, help="Default: 32, on a GPU 128.")] = None,
    learning_rate: Annotated[float | None, Option(min=0, help="Default: 2e-5.")] = None,
    folds: Annotated[int | None, Option(min=3, help="Number of folds to cross-validate.")] = None,
    also: Annotated[
        str | None, Option(parser=expanded, help="A second collection: is the encoder worse there?")
    ] = None,
    measures: Measures = "nDCG@10 R@100",
    device: Device = None,
    report_to: Annotated[
        list[str] | None, Option(help="Log to tensorboard, wandb, mlflow or trackio. Repeatable.")
    ] = None,
    no_cache: NoCache = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune an encoder on a corpus, and report whether it improved.

    The test queries are ranked by the encoder before and after training, by
    BM25, and by the fusion of both; paired tests compare them. If training does
    not help on the validation queries, the original encoder is kept. An
    interrupted call is resumed; SIGTERM and SIGUSR1 end it after a checkpoint,
    with status 75.
    """
    end_when_asked()
    with working(verbose, model):
        names = measure_names(measures)
        from adaptive_margins.corpus.finetune import finetune
        from adaptive_margins.corpus.settings import Settings

        given = Settings.for_device(device, batch_size=batch_size, learning_rate=learning_rate)
        found = finetune(
            path,
            output,
            model=model,
            target=_target(target),
            seed=seed,
            measures=names,
            negatives=negatives,
            device=device,
            triples=triples,
            report_to=tuple(report_to or ()),
            settings=given,
            options=options,
            folds=folds,
            also=also,
            cache=not no_cache,
        ).report
    show(found, as_json, _train_text(found, path))


def _train_text(report: Mapping[str, Any], path: str) -> str:
    """The report of `train` for a terminal."""
    from adaptive_margins.corpus.choice import choice_table

    folder, place = report["model_dir"], shlex.quote(report["model_dir"])
    runs = " ".join(f"{place}/runs/{name}.test.run.gz" for name in ("start", "trained"))
    parts = [
        report["collection"]["split"],
        "\n".join(aligned(choice_table(report))),
        *_systems_text(report, "test queries"),
        report["verdict"],
        f"The encoder is in {folder}: SentenceTransformer({folder!r}) opens it. Next:\n"
        f"  adaptive-margins index {shlex.quote(path)} --model {place} --output {place}.index\n"
        f'  adaptive-margins search {place}.index "…"\n'
        f"  adaptive-margins compare --qrels {place}/qrels.test.txt {runs}",
    ]
    return "\n\n".join(part for part in parts if part)


def _systems_text(found: Mapping[str, Any], title: str) -> list[str]:
    """A table of the systems' measures, and one of their comparisons."""
    measures = list(next(iter(found["measures"].values())))
    means = [[title, *measures]]
    for name, values in found["measures"].items():
        means.append([name, *(f"{values[measure]:.4f}" for measure in measures)])
    pairs = [[f"difference in {measures[0]}", "mean", "95 % CI", "p (t)", "p (TOST)", ""]]
    for name, pair in found["comparisons"].items():
        tests = ["—", "—", "—"]
        if pair["ci"] is not None:
            low, high = pair["ci"]
            tests = [f"[{low:+.4f}, {high:+.4f}]", f"{pair['p_t']:.4f}", f"{pair['p_tost']:.4f}"]
        pairs.append([name, f"{pair['difference']:+.4f}", *tests, pair["verdict"]])
    return ["\n".join(aligned(rows)) for rows in (means, pairs)]


@command
@encoder_options
def evaluate(
    path: Source,
    options: EncoderOptions,
    model: Model,
    mode: Annotated[Mode, Option(help="Rank all, rerank candidates, or fuse with BM25.")] = "full",
    query_set: Annotated[
        str | None, Option("--set", help="Query set (default: test, or the only one).")
    ] = None,
    candidates: Annotated[
        Path | None, Option(parser=old_path, help="With --mode rerank: the TREC run to rerank.")
    ] = None,
    depth: Annotated[
        int | None, Option(min=1, help="Passages per query (default: 100, or as measures need).")
    ] = None,
    run_out: RunOut = None,
    measures: Measures = "nDCG@10 R@100",
    exclude_self: Annotated[
        bool, Option("--exclude-self", help="Leave out the passage whose id is the query's.")
    ] = False,
    device: Device = None,
    per_query: PerQuery = False,
    no_cache: NoCache = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Rank a set of queries with an encoder and score the ranking.

    If the encoder was trained on some of these queries, only its test queries are ranked.
    """
    with working(verbose, model):
        names = measure_names(measures)
        from adaptive_margins.corpus.evaluate import evaluate_encoder

        found = evaluate_encoder(
            path,
            model,
            mode=mode,
            query_set=query_set,
            candidates=candidates,
            depth=depth,
            measures=names,
            exclude_self=exclude_self,
            options=options,
            device=device,
            run_out=run_out,
            cache=not no_cache,
        )
    result = found.report
    about = (
        f"{model} on {result['collection']['name']}, {result['set']}: {_judged(result)},"
        f" {result['collection']['passages']:,} passages,"
        f" mode {mode}, depth {result['depth']:,}"
    )
    rows = [["measure", "mean"], *([m, f"{value:.4f}"] for m, value in result["measures"].items())]
    lines = [about, *filter(None, [result["split"]]), "", *aligned(rows)]
    if mode == "hybrid":
        lines += ["", "weight of dense: {weight} ({how})".format(**result["hybrid"])]
        lines += [f"\n{part}" for part in _systems_text(result["hybrid"], "queries")]
    if run_out:
        lines.append(f"\nRun: {run_out}")
    if per_query:
        result = {**result, "per_query": found.evaluation.per_query}
    show(result, as_json, "\n".join(lines), run_out)


def _judged(result: Mapping[str, Any]) -> str:
    """The number of queries, and of those with a relevant passage if it is another one."""
    fewest = min(result["relevant_queries"].values())
    text = f"{result['queries']:,} queries"
    return text if fewest == result["queries"] else f"{text} ({fewest:,} with a relevant passage)"


def measure_names(text: str, option: str = "--measures") -> list[str]:
    """Measures with their levels in their names, each once."""
    from adaptive_margins.evaluation.measures import named

    try:
        names = list(dict.fromkeys(named(measure) for measure in text.split()))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
    if not names:
        raise typer.BadParameter(f"expected at least one measure, got {text!r}", param_hint=option)
    return names


def _target(text: str) -> Any:
    """A number, or a word that the library checks."""
    try:
        return float(text)
    except ValueError:
        return text


# ---- index and search -------------------------------------------------------------------------


@command
@encoder_options
def index(
    path: Source,
    options: EncoderOptions,
    model: Model,
    output: Annotated[Path, Option(parser=new_folder, help="A new folder for the index.")],
    weight: Annotated[
        float | None, Option(min=0, max=1, help="Weight of the encoder (default: as learned).")
    ] = None,
    ray: Annotated[
        str,
        Option(metavar="ADDRESS[,gpus=N][,cpus=N]", help="Embed on a cluster of Ray, or `local`."),
    ] = "",
    device: Device = None,
    no_cache: NoCache = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Embed all passages and write an index to search in, with BM25.

    An interrupted call is resumed.
    """
    with working(verbose, model):
        from adaptive_margins.corpus.validation import stored_weight
        from adaptive_margins.data.sources import open_collection
        from adaptive_margins.encoder.load import default_device, open_encoder
        from adaptive_margins.files import folder_bytes
        from adaptive_margins.retrieval.dense import DenseRetriever
        from adaptive_margins.retrieval.dense_index import DenseIndex
        from adaptive_margins.retrieval.embedding_cache import cache_folder

        collection = open_collection(path)
        encoder = open_encoder(model, options, device=device or default_device())
        cache = cache_folder(not no_cache)
        retriever = DenseRetriever(encoder, collection.passages, cache=cache, ray=ray)
        weight = stored_weight(model) if weight is None else weight
        about: dict[str, Any] = {"fingerprint": collection.fingerprint, "weight": weight}
        built = DenseIndex.build(retriever, collection.name, model, output, **about)
    result = {
        "index": str(output),
        "passages": len(built.passages),
        "kind": built.settings.factory,
        "bytes": folder_bytes(output),
        "encoder": {"name": built.encoder, "identity": built.identity},
        "options": built.about["options"],
        "collection": built.about["collection"],
        "bm25": built.about["bm25"],
        "truncated": {
            "passages": retriever.truncated["passages"][0],
            "lost": retriever.truncation["lost"]["passages"],
            "limit": retriever.passage_length,
        },
    }
    text = (
        f"{output}: {result['passages']:,} passages of {collection.name}, {result['kind']},"
        f" {size(folder_bytes(output))}\n\n"
        f'adaptive-margins search {shlex.quote(str(output))} "…"'
    )
    show(result, as_json, text)


@command
def search(
    folder: Annotated[Path, Argument(metavar="DIR", parser=old_path, help="What `index` wrote.")],
    query: Annotated[str | None, Argument(metavar="QUERY", help="One query.")] = None,
    queries: Annotated[
        Path | None, Option(parser=old_path, help="A file of queries: id, tab, text per line.")
    ] = None,
    mode: Annotated[Searched, Option(help="The encoder, BM25, or both fused.")] = "hybrid",
    depth: Annotated[int, Option(min=1, help="Passages per query.")] = 10,
    run_out: RunOut = None,
    model: Annotated[
        str | None, Option(parser=expanded, help="The index's encoder, if its folder was moved.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Search an index: one query, or a file of queries."""
    if (query is None) == (queries is None):
        raise typer.BadParameter("give one of QUERY and --queries", param_hint="QUERY")
    if query is not None and not query.strip():
        raise typer.BadParameter("the query is empty", param_hint="QUERY")
    with working(verbose, model or ""):
        from adaptive_margins.data.collection import Texts, read_queries
        from adaptive_margins.data.trec import top, write_run
        from adaptive_margins.encoder.load import default_device
        from adaptive_margins.retrieval.dense_index import DenseIndex

        asked = read_queries(queries) if queries else Texts(["1"], [query or ""])
        opened = DenseIndex.open(folder)
        weight = opened.weight if mode == "hybrid" else float(mode == "dense")
        encoder = weight != 0 and opened.open_encoder(model, device=device or default_device())
        run = opened.search(encoder, asked, depth, weight=weight)
        if run_out:
            write_run(run, run_out, "adaptive-margins")
        hits = [
            {"qid": q, "rank": rank, "score": score, "docid": d, "text": opened.passages[d]}
            for q in asked.ids
            for rank, (d, score) in enumerate(top(run[q]), start=1)
        ]
    result = {
        "index": str(folder),
        "encoder": opened.encoder,
        "mode": mode,
        "weight": weight,
        "depth": depth,
        "queries": dict(zip(asked.ids, asked.texts, strict=True)),
        "truncated": {"queries": opened.truncated[0], "limit": opened.about["lengths"]["query"]},
        "run": str(run_out) if run_out else None,
        "hits": hits,
    }
    if query is None and run_out:
        text = f"{run_out}: {len(hits):,} hits of {len(asked):,} queries"
    else:
        text = _hits_text(asked, hits, titles=query is None)
    show(result, as_json, text, run_out)


def _hits_text(queries: Texts, hits: Sequence[Mapping[str, Any]], *, titles: bool) -> str:
    """Rank, score, docid and as much of the passage as the terminal is wide."""
    if not hits:
        return "No passage was found."
    width = shutil.get_terminal_size().columns
    rows = [[f"{hit['rank']}", f"{hit['score']:.4f}", hit["docid"]] for hit in hits]
    lines: dict[str, list[str]] = {qid: [] for qid in queries.ids}
    for begin, hit in zip(aligned(rows, left=3), hits, strict=True):
        passage = printable(" ".join(hit["text"].split()))
        lines[hit["qid"]].append(f"{begin}  {passage}"[:width])
    if titles:
        for qid, text in zip(queries.ids, queries.texts, strict=True):
            lines[qid].insert(0, printable(f"{qid}: {text}")[:width])
    return "\n\n".join("\n".join(block) for block in lines.values())


# ---- collection -------------------------------------------------------------------------------


@command
def collection(
    path: Source,
    output: Annotated[
        Path | None, Option(parser=new_file, help="Write the complete data sheet, NAME.html.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check a collection and print its data sheet.

    Runs in its folder (NAME.run or NAME.trec) are listed as well.
    """
    with working(verbose):
        from adaptive_margins.book import describe
        from adaptive_margins.data.sources import open_collection
        from adaptive_margins.data.trec import read_runs
        from adaptive_margins.files import write_text

        opened = open_collection(path)
        runs = read_runs(Path(path)) if Path(path).is_dir() else {}
        facts = describe.collection_facts(opened, runs)
        if output:
            write_text(output, describe.collection_page(opened, facts))
    text = describe.facts_text(facts)
    page = str(output) if output else None
    show({**facts, "page": page}, as_json, f"{text}\n\nPage: {page}" if page else text, output)
