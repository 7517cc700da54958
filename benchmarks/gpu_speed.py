"""How fast is the project on this device, and how long would the profiles take? Parts of gpu_check.py."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from gpu_correct import CHUNKS, free, one_line
from gpu_material import KINDS, Context, Row, Rows, encoder, row, triples
from material import PASSAGE_LENGTH, flops
from schemes import Setting, Step, ours, sentence_transformers, tokens_of
from torch import Tensor

from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.speed import packed
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.training_step import TripleCollator

PROFILE = f"in {CHUNKS} chunks, as the profiles"
PEER = "Sentence Transformers' trainer"
_FLASH = "packed_varlen"  # transformers would look for a kernel, were "flash" in it


def synchronize(context: Context) -> None:
    """Wait until the device has computed everything."""
    if context.device != "cpu":
        torch.cuda.synchronize()


def _seconds(context: Context, work: Callable[[], object]) -> float:
    synchronize(context)
    started = time.perf_counter()
    work()
    synchronize(context)
    return time.perf_counter() - started


# ---- training and encoding -------------------------------------------------------------------------------------------


def matmul_rate(context: Context) -> float:
    """Multiplications and additions a second of a product of two random bf16 matrices."""
    size, number = context.sizes.matrix, 10
    a, b = (torch.randn(size, size, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    _seconds(context, lambda: [a @ b for _ in range(3)])
    return number * 2 * size**3 / _seconds(context, lambda: [a @ b for _ in range(number)])


def throughput(context: Context) -> Rows:
    """Rates of the profiles' own way first, then of the others, batch size by batch size."""
    peak = matmul_rate(context)
    size = context.sizes.matrix
    yield row(
        "bf16 matrix product", peak / 1e12, "TFLOP/s", note=f"two random matrices, {size} × {size}"
    )
    models = {kind: encoder(context, kind, dropout=None) for kind in KINDS}
    for kind, model in models.items():
        yield _embedding(context, kind, model)
    contestants = [
        (PROFILE, _in_chunks(CHUNKS)),
        (PEER, _peer),
        ("packed, FlashAttention", _flash),
        ("padded to the longest", _in_chunks(1)),
    ]
    for size in context.sizes.batches:
        for name, make in contestants:
            for kind, model in models.items():
                yield _training(context, kind, model, size, name, make, peak)


Maker = Callable[[Context, Any, Setting], Step | str]


def _in_chunks(chunks: int) -> Maker:
    """All texts of a step padded in so many chunks, also where they would be packed."""

    def collator(queries: Tokens, passages: Tokens, chunks: int, *_: Any) -> TripleCollator:
        return TripleCollator(queries, passages, chunks, Tokens.batch)

    return lambda _, __, setting: ours(chunks, collator, setting=setting)


def _peer(context: Context, model: Any, setting: Setting) -> Step | str:
    return sentence_transformers(True, setting)


def _flash(context: Context, model: Any, setting: Setting) -> Step | str:
    """Texts end to end; on a GPU by torch's FlashAttention. Or the reason why not."""
    config = model[0].model.config
    if config.model_type == "mpnet":
        return "MPNet adds a position bias to the attention, which FlashAttention cannot"
    if context.device == "cpu":
        return ours(1, setting=setting)
    if torch.cuda.get_device_capability() < (8, 0):
        return "FlashAttention needs a card of compute capability 8.0 (Ampere) or newer"
    try:
        from torch.nn.attention.varlen import varlen_attn as _  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn (2.10 has)"
    first = config.pad_token_id + 1 if config.model_type == "roberta" else 0

    def collator(queries: Tokens, passages: Tokens, chunks: int, *_: Any) -> TripleCollator:
        return TripleCollator(queries, passages, chunks, lambda t, rows: packed(t, rows, first))

    def copied(model: Any) -> Any:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(_FLASH, _flash_attention)
        AttentionMaskInterface.register(_FLASH, lambda **_: None)
        model = copy.deepcopy(model)
        model[0].model.set_attn_implementation(_FLASH)
        return model

    return ours(1, collator, copied, setting)


def _flash_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each text of (1, H, T, D / H) packed ones, without dropout."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    longest = PASSAGE_LENGTH
    return varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, longest, longest)[None], None


