"""What several test files share: one finished reproduction of the profile smoke, and tiny models of several kinds."""

from __future__ import annotations

import ast
import atexit
import functools
import gc
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Before numpy and torch are imported: the machine's cores are shared, and sums must not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ADAPTIVE_MARGINS_CACHE_GB"] = "0"  # no embeddings are kept in this checkout
# ir_datasets makes its folders when it is imported; not in the user's home.
os.environ["IR_DATASETS_HOME"] = tempfile.mkdtemp(prefix="ir_datasets.")

import numpy as np
import pytest
import yaml
from filelock import FileLock

import warm

atexit.register(shutil.rmtree, os.environ["IR_DATASETS_HOME"], ignore_errors=True)
ROOT = Path(__file__).resolve().parents[1]
SHARED_HOME = "ADAPTIVE_MARGINS_TEST_HOME"
SHARED_MINIATURE = "ADAPTIVE_MARGINS_TEST_MINIATURE"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *"the a graph node edge array matrix of sort return shape path".split()]  # noqa: SIM905
TEXTS = [
    "the shape of a matrix",
    "sort the array of a graph, return the shape of the path of the node, the edge, the array and the matrix",
    "node",
    "",
    "return a path of the graph of the node, the edge and the word zygote, which is unknown",
    "the shape of a matrix",
]

# jsonschema would build grammars of IRIs when imported, for 2 s; no notebook has one.
sys.modules["rfc3987_syntax"] = None
RANDOM_LENGTH = 9  # tokens of a text of `RANDOM_TEXTS`, at most
_DRAW = np.random.default_rng(5)
RANDOM_TEXTS = [" ".join(_DRAW.choice(WORDS[5:], size=_DRAW.integers(0, 12))) for _ in range(230)]


@pytest.fixture(scope="module")
def bert(tiny_folder):
    """A tiny BERT without dropout, read only."""
    from adaptive_margins.encoder.load import open_encoder
    from adaptive_margins.profiles.encoders import EncoderSettings

    return open_encoder(EncoderSettings(base=str(tiny_folder("bert"))), dropout=0.0)


@pytest.fixture(scope="module")
def tokens(bert):
    """`RANDOM_TEXTS` as its tokens."""
    from adaptive_margins.encoder.tokens import tokenize

    return tokenize(bert, RANDOM_TEXTS, RANDOM_LENGTH)


