"""The command as a user sees it: help, lists, plans, and one message in place of a traceback."""

from __future__ import annotations

import re
import shutil

import pytest

from adaptive_margins import cli
from adaptive_margins.encoders import EncoderError
from adaptive_margins.experiments import Reproduction
from adaptive_margins.profiles import ProfileError, available
from adaptive_margins.store import StoreError
from adaptive_margins.training import TrainingError


def call(monkeypatch, capsys, *arguments):
    """Exit status and what was printed, in this process."""
    monkeypatch.setattr("sys.argv", ["adaptive-margins", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr()
    code = end.value.code
    if isinstance(code, str):  # Python prints it and ends with 1
        return 1, told.out, told.err + code
    return code or 0, told.out, told.err


def test_help(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "--help")
    assert code == 0
    for word in ("plan", "reproduce", "profiles"):
        assert word in out
    for name in ("plan", "reproduce"):
        code, out, _ = call(monkeypatch, capsys, name, "--help")
        assert code == 0
        assert "--profile" in out
        assert "laptop" in out


def test_profiles(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "profiles")
    assert code == 0
    assert out.split() == available()


@pytest.mark.parametrize("name", ["plan", "reproduce"])
def test_an_unknown_profile_is_one_message(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path / "home"))
    code, out, err = call(monkeypatch, capsys, name, "--profile", "lapto")
    assert (code, out) == (1, "")
    assert err.startswith("adaptive-margins: unknown profile 'lapto': known are ")
    assert "\n" not in err
    assert not (tmp_path / "home").exists()


def test_a_broken_profile_is_one_message(tmp_path, monkeypatch, capsys):
    path = tmp_path / "my.yaml"
    path.write_text("extends: smoke\nstatic: {triple: 3}\n")
    code, out, err = call(monkeypatch, capsys, "plan", "--profile", str(path))
    assert (code, out) == (1, "")
    assert err.startswith(f"adaptive-margins: {path} has 1 error(s):")
    assert "unknown key 'triple'" in err


@pytest.mark.parametrize("kind", [EncoderError, ProfileError, StoreError, TrainingError])
def test_foreseen_errors_are_one_message_and_others_are_not_hidden(monkeypatch, capsys, kind):
    def fail(*_, **__):
        raise kind("this and that")

    monkeypatch.setattr(Reproduction, "open", fail)
    code, _, err = call(monkeypatch, capsys, "plan")
    assert (code, err) == (1, "adaptive-margins: this and that")
    kind = ZeroDivisionError
    monkeypatch.setattr("sys.argv", ["adaptive-margins", "plan"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("arguments", [["plane"], ["plan", "--profil", "smoke"], ["plan", "smoke"]])
def test_a_wrong_call_says_how_to_call(monkeypatch, capsys, arguments):
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "Usage" in err


def test_a_plan_of_what_is_finished(smoke_home, monkeypatch, capsys):
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(smoke_home))
    code, out, err = call(monkeypatch, capsys, "plan", "--profile", "smoke")
    assert (code, err) == (0, "")
    count = len(list((smoke_home / "runs").iterdir()))
    assert out.startswith(f"Profile smoke: {count} runs, {count} are there.\n")
    assert "about 0:00" in out
    assert "Nothing has to be fetched." in out


def test_a_plan_lists_what_is_missing(smoke, tmp_path, monkeypatch, capsys):
    for name in ("cache", "collections"):
        shutil.copytree(smoke.home / name, tmp_path / name)
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path))
    code, out, _ = call(monkeypatch, capsys, "plan", "--profile", "smoke")
    figures = 4 + 18 + 4 + 4  # starts, Figure 3 with its second seed, Figures 4 and 5
    count = (
        figures + 5 * 2 + 2
    )  # Table 3, Table 4; ε is not known yet, so the tuned one counts apart from ε = 1
    assert code == 0
    assert out.startswith(f"Profile smoke: {count} runs, 0 are there.\n")
    rows = [re.split(r"  +", line) for line in out.splitlines()]
    rows = [row for row in rows if len(row) == 9 and row[2].isdigit()]
    assert sum(int(row[2]) for row in rows) == count
    assert {row[0] for row in rows} == {"bm25", "minilm", "minilm-3", "minilm-4"}
    for _, _, _, done, _, seconds, disk, _, memory in rows:
        assert (done, seconds[0], disk[-1], memory[-1]) == ("0", "0", "B", "B")
    assert "Speeds were measured on this machine just now." in out
    assert not (tmp_path / "runs").exists()

    _, every, _ = call(monkeypatch, capsys, "plan", "--profile", "smoke", "--every")
    ids = {c.run_id for c in smoke.known_configs()}
    assert all(f" {run_id} " in every for run_id in ids)