def _training(
    context: Context, kind: str, model: Any, size: int, name: str, make: Maker, peak: float
) -> Row:
    """The line of a way to train: triples/s, share of the matmul rate, peak memory."""
    what, sizes = f"{kind}, B {size}, {name}", context.sizes
    setting = Setting(context.device, "bf16", "adamw_8bit", sizes.warm, sizes.timed)
    batch = triples(sizes, size)
    more: dict[str, Any] = {"encoder": kind, "batch_size": size, "way": name}
    try:
        step = make(context, model, setting)
        if isinstance(step, str):
            return row(what, unit="triples/s", reason=step, **more)
        if context.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        seconds, _ = step(model, batch)
    except Exception as error:
        return row(what, unit="triples/s", reason=one_line(error), **more)
    finally:
        free(context)
    lengths = np.concatenate([tokens.lengths for tokens in tokens_of(model, batch)])
    share = flops(model, lengths) / seconds / peak
    note = f"{share:.0%} of the matrix product's rate"
    memory = None
    if context.device != "cpu":
        memory = torch.cuda.max_memory_allocated()
        note += f", {memory / 1e9:.1f} GB"
    return row(
        what,
        size / seconds,
        "triples/s",
        note=note,
        share_of_matmul=share,
        peak_bytes=memory,
        **more,
    )


