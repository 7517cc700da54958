"""The command as a user sees it: help, lists, plans, and one message in place of a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from obstore.exceptions import GenericError

from adaptive_margins import cli, cli_corpus, files, progress, terminal
from adaptive_margins.data.collection import Texts
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.paper import plan
from adaptive_margins.paper.experiments import fixed_runs
from adaptive_margins.profiles.load import available
from conftest import linked
from test_cli_corpus import commands  # noqa: F401


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_profiles(call):
    code, out, _ = call("profiles")
    assert code == 0
    assert out.split() == available()


@pytest.mark.parametrize("name", ["plan", "reproduce"])
def test_a_wrong_profile_is_one_message(call, tmp_path, monkeypatch, name):
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path / "home"))
    path = tmp_path / "my.yaml"
    path.write_text("extends: smoke\nstatic: {triple: 3}\n")
    for profile, begins in (
        ("lapto", "unknown profile 'lapto': known are "),
        (str(path), f"{path} has 1 error(s):"),
    ):
        code, out, err = call(name, "--profile", profile)
        assert (code, out) == (1, "")
        assert err.startswith(f"adaptive-margins: {begins}")
    assert "'triple'" in err
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("arguments", [["plane"], ["plan", "--profil", "smoke"], ["plan", "smoke"]])
def test_a_wrong_call_says_how_to_call(call, arguments):
    code, _, err = call(*arguments)
    assert code == 2
    assert "--help" in err and err.count("\n") == 1


def test_a_plan_of_what_is_finished(call, smoke_home, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(smoke_home))
    code, out, err = call("plan", "--profile", "smoke")
    assert (code, err) == (0, "")
    count = len(list((smoke_home / "runs").iterdir()))
    assert out.startswith(f"Profile smoke: {count} runs, {count} are done.\n")
    assert "about 0:00" in out
    assert "Nothing has to be fetched." in out


def test_a_plan_lists_what_is_missing(call, smoke, tmp_path, monkeypatch):
    linked(smoke.home, tmp_path, "cache", "collections")
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path))
    speed = plan._Speed(1e-3, 1e-4, 384, True)  # tests/paper/test_plan.py measures
    monkeypatch.setattr(plan, "_calibrated", lambda inputs, encoder: speed)
    code, out, _ = call("plan", "--profile", "smoke", "--every")
    # Baselines, Figure 3 with its second seed, Figure 5's other batch size, Tables 3 and 4 with
    # their seeds, of which 12 are MarginMSE's; the tuned ε is not known yet, so it counts apart from ε = 1.
    count = 4 + 18 + 2 + 5 * 3 + 2 * 2 + 3 * 2 * 2
    assert code == 0
    assert out.startswith(f"Profile smoke: {count} runs, 0 are done.\n")
    rows = [re.split(r"  +", line) for line in out.splitlines()[4:]]
    rows = [row for row in rows if len(row) == 7]
    assert len(rows) == count + 1
    assert {row[0] for row in rows[1:]} == {"bm25", "minilm", "minilm-3", "minilm-4"}
    assert {c.run_id for c in fixed_runs(smoke.experiments)} <= {row[2] for row in rows}
    assert "Speeds were measured on this machine just now." in out
    assert not (tmp_path / "runs").exists()


# ---- other people's terminals --------------------------------------------------------------------------------------

PROGRAM = f"{shlex.quote(sys.executable)} -m adaptive_margins.cli"


def shell(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a bash script in which $AM is the command."""
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, timeout=120, check=False,
        env={**os.environ, "AM": PROGRAM, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with qrels.txt, a.run and b.run: 12 queries, and passages whose ids are not ASCII."""
    folder = tmp_path_factory.mktemp("runs")
    lines = [f"q{i} 0 d{j}é {int(i == j)}\n" for i in range(12) for j in range(12)]
    (folder / "qrels.txt").write_text("".join(lines))
    for name, step in (("a", 1), ("b", 2)):
        run = [f"q{i} Q0 d{(i * step + j) % 12}é {j} {9 - j} x\n" for i in range(12) for j in range(10)]  # fmt: skip
        (folder / f"{name}.run").write_text("".join(run))
    return folder


@pytest.mark.parametrize(
    ("encoding", "environment"),
    [
        ("latin-1", {"PYTHONIOENCODING": "latin-1"}),
        ("ascii", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ],
)
def test_a_terminal_that_is_not_utf_8(runs, encoding, environment):
    text = shell("$AM compare --qrels qrels.txt a.run b.run", runs, **environment)
    assert (text.returncode, text.stderr) == (0, b"")
    assert "margin of equivalence" in text.stdout.decode(encoding)
    assert r"a \u2212 b" in text.stdout.decode(encoding)
    if encoding == "latin-1":
        shutil.copy(runs / "a.run", runs / "ä.run")
        found = shell("$AM compare --qrels qrels.txt ä.run b.run --json", runs, **environment)
        assert found.stdout.isascii()
        assert set(json.loads(found.stdout)["runs"]) == {"ä", "b"}
        return
    helped = shell("$AM compare --help", runs, **environment)
    assert (helped.returncode, helped.stderr) == (0, b"")
    assert "--qrels" in helped.stdout.decode(encoding)


def test_an_argument_that_is_no_text(runs):
    done = shell(r"$AM compare --qrels qrels.txt a.run $'caf\xe9.run'", runs)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(rb"adaptive-margins: the argument 'caf\xe9.run' is not utf-8")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("end", "status", "stderr"),
    [
        ("> /dev/full", 1, b"adaptive-margins: No space left on device\n"),
        (">&- 2>&- <&-", 0, b""),
        ("| true; exit ${PIPESTATUS[0]}", 1, b""),
    ],
)
def test_output_that_cannot_be_written(tmp_path, end, status, stderr):
    # More than fits into the pipe's buffer, so that the writer is at work when the reader goes.
    (tmp_path / "slow.py").write_text(
        "from adaptive_margins import cli, profiles\n"
        "profiles.available = lambda: ['a name'] * 100_000\n"
        "cli.main()\n"
    )
    done = shell(f"{sys.executable} slow.py profiles {end}", tmp_path)
    assert (done.returncode, done.stderr) == (status, stderr)


def test_what_is_no_fault_of_the_program_is_one_line_and_a_bug_is_traced(call, monkeypatch):
    for error, said in (
        (AdaptiveMarginsError("this and that"), "this and that"),
        (MemoryError(), "out of memory; "),
        (MemoryError("Unable to allocate 8 GiB"), "Unable to allocate 8 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory; "),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out\nof memory"), "CUDA out of mem"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.ENOENT, "No such file", "a\x1b[31m.run"), r"a\x1b[31m.run: No such file"),
        (OSError("no answer\nfrom the hub"), "no answer from the hub"),
        (GenericError("no route\nDebug: …"), "store does not answer: no route; finished"),
        (UnicodeEncodeError("utf-8", "\udc80", 0, 1, "surrogates not allowed"), r"'\udc80'"),
    ):
        monkeypatch.setattr(cli, "_open", raising(error))
        code, out, err = call("plan")
        assert (code, out) == (1, "")
        assert err.startswith("adaptive-margins: ") and said in err
        assert err.count("\n") == 1
    for bug in (ValueError("x"), RuntimeError("x"), ZeroDivisionError()):
        monkeypatch.setattr(cli, "_open", raising(bug))
        with pytest.raises(type(bug)):
            cli.main()


def test_a_query_that_begins_with_a_dash(call, tmp_path):
    for query in ("-O3 flag", "--badger", "-5 degrees"):
        code, _, err = call("search", str(tmp_path), query)
        assert (code, "Put -- before" in err) == (2, True)
        code, _, err = call("search", str(tmp_path), "--", query)
        assert (code, "no index" in err) == (1, True)  # the query is taken
    code, _, err = call("compare", "--badger")
    assert (code, "Put --" in err) == (2, False)


def test_the_home_folder_in_every_path(call, monkeypatch, runs, tmp_path):
    monkeypatch.setenv("HOME", str(runs))
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--qrels=~/qrels.txt", "~/a.run", "~/b.run", "--plot=~/plot.svg", "--json"]  # fmt: skip
    code, out, _ = call(*arguments)
    assert (code, json.loads(out)["plot"]) == (0, str(runs / "plot.svg"))
    assert (runs / "plot.svg").is_file()
    assert list(tmp_path.iterdir()) == []
    for arguments in (
        ("evaluate", "~/none", "--model", "~/none"),
        ("search", "~/none", "query"),
        ("plan", "--profile", "~/none.yaml"),
    ):
        code, _, err = call(*arguments)
        assert (code, str(runs / "none") in err) == (1, True)
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", "~/home")
    assert files.home() == runs / "home"
    code, _, err = call("compare", "--qrels=~nobody7/q", "a", "b")
    assert (code, "nobody7" in err) == (2, True)
    (tmp_path / "~draft").write_text("q Q0 d 1 1 x\n")  # such a name of a file is one
    assert terminal.expanded("~draft") == "~draft"


OUTPUTS = [
    ("train", "corpus", "--output"),
    ("evaluate", "corpus", "--model=none", "--run-out"),
    ("compare", "--qrels=none", "a", "b", "--plot"),
    ("index", "corpus", "--model=none", "--output"),
    ("search", "none", "query", "--run-out"),
    ("collection", "corpus", "--output"),
]


@pytest.mark.parametrize("arguments", OUTPUTS, ids=lambda arguments: arguments[0])
def test_an_output_is_refused_before_anything_is_read(call, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    code, _, err = call(*arguments, "")
    assert (code, "the name is empty" in err) == (2, True)
    for name in ("folder", "folder/mine/x.svg"):
        code, out, err = call(*arguments, name)
        assert (code, out) == (1, "")
        assert err.startswith(f"adaptive-margins: {name} cannot be written: ")
        assert err.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "mine"]


def test_control_characters_do_not_reach_the_terminal(call, capsys, tmp_path):
    folder = tmp_path / "red\x1b[31m"
    folder.mkdir()
    bad = "\x07bell \x1b[2J \x9b1m \u202eright-to-left \x7f"
    (folder / "collection.tsv").write_text(f"d1\x1b[1m\tone {bad}\nd2\ttwo\n", "utf-8")
    (folder / "queries.tsv").write_text("q1\x1b[7m\tone\n")
    (folder / "qrels.txt").write_text("q1\x1b[7m 0 d2 1\nq1\x1b[7m 0 no\x1b[5m 1\n")
    for options in ([], ["--json"]):
        _, out, err = call("collection", str(folder), *options)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out + err), options
        assert r"\x1b" in out + err
    line = cli_corpus._hits_text(
        Texts(["1"], ["q"]),
        [{"qid": "1", "rank": 1, "score": 1.0, "docid": "d\x1b[1m", "text": bad}],
        titles=False,
    )
    assert r"d\x1b[1m" in line and r"\x07bell \x1b[2J \x9b1m \u202er" in line
    assert progress.printable("a\tb\nc é 漢字") == "a\tb\nc é 漢字"
    for text in ("é 漢字", "é \x9b1m \u202e"):
        terminal.show({"text": text}, True, "")
        out = capsys.readouterr().out
        assert json.loads(out) == {"text": text} and progress.printable(out) == out


def test_a_home_that_cannot_be_written(runs):
    nowhere = {
        name: "/dev/null/x" for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME")
    }
    done = shell("$AM compare --qrels qrels.txt a.run b.run --plot p.png", runs, **nowhere)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (runs / "p.png").is_file()