def command(*arguments: str, home: Path, timeout: float = 600, **environment: str):
    """Run ``adaptive-margins`` in a process of its own; stdout and stderr come together."""
    environment = {**os.environ, "ADAPTIVE_MARGINS_HOME": str(home), **environment}
    return subprocess.run(
        [sys.executable, warm.__file__, "-m", "adaptive_margins.cli", *arguments],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def linked(home: Path, to: Path, *names: str, without: Iterable[str] = ()) -> Path:
    """``to`` with folders of a home, whose files are hard links: what writes a file replaces it."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # on another file system
            shutil.copy2(source, target)

    for name in names:
        ignore = shutil.ignore_patterns(*without)
        shutil.copytree(home / name, to / name, copy_function=link, ignore=ignore)
    return to


@pytest.fixture
def forked_workers(monkeypatch):
    """Worker processes are forked, and need not import everything again; what they get is pickled all the same."""
    start = ProcessPoolExecutor.__init__

    def forking(self, max_workers, mp_context, initializer, initargs):
        assert mp_context.get_start_method() == "spawn"
        given = pickle.loads(pickle.dumps((initializer, initargs)))
        start(self, max_workers, multiprocessing.get_context("fork"), *given)

    monkeypatch.setattr(ProcessPoolExecutor, "__init__", forking)


def executed(notebook: Path, **parameters: Any) -> None:
    """Run a notebook's cells in this process, with parameters; what a cell shows is made, and thrown away."""
    import nbformat
    from IPython.core.formatters import DisplayFormatter

    variables: dict[str, Any] = {}
    show = DisplayFormatter().format
    for cell in nbformat.read(notebook, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or "skip-execution" in tags:
            continue
        tree = ast.parse(cell.source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell.id, "exec"), variables)
        if last is not None:
            show(eval(compile(ast.Expression(last.value), cell.id, "eval"), variables))
        if "parameters" in tags:
            variables |= parameters


def in_child(work: Callable[[], object]) -> str:
    """What ``work`` says in a forked process: "" or its error, "died" if the process did not live to tell."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def tell() -> None:
        try:
            work()
            sending.send("")
        except BaseException as error:
            sending.send(f"{type(error).__name__}: {error}")
        os._exit(0)

    process = context.Process(target=tell)
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        return "died"
    finally:
        process.join()


class Bomb:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return Path.touch, (self.flag,)


def die() -> None:
    """The end of this process, as by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def flip(path: Path, byte: int = -9) -> None:
    """Change one bit of a file, which may be linked elsewhere."""
    content = bytearray(path.read_bytes())
    content[byte % len(content)] ^= 4
    path.unlink()
    path.write_bytes(content)


def kill_in(owner: object, name: str, number: int) -> None:
    """Make the ``number``-th call (from 1) of a function or method the last thing the process does."""
    original, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            die()
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


# Two workers make one home each; the one that is done first goes on with a long file that needs none.
FIRST = ["test_miniature.py", "test_book.py", "test_losses.py", "test_figures.py", "test_gpu_check.py"]  # fmt: skip


def pytest_configure(config):
    # xdist would begin with the files of most tests, and those that take longest have few.
    config.option.loadscopereorder = False
    if getattr(config.option, "numprocesses", None):
        return  # this process hands out tests, and imports nothing heavy
    import torch

    from adaptive_margins.encoder import frozen, load
    from adaptive_margins.paper import inputs

    torch.set_num_threads(1)
    # Encoders are opened on the CPU, whatever the machine has; tests of a GPU name it.
    load.default_device = lambda: "cpu"
    opened = functools.cache(load.open_encoder)

    def open_encoder(settings, **options):
        """The shipped encoder is read once for all homes, which copy it."""
        shipped = settings.base == "minilm"
        return frozen._copied(opened(settings, **options)) if shipped else load.open_encoder(settings, **options)  # fmt: skip

    inputs.open_encoder = open_encoder


def pytest_collection_finish():
    gc.freeze()  # every training run collects garbage, and need not look at all that was imported


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()  # trainers refer to themselves, and to models
        gc.freeze()


def pytest_collection_modifyitems(items):
    # What takes longest begins first; whichever test of a home comes first waits for its reproduction.
    homes = [{"smoke_home", "miniature_home"} & set(getattr(i, "fixturenames", ())) for i in items]
    slow = {item.path for item, used in zip(items, homes, strict=True) if used}
    for item, used in zip(items, homes, strict=True):
        if used:
            item.add_marker(pytest.mark.timeout(900))

    def place(item) -> int:
        named = item.path.name in FIRST
        return FIRST.index(item.path.name) if named else len(FIRST) + (item.path not in slow)

    items.sort(key=place)


def shared(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder for all workers of pytest-xdist."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def warm_start(tmp_path_factory) -> Iterator[None]:
    """Kernels, commands and books of this session are forked by `warm`, from one server for all workers."""
    folder = shared(tmp_path_factory, "warm")
    kernel = folder / "kernels" / "python3" / "kernel.json"
    server = None
    with FileLock(f"{folder}.lock"):
        if not kernel.is_file():
            server = warm.start(folder / "socket")
            kernel.parent.mkdir(parents=True)
            argv = [sys.executable, "-S", "-E", warm.__file__, "-m", "ipykernel_launcher", "-f"]
            text = {"argv": [*argv, "{connection_file}"], "display_name": "", "language": "python"}
            kernel.write_text(json.dumps(text))
    os.environ |= {warm.SOCKET: str(folder / "socket"), "JUPYTER_PATH": str(folder)}
    warm.build_books()
    yield
    if server is not None:
        server.stdin.close()
        server.wait()


def reproduced(factory: Any, home: Path, profile: str, *arguments: str) -> Path:
    """``home``, with what ``adaptive-margins reproduce`` makes of a profile there, and what it said in reproduce.log."""
    done_here = shared(factory, "reproduced") / Path(profile).stem
    with FileLock(f"{home}.lock"):  # the first worker makes it, others wait
        if done_here.is_file():  # in this session: workers may be reading it
            return home
        done = command("reproduce", "--profile", profile, *arguments, home=home, timeout=850)
        if done.returncode:
            pytest.fail(
                f"reproduce --profile {profile} failed:\n{done.stdout[-8000:]}", pytrace=False
            )
        (home / "reproduce.log").write_text(done.stdout)
        done_here.touch()
    return home


@pytest.fixture(scope="session")
def smoke_home(tmp_path_factory, warm_start) -> Path:
    """A home folder with everything that ``adaptive-margins reproduce --profile smoke`` makes. Read only: copy to change.

    For repeated test runs, $ADAPTIVE_MARGINS_TEST_HOME may name a folder: what is finished there is not made again.
    """
    given = os.environ.get(SHARED_HOME)
    home = Path(given).resolve() if given else shared(tmp_path_factory, "smoke")
    numbered = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    arguments = [] if numbered else ["--runs-only"]
    return reproduced(tmp_path_factory, home, "smoke", *arguments)


@pytest.fixture(scope="session")
def smoke(smoke_home):
    """The reproduction that `smoke_home` holds, opened for reading."""
    from adaptive_margins import paper

    return paper.open("smoke", smoke_home)


def plain_embeddings(model: Any, texts: Sequence[str], length: int) -> Any:
    """Sentence Transformers' own way from texts to unit vectors, one text at a time."""
    before, model.max_seq_length = model.max_seq_length, length
    vectors = [
        model.encode([text], normalize_embeddings=True, show_progress_bar=False)[0]
        for text in texts
    ]
    model.max_seq_length = before
    return np.stack(vectors)


def write_tokenizer(folder: Path, kind: str = "bert", words: Sequence[str] = WORDS) -> None:
    """A word tokenizer; ``roberta`` and ``mpnet`` have their padding at id 1, as theirs do."""
    from transformers import BertTokenizer

    words = list(words)
    if kind in ("roberta", "mpnet"):
        words[0], words[1] = words[1], words[0]
    vocabulary = {word: i for i, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary, model_max_length=64).save_pretrained(folder)


def write_encoder(folder: Path, kind: str, words: Sequence[str] = WORDS) -> Path:
    """A randomly initialised model of that kind with its tokenizer: 3 layers, 16 dimensions, a few words."""
    import torch
    from transformers import AutoConfig, AutoModel

    pad = 1 if kind in ("roberta", "mpnet") else 0
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    if kind == "distilbert":
        names = ["dim", "n_layers", "n_heads", "hidden_dim"]
    sizes = dict(zip(names, (16, 3, 2, 24), strict=True))
    config = AutoConfig.for_model(
        kind, vocab_size=len(words), max_position_embeddings=64, pad_token_id=pad, initializer_range=0.5, **sizes
    )  # fmt: skip
    torch.manual_seed(7)
    AutoModel.from_config(config).save_pretrained(folder)
    write_tokenizer(folder, kind, words)
    return folder


def write_retriever(
    folder: Path, kind: str, seed: int, words: Sequence[str] = WORDS, *,
    linear: bool = False, dim: int | None = None, prompts: dict[str, str] | None = None,
) -> str:  # fmt: skip
    """A random Sentence Transformers folder: [CLS], and as ANCE has them, a linear layer and a layer norm."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (  # fmt: skip
        Dense,
        LayerNorm,
        Pooling,
        Transformer,
    )

    plain = write_encoder(folder.with_name(f"{folder.name}-plain"), kind, words)
    transformer = Transformer(str(plain))
    torch.manual_seed(seed)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    modules: list[torch.nn.Module] = [transformer, Pooling(16, pooling_mode="cls")]
    if linear or dim:
        modules.append(Dense(16, dim or 16, activation_function=torch.nn.Identity()))
    if linear:
        modules.append(LayerNorm(16))
        torch.nn.init.normal_(modules[-1].norm.weight)
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Callable[..., Path]:
    """``tiny_folder("bert")`` → folder of `write_encoder`'s model of that kind."""
    folders: dict[str, Path] = {}

    def make(kind: str = "bert") -> Path:
        if kind not in folders:
            folders[kind] = write_encoder(tmp_path_factory.mktemp(kind), kind)
        return folders[kind]

    return make


MINIATURE_SIZES = {  # in the place of the sizes of profiles/paper.yaml
    "static": {"targets": [0.3, 1.0], "triples": 32, "batch_size": 16},
    "adaptive": {"triples": 64, "batch_sizes": [16], "evaluate_every_steps": 2},
    "distributed": {"triples": 64, "batch_sizes": [16], "evaluate_every_steps": 2},
    "comparison": {"triples": 96, "batch_sizes": [16], "evaluate_every_steps": 2, "patience": 2},
    "target_plot": {"window": 2, "span": 3},
    "differences": {"seeds": [1], "draws": 50},
    "training": {"checkpoint_every": 3},
    "ranking": {"shard": 256, "batch_tokens": 4096, "devices": ["cpu", "cpu"]},
}


def write_miniature(home: Path, extends: str = "paper", **values: Any) -> Path:
    """A profile with a small collection and random encoders, of the same kinds; returns its file.

    Only sizes, places and the device differ. The collection is converted, so that other processes find it.
    """
    import irds_miniature
    from adaptive_margins import paper

    small = irds_miniature.register(
        home / "files", f"am-miniature-{home.name}", passages=700, triples=2000, depth=100
    )
    words = [*SPECIAL, *irds_miniature.VOCABULARY]
    sets = {"TREC-DL19": small.sets["dl19"], "TREC-DL20": small.sets["dl20"]}
    counts = {"TREC-DL19": small.counts["dl19"], "TREC-DL20": small.counts["dl20"]}
    profile = {
        "name": f"miniature-{extends}",
        "extends": extends,
        "about": "A profile in small: a collection written by the test suite, random encoders.",
        "collection": {
            "name": "Miniature", "passages": small.passages, "triples": small.triples, "sets": sets,
            "counts": {**{k: small.counts[k] for k in ("passages", "train", "triples")}, **counts},
            **values.pop("collection", {}),
        },
        "encoders": {
            kind: {
                "base": str(write_encoder(home / "encoders" / kind, kind, words)),
                "revision": None,
                "stated": None,
            }
            for kind in ("distilbert", "roberta", "mpnet")
        },
        "untrained": {
            "dpr": {
                "base": write_retriever(home / "encoders" / "passages", "bert", 1, words),
                "query_base": write_retriever(home / "encoders" / "queries", "bert", 2, words),
                "query_revision": None,
            },
            "ance": {"base": write_retriever(home / "encoders" / "ance", "roberta", 3, words, linear=True)},
            "tas-b": {"base": write_retriever(home / "encoders" / "tas-b", "distilbert", 4, words)},
        },
        "teacher": {
            "model": {"base": str(write_encoder(home / "encoders" / "bert", "bert", words)), "revision": None},
            "in_batch": {"base": str(home / "encoders" / "bert"), "revision": None},
            "clusters": 4,
            "hard_margin": None,
        },
        "device": "cpu",
        **MINIATURE_SIZES,
        **values,
    }  # fmt: skip
    for encoder in profile["untrained"].values():
        encoder |= {"revision": None, "stated": None}
    path = home / f"miniature-{extends}.yaml"
    path.write_text(yaml.safe_dump(profile))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTIVE_MARGINS_ACCEPT_LICENCE", "all")
        paper.open(path, home).inputs.collection  # noqa: B018
    return path


@pytest.fixture(scope="session")
def miniature_home(tmp_path_factory, warm_start) -> Path:
    """A home folder with the runs of the profile paper, in small. Read only.

    $ADAPTIVE_MARGINS_TEST_MINIATURE may name a folder, as with `smoke_home`.
    """
    given = os.environ.get(SHARED_MINIATURE)
    home = Path(given).resolve() if given else shared(tmp_path_factory, "miniature")
    profile = home / "miniature-paper.yaml"
    with FileLock(f"{home}.profile.lock"):
        if not profile.is_file():
            write_miniature(home)
    return reproduced(tmp_path_factory, home, str(profile), "--runs-only")


@pytest.fixture(scope="session")
def miniature(miniature_home):
    """The reproduction that `miniature_home` holds, opened for reading."""
    from adaptive_margins import paper

    return paper.open(miniature_home / "miniature-paper.yaml", miniature_home)


# Values of the smallest configurations of runs, of each kind.
RUN_VALUES = {
    "collection": "f" * 16, "depth": 8, "validation": "validation", "rerank_measures": ["nDCG@10"], "code_version": 1,
}  # fmt: skip
ENCODER_VALUES = {
    **RUN_VALUES, "encoder": "tiny", "weights": "0" * 64, "pooling": "mean", "layers": None, "trained_layers": None,
    "query_length": 8, "passage_length": 12, "precision": "fp32",
}  # fmt: skip
TRAINING_VALUES = {
    **ENCODER_VALUES, "target": "distributed", "in_batch": False, "batch_size": 4, "triples": 28, "learning_rate": 1e-2,
    "weight_decay": 0.0, "decay": 1.0, "optimizer": "adamw_torch_fused", "dropout": 0.0, "seed": 1, "evaluate_every": 2,
    "patience": 0, "keep": "best", "selection": "nDCG@10",
}  # fmt: skip


def run_config(**values: Any) -> Any:
    """The configuration of a small training run, ``values`` in the place of its own."""
    from adaptive_margins.runs import TrainingRun

    return TrainingRun.model_validate({**TRAINING_VALUES, **values})
