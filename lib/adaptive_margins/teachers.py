"""Teacher distillation: MarginMSE, cross-encoders, published scores, late interaction.

A cross-encoder scores the pairs of each triple, once for all runs. Pairs across a batch are scored
in training by a cheaper teacher, late interaction, as in TAS-B (Hofstätter et al. 2021).
"""

from __future__ import annotations

import array
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import normalize

from adaptive_margins.data.collection import Collection, Texts
from adaptive_margins.data.mining import Similarity
from adaptive_margins.data.text import Problems, read_lines
from adaptive_margins.encoder import checks
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.frozen import LoadedEncoder
from adaptive_margins.encoder.load import model_folder, quiet, weights_folder
from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.files import atomic_file
from adaptive_margins.profiles.encoders import EncoderSettings, TeacherSettings
from adaptive_margins.progress import bar

SCORES = ("positive_score", "negative_score")
"""Columns of a dataset of triples with the scores of a teacher."""
IN_BATCH_WEIGHT = 0.75
"""Weight of the in-batch loss (Hofstätter et al. 2021; ``in_batch_neg_lambda`` of their code)."""

InBatchTeacher = Callable[[np.ndarray, np.ndarray], Tensor]
"""Scores of pairs across a batch: rows of n queries and of m passages → (n, m)."""


class TeacherError(AdaptiveMarginsError, ValueError):
    """A teacher that cannot be used, or scores that do not fit the triples."""


