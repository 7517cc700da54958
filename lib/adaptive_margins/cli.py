"""The command ``adaptive-margins``: entry point, and the commands for the paper's experiments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

from adaptive_margins import cli_compare, cli_corpus, cli_mine, terminal
from adaptive_margins.distributed import processes
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.processes import end_when_asked
from adaptive_margins.progress import printable

if TYPE_CHECKING:
    from adaptive_margins.paper import Reproduction

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Rerun, check and use adaptive relevance margins.",
)
Profile = Annotated[
    str, Option(parser=terminal.expanded, help="A profile's name, or the path of a YAML file.")
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
    terminal.show(found.values(), as_json, found.text(every=every))
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
        Option(
            parser=terminal.expanded, help="Share runs in a folder or bucket (s3://BUCKET/runs)."
        ),
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

        take(reproduction, source if "://" in source else terminal.expanded(source))
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
        Path | None,
        Option(parser=terminal.new_file, help="The JSON (default: _build/gpu-check.json)."),
    ] = None,
    as_json: cli_corpus.Json = False,
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


app.add_typer(cli_corpus.commands)
app.add_typer(cli_compare.commands)
app.add_typer(cli_mine.commands)


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
