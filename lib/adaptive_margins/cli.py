"""The command ``adaptive-margins``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from adaptive_margins import cli_corpus, progress
from adaptive_margins.errors import AdaptiveMarginsError

if TYPE_CHECKING:
    from adaptive_margins.experiments import Reproduction

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Rerun, check and use adaptive relevance margins.",
)

ProfileOption = Annotated[str, typer.Option(help="A profile's name, or the path of a YAML file.")]


AcceptOption = Annotated[
    bool,
    typer.Option(
        "--accept-licence", help="Accept the terms of the collection, which `plan` names."
    ),
]


def _open(profile: str) -> Reproduction:
    """The profile, opened; the hub is reached only if the profile names an encoder of the hub."""
    from adaptive_margins.profiles import load_profile

    settings = load_profile(profile)
    named = [*settings.encoders.values(), *settings.untrained.values()]
    if not any(encoder.revision for encoder in named):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from adaptive_margins.experiments import Reproduction

    return Reproduction.open(profile)


@app.command()
def plan(
    profile: ProfileOption = "laptop",
    every: Annotated[
        bool, typer.Option("--every", help="A line for every run, not one for runs of a kind.")
    ] = False,
) -> None:
    """List the runs of a profile with time, disk and memory, what is done, and what would be fetched. Fetches nothing."""
    from adaptive_margins.report.plan import plan_text

    reproduction = _open(profile)
    typer.echo(plan_text(reproduction.profile, reproduction.plan(), every=every))


@app.command()
def reproduce(
    profile: ProfileOption = "laptop",
    runs_only: Annotated[
        bool, typer.Option("--runs-only", help="Make the runs, not the book.")
    ] = False,
    run: Annotated[
        list[str] | None,
        typer.Option(help="Make only the run of this id, and what it needs. Repeatable."),
    ] = None,
    notebook: Annotated[
        list[str] | None,
        typer.Option(
            help="Execute only this notebook (number or name), build no book. Repeatable."
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="With the chapter on the released code, which takes longer."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Execute notebooks that are finished, too.")
    ] = False,
    accept_licence: AcceptOption = False,
) -> None:
    """Make all runs of a profile, execute the notebooks and build the book. Goes on where it was interrupted."""
    from adaptive_margins.data.msmarco import ACCEPT_VARIABLE
    from adaptive_margins.report.build import build

    if accept_licence:
        os.environ[ACCEPT_VARIABLE] = "all"
    reproduction = _open(profile)
    if run:
        for run_id in run:
            typer.echo(reproduction.run_one(run_id).path)
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
    """Names of the profiles that come with the library."""
    from adaptive_margins.profiles import available

    typer.echo("\n".join(available()))


app.add_typer(cli_corpus.commands)


def main() -> None:
    """Entry point: an error that says what to do becomes one message and exit status 1, an interruption 130."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        message = str(error)
        if not isinstance(error, AdaptiveMarginsError):
            if not isinstance(error, OSError):
                raise
            if error.filename is not None:
                message = f"{error.filename}: {error.strerror}"
        progress.clear()
        raise SystemExit(f"adaptive-margins: {message}") from None


if __name__ == "__main__":
    main()
