"""Computes runs: trains, ranks and stores, one or many at a time, and resumes interrupted ones."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

import adaptive_margins.paper.backends as backends
from adaptive_margins.data.trec import Run
from adaptive_margins.distributed import is_first, processes, shared, wait
from adaptive_margins.encoder.embed import embed, embed_shards
from adaptive_margins.encoder.frozen import LoadedEncoder
from adaptive_margins.encoder.load import save_encoder, state_hash
from adaptive_margins.evaluation.measures import Evaluation, evaluate
from adaptive_margins.files import HOME_VARIABLE, check_output, locked
from adaptive_margins.paper.experiments import Experiments
from adaptive_margins.paper.inputs import Inputs
from adaptive_margins.paper.shared_store import LeasedError, open_store
from adaptive_margins.paper.store import R, Store, StoredRun, StoreError
from adaptive_margins.paper.teacher import teacher_of
from adaptive_margins.profiles.config import Profile
from adaptive_margins.progress import bar, say
from adaptive_margins.ray_tasks import ray_options
from adaptive_margins.retrieval.exact import approximation_recall, exact_search, rerank
from adaptive_margins.retrieval.faiss_index import (
    IndexSettings,
    build_index,
    choose_index,
    search_index,
)
from adaptive_margins.runs import (
    BM25Run,
    EncoderRun,
    RunConfig,
    TrainingRun,
    TransferRun,
    ZeroShotRun,
)
from adaptive_margins.teachers import InBatchTeacher, TeacherError

if TYPE_CHECKING:
    from datasets import Dataset

    from adaptive_margins.training import TrainingResult

Rankings = dict[str, dict[str, Run]]
"""Mode → query set → ranking."""


@dataclasses.dataclass(frozen=True)
class _Reranked(Evaluation):
    """Measures with the ranking they were computed from."""

    ranking: Run


class Runner:
    """Computes the runs that are missing in the store.

    ``place`` is where that is shared (`shared_store.open_store`) and what Ray is asked for
    (`ray_options`); a driver and its workers have one ``owner``, and hold its leases.
    """

    def __init__(
        self, inputs: Inputs, store: Store, place: tuple[str, str] = ("", ""), owner: str = ""
    ) -> None:
        self.inputs = inputs
        self.store = store
        self.place = place
        self.owner = owner or uuid4().hex
        self.memory = 0  # bytes that a run takes, which Ray is asked for; 0: unknown
        self.profile = inputs.profile
        self.teacher = teacher_of(inputs)
        self._ray = ray_options(place[1], place[0]) if place[1] else ("", {})
        self._backend: tuple[backends.Submit, int] | None = None
        self._check: Callable[[], None] = lambda: None

    # ---- many runs -----------------------------------------------------------------------------

    def ensure(self, configs: Iterable[R]) -> list[StoredRun[R]]:
        """Return the finished runs of ``configs``, in order; missing ones are computed first."""
        configs = list(configs)
        missing = shared(self.store.missing(configs))
        if missing:
            if is_first():
                check_output(self.store.path(missing[0]) / "config.json")
            if is_first() and self._ray[0] in ("", "local"):
                self.prepare(missing)
            wait()
            with self.workers():
                self._compute(missing)
        return [self.store.get(c) for c in configs]

    @contextmanager
    def workers(self) -> Iterator[None]:
        """What computes missing runs in the block, for all calls of `ensure`: see `backends`.

        Workers start with the first missing run. Without Ray, with one worker, or under torchrun,
        runs are computed in this process.
        """
        if self._backend is not None:
            yield
            return
        address, needs = self._ray
        on_cuda = self.profile.device.startswith("cuda")
        needs = {"num_cpus": 1, "num_gpus": int(on_cuda), **needs}
        slots = 2**31 if address else 1 if processes() > 1 else self.profile.workers
        gpus = backends.visible_gpus() if on_cuda and slots > 1 and not address else []
        make = functools.partial(
            _worker,
            self.profile,
            self.inputs.home,
            self.store.folder,
            self.place,
            owner=self.owner,
            one_gpu=bool(needs["num_gpus"] if address else gpus),
        )
        backend: Any = nullcontext(functools.partial(backends.at_once, self.execute))
        if address:
            backend = backends.on_ray(address, make, needs, lambda: self.memory)
        elif slots > 1:
            backend = backends.in_processes(slots, make, gpus)
        with backend as submit:
            self._backend = submit, slots
            try:
                yield
            finally:
                self._backend = None

    def prepare(self, missing: Iterable[RunConfig]) -> None:
        """Compute what the workers share (tokens, states, candidates, teacher) with all cores."""
        missing = list(missing)
        with locked(self.inputs.home / "cache" / "inputs"):
            for name in dict.fromkeys(c.encoder for c in missing if isinstance(c, EncoderRun)):
                self.inputs.encoder(name)
            for name in self.inputs.evaluated_sets:
                self.inputs.top_candidates(name)
                self.inputs.bm25_ranking(name)
            distilled = [c for c in missing if isinstance(c, TrainingRun) and c.teacher is not None]
            if distilled and self.teacher is not None:
                self.teacher.prepare()
                for config in distilled:  # stores clusters; errors come before any training
                    self.teacher.order(config, steps=1)

    def _compute(self, missing: Iterable[RunConfig]) -> None:
        # Zero-shot runs first: training runs read step 0 from them. Then long runs, so that the
        # workers end at about the same time: full rankings, and then those with many triples.
        def order(config: RunConfig) -> tuple[bool, bool, int]:
            triples = getattr(config, "triples", 0)
            return isinstance(config, TrainingRun), not config.test_sets, -triples

        ordered = sorted(missing, key=order)
        assert self._backend is not None
        with bar("runs", total=len(ordered), unit="runs") as progress:
            for config in backends.compute(*self._backend, ordered):
                result = self.store.get(config).result
                seconds = result["train_seconds"] + result["eval_seconds"]
                progress.update(1)
                say(f"{config.encoder} {describe(config)}: {seconds:.1f} s")

    # ---- one run -------------------------------------------------------------------------------

    def execute(self, config: R, stale: str | None = None) -> StoredRun[R]:
        """Compute one run in this process and store it.

        A run that was killed is resumed from its last complete checkpoint. If another process of
        this machine computes the same run, this call waits for it and returns its result.

        Raises:
            LeasedError: another process, perhaps of another machine, has its lease in a shared
                store, and the content of that is not ``stale``.
        """
        work = self.inputs.home / "cache" / "work" / config.run_id
        with ExitStack() as stack:
            refused = None
            try:
                if is_first() and self.store.leases is not None:
                    lease = self.store.leases.held(config.run_id, self.owner, stale)
                    self._check = stack.enter_context(lease)
            except LeasedError as error:
                refused = error
            if (refused := shared(refused)) is not None:
                raise refused
            stack.enter_context(locked(work) if is_first() else nullcontext())
            if not shared(self.store.has(config)):
                if isinstance(config, TrainingRun) or is_first():
                    self._compute_one(config, work)
                if is_first():
                    shutil.rmtree(work, ignore_errors=True)
            if is_first():
                self._check()
                self.store.publish(config)
            wait()
        return self.store.get(config)

    def _compute_one(self, config: Any, work: Path) -> None:
        """Train if the run is one, in all processes; evaluate, rank and store in the first."""
        runs: Rankings = {"rerank": {}}
        if isinstance(config, BM25Run):
            runs["rerank"] = {name: self.inputs.top_candidates(name) for name in config.rerank_sets}
            runs["full"] = {name: self.inputs.bm25_ranking(name) for name in config.test_sets}
            self.store.put(config, None, self._evaluated(runs, config), runs)
            return
        encoder = self.inputs.encoder(config.encoder)
        model = encoder.fresh()
        validate = functools.partial(self._validated, encoder, config=config)
        result = None
        save = None
        extra: dict[str, Any] = {}
        if isinstance(config, TransferRun):
            state = StoredRun(self.inputs.home / "runs" / config.source).weights(config.checkpoint)
            if unknown := model.load_state_dict(state, strict=False).unexpected_keys:
                raise StoreError(
                    f"run {config.source} has parameters that encoder {config.encoder!r} lacks,"
                    f" {unknown[0]} first; it was trained with other settings"
                )
        if isinstance(config, TrainingRun):
            result = self._train(config, encoder, model, validate, work)
            if not is_first():
                return
        selected = result.kept if result else validate(model)
        # The selected evaluation has no ranking if it was read from a checkpoint or the store.
        reranked = selected if isinstance(selected, _Reranked) else validate(model)
        if config.test_sets:
            runs, extra["index"] = self._rank_tests(encoder, model, config, work)
        evaluations = self._evaluated(runs, config)
        runs.pop("exact", None)
        # If the validation set is a test set too, its scores are those of the learning curve.
        evaluations["rerank"][config.validation] = selected
        runs["rerank"][config.validation] = reranked.ranking
        if isinstance(config, TrainingRun) and config.teacher is not None and self.teacher:
            extra["teacher"] = self.teacher.about
        if isinstance(config, TrainingRun) and config.save_model:
            save = functools.partial(save_encoder, encoder.whole_with(model))
        self.store.put(config, result, evaluations, runs, extra=extra, save_model=save)

    def _train(
        self, config: TrainingRun, encoder: LoadedEncoder, model: Any, validate: Any, work: Path
    ) -> TrainingResult:
        """Train ``model``. Step 0 is read from the zero-shot run if that is stored.

        Not on another set than that run's own: there, its embeddings may be of 16 bits.
        """
        from adaptive_margins.training import train  # seconds, of no use to finished runs

        start = Experiments(self.inputs, self.store).zero_shot_run(config.encoder)
        initial, same = None, (config.similarity, config.validation) == ("cosine", start.validation)
        if same and self.store.has(start):
            initial = self.store.get(start).evaluation("rerank", config.validation)
        triples, order, in_batch = self.inputs.triples, None, None
        if config.teacher is not None:
            triples, order, in_batch = self._distillation(config)
        return train(
            config,
            model,
            triples,
            encoder.queries,
            encoder.passages,
            validate,
            initial=initial,
            folder=work,
            checkpoint_every=self.profile.training.checkpoint_every,
            device=self.profile.device,
            order=order,
            in_batch=in_batch,
            names=(self.inputs.queries.ids, self.inputs.collection.passages.ids),
        )

    def _distillation(
        self, config: TrainingRun
    ) -> tuple[Dataset, np.ndarray, InBatchTeacher | None]:
        """Triples with the teacher's scores, their order, and the in-batch teacher."""
        if self.teacher is None or self.teacher.identity != config.teacher:
            there = self.teacher.identity if self.teacher else "none"
            raise TeacherError(
                f"run {config.run_id} needs the scores of teacher {config.teacher}; the teacher of"
                f" profile {self.profile.name!r} is {there}"
            )
        self.teacher.prepare()
        in_batch = self.teacher.across if config.in_batch else None
        return self.teacher.dataset(), self.teacher.order(config), in_batch

    def _evaluate(self, run: Run, query_set: str, measures: Iterable[str]) -> Evaluation:
        self._check()
        return evaluate(self.inputs.collection.qrels[query_set], run, list(measures))

    def _evaluated(self, runs: Rankings, config: RunConfig) -> dict[str, dict[str, Evaluation]]:
        measures = {"rerank": config.rerank_measures}
        return {
            mode: {
                name: self._evaluate(run, name, measures.get(mode, config.full_measures))
                for name, run in sets.items()
            }
            for mode, sets in runs.items()
        }

    def _validated(self, encoder: LoadedEncoder, model: Any, config: EncoderRun) -> _Reranked:
        """Rerank the candidates of the validation queries with ``model``."""
        name = config.validation
        queries = self._embed_queries(encoder, model, config, name)
        rows = self.inputs.candidate_rows(name)
        passages = embed(model, encoder.passages, rows, **self._embedding(config))
        run = self._reranked(config, name, queries, passages)
        found = self._evaluate(run, name, config.rerank_measures)
        return _Reranked(found.mean, found.per_query, run)

    def _reranked(
        self, config: EncoderRun, query_set: str, queries: np.ndarray, passages: np.ndarray
    ) -> Run:
        """The candidates of a set, reranked by the embeddings of its queries and of them."""
        collection, ids = self.inputs.collection, self.inputs.collection.passages.ids
        return rerank(
            self.inputs.top_candidates(query_set),
            queries,
            collection.queries[query_set].ids,
            passages,
            [ids[int(row)] for row in self.inputs.candidate_rows(query_set)],
            normalize=self._embedding(config)["normalize"],
        )

    def _embedding(self, config: EncoderRun) -> dict[str, Any]:
        """How a run's texts are embedded: with length 1 if they are compared by the cosine."""
        declared = self.inputs.settings(config.encoder).similarity
        return {
            "batch_tokens": self.profile.ranking.batch_tokens,
            "precision": config.precision,
            "normalize": getattr(config, "similarity", declared) == "cosine",
        }

    def _embed_queries(
        self, encoder: LoadedEncoder, model: Any, config: EncoderRun, query_set: str
    ) -> np.ndarray:
        rows = self.inputs.query_rows(query_set)
        model = encoder.query_model or model
        return embed(model, encoder.queries, rows, **self._embedding(config))

    def _rank_tests(
        self, encoder: LoadedEncoder, model: Any, config: EncoderRun, work: Path
    ) -> tuple[Rankings, dict[str, Any]]:
        """Embed all passages; rerank the test sets, search a FAISS index, and search exactly.

        A run that was killed while it embedded goes on with the next shard; these are named by a
        hash of the weights, and those of others are never mixed in.
        """
        ranking, options, depth = self.profile.ranking, self._embedding(config), config.full_depth
        since = time.perf_counter()
        passages = embed_shards(
            model,
            encoder.passages,
            work / f"passages-{state_hash(model)}",
            shard=ranking.shard,
            dtype=ranking.dtype,
            devices=ranking.devices or (self.profile.device,),
            **options,
        )
        embedded = time.perf_counter()
        settings, index = choose_index(*passages.shape, depth=depth), None
        if options["normalize"]:
            threads = 1 if settings.quick else os.cpu_count() or 1  # one: it is reproducible
            seed = config.seed if isinstance(config, TrainingRun) else 0
            index = build_index(passages, settings, seed=seed, threads=threads)
        else:
            note = "the dot product is searched exactly"
            settings = IndexSettings("Flat", passages.shape[1], note=note)
        built = time.perf_counter()
        runs: Rankings = {"rerank": {}, "full": {}, "exact": {}}
        recall, ids = {}, self.inputs.collection.passages.ids
        for name in config.test_sets:
            queries = self._embed_queries(encoder, model, config, name)
            candidates = passages[self.inputs.candidate_rows(name)]
            runs["rerank"][name] = self._reranked(config, name, queries, candidates)
            qids = self.inputs.collection.queries[name].ids
            full = exact = exact_search(queries, passages, qids, ids, depth)
            if index is not None:
                full = search_index(index, settings, queries, qids, ids, depth, passages)
            runs["full"][name], runs["exact"][name] = full, exact
            recall[name] = approximation_recall(full, exact, depth)
        return runs, {
            **dataclasses.asdict(settings),
            "embed_seconds": embedded - since,
            "build_seconds": built - embedded,
            "search_seconds": time.perf_counter() - built,
            "recall_of_exact": recall,
        }