def margin_mse(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    positive_scores: Tensor,
    negative_scores: Tensor,
    *,
    similarity: str = "dot",
) -> Tensor:
    """Mean squared error between the margins of student and teacher (Hofstätter et al. 2020).

    With similarity s and the teacher's scores t, the loss is the mean over B of
    (s(q_i, d⁺_i) − s(q_i, d⁻_i) − (t⁺_i − t⁻_i))², and in-batch the mean over B² of
    (s(q_i, d⁺_i) − s(q_i, d⁻_j) − (t⁺_i − t⁻_ij))².

    Args:
        query, positive, negative: (B, D) embeddings of any norm.
        positive_scores: (B,) scores of any range.
        negative_scores: (B,); in-batch (B, B), row i the query.
        similarity: "dot" (as published) or "cosine".

    Returns:
        A scalar tensor, float32, or float64 if the queries are, also under autocast.
    """
    in_batch = negative_scores.ndim == 2
    dtype = torch.promote_types(torch.float32, query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        q, p, n = (vectors.to(dtype) for vectors in (query, positive, negative))
        if similarity == "cosine":
            q, p, n = (normalize(vectors, dim=1) for vectors in (q, p, n))
        to_negative = q @ n.T if in_batch else (q * n).sum(1)
        beyond = (q * p).sum(1) - positive_scores.to(dtype)
        beyond = beyond[:, None] if in_batch else beyond
        return (beyond - to_negative + negative_scores).square().mean()


def dual_margin_mse(
    texts: Sequence[Tensor],
    pair_scores: Tensor,
    to_positives: Tensor,
    to_negatives: Tensor,
    similarity: str = "dot",
) -> Tensor:
    """MarginMSE with two teachers (Hofstätter et al. 2021): pairs, and all passages of the batch.

    The in-batch part, weighted by `IN_BATCH_WEIGHT`, is half that over the negatives of the batch
    and half that over its positives, where the pairs i = j are 0.

    Args:
        texts: (B, D) embeddings of queries, positives and negatives.
        pair_scores: (2, B), the pairwise teacher's scores of positives and of negatives.
        to_positives, to_negatives: (B, B), the in-batch teacher's scores; row i is the query.
        similarity: see `margin_mse`.
    """
    query, positive, negative = texts
    own = to_positives.diagonal()
    across = [
        margin_mse(query, positive, other, own, scores, similarity=similarity)
        for other, scores in ((negative, to_negatives), (positive, to_positives))
    ]
    pairs = margin_mse(*texts, *pair_scores, similarity=similarity)
    return pairs + IN_BATCH_WEIGHT * (across[0] + across[1]) / 2


class LateInteraction:
    """In-batch teacher: MaxSim over the token embeddings of an encoder (Khattab and Zaharia 2020).

    A score is the sum over the query's tokens of the largest cosine with a passage's token, special
    tokens included. ``encoder`` has the tokens of all texts; ``projection`` (K, D), if any, is
    applied to its token embeddings.
    """

    def __init__(self, encoder: LoadedEncoder, projection: Tensor | None = None) -> None:
        self.encoder = encoder
        self.projection = projection
        self.model = encoder.fresh().eval()

    @torch.no_grad()
    def __call__(self, queries: np.ndarray, passages: np.ndarray) -> Tensor:
        """Rows of n queries and of m passages → scores, (n, m) float32."""
        q = self._embedded(self.encoder.queries, queries)
        d = self._embedded(self.encoder.passages, passages)
        with torch.autocast(q.device.type, enabled=False):
            cosines = torch.einsum("qid,pjd->qipj", q, d)
            # An embedding of padding is zero: never the largest of a passage, 0 of a query.
            cosines = cosines.masked_fill((d == 0).all(-1), -math.inf).amax(-1)
            return cosines.masked_fill((q == 0).all(-1)[..., None], 0).sum(1)

    def _embedded(self, tokens: Tokens, rows: np.ndarray) -> Tensor:
        """Token embeddings of length 1, (n, L, D) float32; zero where a text is padded."""
        features = {k: v.to(self.model.device) for k, v in tokens.batch(rows).items()}
        mask = features["attention_mask"][..., None]
        found = self.model(features)["token_embeddings"].float()
        if self.projection is not None:
            found = found @ self.projection.to(found).T
        return normalize(found, dim=-1) * mask


def token_projection(settings: EncoderSettings) -> Tensor | None:
    """The linear layer (K, D) that ColBERT has after its transformer; None for other encoders."""
    from transformers.utils import cached_file

    name, folder = "model.safetensors", weights_folder(settings)
    file = folder / name if folder else cached_file(settings.base, name, revision=settings.revision)
    with safe_open(file, "pt") as weights:
        if "linear.weight" not in list(weights.keys()):
            return None
        found: Tensor = weights.get_tensor("linear.weight")
        return found


def open_cross_encoder(
    settings: TeacherSettings, *, max_length: int, device: str, folder: Path | None = None
) -> Any:
    """Open the cross-encoder of a profile, or a fine-tuned one in ``folder``; scores are logits.

    No pickle is loaded, and no code that comes with a model is run.

    Raises:
        EncoderError: there is no such model, or its weights are not the pinned ones.
        TeacherError: it cannot be opened as a model with one score.
    """
    from sentence_transformers import CrossEncoder

    model = settings.model
    assert model is not None
    place = folder or weights_folder(model)
    truncated = model.layers is not None and folder is None
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # of the layer that gives the score
            return CrossEncoder(
                str(place or model.base),
                revision=None if place else model.revision,
                num_labels=1,
                max_length=max_length,
                device=device,
                activation_fn=torch.nn.Identity(),
                config_kwargs={"num_hidden_layers": model.layers} if truncated else {},
                model_kwargs={"use_safetensors": True},
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise TeacherError(f"teacher.model {model.base!r} cannot be opened: {error}") from error


def pair_scores(name: str, queries: Texts, passages: Texts, device: str) -> Similarity:
    """Open a cross-encoder with the checks of `open_encoder`; return its scores, in (0, 1), of ids.

    Raises:
        EncoderError: there is no such model with one score, or its files do not fit each other.
    """
    from sentence_transformers import CrossEncoder

    folder = model_folder(name)
    checks.check_folder(folder)
    place = checks.module_folders(folder)[0]
    checks.check_config(place, plain=False)
    if not (files := checks.weight_files(place)):
        raise EncoderError(f"{place} has no model.safetensors (pickles are not loaded)")
    options: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
    options = {"model_kwargs": options, "local_files_only": True, "device": device}
    try:
        with quiet():
            model = CrossEncoder(str(folder), activation_fn=torch.nn.Sigmoid(), **options)
    except Exception as error:  # as `open_encoder`
        raise EncoderError(f"{name!r} could not be loaded: {checks.one_line(error)}") from error
    checks.check_weights(name, model, files)
    checks.check_tokenizer(name, model)
    checks.limit_length(name, model, None)
    if model.num_labels != 1:
        raise EncoderError(f"cross-encoder {name!r} has {model.num_labels} scores; expected one")

    def scores(qid: str, docids: list[str]) -> np.ndarray:
        pairs = [(queries[qid], passages[docid]) for docid in docids]
        found: np.ndarray = model.predict(pairs, show_progress_bar=False)
        return found

    return scores


def fine_tune(
    model: Any, pairs: Sequence[tuple[str, str]], labels: Sequence[float], settings: TeacherSettings
) -> None:
    """Train a cross-encoder for one epoch of pairs labelled 1 (relevant) and 0, in place."""
    from datasets import Dataset
    from sentence_transformers import cross_encoder
    from transformers import PrinterCallback

    queries, passages = zip(*pairs, strict=True)
    data = Dataset.from_dict({"query": queries, "passage": passages, "label": labels})
    with tempfile.TemporaryDirectory() as folder, quiet():
        arguments = cross_encoder.CrossEncoderTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=0.1,  # of all steps
            seed=settings.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
        )
        loss = cross_encoder.losses.BinaryCrossEntropyLoss(model)
        trainer = cross_encoder.CrossEncoderTrainer(
            model=model, args=arguments, train_dataset=data, loss=loss
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def score_pairs(
    model: Any,
    pair: Callable[[int], tuple[str, str]],
    count: int,
    folder: Path,
    *,
    shard: int = 4096,
) -> tuple[np.ndarray, float]:
    """Scores of ``count`` pairs, (count,) float32, and the seconds that they took.

    ``pair(i)`` gives (query, passage) texts. ``folder`` gets a file for each ``shard``
    pairs, so that a killed call is resumed with the first that is missing.

    Raises:
        TeacherError: a score is not finite.
    """
    parts, seconds = [np.empty(0, np.float32)], 0.0
    with bar("teacher scores", total=count, unit="pairs") as progress:
        for start in range(0, count, shard):
            stop, file = min(count, start + shard), folder / f"{start}.npz"
            if not file.is_file():
                since = time.perf_counter()
                some = [pair(i) for i in range(start, stop)]
                found = model.predict(some, batch_size=64, show_progress_bar=False)
                if wrong := int((~np.isfinite(found)).sum()):
                    raise TeacherError(
                        f"{wrong} of {stop - start} scores of the teacher: not finite"
                    )
                took = time.perf_counter() - since
                with atomic_file(file) as partial, partial.open("wb") as out:
                    np.savez(out, scores=found.astype(np.float32), seconds=took)
            with np.load(file) as stored:
                parts.append(stored["scores"])
                seconds += float(stored["seconds"])
            progress.update(stop - start)
    return np.concatenate(parts), seconds


def read_scores(path: Path, collection: Collection, triples: np.ndarray) -> np.ndarray:
    """Read scores published by Hofstätter et al. (2020; Zenodo 4068216) as they are, by line.

    A line has the scores of positive and negative, query id, and the ids of positive and negative,
    separated by tabs; lines have any order. ``triples`` (N, 3) are rows of queries and passages.

    Returns:
        (N, 2) float32: scores of positives and of negatives.

    Raises:
        DataError: malformed lines and unknown ids, with file and line.
        TeacherError: triples without scores: how many, and the first.
    """
    import pandas as pd

    queries, passages = collection.queries["train"], collection.passages
    problems, rows, scores = Problems(), array.array("i"), array.array("f")
    lines = bar(f"reading {path.name}", read_lines(path, problems), unit="lines")
    for number, line in lines:
        try:
            positive, negative, query, *both = line.split("\t")
            values = array.array("f", [float(positive), float(negative)])
            if len(both) != 2 or not all(map(math.isfinite, values)):
                raise ValueError
            rows.extend((queries.row(query), *map(passages.row, both)))
            scores.extend(values)
        except ValueError:
            expected = "two finite scores, query id, positive and negative docid, with tabs"
            problems.add(path, number, f"expected {expected}, not {line!r}")
        except KeyError as error:
            problems.add(path, number, str(error.args[0]))
    problems.check()
    names = ["query", "positive", "negative"]
    found = pd.DataFrame(np.array(rows, np.int32).reshape(-1, 3), columns=names)
    found[list(SCORES)] = np.array(scores, np.float32).reshape(-1, 2)
    wanted = pd.DataFrame(np.asarray(triples, np.int32), columns=names)
    merged = wanted.merge(found.drop_duplicates(names), how="left", on=names)[list(SCORES)]
    missing = np.flatnonzero(merged[SCORES[0]].isna())
    if len(missing):
        query, *both = triples[missing[0]]
        first = ", ".join([queries.ids[query], *(passages.ids[row] for row in both)])
        raise TeacherError(
            f"{path} has no scores of {len(missing):,} of {len(triples):,} triples, first of number"
            f" {missing[0] + 1} (query, positive, negative: {first}); the scores have to be those"
            " of this collection's triples"
        )
    return merged.to_numpy(np.float32)
