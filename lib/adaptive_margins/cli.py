"""The command ``adaptive-margins``: entry point; the paper's experiments; compare and mine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from adaptive_margins import cli_corpus, terminal
from adaptive_margins.cli_corpus import (
    MOST_SEED,
    Device,
    Json,
    Miner,
    Model,
    PerQuery,
    Source,
    Verbose,
    command,
    measure_names,
)
from adaptive_margins.distributed import processes
from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.processes import end_when_asked
from adaptive_margins.progress import printable
from adaptive_margins.terminal import encoder_options, expanded, new_file, old_path, show, working
from adaptive_margins.text_tables import aligned

if TYPE_CHECKING:
    from adaptive_margins.paper import Reproduction

_STYLES = {"text": "plain", "markdown": "github", "latex": "latex_booktabs"}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Rerun, check and use adaptive relevance margins.",
)
Profile = Annotated[
    str, Option(parser=expanded, help="A profile's name, or the path of a YAML file.")
]


def _open(profile: str, source: str = "", **values: Any) -> Reproduction:
    """The profile, opened; the hub is reached only if an encoder or the source of runs is there."""
    from adaptive_margins.profiles.load import load_profile

    settings = load_profile(profile)
    named = [*settings.encoders.values(), *settings.untrained.values()]
    if not (source.startswith("hf://") or any(encoder.revision for encoder in named)):
        terminal.offline()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from adaptive_margins import paper

    return paper.open(profile, **values)


@app.command()
def plan(
    profile: Profile = "laptop",
    every: Annotated[bool, Option("--every", help="One line per run.")] = False,
    check: Annotated[
        bool,
        Option("--check", help="Compare finished runs with their checksums; 1 if one differs."),
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON: every run, and why.")] = False,
) -> None:
    """List a profile's runs: done, missing or stale, and why; times, disk and downloads."""
    reproduction = _open(profile)
    found = reproduction.plan()
    show(found.values(), as_json, found.text(every=every))
    if check and (damaged := reproduction.store.damaged()):
        lines = [*map(printable, damaged), "`reproduce` computes them again."]
        print(*lines, sep="\n", file=sys.stderr if as_json else sys.stdout)
        raise typer.Exit(1)


@app.command()
def reproduce(
    profile: Profile = "laptop",
    source: Annotated[
        str, Option("--from", help="Take somebody's finished runs first: a folder, archive or URL.")
    ] = "",
    runs_only: Annotated[
        bool, Option("--runs-only", help="Compute the runs, build no book.")
    ] = False,
    run: Annotated[
        list[str] | None,
        Option(help="Compute only the run of this id, and what it needs. Repeatable."),
    ] = None,
    notebook: Annotated[
        list[str] | None,
        Option(help="Execute only this notebook (number or name), build no book. Repeatable."),
    ] = None,
    every: Annotated[
        bool, Option("--all", help="Include the chapter on the released code, which takes longer.")
    ] = False,
    force: Annotated[
        bool, Option("--force", help="Execute notebooks that are finished, too.")
    ] = False,
    accept_licence: Annotated[
        bool, Option("--accept-licence", help="Accept the terms of the collection; see `plan`.")
    ] = False,
    workers: Annotated[
        int | None, Option(min=1, help="Worker processes, one for each GPU.")
    ] = None,
    store: Annotated[
        str | None,
        Option(parser=expanded, help="Share runs in a folder or bucket (s3://BUCKET/runs)."),
    ] = None,
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS[,gpus=N][,cpus=N]", help="Compute on a cluster of Ray, or `local`."
        ),
    ] = None,
) -> None:
    """Compute all runs of a profile, execute the notebooks and build the book.

    An interrupted call is resumed. SIGTERM and SIGUSR1 end it after a checkpoint, with status 75.
    """
    end_when_asked()
    from adaptive_margins.book.build import build
    from adaptive_margins.data.ir_datasets import ACCEPT_VARIABLE
    from adaptive_margins.paper.reproduction import RAY_VARIABLE, STORE_VARIABLE

    if processes() > 1 and not (runs_only or run):
        raise typer.BadParameter(
            "several processes (torchrun) compute runs, not the book; add --runs-only or --run ID,"
            " and build the book afterwards with one process"
        )
    if accept_licence:
        os.environ[ACCEPT_VARIABLE] = "all"
    if store:  # the notebooks find it there, too
        os.environ[STORE_VARIABLE] = store if "://" in store else os.path.abspath(store)
    if ray:
        os.environ[RAY_VARIABLE] = ray
    reproduction = _open(profile, source, **({"workers": workers} if workers else {}))
    if source:
        from adaptive_margins.paper.shared_runs import take

        take(reproduction, source if "://" in source else expanded(source))
    if run:
        for run_id in run:
            print(printable(str(reproduction.run_one(run_id).path)))
    elif runs_only:
        reproduction.run_all()
    else:
        build(
            profile,
            home=reproduction.home,
            notebooks=notebook,
            every=every,
            force=force,
            run=reproduction.run_all,
        )


@app.command()
def profiles() -> None:
    """List the packaged profiles."""
    from adaptive_margins.profiles.load import available

    print("\n".join(available()))


