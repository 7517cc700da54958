"""The check of a GPU, in miniature on a CPU: the contract of its JSON, and that what is wrong fails it."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import types
from pathlib import Path

import bitsandbytes  # noqa: F401  (before the processes of the parts are forked)
import pytest
import torch

from adaptive_margins import cli, training_step
from adaptive_margins.paper.reproduction import Reproduction
from adaptive_margins.profiles.load import load_profile

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
with pytest.MonkeyPatch.context() as _patch:  # the scripts import each other by their names
    _patch.syspath_prepend(FOLDER)
    gpu_check, gpu_correct, gpu_material, gpu_speed, schemes = map(
        importlib.import_module,
        ("gpu_check", "gpu_correct", "gpu_material", "gpu_speed", "schemes"),
    )


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """What the parts would import, each in its process, is imported before they are forked."""
    folder = tmp_path_factory.mktemp("encoders")
    context = gpu_material.Context("cpu", gpu_material.MINIATURE, folder)
    for kind in gpu_material.KINDS:
        gpu_material.encoder(context, kind, None)


def checked(folder, *arguments):
    """Exit status and report of a check in miniature."""
    path = folder / "new" / "check.json"
    code = gpu_check.main(["--device", "cpu", "--output", str(path), *arguments])
    assert [p.name for p in path.parent.iterdir()] == ["check.json"]  # no temporary one
    return code, json.loads(path.read_text())


def test_all_parts(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(gpu_material.KINDS, "roberta")  # two kinds stand for three
    code, report = checked(tmp_path)
    told = capsys.readouterr().out
    found = [report[key] for key in ("verdict", "contract", "miniature")]
    assert (code, found) == (0, ["passed", 1, True])
    assert {"card", "driver", "cuda", "cudnn", "processor", "versions"} <= report["machine"].keys()
    assert report["machine"]["versions"]["torch"] == torch.__version__
    parts = {part["name"]: part for part in report["parts"]}
    assert [*parts] == [part.name for part in gpu_check.PARTS]
    assert sum(part.seconds for part in gpu_check.PARTS) <= 460
    for part in parts.values():
        assert part["status"] == ("passed" if part["check"] else "done"), part
        assert part["title"] in told and part["about"] in told
        for row in part["rows"]:
            assert (row["value"] is None) == bool(row["reason"]), row
            known = None not in (row["value"], row["limit"])
            assert row["passed"] == (row["value"] <= row["limit"] if known else None), row
            assert row["what"] in told and row["reason"] in told
    lines = {name: {row["what"]: row for row in part["rows"]} for name, part in parts.items()}
    kinds, precisions = gpu_material.KINDS, gpu_correct.LIMITS
    assert [*lines["gradients"]] == [f"{kind}, {p}" for kind in kinds for p in precisions]
    reasons = [r["reason"] for r in lines["gradients"].values() if r["reason"]]
    assert reasons == len(kinds) * ["fp16 needs a GPU"]
    exact, rounded = (lines["gradients"][f"mpnet, {p}"]["value"] for p in ("fp32", "bf16"))
    assert 0 < exact < rounded
    assert len(lines["cached"]) == 4
    assert lines["waits"]["in this project's code"]["value"] == 0
    rates = [row for row in lines["throughput"].values() if row["value"]]
    assert len(rates) == 1 + 5 * len(kinds) - 1
    reason = lines["throughput"]["mpnet, B 4, packed, FlashAttention"]["reason"]
    assert "MPNet adds a position bias" in reason
    assert all(row["value"] > 0 for row in rates)
    searched = ("exact search on the CPU", "GPU", "index built on the CPU")
    assert [*lines["indexes"]] == [f"700 vectors, {what}" for what in searched]
    assert 0 < lines["indexes"]["700 vectors, index built on the CPU"]["recall"] <= 1
    assert [*lines["hours"]] == ["paper", "paper-night"]


@pytest.mark.parametrize(
    ("part", "name", "wrong"),
    [
        ("gradients", "margin_loss", "1.01 * right(*given, **named)"),
        ("waits", "margin_loss", "(loss := right(*given, **named), loss.item())[0]"),
    ],
)
def test_a_wrong_step_fails(tmp_path, monkeypatch, part, name, wrong):
    """A gradient of 1 % too much; a loss that is read in every step."""
    place = {"__name__": training_step.__name__, "right": getattr(training_step, name)}
    monkeypatch.setattr(training_step, name, eval(f"lambda *given, **named: {wrong}", place))
    monkeypatch.setattr(gpu_correct, "KINDS", {"distilbert": "cls"})
    code, report = checked(tmp_path, "--parts", part)
    (found,) = report["parts"]
    assert (code, found["status"]) == (1, "failed")
    assert report["verdict"] == f"failed: {found['title']}"
    if part == "gradients":
        values = [row for row in found["rows"] if row["what"].endswith("fp32")]
        assert [row["value"] for row in values] == [pytest.approx(0.01, rel=0.01)]
        assert not values[0]["passed"]
    else:
        assert [row["value"] for row in found["rows"] if row["limit"] == 0] == [1]
        assert any(
            row["what"].startswith("adaptive_margins.training_step:") for row in found["rows"]
        )


def test_a_wrong_cached_loss_fails(tmp_path, monkeypatch):
    right = gpu_correct.CachedMarginLoss.calculate_loss
    monkeypatch.setattr(
        gpu_correct.CachedMarginLoss,
        "calculate_loss",
        lambda self, reps, *a, **k: right(self, [reps[0], reps[2], reps[1]], *a, **k),
    )
    code, report = checked(tmp_path, "--parts", "cached")
    assert code == 1
    assert not any(row["passed"] for row in report["parts"][0]["rows"])


@pytest.mark.parametrize("kind", ["distilbert", "roberta"])
def test_the_packed_way_of_a_gpu_trains_the_same(tmp_path, monkeypatch, kind):
    """With another attention in the place of torch's kernel, which needs a GPU."""
    from torch.nn.attention import varlen

    def attention(q, k, v, starts, ends_of_keys, *longest):
        assert starts is ends_of_keys and max(starts.diff()) <= longest[0] == longest[1]
        split = [x.split(starts.diff().tolist()) for x in (q, k, v)]
        parts = (torch.einsum("qhd,khd->hqk", a, b).div(a.shape[-1] ** 0.5).softmax(-1) @ c.transpose(0, 1) for a, b, c in zip(*split, strict=True))  # fmt: skip
        return torch.cat([part.transpose(0, 1) for part in parts])

    monkeypatch.setattr(varlen, "varlen_attn", attention)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    context = gpu_material.Context("cuda", gpu_material.MINIATURE, tmp_path)
    model, batch = gpu_material.encoder(context, kind, 0.0), gpu_material.triples(context.sizes, 4)
    steps = gpu_speed._flash(context, model, schemes.CPU), schemes.merged()
    assert steps[0](model, batch)[1] == pytest.approx(steps[1](model, batch)[1], abs=1e-5)


