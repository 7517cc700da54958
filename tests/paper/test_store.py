"""The store: whole folders or none, damaged files named, ids that depend on everything that matters, the contract's files."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from adaptive_margins import files
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.files import CHECKSUMS, WriteError, home
from adaptive_margins.paper.store import Store, StoredRun, StoreError
from adaptive_margins.runs import CODE_VERSION, BM25Run, TrainingRun, ZeroShotRun, read_run_config
from adaptive_margins.training import TrainingResult
from conftest import ENCODER_VALUES, RUN_VALUES, TRAINING_VALUES, die, flip, in_child, run_config

EVALUATION = Evaluation({"nDCG@10": 0.5}, {"nDCG@10": {"q1": 0.25, "q2": 0.75}})
RUN = {"q1": {"d1": 0.1 + 0.2, "d2": 0.1}, "q2": {"d2": 1.0}}


def training_result() -> TrainingResult:
    curve = pd.DataFrame(
        {"step": [0, 2], "triples": [0, 8], "seconds": [0.0, 1.5], "nDCG@10": [0.4, 0.5]}
    )
    targets = pd.DataFrame(
        {"step": [1, 2], "mean": [0.1, 0.2], "min": [-0.5, -0.25], "max": [0.5, 0.75]}
    )
    checks = pd.DataFrame(
        {"step": [0, 2], "qid": ["q1", "q1"], "measure": ["nDCG@10"] * 2, "value": [0.4, 0.5]}
    )
    return TrainingResult(
        curve=curve, checks=checks, targets=targets, kept=EVALUATION, kept_step=2, best_step=2, stop_step=2, triples=8,
        train_seconds=1.5, eval_seconds=0.5, peak_bytes=123456789,
        states={"selected": {"w": torch.ones(2)}, "last": {"w": torch.arange(6.0).view(2, 3)}},
    )  # fmt: skip


def put(store: Store, config: TrainingRun | None = None, **options) -> StoredRun:
    evaluations = {"rerank": {"validation": EVALUATION}, "full": {"test1": EVALUATION}}
    runs = {"rerank": {"validation": RUN}, "full": {"test1": RUN}}
    return store.put(config or run_config(), training_result(), evaluations, runs, **options)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "runs")


# ---- the contract --------------------------------------------------------------------------------


def test_a_run_is_written_as_the_contract_says_and_read_back(store):
    config = run_config()
    assert not store.has(config)
    put(store, extra={"index": {"nlist": 4}}, save_model=lambda folder: folder.mkdir())
    assert store.has(config)
    stored = Store(store.folder).get(config)
    assert stored.path == store.path(config) == store.folder / config.run_id
    assert sorted(p.name for p in stored.path.iterdir()) == [
        "SHA256SUMS", "checks.parquet", "config.json", "curve.parquet", "full.test1.run.gz", "model",
        "rerank.validation.run.gz", "result.json", "targets.parquet",
    ]  # fmt: skip
    assert stored.config == config
    assert stored.evaluation("rerank", "validation") == EVALUATION
    assert stored.run("full", "test1") == RUN
    expected = training_result()
    put(store, ranked := run_config(test_sets=("test1",), full_measures=("nDCG@10",), full_depth=9))
    for which, state in expected.states.items():
        assert store.get(ranked).weights(which)["w"].equal(state["w"])
    with pytest.raises(StoreError, match=r"selected\.safetensors is missing"):
        stored.weights()
    pd.testing.assert_frame_equal(stored.curve, expected.curve)
    pd.testing.assert_frame_equal(stored.targets, expected.targets)

    # As somebody else reads them.
    written = json.loads((stored.path / "config.json").read_text())
    promised = "encoder target in_batch orientation batch_size seed collection code_version"
    assert set(promised.split()) <= set(written)
    result = json.loads((stored.path / "result.json").read_text())
    assert result["rerank"]["validation"] == {
        "mean": {"nDCG@10": 0.5},
        "per_query": {"nDCG@10": {"q1": 0.25, "q2": 0.75}},
    }
    assert {k: result[k] for k in ("train_seconds", "eval_seconds", "best_step", "stop_step")} == {
        "train_seconds": 1.5, "eval_seconds": 0.5, "best_step": 2, "stop_step": 2,
    }  # fmt: skip
    assert (result["triples"], result["peak_bytes"], result["index"]) == (
        8,
        123456789,
        {"nlist": 4},
    )
    lines = gzip.decompress((stored.path / "full.test1.run.gz").read_bytes()).decode().splitlines()
    assert lines[0].split() == ["q1", "Q0", "d1", "1", repr(0.1 + 0.2), config.run_id]


@pytest.mark.parametrize("target", [0.0, 0.3, 1, "adaptive", "distributed"])
def test_targets_keep_their_type(store, target):
    config = run_config(target=target)
    put(store, config)
    read = store.get(config).config.target
    assert read == target
    assert isinstance(read, str if isinstance(target, str) else float)


def test_every_run_of_smoke_keeps_the_contract(smoke_home):
    folders = sorted((smoke_home / "runs").iterdir())
    assert not [f for f in folders if f.name.startswith(".")]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        result = json.loads((folder / "result.json").read_text())
        assert read_run_config(json.dumps(config)).run_id == folder.name
        assert config["code_version"] == CODE_VERSION
        assert (smoke_home / "collections" / config["collection"]).is_dir()
        assert {"train_seconds", "eval_seconds", "best_step", "stop_step", "triples", "peak_bytes"} <= set(result)  # fmt: skip
        expected = {f"{m}.{s}.run.gz" for m in ("rerank", "full") for s in result.get(m, ())}
        assert {p.name for p in folder.glob("*.run.gz")} == expected
        assert "rerank.validation.run.gz" in expected
        if config["kind"] != "training":
            assert not list(folder.glob("*.parquet"))
            continue
        curve = pd.read_parquet(folder / "curve.parquet")
        measures = config["rerank_measures"]
        assert list(curve.columns) == ["step", "triples", "seconds", *measures]
        assert curve["step"].iloc[0] == 0
        assert curve["step"].iloc[-1] == config["triples"] // config["batch_size"]
        assert result["stop_step"] in set(curve["step"])
        assert result["triples"] == result["stop_step"] * config["batch_size"]
        targets = pd.read_parquet(folder / "targets.parquet")
        assert list(targets.columns) == ["step", "mean", "min", "max"]
        assert targets["step"].tolist() == list(range(1, curve["step"].iloc[-1] + 1))
        assert (targets["min"] <= targets["mean"]).all()
        assert (targets["mean"] <= targets["max"]).all()
        assert (targets[["min", "max"]].abs() <= 1 + 1e-6).all().all()
        assert result["peak_bytes"] > 0
        assert result["train_seconds"] > 0


# ---- ids -----------------------------------------------------------------------------------------

KINDS = {
    BM25Run: {**RUN_VALUES, "version": "1", "rerank_sets": ["validation"]},
    ZeroShotRun: ENCODER_VALUES,
    TrainingRun: TRAINING_VALUES,
}
OTHER = {
    "encoder": "other", "weights": "1" * 64, "pooling": "cls", "layers": 3, "trained_layers": 1, "query_length": 9,
    "passage_length": 13, "target": 0.5, "in_batch": True, "orientation": "released", "error": "absolute",
    "stop_gradient": True, "batch_size": 7, "chunks": 3, "triples": 14, "learning_rate": 1e-3, "weight_decay": 0.1,
    "decay": 0.5, "optimizer": "adamw_torch", "precision": "bf16", "dropout": None, "seed": 2, "evaluate_every": 3,
    "patience": 1, "keep": "last", "selection": "AP", "validation": "test1", "depth": 9, "candidates": "official",
    "rerank_measures": ["AP"], "test_sets": ["test1"], "full_measures": ["AP"], "full_depth": 7, "save_model": True,
    "stop_early": False, "similarity": "dot", "teacher": "scores", "sampling": "topics",
    "collection": "0" * 16, "code_version": 2, "version": "2", "rerank_sets": ["test1"],
}  # fmt: skip
FIXED = {"kind", "loss", "sampling"}  # others need a target of None, or a teacher: tested below


@pytest.mark.parametrize("kind", KINDS)
def test_the_id_depends_on_every_field_and_nothing_else(kind):
    config = kind.model_validate(KINDS[kind])
    assert read_run_config(config.model_dump_json()) == config
    for field in kind.model_fields.keys() - FIXED - ({"encoder"} if kind is BM25Run else set()):
        assert kind.model_validate({**KINDS[kind], field: OTHER[field]}).run_id != config.run_id
    for field in OTHER.keys() - kind.model_fields.keys():
        with pytest.raises(ValidationError, match=field):
            kind.model_validate({**KINDS[kind], field: OTHER[field]})


def test_ids_are_stable():
    # If this fails, all stored runs are trained again. Was that meant? Then raise CODE_VERSION, too.
    ids = [kind.model_validate(values).run_id for kind, values in KINDS.items()]
    assert ids == ["273b109cfcfef132", "f2f9cdfefd32b39e", "4d0bf08caf930c8a"]
    assert run_config(target=1).run_id == run_config(target=1.0).run_id
    others = ({"target": 0}, {"loss": "softmax", "target": None}, {"teacher": "t"}, {"teacher": "t", "sampling": "topics"})  # fmt: skip
    assert len({*ids, *(run_config(**values).run_id for values in ({}, *others))}) == 7


@pytest.mark.parametrize(
    "values",
    [
        {"target": "dynamic"}, {"loss": "hinge"}, {"epsilon": 1.0}, {"seed": None}, {"batch_size": 0},
        {"target": None}, {"loss": "softmax", "target": 0.5}, {"kind": "bm25"}, {"keep": "last", "stop_early": False},
        {"loss": "margin-mse", "target": None}, {"sampling": "topics"}, {"loss": "margin-mse", "teacher": "t"},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_that_is_none(values):
    with pytest.raises(ValidationError):
        run_config(**values)


# ---- whole or not at all -------------------------------------------------------------------------


def nothing_is_left(folder: Path) -> bool:
    return not folder.exists() or not list(folder.iterdir())


def test_an_error_in_the_middle_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError):
        put(store, save_model=lambda folder: 1 / 0)
    assert nothing_is_left(store.folder)
    assert not store.has(run_config())


def test_a_full_disk_of_the_system(store):
    """With a limit on the size of files, as near to a full disk as a test comes without being root."""

    def fill(size, save):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        put(store, save_model=save)

    def save(folder):
        from safetensors.numpy import save_file

        folder.mkdir()
        save_file({"a": np.zeros(100_000)}, folder / "model.safetensors")

    path = store.path(run_config())
    for size in (0, 100, 1500, 50_000):
        told = in_child(lambda size=size: fill(size, save))
        assert told.startswith(f"StoreError: {path} could not be written"), (size, told)
        assert nothing_is_left(store.folder)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StoreError, match="could not be written"):
        put(Store(tmp_path / "runs"))


def test_what_a_killed_process_left_goes_when_the_run_is_stored(store):
    assert in_child(lambda: put(store, save_model=lambda _: die())) == "died"
    assert not store.has(run_config())
    assert len(list(store.folder.iterdir())) == 1
    stored = put(store)
    assert list(store.folder.iterdir()) == [stored.path]


def finish_together(folder: Path, start: float, number: int) -> None:
    time.sleep(max(0.0, start - time.time()))
    put(Store(folder), extra={"number": number})


def test_processes_that_finish_the_same_run(store):
    context = multiprocessing.get_context("fork")
    start = time.time() + 0.3
    processes = [
        context.Process(target=finish_together, args=(store.folder, start, n)) for n in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [p.name for p in store.folder.iterdir()] == [run_config().run_id]
    stored = store.get(run_config())
    assert stored.result["number"] in range(4)
    assert stored.run("full", "test1") == RUN


# ---- damaged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "garbage"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda r: r.config),
        ("result.json", lambda r: r.evaluation("rerank", "validation")),
        ("curve.parquet", lambda r: r.curve),
        ("checks.parquet", lambda r: r.checks),
        ("targets.parquet", lambda r: r.targets),
        ("rerank.validation.run.gz", lambda r: r.run("rerank", "validation")),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(store, name, read, damage):
    stored = put(store)
    file = stored.path / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(
            {"empty": b"", "half": content[: len(content) // 2], "garbage": b"\xff\x00" * 99}[
                damage
            ]
        )
    with pytest.raises(StoreError) as error:
        read(store.get(run_config()))
    assert str(file) in str(error.value)
    assert f"delete the folder {stored.path}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("curve.parquet", lambda r: r.curve),
        ("result.json", lambda r: r.result),
        ("full.test1.run.gz", lambda r: r.run("full", "test1")),
        ("selected.safetensors", lambda r: r.weights()),
    ],
)
def test_one_bit_is_noticed_named_and_set_aside(store, capsys, name, read):
    """Most of these files would be read as if nothing had happened."""

    def save(folder):
        folder.mkdir()
        (folder / "weights").write_bytes(b"0123456789")

    config = run_config(test_sets=("test1",), full_measures=("nDCG@10",), full_depth=9)
    stored, other = put(store, config, save_model=save), put(store)
    read(stored)
    assert store.damaged() == []
    flip(stored.path / name)
    found = store.get(config)
    with pytest.raises(StoreError, match=rf"{name} was changed.*delete the folder {stored.path}"):
        read(found)
    assert found.config == config  # other files are not read for it
    assert f"{stored.path / name} was changed" in "".join(store.damaged())
    assert store.damaged(other.run_id) == []
    for _ in range(2):  # the second time there is one aside already
        store.damaged(aside=True)
        assert not store.has(config)
        assert store.has(run_config())
        aside = store.folder.parent / "cache" / "damaged" / config.run_id
        assert f"{stored.path / name} was changed" in (said := capsys.readouterr().err)
        assert f"moved to {aside} and computed again" in said
        assert (aside / name).is_file()
        flip(put(store, config, save_model=save).path / name)


@pytest.mark.parametrize(
    "text", ["[]", "3", "{}", '{"rerank": 3}', '{"rerank": {"validation": {}}}']
)
def test_a_result_of_another_shape(store, text):
    stored = put(store)
    (stored.path / "result.json").write_text(text)
    with pytest.raises(StoreError, match=r"result\.json"):
        store.get(run_config()).evaluation("rerank", "validation")


def test_what_is_not_there_is_said(store):
    with pytest.raises(StoreError, match=rf"{run_config().run_id} \(tiny, training\) is not in"):
        store.get(run_config())
    stored = put(store)
    with pytest.raises(StoreError, match=r"no full on 'test2'; it has .*'full': \['test1'\]"):
        stored.evaluation("full", "test2")
    with pytest.raises(StoreError, match=r"full\.test2\.run\.gz is missing"):
        stored.run("full", "test2")


def test_a_configuration_from_another_version(store):
    stored = put(store)
    config = json.loads((stored.path / "config.json").read_text())
    (stored.path / "config.json").write_text(json.dumps({**config, "new_field": 1}))
    (stored.path / CHECKSUMS).unlink()
    with pytest.raises(StoreError, match=r"config\.json cannot be read(.|\n)*new_field"):
        _ = store.get(run_config()).config


def test_a_run_whose_folder_has_another_name(store):
    stored = put(store)
    other = store.path(run_config(seed=2))
    shutil.copytree(stored.path, other)
    with pytest.raises(StoreError, match=f"{other}.*{stored.run_id}"):
        _ = StoredRun(other).config


# ---- home ----------------------------------------------------------------------------------------


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path / "x" / ".."))
    assert home() == tmp_path
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(tmp_path / "file"))
    with pytest.raises(WriteError, match="file; expected a folder"):
        home()
    monkeypatch.delenv("ADAPTIVE_MARGINS_HOME")
    checkout = Path(__file__).resolve().parents[2]
    assert home() == checkout
    installed = tmp_path / "lib" / "python" / "site-packages" / "adaptive_margins" / "files.py"
    monkeypatch.setattr(files, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    assert home() == tmp_path
    assert os.environ.get("ADAPTIVE_MARGINS_HOME") is None