def describe(config: RunConfig, with_target: bool = True) -> str:
    """A run in words; without ``with_target``, the runs of a margin ε sweep have the same."""
    if isinstance(config, BM25Run):
        return "ranking"
    if isinstance(config, ZeroShotRun):
        return "zero-shot, full ranking"
    if isinstance(config, TransferRun):
        return f"{config.checkpoint} checkpoint of {config.source} on another collection"
    assert isinstance(config, TrainingRun)
    target = str(config.target or config.loss)
    if isinstance(config.target, float):
        target = f"static ε = {config.target:g}" if with_target else "static"
    parts = {
        target: True,
        "in-batch": config.in_batch,
        config.sampling: config.sampling != "random",
        f"B {config.batch_size}": True,
        f"{config.triples} triples": True,
        "early stopping": config.patience > 0,
        "full ranking": bool(config.test_sets),
    }
    return ", ".join(part for part, applies in parts.items() if applies)


def _worker(
    profile: Profile, home: Path, folder: Path, place: tuple[str, str], *, owner: str, one_gpu: bool
) -> Runner:
    """A runner in a worker process, perhaps on a machine with another home folder."""
    if one_gpu:
        ranking = profile.ranking.model_copy(update={"devices": ()})
        profile = profile.model_copy(update={"device": "cuda", "ranking": ranking})
    if place[1] not in ("", "local"):
        home = Path(os.environ.get(HOME_VARIABLE, home))
        folder = home / "runs"
    return Runner(Inputs(profile, home), open_store(place[0], folder), owner=owner)