def test_a_part_that_fails_stops_no_other(tmp_path, monkeypatch):
    def raising(context):
        yield gpu_material.row("first", 1.0)
        raise ValueError("two\nlines")

    def hanging(context):
        yield gpu_material.row("first", 1.0, limit=2.0)
        time.sleep(60)

    def dying(context):
        yield gpu_material.row("first", float("nan"), limit=2.0)
        os._exit(3)

    parts = [
        gpu_check.Part("raising", "Raising", "parts_of_a_test:raising", False, 30, ""),
        gpu_check.Part("dying", "Dying", "parts_of_a_test:dying", True, 0, ""),
        gpu_check.Part("lacking", "Lacking", "parts_of_a_test:lacking", True, 0, ""),
    ]
    module = types.ModuleType("parts_of_a_test")
    vars(module).update(raising=raising, hanging=hanging, dying=dying)
    monkeypatch.setitem(sys.modules, "parts_of_a_test", module)
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    code, report = checked(tmp_path)
    found = [(p["status"], p["reason"]) for p in report["parts"]]
    assert found[0] == ("error", "ValueError: two lines")
    assert (
        found[1] == ("failed", "") and report["parts"][1]["rows"][0]["reason"] == "the value is nan"
    )
    assert found[2][0] == "error" and "lacking" in found[2][1]
    assert (code, report["verdict"]) == (1, "failed: Dying, Lacking")
    part = gpu_check.Part("hanging", "Hanging", "parts_of_a_test:hanging", True, 0, "")
    context = gpu_material.Context("cpu", gpu_material.MINIATURE, tmp_path, time.time() + 1.5)
    found = gpu_check.run(part, context)
    assert (found["status"], found["reason"], len(found["rows"])) == ("cut", "its 1 s were over", 1)
    assert gpu_check.verdict([found]) == "not decided, out of time: Hanging"


def test_hours_follow_the_rates(tmp_path):
    """Of paper-night, the triples of its runs at the rate of a triple, and the rest at that of a passage."""

    def night(triples, passages):
        rates = (("triples/s", gpu_speed.PROFILE, triples), ("passages/s", "embed", passages))
        rows = [
            gpu_material.row(kind, value, unit, encoder=kind, way=way, batch_size=128)
            for kind in gpu_material.KINDS
            for unit, way, value in rates
        ]
        parts = {"throughput": {"rows": rows}}
        context = gpu_material.Context("cpu", gpu_material.REAL, tmp_path, parts=parts)
        return [line["value"] for line in gpu_speed.hours(context)][1]

    runs = Reproduction(load_profile("paper-night"), tmp_path).plan().runs
    saved = night(100.0, 1000.0) - night(200.0, 1000.0)
    assert saved * 3600 == pytest.approx(runs["triples"].sum() / 200)
    context = gpu_material.Context("cpu", gpu_material.REAL, tmp_path)
    reasons = [line["reason"] for line in gpu_speed.hours(context)]
    assert reasons[1] == "no rate of distilbert in passages/s, distilbert in triples/s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_names_what_it_needs(tmp_path, capsys):
    path = tmp_path / "check.json"
    assert gpu_check.main(["--output", str(path)]) == 2
    told = capsys.readouterr().err
    assert "no CUDA device" in told and "--device cpu" in told
    assert not path.exists()


def test_the_command_starts_it(tmp_path, monkeypatch):
    started = []
    run = lambda command, check: started.append(command) or types.SimpleNamespace(returncode=2)  # noqa: E731
    monkeypatch.setattr(cli.subprocess, "run", run)
    path = tmp_path / "out.json"
    arguments = ["check-gpu", "--device", "cpu", "--json", "--output", str(path)]
    monkeypatch.setattr("sys.argv", ["adaptive-margins", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    script = str(FOLDER / "gpu_check.py")
    assert started == [[sys.executable, script, "--device", "cpu", "--output", str(path), "--json"]]