def _embedding(context: Context, kind: str, model: Any) -> Row:
    """The line of passages/s, as full rankings embed them."""
    what, sizes = f"{kind}, passages embedded", context.sizes
    more = {"encoder": kind, "way": "embed"}
    try:
        texts = triples(sizes, sizes.passages // 2)
        model = copy.deepcopy(model).to(context.device)
        _, tokens = tokens_of(model, texts)

        def work(count: int) -> np.ndarray:
            return embed(model, tokens, range(count), batch_tokens=65536, precision="bf16")

        work(max(1, len(tokens) // 8))
        rate = len(tokens) / _seconds(context, lambda: work(len(tokens)))
    except Exception as error:
        return row(what, unit="passages/s", reason=one_line(error), **more)
    return row(what, rate, "passages/s", **more)


# ---- FAISS -----------------------------------------------------------------------------------------------------------

_DEPTH, _CLUSTERS, _GROWTH = 100, 256, 14
"""Hits; clusters of the vectors; how much longer ten times the vectors take to build at most."""


def _unit(rng: np.random.Generator, centres: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Random vectors of length 1 around the centres, in blocks."""
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        noise = rng.standard_normal((size, centres.shape[1]), dtype=np.float32)
        vectors = centres[rng.integers(len(centres), size=size)] + noise
        yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def indexes(context: Context) -> Rows:
    """Indexes of the project's kind, trained on CPU and GPU, and exact search on both."""
    import faiss

    from adaptive_margins.retrieval.exact import exact_search

    sizes, rng = context.sizes, np.random.default_rng(1)
    centres = rng.standard_normal((_CLUSTERS, sizes.dimensions), dtype=np.float32)
    everything = np.concatenate(list(_unit(rng, centres, max(sizes.vectors))))
    queries = np.concatenate(list(_unit(rng, centres, sizes.queries)))
    qids = [str(q) for q in range(len(queries))]
    expected: dict[str, float] = {"CPU": 0.0, "GPU": 0.0}
    for count in sizes.vectors:
        vectors, ids = everything[:count], [str(i) for i in range(count)]
        started = time.perf_counter()
        exact = exact_search(queries, vectors, qids, ids, _DEPTH)
        rate = len(queries) / (time.perf_counter() - started)
        yield row(f"{count:,} vectors, exact search on the CPU", rate, "queries/s")
        for device in ("GPU", "CPU"):
            if device == "GPU" and not faiss.get_num_gpus():
                yield row(f"{count:,} vectors, GPU", reason=_why_no_gpu(context))
                continue
            if expected[device] > context.left:
                reason = f"would take about {expected[device]:.0f} s, {context.left:.0f} s are left"
                yield row(f"{count:,} vectors, {device}", reason=reason)
                continue
            if device == "GPU":
                yield _exact_on_gpu(queries, vectors, exact)
            try:
                line = _index(device, queries, vectors, exact)
                expected[device] = _GROWTH * line["build_seconds"]
                yield line
            except Exception as error:
                yield row(f"{count:,} vectors, {device}", reason=one_line(error))


def _why_no_gpu(context: Context) -> str:
    if context.device == "cpu":
        return "the check runs on the CPU"
    return "FAISS is a build for CPUs; install the extra gpu (faiss-gpu-cu12) in place of cpu"


def _exact_on_gpu(queries: np.ndarray, vectors: np.ndarray, exact: Any) -> Row:
    import faiss

    what = f"{len(vectors):,} vectors, exact search on the GPU"
    try:
        resources = faiss.StandardGpuResources()
        arguments = {"metric": faiss.METRIC_INNER_PRODUCT, "device": 0}
        faiss.knn_gpu(resources, queries[:1], vectors[:1000], 1, **arguments)
        started = time.perf_counter()
        _, found = faiss.knn_gpu(resources, queries, vectors, _DEPTH, **arguments)
        rate = len(queries) / (time.perf_counter() - started)
    except Exception as error:
        return row(what, reason=one_line(error))
    same = [len({str(i) for i in hits} & exact[str(q)].keys()) for q, hits in enumerate(found)]
    share = float(np.mean(same)) / _DEPTH
    return row(
        what,
        rate,
        "queries/s",
        note=f"copying the vectors included; recall@100 {share:.4f}",
        recall=share,
    )


def _index(device: str, queries: np.ndarray, vectors: np.ndarray, exact: Any) -> Row:
    """Build and search an index; on the CPU without the GPU's clustering."""
    import faiss

    from adaptive_margins.retrieval.exact import approximation_recall
    from adaptive_margins.retrieval.faiss_index import build_index, choose_index, search_index

    count, dimensions = vectors.shape
    settings = choose_index(count, dimensions, depth=_DEPTH)
    qids, ids = ([str(i) for i in range(n)] for n in (len(queries), count))
    started = time.perf_counter()
    with mock.patch.object(faiss, "get_num_gpus", lambda: int(device == "GPU")):
        index = build_index(vectors, settings, seed=1, threads=os.cpu_count() or 1)
    built = time.perf_counter()
    found = search_index(index, settings, queries, qids, ids, _DEPTH, vectors)
    rate = len(queries) / (time.perf_counter() - built)
    recall = approximation_recall(found, exact, _DEPTH)
    where = "clustered on the GPU" if device == "GPU" else "built on the CPU"
    return row(
        f"{count:,} vectors, index {where}", built - started, "s",
        note=f"{rate:,.0f} queries/s, recall@100 {recall:.3f}, {settings.factory}",
        build_seconds=built - started, queries_per_second=rate, recall=recall, vectors=count, device=device,
    )  # fmt: skip


# ---- hours -----------------------------------------------------------------------------------------------------------

SHAPES = {
    **{kind: kind for kind in KINDS},
    "dpr": "roberta",
    "ance": "roberta",
    "tas-b": "distilbert",
}
"""The encoders of the profiles, by which of ours they are as large as."""


def hours(context: Context) -> Rows:
    """The plans of the two profiles, with the rates that were measured."""
    from adaptive_margins.paper.inputs import Inputs
    from adaptive_margins.paper.plan import make_plan
    from adaptive_margins.paper.store import Store
    from adaptive_margins.profiles.load import load_profile

    largest = context.sizes.batches[0]
    rates: dict[tuple[str, str], float] = {}
    for line in context.parts.get("throughput", {}).get("rows", []):
        if line["value"] and (
            line.get("way") == "embed"
            or (line.get("way"), line.get("batch_size")) == (PROFILE, largest)
        ):
            rates[line["encoder"], line["unit"]] = line["value"]
    for name in ("paper", "paper-night"):
        profile = load_profile(name)
        keys = [f"encoders__{key}" for key in profile.encoders]
        keys += [f"untrained__{key}" for key in profile.untrained]
        overrides, lacking = dict[str, float](), set[str]()
        for key, unit in product(keys, ("triples/s", "passages/s")):
            shape = SHAPES[key.partition("__")[2]]
            if (shape, unit) in rates:
                value = f"{key}__stated__{unit.replace('/s', '_per_second')}"
                overrides[value] = rates[shape, unit]
            else:
                lacking.add(f"{shape} in {unit}")
        if lacking:
            yield row(name, unit="hours", reason=f"no rate of {', '.join(sorted(lacking))}")
            continue
        with tempfile.TemporaryDirectory() as home:  # no run is finished there
            inputs = Inputs(load_profile(name, **overrides), Path(home))
            plan = make_plan(inputs, Store(Path(home) / "runs"))  # not a store that is shared
        note = f"{len(plan.runs)} runs; {plan.teacher / 3600:.1f} hours of the teacher are assumed, not measured"
        yield row(
            name,
            plan.seconds / 3600,
            "hours",
            note=note,
            runs=len(plan.runs),
            teacher_hours=plan.teacher / 3600,
        )
