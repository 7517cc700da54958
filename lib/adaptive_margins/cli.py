"""The command ``adaptive-margins``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Rerun, check and use adaptive relevance margins.",
)

ProfileOption = Annotated[str, typer.Option(help="A profile's name, or the path of a YAML file.")]


@app.callback()
def _offline() -> None:
    # Nothing is fetched unless a profile names a hub encoder; then the user unsets these.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@app.command()
def plan(profile: ProfileOption = "laptop") -> None:
    """List the runs of a profile, what is done, and the expected time of the rest on this machine."""
    from adaptive_margins.experiments import Reproduction

    Reproduction.open(profile).announce()


@app.command()
def reproduce(
    profile: ProfileOption = "laptop",
    runs_only: Annotated[
        bool, typer.Option("--runs-only", help="Make the runs, not the book.")
    ] = False,
    notebook: Annotated[
        list[str] | None,
        typer.Option(
            help="Execute only this notebook (number or name), build no book. Repeatable."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Execute notebooks that are finished, too.")
    ] = False,
) -> None:
    """Make all runs of a profile, execute the notebooks and build the book. Goes on where it was interrupted."""
    from adaptive_margins.experiments import Reproduction
    from adaptive_margins.report.build import build

    reproduction = Reproduction.open(profile)
    if runs_only:
        reproduction.run_all()
    else:
        build(
            profile,
            home=reproduction.home,
            notebooks=notebook,
            force=force,
            run=reproduction.run_all,
        )


@app.command()
def profiles() -> None:
    """Names of the profiles that come with the library."""
    from adaptive_margins.profiles import available

    typer.echo("\n".join(available()))


def main() -> None:
    """Entry point: an error that says what to do becomes one message and exit status 1."""
    try:
        app()
    except Exception as error:
        if type(error).__module__.startswith("adaptive_margins."):
            raise SystemExit(f"adaptive-margins: {error}") from None
        raise


if __name__ == "__main__":
    main()