@app.command()
def check_gpu(
    device: Annotated[
        Literal["cuda", "cpu"], Option(help="cpu: try the check in miniature, without a GPU.")
    ] = "cuda",
    output: Annotated[
        Path | None, Option(parser=new_file, help="The JSON (default: _build/gpu-check.json).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a CUDA GPU: does it compute correctly, how fast, how long would the profiles take?

    At most 8 minutes, without a network. Status 1 if a check fails, 2 without a CUDA device.
    """
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"
    if not script.is_file():
        raise AdaptiveMarginsError(
            f"{script} does not exist; the check needs a clone of the repository (pip install -e)"
        )
    options = ["--output", str(output)] if output else []
    options += ["--json"] if as_json else []
    command = [sys.executable, str(script), "--device", device, *options]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


# ---- rankings and negatives of any system ----


@command
def compare(
    runs: Annotated[
        list[Path], Argument(metavar="RUN", parser=old_path, help="TREC runs, two or more.")
    ],
    qrels: Annotated[
        Path, Option(parser=old_path, help="Judgements: TREC's four columns, or BEIR's three.")
    ],
    measure: Annotated[str, Option(help="A measure in ir_measures' notation.")] = "nDCG@10",
    margin: Annotated[float, Option(help="Bound of equivalence (TOST).")] = 0.05,
    plot: Annotated[
        Path | None, Option(parser=new_file, help="Draw differences per query: .png, .svg, .pdf.")
    ] = None,
    complete: Annotated[
        bool, Option("--complete", help="The runs have all hits that could be found.")
    ] = False,
    baseline: Annotated[
        Path | None, Option(metavar="RUN", parser=old_path, help="Compare only with this run.")
    ] = None,
    form: Annotated[
        Literal["text", "markdown", "latex"], Option("--format", help="Format of tables.")
    ] = "text",
    per_query: PerQuery = False,
    as_json: Json = False,
) -> None:
    """Compare runs pair by pair: equivalent, better, worse or undecided.

    By a paired t test and TOST (two one-sided tests, within ±margin) over all
    judged queries, corrected for the number of pairs (Bonferroni; with a
    baseline Holm). A judged query without hits counts 0.
    """
    with working():
        names = measure_names(measure, "--measure")
        if len(names) > 1:
            raise typer.BadParameter(f"expected 1 measure, got {measure!r}", param_hint="--measure")
        from adaptive_margins.corpus.compare import compare_files
        from adaptive_margins.evaluation.comparison import comparison_text

        result = compare_files(
            qrels, runs, names[0], margin, complete=complete, plot=plot, baseline=baseline
        )
    if not per_query:
        del result["per_query"]
    show(result, as_json, comparison_text(result, _STYLES[form]), plot)


@command
@encoder_options
def mine(
    path: Source,
    output: Annotated[
        Path,
        Option(
            parser=old_path,
            help="NAME.tsv: ids, as triples.tsv; NAME.jsonl, NAME.parquet: texts and ids; a new"
            " folder: the collection with the triples.",
        ),
    ],
    options: EncoderOptions,
    retriever: Annotated[Miner, Option(help="Ranks the candidates.")] = "bm25",
    model: Model = "minilm",
    negatives: Annotated[int, Option(min=1, help="Negatives of each positive.")] = 1,
    depth: Annotated[int, Option(min=1, help="Candidates per query.")] = 100,
    cross_encoder: Annotated[
        str | None,
        Option(parser=expanded, help="Scores for the filter: a folder, or ORG/NAME@REVISION."),
    ] = None,
    seed: Annotated[int, Option(min=0, max=MOST_SEED, help="Seeds split and negatives.")] = 1,
    device: Device = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Mine hard negatives, for `train` or another trainer.

    Candidates that are probably relevant are dropped, as by `train`. The output
    has triples, or with several --negatives n-tuples; NAME.scores.tsv next to it
    has ranks and scores.
    """
    with working(verbose, f"{model} {cross_encoder or ''}"):
        from adaptive_margins.corpus.mine import mine_negatives

        asked = retriever, model, negatives, depth, cross_encoder, seed, device, options
        found = mine_negatives(path, output, *asked)
    counts = {**found["filtered"], "too_few": found["too_few"], "rows": found["rows"]}
    rows = aligned([[name.replace("_", " "), f"{count:,}"] for name, count in counts.items()])
    last = f"{found['output']}; ranks and scores of negatives: {found['scores']}"
    parts = [found["split"], "\n".join(rows), last]
    show(found, as_json, "\n\n".join(part for part in parts if part))


app.add_typer(cli_corpus.commands)


def main() -> None:
    """Entry point: exit with 1 and a line for an error, 2 for a wrong call, 130 if interrupted."""
    terminal.prepare_streams()
    code: int | str | None
    try:
        try:
            terminal.check_arguments(sys.argv[1:])
            code = app(standalone_mode=False)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        terminal.forget_output()
        code = 141  # as if SIGPIPE had ended it
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = terminal.exit_code(error)
        if code is None:
            raise
    raise SystemExit(code or 0)


if __name__ == "__main__":
    main()
