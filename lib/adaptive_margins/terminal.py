"""Between commands and the terminal: paths, progress, warnings, errors and output.

Control characters, and characters that the encoding of stdout lacks, are printed escaped.
"""

from __future__ import annotations

import functools
import inspect
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptive_margins import progress
from adaptive_margins.distributed import is_first
from adaptive_margins.encoder.options import CORPUS_LENGTH, EncoderOptions
from adaptive_margins.errors import AdaptiveMarginsError, ArgumentError
from adaptive_margins.progress import printable

_OPTIONS = {"query_set": "--set", "runs": "RUN"}  # parameters with another name than their option


# ---- arguments --------------------------------------------------------------------------------


def expanded(value: str) -> str:
    """Return a name with ``~`` and ``~user`` at its beginning replaced by the home folder."""
    if not value:
        raise typer.BadParameter("the name is empty")
    path = os.path.expanduser(value)
    if path.startswith("~") and not os.path.lexists(path):
        user = path.split("/")[0][1:]
        raise typer.BadParameter(f"there is no user {user!r}; a file is called ./{path}")
    return path


def old_path(value: str) -> Path:
    """Parse the name of something to read."""
    return Path(expanded(value))


def new_file(value: str, *, folder: bool = False) -> Path:
    """Parse the name of a file or folder to write; WriteError if it cannot be written."""
    from adaptive_margins.files import check_output

    path = old_path(value)
    check_output(path, folder=folder)
    return path


def new_folder(value: str) -> Path:
    """Parse the name of a folder to write; WriteError if it cannot be written."""
    return new_file(value, folder=True)


def check_arguments(arguments: list[str]) -> None:
    """Raise AdaptiveMarginsError if an argument is not text in the file system's encoding."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise AdaptiveMarginsError(
                f"the argument {str(os.fsencode(argument))[1:]} is not"
                f" {sys.getfilesystemencoding()}; rename the file, or set LC_ALL to the encoding"
                " that it is written in"
            )


_ENCODER = {
    "query_prompt": (str, "Text before each query (default: the encoder's prompt)."),
    "passage_prompt": (str, "Text before each passage (default: the encoder's prompt)."),
    "dimensions": (int, "Use only the first dimensions of each embedding (default: all)."),
    "max_length": (int, f"Tokens a text (default: the encoder's limit, at most {CORPUS_LENGTH})."),
}


def encoder_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `EncoderOptions` for its argument ``options``."""
    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    options = parameters.pop("options")
    for name, (kind, about) in _ENCODER.items():
        option = typer.Option(help=about, rich_help_panel="Encoder")
        hint = Annotated[kind, option]  # type: ignore[valid-type]
        parameters[name] = options.replace(name=name, default=None, annotation=hint)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = EncoderOptions(**{name: given.pop(name) for name in _ENCODER})
        command(options=options, **given)

    vars(run)["__signature__"] = inspect.Signature(list(parameters.values()))
    return run


# ---- while a command computes -----------------------------------------------------------------


@contextmanager
def working(verbose: bool = False, model: str = "") -> Iterator[None]:
    """Send prints to stderr, show progress on a terminal only, and print warnings as one line.

    ``verbose`` shows progress anywhere. The hub is reached only if the encoder ``model`` has an
    ``@``. An ArgumentError becomes typer.BadParameter.
    """
    offline(model)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    progress.quiet(not is_first() or not (verbose or sys.stderr.isatty()))
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.showwarning = _warn
            yield
    except ArgumentError as error:
        option = _OPTIONS.get(error.name, f"--{error.name.replace('_', '-')}")
        raise typer.BadParameter(str(error), param_hint=option) from error
    finally:
        progress.clear()
        progress.quiet(False)


def offline(model: str = "") -> None:
    """Disable access to the hub, unless an encoder of the hub is named."""
    if "@" not in model:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    line = " ".join(str(message).splitlines())
    progress.say(f"adaptive-margins: warning: {line}", always=True)


# ---- output -----------------------------------------------------------------------------------


def show(result: Mapping[str, Any], as_json: bool, text: str, written: Path | None = None) -> None:
    """Print a result as JSON or text, to stdout, or to stderr if a file was ``written`` there."""
    from adaptive_margins.files import is_stdout

    stream = sys.stderr if written and is_stdout(written) else sys.stdout
    shown = printable(text)
    if as_json:
        unicode = (stream.encoding or "utf-8").lower().startswith("utf")
        shown = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        if not unicode or printable(shown) != shown:
            shown = json.dumps(result, indent=1)
    print(shown, file=stream)


def prepare_streams() -> None:
    """Make the standard streams accept any text, and silence messages about caches.

    Of several processes (torchrun), only the first one reports.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # it was closed
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if not is_first():
        progress.quiet()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def forget_output() -> None:
    """Drop output that could not be written to stdout, or Python tries again when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# ---- errors -----------------------------------------------------------------------------------


def exit_code(error: Exception) -> int | str | None:
    """Return the exit status, or a message for status 1; None for a bug, to be traced."""
    progress.clear()
    if hasattr(error, "format_message"):  # of click
        return _usage(error)
    message = _message(error)
    if message is None:
        return None
    forget_output()
    return f"adaptive-margins: {printable(message)}"


def _usage(error: Any) -> int:
    """Print a usage error on one line (help, if there are no arguments); return its status."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return error.exit_code
    if type(error).__name__ == "NoSuchOption" and context and context.info_name == "search":
        hint = 'Put -- before a query that begins with a dash: search INDEX -- "-O3 flag"'
        error.message += f". {hint}"
    message = " ".join(error.format_message().split()).rstrip(".")
    command = context.command_path if context else "adaptive-margins"
    print(f"adaptive-margins: {printable(message)}; see {command} --help", file=sys.stderr)
    return error.exit_code


def _message(error: Exception) -> str | None:
    """The text of an error that is not a bug of this program."""
    if isinstance(error, AdaptiveMarginsError):
        return str(error)
    message = " ".join(str(error).split())
    no_memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    if no_memory or (isinstance(error, RuntimeError) and "can't allocate memory" in message):
        return f"out of memory; try a smaller collection, batch or encoder. {message}".rstrip()
    if type(error).__module__ == "obstore.exceptions":
        return (
            f"the store does not answer: {str(error).splitlines()[0]}; finished runs are kept in"
            " the home folder, and the same command goes on from there"
        )
    if isinstance(error, OSError):
        message = error.strerror or message or type(error).__name__
        return message if error.filename is None else f"{error.filename}: {message}"
    if isinstance(error, UnicodeError):
        return f"text that cannot be written or read: {message}"
    return None
