"""Margin losses with static, adaptive and distributed targets, and the experiments of their paper.

The names below are imported from their modules when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive_margins import paper as paper
    from adaptive_margins.cached_loss import CachedMarginLoss as CachedMarginLoss
    from adaptive_margins.corpus.compare import compare_files as compare_files
    from adaptive_margins.corpus.evaluate import evaluate_encoder as evaluate_encoder
    from adaptive_margins.corpus.finetune import finetune as finetune
    from adaptive_margins.corpus.mine import mine_negatives as mine_negatives
    from adaptive_margins.data.collection import Collection as Collection
    from adaptive_margins.data.collection import Texts as Texts
    from adaptive_margins.data.sources import open_collection as open_collection
    from adaptive_margins.data.trec import read_qrels as read_qrels
    from adaptive_margins.data.trec import read_run as read_run
    from adaptive_margins.data.trec import write_run as write_run
    from adaptive_margins.encoder.load import open_encoder as open_encoder
    from adaptive_margins.encoder.options import EncoderOptions as EncoderOptions
    from adaptive_margins.errors import AdaptiveMarginsError as AdaptiveMarginsError
    from adaptive_margins.evaluation.evaluator import CollectionEvaluator as CollectionEvaluator
    from adaptive_margins.evaluation.measures import evaluate as evaluate
    from adaptive_margins.evaluation.significance import compare as compare
    from adaptive_margins.losses import MarginLoss as MarginLoss
    from adaptive_margins.losses import margin_loss as margin_loss
    from adaptive_margins.losses import margins_and_targets as margins_and_targets
    from adaptive_margins.profiles.load import load_profile as load_profile
    from adaptive_margins.retrieval.bm25 import BM25 as BM25
    from adaptive_margins.retrieval.dense import DenseRetriever as DenseRetriever
    from adaptive_margins.retrieval.dense import hybrid as hybrid
    from adaptive_margins.retrieval.dense_index import DenseIndex as DenseIndex
    from adaptive_margins.training import train as train

__version__ = "0.1.0"

_MODULES = {
    "AdaptiveMarginsError": "errors",
    "BM25": "retrieval.bm25",
    "CachedMarginLoss": "cached_loss",
    "Collection": "data.collection",
    "CollectionEvaluator": "evaluation.evaluator",
    "DenseIndex": "retrieval.dense_index",
    "DenseRetriever": "retrieval.dense",
    "EncoderOptions": "encoder.options",
    "MarginLoss": "losses",
    "Texts": "data.collection",
    "compare": "evaluation.significance",
    "compare_files": "corpus.compare",
    "evaluate": "evaluation.measures",
    "evaluate_encoder": "corpus.evaluate",
    "finetune": "corpus.finetune",
    "hybrid": "retrieval.dense",
    "load_profile": "profiles.load",
    "margin_loss": "losses",
    "margins_and_targets": "losses",
    "mine_negatives": "corpus.mine",
    "open_collection": "data.sources",
    "open_encoder": "encoder.load",
    "paper": "",
    "read_qrels": "data.trec",
    "read_run": "data.trec",
    "train": "training",
    "write_run": "data.trec",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not (module := _MODULES[name]):
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
