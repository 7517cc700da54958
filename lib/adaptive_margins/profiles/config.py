"""Profiles: every value an experiment depends on, validated before anything runs."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from adaptive_margins.device import default_device
from adaptive_margins.profiles.encoders import EncoderSettings, TeacherSettings
from adaptive_margins.profiles.values import (
    LearningRate,
    Number,
    Positive,
    Seed,
    Settings,
    Share,
    Whole,
)

ROWS = ("static", "static in-batch", "adaptive", "adaptive in-batch", "distributed")
"""The rows of Table 3: targets, with and without in-batch negatives."""


class PyDocsSettings(Settings):
    """The PyDocs collection (data/pydocs.py).

    Packages to read, sizes of the query sets, and the length of a passage in words.
    """

    query_sets: ClassVar[tuple[str, ...]] = ("validation", "test1", "test2")

    kind: Literal["pydocs"]
    packages: tuple[str, ...] = Field(min_length=1)
    validation: Positive
    test: Positive
    max_passages: Positive | None = None
    max_words: Positive = 60
    seed: Seed = 1


class IrDatasetsSettings(Settings):
    """A collection read through ir_datasets and converted once (data/converted.py).

    Attributes:
        passages, triples: ir_datasets ids.
        sets: name of a query set → ir_datasets id.
        counts: numbers that must come out, by "passages", "train" (queries), "triples" and set.
        triples_per_query: keep the first so many triples of each query, and drop queries with
            fewer, as the released code does.
        licence: whose terms apply; unless it is empty, the user has to accept them before anything
            is fetched.
    """

    kind: Literal["ir_datasets"]
    name: str
    passages: str
    triples: str | None = None
    sets: dict[str, str] = Field(min_length=1)
    counts: dict[str, Positive | None] = Field(default_factory=dict)
    triples_per_query: Positive | None = None
    licence: str = ""

    @property
    def query_sets(self) -> tuple[str, ...]:
        """Names of the evaluated sets."""
        return tuple(self.sets)

    @model_validator(mode="after")
    def _keys_name_something(self) -> IrDatasetsSettings:
        if wrong := [name for name in self.sets if not re.fullmatch(r"[\w-]{1,100}", name)]:
            raise ValueError(f"sets: a name is letters, digits, _ and -, not {wrong[0]!r}")
        if "train" in self.sets:
            raise ValueError("sets: 'train' is the set of the training queries")
        known = {"passages", "train", "triples", *self.sets}
        if unknown := sorted(self.counts.keys() - known):
            raise ValueError(f"counts names {unknown[0]!r}; there are {', '.join(sorted(known))}")
        return self


CollectionSettings = Annotated[PyDocsSettings | IrDatasetsSettings, Field(discriminator="kind")]


class CandidateSettings(Settings):
    """What is reranked, and where negatives come from.

    Attributes:
        source: "bm25", ranked here, or "official", the lists that come with the collection.
        depth: passages per query that are reranked.
        negative_ranks: BM25 ranks [from, to) that negatives are drawn from, for a collection
            without triples.
    """

    source: Literal["bm25", "official"] = "bm25"
    depth: Positive
    negative_ranks: tuple[Positive, Positive] | None = None

    @model_validator(mode="after")
    def _ranks_ascend(self) -> CandidateSettings:
        if self.negative_ranks and self.negative_ranks[0] >= self.negative_ranks[1]:
            low, high = self.negative_ranks
            raise ValueError(f"negative_ranks {low}, {high}: the first must be the smaller one")
        return self


class LengthSettings(Settings):
    """Maximum sequence lengths in tokens, the two special tokens included."""

    query: Annotated[Whole, Field(ge=3)]
    passage: Annotated[Whole, Field(ge=3)]


class TrainingSettings(Settings):
    """The optimiser (names as in transformers' TrainingArguments.optim) and other settings."""

    learning_rate: LearningRate
    weight_decay: Annotated[Number, Field(ge=0)]
    optimizer: Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit"]
    precision: Literal["fp32", "bf16", "fp16"]
    orientation: Literal["paper", "released"] = Field("paper", description="see losses.py")
    dropout: Share | None = Field(None, description="None keeps the encoder's own")
    chunks: Positive = Field(1, description="parts of a step's texts; see training.py")
    checkpoint_every: Annotated[Whole, Field(ge=0)] = Field(0, description="steps; 0: none")


class MeasureSettings(Settings):
    """Measures in ir_measures' notation; ``selection`` decides on the best step and margin ε."""

    rerank: tuple[str, ...] = Field(min_length=1)
    full: tuple[str, ...] = Field(min_length=1)
    full_depth: Positive
    selection: str

    @model_validator(mode="after")
    def _measures_fit(self) -> MeasureSettings:
        if self.selection not in self.rerank:
            raise ValueError(
                f"selection {self.selection!r} is not among the rerank measures {list(self.rerank)}"
            )
        import ir_measures

        for notation in (*self.rerank, *self.full):
            try:
                cutoff = ir_measures.parse_measure(notation).params.get("cutoff", 0)
                too_deep = notation in self.full and cutoff > self.full_depth
            except (NameError, ValueError, TypeError) as error:
                raise ValueError(f"{notation!r} is not a measure of ir_measures: {error}") from None
            if too_deep:
                depth = self.full_depth
                raise ValueError(f"{notation!r} needs a full_depth of {cutoff}, not {depth}")
        return self


class SetSettings(Settings):
    """Names of the query sets used for tuning and learning curves, and for Tables 3 and 4."""

    validation: str
    tests: tuple[str, ...] = Field(min_length=1)


class _Experiment(Settings):
    """What an experiment may set in place of the profile's values."""

    learning_rate: LearningRate | None = None
    seed: Seed | None = None


class StaticSettings(_Experiment):
    """Section 5.1, Figure 3: runs per ε, with and without in-batch negatives.

    An encoder in ``tuned`` has no such runs: its ε without and with in-batch negatives are given.
    """

    targets: tuple[Number, ...] = Field(min_length=1)
    triples: Positive
    batch_size: Positive
    seeds: dict[str, tuple[Seed, ...]] = Field(
        default_factory=dict, description="further seeds per encoder"
    )
    tuned: dict[str, tuple[Number, Number]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_step(self) -> StaticSettings:
        if self.triples < self.batch_size:
            raise ValueError(f"triples {self.triples} do not fill a batch of {self.batch_size}")
        return self


class CurveSettings(_Experiment):
    """Sections 5.2 and 5.3, Figures 4 to 6: learning curves.

    Evaluated ``evaluate_every`` triples or ``evaluate_every_steps``; ``triples`` None is one epoch;
    ``decay`` is γ, the factor of the learning rate per step.
    """

    triples: Positive | None
    batch_sizes: tuple[Positive, ...] = Field(min_length=1)
    evaluate_every: Positive | None = None
    evaluate_every_steps: Positive | None = None
    decay: Annotated[Number, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _whole_steps(self) -> CurveSettings:
        if (self.evaluate_every is None) == (self.evaluate_every_steps is None):
            raise ValueError("one of evaluate_every and evaluate_every_steps must be given")
        for size in self.batch_sizes:
            if self.triples is not None and self.triples < size:
                raise ValueError(f"triples {self.triples} do not fill a batch of {size}")
            if (self.evaluate_every or 0) % size:
                raise ValueError(
                    f"evaluate_every {self.evaluate_every} is not a multiple of batch size {size}"
                )
        return self

    def check_steps(self, batch_size: int) -> int:
        """Steps from one evaluation to the next."""
        return self.evaluate_every_steps or (self.evaluate_every or 0) // batch_size


class ComparisonSettings(CurveSettings):
    """Section 5.4, Table 3: runs with learning-rate decay and early stopping.

    Attributes:
        patience: evaluations without a gain on ``validation`` (by default the profile's set) after
            which a run stops.
        stop_early: whether training ends there; if not, its curve goes on (`runs.TrainingRun`), and
            Figures 4 and 5 show the runs of Table 3 where all settings agree.
        keep: the checkpoint that is evaluated.
        seeds: seeds of the rows per encoder, in place of the profile's one.
        budgets: triples of rows of Table 3, such as "static in-batch", in place of ``triples``.
    """

    patience: Positive
    stop_early: bool = True
    validation: str | None = None
    keep: Literal["best", "last"] = "best"
    budgets: dict[str, Positive] = Field(default_factory=dict)
    seeds: dict[str, Annotated[tuple[Seed, ...], Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _values_fit(self) -> ComparisonSettings:
        for row, triples in self.budgets.items():
            if row not in ROWS:
                raise ValueError(f"budgets names {row!r}; the rows are {', '.join(ROWS)}")
            if triples < self.batch_sizes[0]:
                size = self.batch_sizes[0]
                raise ValueError(f"budgets: {triples} triples do not fill a batch of {size}")
        for encoder, seeds in self.seeds.items():
            if len({*seeds}) < len(seeds):  # two equal runs would count as two observations
                raise ValueError(f"seeds of {encoder!r}: {list(seeds)} has one of them twice")
        if self.keep == "last" and not self.stop_early:
            raise ValueError("keep: last needs stop_early: true, the last checkpoint is there")
        return self


class NoteSettings(Settings):
    """Remarks on this profile in the book, by the place where they stand; Markdown, or empty."""

    cover: str = ""
    collection: str = ""
    lengths: str = ""
    triples: str = ""
    encoders: str = ""
    validation: str = ""
    baselines: str = ""


class DifferencesSettings(Settings):
    """The chapter on the paper and the released code: seeds, and how often queries are drawn."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1, 2, 3)
    draws: Positive = 2000


class RankingSettings(Settings):
    """Full ranking: ``shard`` passages are embedded at a time, stored as ``dtype``.

    ``devices`` share the work; none stands for the profile's.
    """

    shard: Positive = 65_536
    dtype: Literal["float32", "float16"] = "float32"
    batch_tokens: Positive = 2048
    devices: tuple[str, ...] = ()


class TargetPlotSettings(Settings):
    """Figure 6: rolling mean over ``window`` batches, the first and last ``span`` batches shown
    (None: all).
    """

    window: Positive
    span: Positive | None = None


class OutOfDomainSettings(Settings):
    """Collections that nothing is trained on.

    Attributes:
        packages: installed packages whose docstrings are a collection each, of at most
            ``passages`` passages and ``queries`` queries.
        collections: ir_datasets ids, used completely.
        every: all encoders with all seeds of Table 3; if not, the reference encoder with its first
            seed.
    """

    packages: tuple[str, ...] = ()
    queries: Positive = 200
    passages: Positive = 1000
    collections: tuple[str, ...] = ()
    every: bool = False


class Profile(Settings):
    """All settings; the comments in profiles/laptop.yaml have the reason of each value."""

    name: str = Field(pattern=r"^\w[\w .+-]*$", max_length=100)
    about: str
    collection: CollectionSettings
    sets: SetSettings
    candidates: CandidateSettings
    encoders: dict[str, EncoderSettings] = Field(min_length=1)
    untrained: dict[str, EncoderSettings] = Field(
        default_factory=dict, description="zero-shot encoders of Table 4 alone"
    )
    reference_encoder: str = Field(description="stands in for distilBERT in Tables 2 and 4")
    lengths: LengthSettings
    training: TrainingSettings
    measures: MeasureSettings
    static: StaticSettings
    adaptive: CurveSettings
    distributed: CurveSettings
    comparison: ComparisonSettings
    target_plot: TargetPlotSettings
    teacher: TeacherSettings | None = Field(
        None, description="without it, Table 4 has no MarginMSE rows"
    )
    out_of_domain: OutOfDomainSettings = OutOfDomainSettings()
    ranking: RankingSettings = RankingSettings()
    notes: NoteSettings = NoteSettings()
    differences: DifferencesSettings = DifferencesSettings()
    seed: Seed = 1
    tables_only: bool = Field(False, description="Figures 4 to 6 show the rows of Table 3")
    workers: Positive = 2
    device: str = Field(
        "auto", validate_default=True, description="as torch names it; auto: cuda, mps or cpu"
    )

    @field_validator("device")
    @classmethod
    def _device_is_named(cls, value: str) -> str:
        return default_device() if value == "auto" else value

    @model_validator(mode="after")
    def _names_exist(self) -> Profile:
        named = [("reference_encoder", self.reference_encoder)]
        named += [("static.seeds", name) for name in self.static.seeds]
        named += [("static.tuned", name) for name in self.static.tuned]
        named += [("comparison.seeds", name) for name in self.comparison.seeds]
        for key, name in named:
            if name not in self.encoders:
                raise ValueError(f"{key} names encoder {name!r}; there are {sorted(self.encoders)}")
        for name, encoder in self.encoders.items():
            if key := encoder.as_published:
                raise ValueError(
                    f"encoders.{name} has {key}, and cannot be trained; list it under untrained"
                )
        if both := sorted(self.encoders.keys() & self.untrained.keys()):
            raise ValueError(f"encoders and untrained both name {', '.join(both)}")
        if "bm25" in self.encoders or "bm25" in self.untrained:
            raise ValueError("an encoder cannot be named 'bm25': that is BM25's own row")
        if isinstance(self.collection, PyDocsSettings):
            if self.candidates.source == "official":
                raise ValueError("candidates.source: PyDocs comes without candidates; use bm25")
            if self.candidates.negative_ranks is None:
                raise ValueError("candidates.negative_ranks: needed, as PyDocs has no triples")
        elif self.teacher and self.teacher.negatives:
            raise ValueError("teacher.negatives: only for PyDocs; other collections have triples")
        known = self.collection.query_sets
        stopping = self.comparison.validation or self.sets.validation
        for name in (self.sets.validation, *self.sets.tests, stopping):
            if name not in known:
                raise ValueError(f"sets names {name!r}; the collection has {', '.join(known)}")
        return self

    def static_seeds(self, encoder: str) -> tuple[int, ...]:
        """Seeds of an encoder's points in Figure 3; the first is that of its line and its ε."""
        s = self.static
        first = self.seed if s.seed is None else s.seed
        return tuple(dict.fromkeys([first, *s.seeds.get(encoder, ())]))

    def row_seeds(self, encoder: str) -> tuple[int, ...]:
        """Seeds of an encoder's rows in Tables 3 and 4."""
        s = self.comparison
        return s.seeds.get(encoder, (self.seed if s.seed is None else s.seed,))
