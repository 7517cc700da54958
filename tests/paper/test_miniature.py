"""The profile paper in small: its runs, figures, tables and book, recomputed by other means.

Conversion of the collection: data/test_ir_datasets.py. Here everything after it, on random encoders of the paper's three kinds.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest
import pytrec_eval
import torch
from sentence_transformers import SentenceTransformer

from adaptive_margins import paper
from adaptive_margins.book import context, shown
from adaptive_margins.data.converted import StoredCollection
from adaptive_margins.data.trec import top, write_run
from adaptive_margins.paper.frames import external_runs
from adaptive_margins.profiles.load import load_profile
from adaptive_margins.retrieval.bm25 import BM25
from conftest import MINIATURE_SIZES, ROOT, executed, write_miniature

SETS = ["TREC-DL19", "TREC-DL20"]
ENCODERS = ["distilbert", "roberta", "mpnet"]


@pytest.fixture(scope="module")
def configs(miniature):
    return {p.name: json.loads((p / "config.json").read_text()) for p in (miniature.home / "runs").iterdir()}  # fmt: skip


def read_ranking(path):
    run = defaultdict(dict)
    with gzip.open(path, "rt") as file:
        for line in file:
            qid, _, docid, _, score, _ = line.split()
            run[qid][docid] = float(score)
    return dict(run)


# ---- the profile ---------------------------------------------------------------------------------


def test_only_sizes_places_and_the_device_differ_from_the_profile_paper(miniature):
    full, small = (p.model_dump() for p in (load_profile("paper"), miniature.profile))
    differing = {k for k in full if full[k] != small[k]}
    assert differing == {*MINIATURE_SIZES, "name", "about", "collection", "encoders", "untrained", "teacher", "device"}  # fmt: skip
    for part, sizes in MINIATURE_SIZES.items():
        assert {k for k in full[part] if full[part][k] != small[part][k]} <= set(sizes)
    for name in ENCODERS:
        changed = {k for k, v in full["encoders"][name].items() if v != small["encoders"][name][k]}
        assert changed == {"base", "revision", "stated"}


def test_every_run_has_the_papers_settings(configs, miniature):
    planned = set(miniature.plan().runs["run_id"])
    assert planned == set(configs)
    trained = {i: configs[i] for i in planned if configs[i]["kind"] == "training"}
    assert len(planned) == len(trained) + 7
    for c in trained.values():
        assert (c["optimizer"], c["precision"], c["weight_decay"]) == ("adamw_8bit", "bf16", 1e-6)
        assert c["learning_rate"] == pytest.approx(5e-6 / c["batch_size"])
        assert (c["query_length"], c["passage_length"], c["dropout"]) == (30, 200, None)
        assert c["pooling"] == {"distilbert": "cls"}.get(c["encoder"], "cls+linear")
        assert c["validation"] == "TREC-DL19"
        assert c["decay"] == (0.99999 if c["patience"] else 1.0)
        assert c["depth"] == 1000
    assert {c["full_depth"] for c in trained.values() if c["patience"]} == {1000}
    per_encoder = 2 * 2 + 2 + 1 + 5
    taught = 3 * 2  # samplings, with and without in-batch negatives
    assert len(trained) == 3 * per_encoder + taught + 1 + (
        miniature.experiments.tuned_target("distilbert", False) != 1
    )


# ---- collection and candidates -------------------------------------------------------------------


def test_the_candidates_are_the_official_ones_in_bm25s_order(miniature):
    collection = miniature.inputs.collection
    assert isinstance(collection, StoredCollection)
    ranking = BM25(collection.passages)
    for name in SETS:
        official = collection.candidates[name]
        assert {s for run in official.values() for s in run.values()} == {0.0}  # as TREC DL's
        scored = miniature.inputs.top_candidates(name)
        assert {q: set(run) for q, run in scored.items()} == {q: set(run) for q, run in official.items()}  # fmt: skip
        everything = ranking.search(collection.queries[name], len(collection.passages))
        for qid, run in scored.items():
            for docid, value in run.items():
                assert value == pytest.approx(everything[qid].get(docid, 0.0), abs=1e-5)


# ---- full ranking --------------------------------------------------------------------------------


def test_the_stored_ranking_is_that_of_the_saved_model(miniature):
    """By sentence-transformers and NumPy: the run embedded in bf16, kept fp16, and searched by an index."""
    config = miniature.experiments.variant_run("distilbert", "distributed", False)
    run = miniature.store.get(config)
    model = SentenceTransformer(str(run.path / "model"), device="cpu")
    passages = miniature.inputs.collection.passages
    queries = miniature.inputs.collection.queries["TREC-DL20"]
    with torch.autocast("cpu", torch.bfloat16):
        model.max_seq_length = 200
        docs = model.encode(list(passages.texts[:]), convert_to_tensor=True).float()
        model.max_seq_length = 30
        asked = model.encode(list(queries.texts), convert_to_tensor=True).float()
    cosine = (torch.nn.functional.normalize(asked) @ torch.nn.functional.normalize(docs).T).numpy()
    stored = read_ranking(run.path / "full.TREC-DL20.run.gz")
    assert set(stored) == set(queries.ids)
    for i, qid in enumerate(queries.ids):
        assert len(stored[qid]) == len(passages)  # 1000 hits were asked for
        for docid, score in stored[qid].items():
            assert score == pytest.approx(cosine[i, passages.row(docid)], abs=1e-2)


def test_the_index_is_of_the_papers_kind_and_its_cost_is_reported(miniature):
    data = miniature.table3()
    cost = context.index_cost(miniature, data)
    assert set(cost["run_id"]) == set(data["run_id"])
    assert cost["index"].str.fullmatch(r"OPQ\d+,IVF\d+_HNSW32,PQ\d+x?\d*").all()
    assert cost["recall"].between(0.9, 1).all()
    for row in cost.to_dict("records"):
        result = miniature.store.folder / row["run_id"] / "result.json"
        found = json.loads(result.read_text())
        assert row["exact"] == found["exact"][row["set"]]["mean"][row["measure"]]


def test_embedding_goes_on_after_an_interruption(miniature, tmp_path, monkeypatch):
    """A run stopped while embedding leaves whole shards, and the next call makes only the others."""
    from adaptive_margins.paper import runner

    other = paper.open(miniature.home / "miniature-paper.yaml", tmp_path, ranking__devices=["cpu"])
    (tmp_path / "collections").symlink_to(miniature.home / "collections")
    (tmp_path / "cache").mkdir()
    for name in ("collections", "tokens"):
        (tmp_path / "cache" / name).symlink_to(miniature.home / "cache" / name)
    config = other.experiments.zero_shot_run("distilbert")
    real = runner.embed_shards

    class Stop(Exception):
        pass

    def stop(model, tokens, folder, **options):
        real(model, tokens, folder, **options)
        state = json.loads((folder / "shards.json").read_text())
        state["done"].pop()  # as if killed before the last shard
        (folder / "shards.json").write_text(json.dumps(state))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(runner, "embed_shards", stop)
        with pytest.raises(Stop):
            other.runner.execute(config)
    work = tmp_path / "cache" / "work" / config.run_id
    (folder,) = work.glob("passages-*")
    before = json.loads((folder / "shards.json").read_text())
    assert before["done"] == [0, 1]

    def watch(model, tokens, folder, **options):
        assert json.loads((folder / "shards.json").read_text()) == before
        found = real(model, tokens, folder, **options)
        assert json.loads((folder / "shards.json").read_text())["done"] == [0, 1, 2]
        return found

    monkeypatch.setattr(runner, "embed_shards", watch)
    run = other.runner.execute(config)
    assert not work.exists()
    stored = miniature.store.get(config)
    for name in SETS:
        assert run.evaluation("full", name).mean == stored.evaluation("full", name).mean


# ---- external runs -------------------------------------------------------------------------------


def test_supplied_runs_are_scored_and_tested(miniature, tmp_path):
    """A deep run of another system in the place of the reproduction study's, and one that is too shallow for R@1000."""
    other = paper.open(miniature.home / "miniature-paper.yaml", tmp_path)
    for name in ("collections", "runs", "cache"):
        (tmp_path / name).symlink_to(miniature.home / name)
    softmax = miniature.store.get(miniature.experiments.table4_runs()[1])
    qrels = miniature.inputs.collection.qrels
    for name in SETS:
        run = softmax.run("full", name)
        retrieval_folder = tmp_path / "supplied" / name
        retrieval_folder.mkdir(parents=True)
        write_run(run, retrieval_folder / "wang-zuccon-tas-b.run.gz", "x")
        shallow = {q: dict(top(hits, 100)) for q, hits in run.items()}
        write_run(shallow, retrieval_folder / "other.run", "x")
    frame = other.table4()
    assert set(frame["reference_run_id"]) == {"supplied: wang-zuccon-tas-b"}
    rows = frame.set_index(["source", "set", "measure"])
    for name in SETS:
        found = pytrec_eval.RelevanceEvaluator(qrels[name], {"ndcg_cut_10"}).evaluate(
            {q: run for q, run in softmax.run("full", name).items() if run}
        )
        expected = np.mean([found.get(q, {"ndcg_cut_10": 0})["ndcg_cut_10"] for q in qrels[name]])
        for run_name in ("wang-zuccon-tas-b", "other"):
            row = rows.loc[f"supplied: {run_name}", name, "nDCG@10"]
            assert row["value"] == pytest.approx(expected, abs=1e-6)
        refused = rows.loc["supplied: other", name, "R(rel=2)@1000"]
        assert np.isnan(refused["value"])
        assert "at most 100" in refused["refused"]
    own = frame[(frame["source"] == "not in the paper") & (frame["loss"] == "Softmax (MNRL)")]
    assert own["equivalent"].all()  # it is the same ranking
    page = shown.table4(other, frame)
    assert "wang-zuccon-tas-b" in page
    assert "at most 100" in page
    assert external_runs(miniature.runner) == {}


