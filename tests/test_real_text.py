"""Real MS MARCO passages, if there are any: $ADAPTIVE_MARGINS_TEST_DATA names a folder with ``msmarco_dl19/``.

It holds collection.tsv, queries.tsv and qrels.txt: some passages of MS MARCO, the 43 queries of TREC DL 2019 and their grades.
MiniLM ranks them through the project's code; sentence-transformers, NumPy and pytrec_eval do it again without it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import yaml

from adaptive_margins import paper

FOLDER = Path(os.environ.get("ADAPTIVE_MARGINS_TEST_DATA", "")) / "msmarco_dl19"
pytestmark = [
    pytest.mark.skipif(
        not (FOLDER / "collection.tsv").is_file(),
        reason="$ADAPTIVE_MARGINS_TEST_DATA names no folder with msmarco_dl19/collection.tsv",
    ),
    pytest.mark.timeout(3000),
]
SET = "TREC-DL19"
TREC = {
    "nDCG@10": ("ndcg_cut_10", 1),
    "Success(rel=2)@100": ("success_100", 2),
    "R(rel=2)@1000": ("recall_1000", 2),
}


def read(name: str) -> dict[str, str]:
    lines = (FOLDER / name).read_text("utf-8").removesuffix("\n").split("\n")
    return dict(line.split("\t", 1) for line in lines)


@pytest.fixture(scope="module")
def reproduction(tmp_path_factory):
    import ir_datasets
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries
    from ir_datasets.util import LocalDownload

    home = tmp_path_factory.mktemp("real")
    for name in ("collection.tsv", "queries.tsv", "qrels.txt"):
        (home / name).symlink_to(FOLDER.resolve() / name)
    docs = TsvDocs(LocalDownload(home / "collection.tsv"))
    queries = TsvQueries(LocalDownload(home / "queries.tsv"))
    qrels = TrecQrels(LocalDownload(home / "qrels.txt"), {})
    ir_datasets.registry.register("am-real", Dataset(docs, queries, qrels))
    profile = {
        "name": "real-text",
        "extends": "paper",
        "collection": {
            "name": "MS MARCO passage, a part", "passages": "am-real", "triples": None,
            "sets": {SET: "am-real", "TREC-DL20": "am-real"}, "licence": "",
            "counts": {"passages": 16999, "train": None, "triples": None, SET: 43, "TREC-DL20": None},
        },
        "sets": {"validation": SET, "tests": [SET]},
        "candidates": {"source": "bm25", "depth": 1000},
        "untrained": {"minilm": {"base": "minilm"}},
        "training": {"precision": "fp32"},
        "ranking": {"dtype": "float32", "batch_tokens": 4096},
        "device": "cpu",
    }  # fmt: skip
    path = home / "real-text.yaml"
    path.write_text(yaml.safe_dump(profile))
    return paper.open(path, home)


def measured(qrels, run, notation):
    measure, level = TREC[notation]
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {measure}, relevance_level=level)
    found = evaluator.evaluate(run)
    return {qid: found[qid][measure] for qid in qrels}


def test_minilm_ranks_real_passages_as_an_independent_computation_does(reproduction):
    config = reproduction.experiments.zero_shot_run("minilm")
    run = reproduction.runner.execute(config)

    from sentence_transformers import SentenceTransformer

    from adaptive_margins.encoder.load import weights_folder

    model = SentenceTransformer(
        str(weights_folder(reproduction.inputs.settings("minilm"))), device="cpu"
    )
    passages, queries = read("collection.tsv"), read("queries.tsv")
    qrels: dict[str, dict[str, int]] = {}
    for line in (FOLDER / "qrels.txt").read_text().splitlines():
        qid, _, docid, grade = line.split()
        qrels.setdefault(qid, {})[docid] = int(grade)
    docids, qids = list(passages), list(queries)
    model.max_seq_length = 200
    docs = model.encode([passages[d] for d in docids], batch_size=64, normalize_embeddings=True)
    model.max_seq_length = 30
    asked = model.encode([queries[q] for q in qids], normalize_embeddings=True)
    cosine = (asked.astype(np.float64) @ docs.astype(np.float64).T).astype(np.float32)
    everything = {
        q: dict(zip(docids, map(float, row), strict=True))
        for q, row in zip(qids, cosine, strict=True)
    }
    candidates = reproduction.inputs.top_candidates(SET)
    reranked = {q: {d: everything[q][d] for d in candidates[q]} for q in qids}
    report = []
    for mode, ranking, notations in (
        ("rerank", reranked, config.rerank_measures),
        ("exact", everything, config.full_measures),
    ):
        for notation in notations:
            expected = measured(qrels, ranking, notation)
            own = run.evaluation(mode, SET).per_query[notation]
            assert own == pytest.approx(expected, abs=1e-6), (mode, notation)
            report.append((mode, notation, np.mean(list(expected.values()))))
    full = run.evaluation("full", SET).mean
    report += [("full", notation, full[notation]) for notation in config.full_measures]
    print(report, run.result["index"]["recall_of_exact"], run.result["index"]["factory"])
    for (
        notation,
        value,
    ) in full.items():  # the index is approximate; what it costs is reported with every run
        assert value == pytest.approx(run.evaluation("exact", SET).mean[notation], abs=0.01)
