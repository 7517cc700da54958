"""Files of others run no code: pickles, names that leave a folder, what pages would act on, parameters, addresses."""

from __future__ import annotations

import ast
import gzip
import json
import pickle
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from docutils.core import publish_doctree
from myst_parser.parsers.docutils_ import Parser
from papermill.translators import PythonTranslator

import report_frames as frames
from adaptive_margins.book import describe, tables
from adaptive_margins.book.render import html_page, plain
from adaptive_margins.book.site import REPOSITORY_VARIABLE, SITE_VARIABLE, configure
from adaptive_margins.corpus.explore import show
from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.folder import read_folder
from adaptive_margins.data.text import DataError
from adaptive_margins.data.trec import read_qrels, read_run
from adaptive_margins.encoder.checks import EncoderError, read_array
from adaptive_margins.encoder.load import open_encoder, save_encoder
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.evaluation.external_runs import read_external_runs
from adaptive_margins.evaluation.measures import Evaluation
from adaptive_margins.files import CHECKSUMS, file_sha256
from adaptive_margins.paper.store import Store, StoredRun, StoreError
from adaptive_margins.profiles.load import ProfileError, available, load_profile
from adaptive_margins.retrieval.dense import DenseRetriever
from adaptive_margins.retrieval.dense_index import DenseIndex
from adaptive_margins.runs import BM25Run
from conftest import ROOT, RUN_VALUES, Bomb

NO_DATA = "collection.tsv"


@pytest.fixture
def flag(tmp_path):
    """Exists if the code of somebody else was run."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists()  # a pickle does run code
    path.unlink()
    yield path
    assert not path.exists()


@pytest.fixture
def no_pickle(monkeypatch):
    """Any pickle that is loaded is an error, by PyTorch's restricted reader, too."""

    def refuse(*_, **__):
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tiny_folder) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "saved"
    save_encoder(open_encoder(str(tiny_folder("bert"))), folder)
    return folder


def stored(folder: Path) -> StoredRun:
    evaluation = Evaluation({"nDCG@10": 0.5}, {"nDCG@10": {"q1": 0.5}})
    found, runs = {"full": {"test1": evaluation}}, {"full": {"test1": {"q1": {"d1": 1.0}}}}
    run = Store(folder).put(BM25Run(**RUN_VALUES, version="1", rerank_sets=()), None, found, runs)
    (run.path / CHECKSUMS).unlink()  # whoever changes a file can change them, too
    return run


# ---- pickles -------------------------------------------------------------------------------------