# ---- the book ------------------------------------------------------------------------------------


def test_notebooks_run_and_every_row_of_their_data_has_its_run(
    miniature_home, configs, tmp_path, monkeypatch
):
    """Those that show something else in the profile paper."""
    profile, data = str(miniature_home / "miniature-paper.yaml"), tmp_path / "data"
    monkeypatch.setenv("ADAPTIVE_MARGINS_HOME", str(miniature_home))
    for name in ("01_collection", "05_comparison", "06_baselines"):
        executed(ROOT / "notebooks" / f"{name}.ipynb", profile=profile, data_folder=str(data))
    names = {p.stem for p in data.glob("*.csv")}
    assert {"table1", "table3", "table4"} <= names
    for path in data.glob("*.csv"):
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        columns = [c for c in frame.columns if re.fullmatch(r"(\w+_)?run_ids?|runs", c)]
        assert columns or path.stem.startswith("claims_")  # computed from the other frames
        assert {i for c in columns for cell in frame[c] for i in cell.split()} <= set(configs)


# ---- the profile released ------------------------------------------------------------------------


def test_the_profile_released_in_small(tmp_path):
    """Its poolings, orientation, first triples of each query, stopping on DL20 and last checkpoint, through the same code."""
    path = write_miniature(
        tmp_path,
        "released",
        collection={"triples_per_query": 8},
        comparison={"triples": None, "evaluate_every_steps": 2, "patience": 2, "batch_sizes": [16]},
        teacher=None,
    )
    released = paper.open(path, tmp_path)
    per_query = Counter(qid for qid, _, _ in released.inputs.collection.triples)
    assert set(per_query.values()) == {8}

    config = released.experiments.comparison_run("roberta", target="distributed", in_batch=False)
    assert config.triples == len(released.inputs.collection.triples) < 2000
    assert (config.orientation, config.pooling, config.keep) == ("released", "cls+pooler", "last")
    assert (config.validation, config.seed) == ("TREC-DL20", 153201820)
    assert config.learning_rate == 5e-7
    run = released.runner.execute(config)
    assert run.result["kept_step"] == run.result["stop_step"]
    assert set(run.curve["step"]) == set(run.checks["step"])
    assert set(run.checks["qid"]) == set(released.inputs.collection.queries["TREC-DL20"].ids)
    assert set(run.result["full"]) == set(SETS)
    assert (
        released.experiments.training_run(
            "mpnet", target=0.5, in_batch=True, batch_size=8, triples=8
        ).pooling
        == "cls"
    )
    static = released.experiments.figure3_runs()
    assert {c.target for c in static} == {0.3, 1.0}  # the miniature's
    assert {(c.seed, c.learning_rate) for c in static} == {(166613, 5e-6)}
