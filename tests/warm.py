"""``python warm.py -m MODULE ...`` or ``warm.py SCRIPT ...``: forked from a server with the heavy imports done.

Every kernel, command and book imports PyTorch, Sentence Transformers and the library, 5 to 10 s, and the suite starts
three dozen. A child has the folder, environment, standard streams and exit status of a process of its own, and ends
with its client. Without a server, the client becomes an ordinary process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

SOCKET = "ADAPTIVE_MARGINS_TEST_SERVER"
"""The environment variable with the path of the server's socket."""


def start(path: Path) -> subprocess.Popen[bytes]:
    """Start a server; returns once it answers. It ends when its standard input is closed."""
    server = subprocess.Popen(
        [sys.executable, __file__, "serve", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    server.stdout.readline()
    server.stdout.close()
    return server


def build_books() -> None:
    """Have books built by children of the server: Sphinx imports the library to document it."""
    from adaptive_margins.book import build

    if __file__ not in build._BUILD:
        build._BUILD[:0] = [sys.executable, __file__]


def serve(path: str) -> None:
    """Answer clients until standard input is closed; returns once the last child has ended."""
    import gc
    import importlib
    import pkgutil
    import select

    sys.modules["rfc3987_syntax"] = None  # as in conftest.py
    import adaptive_margins

    names = "datasets faiss ipykernel.kernelapp jupyter_book.sphinx myst_nb.sphinx_ext papermill"
    names += " scipy.stats sphinx.ext.autodoc sphinxcontrib.bibtex"
    modules = pkgutil.walk_packages(adaptive_margins.__path__, "adaptive_margins.")
    for name in [*names.split(), *(module.name for module in modules)]:
        if name != "adaptive_margins.cli":  # which children run
            importlib.import_module(name)
    from sentence_transformers import CrossEncoder, SentenceTransformerTrainer  # noqa: F401

    build_books()
    gc.freeze()  # garbage collection in a child leaves all of this alone
    signal.signal(signal.SIGCHLD, _reap)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(8)
        print("ready", flush=True)
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _child(connection)
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(ChildProcessError):
        while os.wait():
            pass


def _reap(*_: object) -> None:
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def _child(connection: socket.socket) -> None:
    """Run what the client asks for; its exit status goes to the client, and this process ends."""
    import atexit
    import runpy
    import threading
    import traceback

    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as file:
        request = json.loads(file.read(int.from_bytes(size, "big")))
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        os.dup2(streams[number], number)
        os.close(streams[number])
        setattr(sys, name, open(number, mode, buffering=1, closefd=False))  # noqa: SIM115
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def watch() -> None:
        connection.recv(1)  # nothing, once the client has ended
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    os.environ.clear()
    os.environ.update(request["environment"])
    if "JPY_PARENT_PID" in os.environ:  # a kernel ends when its parent does
        os.environ["JPY_PARENT_PID"] = str(os.getppid())
    os.chdir(request["cwd"])
    flag, *arguments = request["arguments"]
    sys.argv = arguments if flag == "-m" else [flag, *arguments]
    sys.path[0] = request["cwd"] if flag == "-m" else os.path.dirname(flag)
    if "ipykernel_launcher" in arguments:  # which sets $MPLBACKEND: matplotlib has read that
        sys.modules["matplotlib"].rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    status = 0
    try:
        if flag == "-m":
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(flag, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([status & 255]))
    os._exit(status)


def client(arguments: list[str]) -> int:
    """Let the server run ``arguments``; returns the exit status, 1 if the child or this one's parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child gets its own
    request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    data = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.environ[SOCKET])
        except (KeyError, OSError):
            os.execv(sys.executable, [sys.executable, *arguments])
        socket.send_fds(connection, [len(data).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(data)
        connection.settimeout(0.5)
        parent = os.getppid()
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                return (connection.recv(1) or b"\1")[0]
    return 1


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(client(sys.argv[1:]))