def test_what_others_give_is_read_without_a_pickle(no_pickle, encoder, tmp_path):
    corpus = [{"_id": f"d{i}", "text": f"the graph of a node {i}"} for i in range(4)]
    beir = write(tmp_path / "beir", **{
        "corpus.jsonl": "\n".join(map(json.dumps, corpus)), "queries.jsonl": '{"_id": "q1", "text": "a node"}',
        "qrels__test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
    })  # fmt: skip
    trec = write(tmp_path / "trec", **{
        "collection.tsv": "d1\tthe graph\nd2\ta node\n", "queries.tsv": "q1\ta node\n", "qrels.txt": "q1 0 d2 1\n", "a.run": "q1 Q0 d2 1 1.5 x\n",
    })  # fmt: skip
    pairs = datasets.Dataset.from_dict({"query": ["a node"], "positive": ["the node of a graph"]})
    pairs.save_to_disk(tmp_path / "pairs")
    collection = read_folder(beir)
    collection.save(tmp_path / "saved")
    for folder in (trec, tmp_path / "pairs", tmp_path / "saved"):
        assert read_folder(folder).queries
    assert read_run(trec / "a.run") and read_qrels(trec / "qrels.txt")
    assert "the graph of a node 1" in describe.collection_page(
        collection, describe.collection_facts(collection)
    )

    run = stored(tmp_path / "runs")
    shutil.copytree(encoder, run.path / "model")
    assert run.config.kind == "bm25" and run.result and run.run("full", "test1")
    assert run.model("cpu").get_embedding_dimension() == 16
    model = open_encoder(str(encoder))
    retriever = DenseRetriever(model, collection.passages)
    DenseIndex.build(retriever, "x", str(encoder), tmp_path / "index")
    index = DenseIndex.open(tmp_path / "index")
    assert index.search(index.open_encoder(), collection.queries["test"], 2)["q1"]


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of an index, and its SHA-256 in index.json."""
    (folder / name).write_bytes(content)
    about = json.loads((folder / "index.json").read_text())
    about["files"][name] = {"bytes": len(content), "sha256": file_sha256(folder / name)}
    (folder / "index.json").write_text(json.dumps(about))


def test_a_pickle_in_the_place_of_a_file_is_refused(flag, encoder, tmp_path):
    bomb = pickle.dumps(Bomb(flag))
    array = np.empty(1, object)
    array[0] = Bomb(flag)
    np.save(tmp_path / "array.npy", array, allow_pickle=True)
    with pytest.raises(EncoderError, match=r"array\.npy cannot be read"):
        read_array(tmp_path / "array.npy", (1, 1), np.float32)

    collection = Collection("x", Texts(["d1", "d2"], ["a graph", "a node"]), {}, {})
    built = tmp_path / "index"
    DenseIndex.build(
        DenseRetriever(open_encoder(str(encoder)), collection.passages), "x", str(encoder), built
    )
    for name, content in (
        ("embeddings.npy", (tmp_path / "array.npy").read_bytes()), ("passages.faiss", bomb), ("passages.arrow", bomb),
    ):  # fmt: skip
        shutil.copytree(built, other := tmp_path / f"index-{name}")
        rewrite(other, name, content)
        with pytest.raises(DataError, match="index"):
            DenseIndex.open(other)

    run = stored(tmp_path / "runs")
    shutil.copytree(encoder, model := run.path / "model")
    for file in model.rglob("*.safetensors"):
        torch.save(Bomb(flag), file.with_name("pytorch_model.bin"))
        file.unlink()
    with pytest.raises(EncoderError, match="is a pickle, which is never loaded"):
        run.model("cpu")
    # As pyarrow up to 14.0 unpickled it.
    about = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb}
    table = pa.table([pa.array([0])], schema=pa.schema([pa.field("step", pa.int64(), metadata=about)]))  # fmt: skip
    pq.write_table(table, run.path / "curve.parquet")
    assert list(run.curve["step"]) == [0]
    for name in ("config.json", "result.json", "curve.parquet", "full.test1.run.gz"):
        (run.path / name).write_bytes(bomb)
    again = StoredRun(run.path)
    for read in (lambda: again.config, lambda: again.result, lambda: again.curve, lambda: again.run("full", "test1")):  # fmt: skip
        with pytest.raises(StoreError, match="cannot be read"):
            read()
    with pytest.raises(DataError, match="found a binary file"):
        read_folder(write_bytes(tmp_path / "corpus", NO_DATA, bomb))


def write_bytes(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def test_code_that_comes_with_an_encoder_is_not_run(flag, encoder, tmp_path):
    shutil.copytree(encoder, folder := tmp_path / "evil")
    (folder / "evil.py").write_text(f"open({str(flag)!r}, 'w')\nclass Evil: pass\n")
    mapped = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "auto_map": mapped}))
    open_encoder(str(folder))
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "evil.Evil"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(EncoderError, match="is not run"):
        open_encoder(str(folder))


# ---- names ---------------------------------------------------------------------------------------

LEAVING = ["../x", "..", "/etc/x", "C:\\x", "a\0b", "x" * 5000, ""]


@pytest.mark.parametrize("name", LEAVING, ids=lambda name: repr(name[:9]))
def test_a_name_that_leaves_its_folder_is_refused(name, encoder, tmp_path):
    collection = {"extends": "paper", "collection": {"sets": {name: "x"}}}
    for values in ({"extends": "smoke", "name": name}, collection):
        profile = write(tmp_path, **{"p.yaml": yaml.safe_dump({"about": "x", **values})})
        words = "name: String should|sets: a name is|pages show"
        with pytest.raises(ProfileError, match=rf"p\.yaml[\s\S]* ({words})"):
            load_profile(profile / "p.yaml")
    queries = {name: Texts(["q"], ["text"])}
    with pytest.raises(DataError, match="a set name must be"):
        Collection("x", Texts(["d"], ["text"]), queries, {name: {}}).save(tmp_path / "saved")
    with pytest.raises(AdaptiveMarginsError):
        load_profile(f"{name}x.yaml")
    if name:
        files = {name: {"bytes": 1, "sha256": ""}}
        about = {"format": 1, "files": files}
        write(tmp_path / "index", **{"index.json": json.dumps(about)})
        with pytest.raises(DataError, match=r"index\.json: .* is not the name of a file|too long"):
            DenseIndex.open(tmp_path / "index")


def test_files_packed_in_themselves_are_refused(tmp_path):
    packed = b"q1 0 d1 1\n"
    for _ in range(3):
        packed = gzip.compress(packed)
    (tmp_path / "qrels.txt").write_bytes(packed)
    assert read_qrels(tmp_path / "qrels.txt") == {"q1": {"d1": 1}}
    (tmp_path / "qrels.txt").write_bytes(gzip.compress(packed))
    with pytest.raises(DataError, match="gzip within gzip"):
        read_qrels(tmp_path / "qrels.txt")


# ---- pages ---------------------------------------------------------------------------------------

FIRE = "window.fired = (window.fired || 0) + 1"
TEXTS = [
    f"<script>{FIRE}</script>",
    f'<img src=x onerror="{FIRE}">',
    f'"><svg onload="{FIRE}">',
    f"</td></table></div><script>{FIRE}</script>",
    f"[click](javascript:{FIRE.replace(' ', '')}) <a href='javascript:{FIRE}'>click</a>",
    r"$\input{/etc/passwd}$ $$\href{javascript:alert(1)}{x}$$ \begin{align}\input{x}\end{align}",
    "{{ 7777*7777 }} {% for x in [1] %}{{ 7777*7777 }}{% endfor %}",
    '{{ cycler.__init__.__globals__.os.system("touch FLAG") }}',
    "```{raw} html <script>fired()</script>``` :::{include} /etc/passwd::: {raw-html}`<b>`",
    "![x](/etc/passwd) [x](/etc/passwd) {download}`/etc/passwd`",
    "\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link \u202egnp.exe\u2066x",
]
"""Texts, and of them what names of a profile, a run or a collection could hold."""
NAMES = [*TEXTS, "```\n<b>", "a\n:::\nb", "[x]: /etc/passwd"]


def write_profile(folder: Path, **values) -> Path:
    return write(folder, **{"p.yaml": yaml.safe_dump({"extends": "smoke", **values}, allow_unicode=True)}) / "p.yaml"  # fmt: skip


@pytest.mark.parametrize("text", NAMES, ids=range(len(NAMES)))
def test_names_and_remarks_that_pages_would_act_on_are_refused(text, tmp_path):
    encoder = {"base": "minilm", "label": text}
    for values in (
        {"about": text}, {"notes": {"cover": text}}, {"encoders": {text: {"base": "minilm"}}}, {"encoders": {"minilm-3": encoder}},
    ):  # fmt: skip
        with pytest.raises(ProfileError, match=r"p\.yaml: .*pages"):
            load_profile(write_profile(tmp_path, **values))
    run = stored(tmp_path / "runs")
    result = json.loads((run.path / "result.json").read_text())
    full = result["full"]["test1"]
    for changed in (
        {"index": {"factory": text}}, {"full": {"test1": {**full, "mean": {text: 0.5}}}}, {"full": {text: full}},
    ):  # fmt: skip
        (run.path / "result.json").write_text(json.dumps({**result, **changed}))
        with pytest.raises(StoreError, match=r"result\.json cannot be read .*pages"):
            StoredRun(run.path).result  # noqa: B018
    about = {"name": text, "fingerprint": "", "sources": {}}
    write(tmp_path / "c", **{"sources.json": json.dumps(about), "collection.tsv": "d\tx\n", "triples.tsv": ""})  # fmt: skip
    with pytest.raises(DataError, match=r"sources\.json: .*pages"):
        Collection.load(tmp_path / "c")
    if "/" not in text and "." not in text:
        write(tmp_path / "supplied" / "test1", **{f"{text}.run": "q Q0 d 1 1 x\n"})
        with pytest.raises(DataError, match="pages"):
            read_external_runs(tmp_path / "supplied", ["test1"])
        with pytest.raises(DataError, match="rename the folder"):
            read_folder(write(tmp_path / text, **{"collection.tsv": "d\tx\n"}))


def test_remarks_may_have_emphasis_code_links_and_citations(tmp_path):
    text = (
        "**Bold**, `code`, [why](../book/reproduce.md#x), [site](https://x.org), 5 < 6, {doc}`cite`"
    )
    assert load_profile(write_profile(tmp_path, about=text)).about == text
    assert all(load_profile(name).about for name in available())


def hostile(flag: Path) -> Collection:
    texts = [text.replace("FLAG", str(flag)) for text in TEXTS]
    ids = [f"{i}:{re.sub(r'[ ]', '', text)}" for i, text in enumerate(texts)]
    queries = Texts(ids, texts)
    qrels = {qid: {docid: 1, ids[0]: 0} for qid, docid in zip(ids[1:], ids[1:], strict=True)}
    return Collection(texts[0], Texts(ids, texts), {"test": queries}, {"test": qrels}, {texts[1]: texts[6]})  # fmt: skip


EXTENSIONS = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "html_image", "substitution"]  # fmt: skip


def nodes_of(markdown: str) -> set[str]:
    """Kinds of nodes that the book's Markdown gives, and what it says in red."""
    settings = {
        "_disable_config": True, "myst_enable_extensions": EXTENSIONS, "myst_substitutions": {"x": "1"}, "report_level": 5, "halt_level": 5,
    }  # fmt: skip
    tree = publish_doctree(markdown, parser=Parser(), settings_overrides=settings)
    return {n.tagname for n in tree.findall()} | (
        {"60481729"} if "60481729" in tree.astext() else set()
    )


