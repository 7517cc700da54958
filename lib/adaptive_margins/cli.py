"""The command ``adaptive-margins``."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptive_margins import cli_corpus, progress
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.progress import printable

if TYPE_CHECKING:
    from adaptive_margins.paper.experiments import Reproduction

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Rerun, check and use adaptive relevance margins.",
)

ProfileOption = Annotated[
    str,
    typer.Option(parser=cli_corpus.expanded, help="A profile's name, or the path of a YAML file."),
]

AcceptOption = Annotated[
    bool,
    typer.Option(
        "--accept-licence", help="Accept the terms of the collection, which `plan` names."
    ),
]


def _open(profile: str) -> Reproduction:
    """The profile, opened; the hub is reached only if the profile names an encoder of the hub."""
    from adaptive_margins.profiles.config import load_profile

    settings = load_profile(profile)
    named = [*settings.encoders.values(), *settings.untrained.values()]
    if not any(encoder.revision for encoder in named):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from adaptive_margins.paper.experiments import Reproduction

    return Reproduction.open(profile)


@app.command()
def plan(
    profile: ProfileOption = "laptop",
    every: Annotated[
        bool, typer.Option("--every", help="A line for every run, not one for runs of a kind.")
    ] = False,
) -> None:
    """List the runs of a profile with time, disk and memory, what is done, and what would be fetched. Fetches nothing."""
    from adaptive_margins.paper.plan_text import plan_text

    reproduction = _open(profile)
    print(printable(plan_text(reproduction.profile, reproduction.plan(), every=every)))


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
    from adaptive_margins.book.build import build
    from adaptive_margins.data.ir_datasets import ACCEPT_VARIABLE

    if accept_licence:
        os.environ[ACCEPT_VARIABLE] = "all"
    reproduction = _open(profile)
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
    """Names of the profiles that come with the library."""
    from adaptive_margins.profiles.config import available

    print("\n".join(available()))


app.add_typer(cli_corpus.commands)


def main() -> None:
    """Entry point: an error that says what to do becomes one message and exit status 1, an interruption 130."""
    _prepare()
    try:
        try:
            _check_arguments(sys.argv[1:])
            code = app(standalone_mode=False)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()
        code = 141  # as if SIGPIPE had ended it
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        progress.clear()
        if hasattr(error, "format_message"):
            code = _usage(error)
        elif (message := _message(error)) is None:
            raise
        else:
            _forget_output()
            code = f"adaptive-margins: {printable(message)}"
    raise SystemExit(code or 0)


def _prepare() -> None:
    """Make the standard streams take whatever is printed, and keep libraries from remarks about their caches."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # it was closed
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _check_arguments(arguments: list[str]) -> None:
    """Raise AdaptiveMarginsError if an argument has bytes that are no text."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise AdaptiveMarginsError(
                f"the argument {str(os.fsencode(argument))[1:]} is not {sys.getfilesystemencoding()}; rename the file, or set"
                " LC_ALL to the encoding that it is written in"
            )


def _usage(error: Any) -> int:
    """Print a usage error on one line (help, if nothing was asked for); return its exit status."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return error.exit_code
    if type(error).__name__ == "NoSuchOption" and context and context.info_name == "search":
        error.message += (
            '. Put -- before a query that begins with a dash: search INDEX -- "-O3 flag"'
        )
    message = " ".join(error.format_message().split()).rstrip(".")
    command = context.command_path if context else "adaptive-margins"
    print(f"adaptive-margins: {printable(message)}; see {command} --help", file=sys.stderr)
    return error.exit_code


def _message(error: Exception) -> str | None:
    """What to say of an error that is no fault of this program; None if it may be one."""
    if isinstance(error, AdaptiveMarginsError):
        return str(error)
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return f"out of memory; try a smaller collection, batch or encoder. {message}".rstrip()
    if isinstance(error, RuntimeError) and "can't allocate memory" in message:  # torch on a CPU
        return f"out of memory; try a smaller collection, batch or encoder. {message}"
    if isinstance(error, OSError):
        message = error.strerror or message or type(error).__name__
        return message if error.filename is None else f"{error.filename}: {message}"
    if isinstance(error, UnicodeError):
        return f"text that cannot be written or read: {message}"
    return None


def _forget_output() -> None:
    """Drop what could not be written to stdout, lest Python tries it again and complains."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