def test_the_data_sheet_shows_texts_and_runs_none(flag):
    collection = hostile(flag)
    scored = {"test": {qid: dict(judged) for qid, judged in collection.qrels["test"].items()}}
    runs = {collection.name: {"set": None, "queries": 0, "depth": 0, "unknown": 0, "nDCG@10": None}}
    facts = describe.collection_facts(collection) | {"runs": runs}
    sheet = describe.datasheet(collection, facts, {}, {}, scored=scored, relevant=1, book=False)
    found = nodes_of(sheet)
    assert not found & {"math", "math_block", "image", "60481729", "problematic", "system_message"}
    assert {"math", "image", "60481729"} <= nodes_of("\n\n".join([TEXTS[5], TEXTS[6], TEXTS[9]]))
    for text in TEXTS:
        assert not nodes_of(plain(text)) & {"raw", "math", "image", "reference", "60481729"}
    assert nodes_of(TEXTS[0]) & {"raw"}


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
def test_a_browser_runs_nothing_of_a_collection(flag, tmp_path):
    collection = hostile(flag)
    table2 = frames.table2().assign(text=TEXTS[:5], qid=TEXTS[1])
    frame = pd.DataFrame({"text": collection.passages.texts}, index=list(collection.passages.ids))
    parts = [
        describe.collection_page(collection, describe.collection_facts(collection)),
        html_page(TEXTS[0], f"# {plain(TEXTS[0])}\n\n{plain(TEXTS[4])}"),
        show(frame.reset_index(drop=True).rename(columns={"text": TEXTS[1]}), TEXTS[0]).to_html(),
        frame.rename(columns={"text": TEXTS[1]})._repr_html_(),
        str(tables.table2(table2, heading=TEXTS[0])),
    ]  # fmt: skip
    frame_tags = "".join(
        f"<iframe srcdoc='{escape(part)}'></iframe>" for part in [*parts, TEXTS[1]]
    )
    page = tmp_path / "page.html"
    page.write_text(f"""<!doctype html><meta charset="utf-8">{frame_tags}<script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const inner = frame.contentDocument, links = [...inner.querySelectorAll("a")];
    links.filter(a => !a.download).forEach(a => a.click());
    const events = [...inner.querySelectorAll("*")].flatMap(e => [...e.attributes].filter(a => /^on/.test(a.name)));
    return [frame.contentWindow.fired || 0, inner.querySelectorAll("script").length, events.length,
      links.filter(a => /^javascript/i.test(a.href)).length, inner.body.textContent.includes("window.fired"),
      /[\\x1b\\u202e\\u2066]/.test(inner.body.textContent)];
  }});
  document.body.textContent = "found " + JSON.stringify(found);
}});
</script>""", "utf-8")  # fmt: skip
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    command = ["chromium", *flags, f"--user-data-dir={tmp_path / 'user'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    *found, control = json.loads(re.search(r"found (\[.*\])", done.stdout)[1])
    assert control[0] == 1  # what is not escaped does run
    assert [row[:5] for row in found] == [[0, 0, 0, 0, True]] * len(parts), found
    assert [row[5] for row in found] == [False, False, True, True, False]  # pandas shows them


# ---- parameters and addresses --------------------------------------------------------------------


def test_parameters_of_notebooks_are_values(flag):
    values = [*TEXTS, f'x"; import os; os.system("touch {flag}")', "'''\n\"\"\"\\", "\\", "{x}", "é\u2028"]  # fmt: skip
    given = {f"p{i}": value for i, value in enumerate(values)}
    variables = {
        target.id: ast.literal_eval(statement.value)
        for statement in ast.parse(PythonTranslator.codify(given)).body
        for target in statement.targets
    }
    assert variables == given


@pytest.mark.parametrize("variable", [SITE_VARIABLE, REPOSITORY_VARIABLE])
def test_addresses_from_the_environment_are_addresses(variable, monkeypatch):
    config = (ROOT / "_config.yml").read_text()
    monkeypatch.setenv(variable, "https://example.org/a-b/~c/")
    assert "https://example.org/a-b/~c" in configure(config, "")
    for wrong in (
        "javascript:alert(1)", 'https://x.org/"><script>', "https://x.org/a b", "http://x\nurl: y", "file:///etc", "https://x/{{ 7*7 }}",
    ):  # fmt: skip
        monkeypatch.setenv(variable, wrong)
        with pytest.raises(AdaptiveMarginsError, match="expected https://"):
            configure(config, "")
