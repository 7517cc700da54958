"""Checks that an encoder's files are complete, and that weights, configuration, tokenizer and
length limit fit each other. Each fault is one EncoderError, before anything is embedded.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from adaptive_margins.encoder.options import CORPUS_LENGTH, EncoderOptions
from adaptive_margins.errors import AdaptiveMarginsError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_LENGTH = 512
"""Maximum length of a text in tokens, if an encoder has no limit."""
MOST_LENGTH = 1 << 20
"""Largest limit that counts as one: tokenizers without a limit have a huge number."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_READ = (".safetensors", ".json", ".txt", ".model")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_QUANTISED = re.compile(r"F[468](_|$)|I[48]$")  # buffers of old checkpoints are BOOL, U8 and I64
_NO_ENCODER = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)$"
    r"|ColBERT|Splade",
    re.IGNORECASE,
)
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


class EncoderError(AdaptiveMarginsError, RuntimeError):
    """Weights or files that are missing, unexpected, or cannot be written or used."""


class EmbeddingError(EncoderError):
    """Texts that an encoder cannot embed, or whose embeddings are not finite."""


def one_line(error: object) -> str:
    """Return an error's text on one line, with its type if it is empty or only a key."""
    text = " ".join(str(error).split())
    bare = isinstance(error, KeyError) or not text
    return f"{type(error).__name__} {text}".rstrip() if bare else text


# ---- files ------------------------------------------------------------------------------------


def read_json(path: Path, kind: type, way_out: str = "download it again") -> Any:
    """Read a JSON file. Raises EncoderError if it does not hold a ``kind``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path} cannot be read ({one_line(error)}); {way_out}") from None
    if not isinstance(found, kind):
        raise EncoderError(f"{path}: expected a JSON {kind.__name__}, not {found!r}; {way_out}")
    return found


def read_settings(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings of cached arrays; EncoderError unless they have the ``expected`` values."""
    again = f"delete {path.parent} to compute it again"
    found = read_json(path, dict, again)
    for key, value in expected.items():
        if found.get(key) != value:
            raise EncoderError(f"{path} has {key} {found.get(key)!r}, expected {value!r}; {again}")
    return found


def read_array(path: Path, shape: tuple[int, int | None], dtype: Any) -> np.ndarray:
    """A .npy file of a matrix, memory-mapped; ``shape`` (n, None) for any number of columns."""
    again = "delete it to compute it again"
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise EncoderError(f"{path} cannot be read ({error}); {again}") from None
    rows, columns = shape
    columns = array.shape[-1] if columns is None else columns
    if array.shape != (rows, columns) or array.dtype != dtype:
        raise EncoderError(
            f"{path} holds {array.dtype} of shape {array.shape}, expected {np.dtype(dtype)} of"
            f" shape {(rows, columns)}; {again}"
        )
    return array


def check_folder(place: Path) -> None:
    """Raise EncoderError if a folder is an adapter, or one of its files a Git LFS pointer."""
    for path in sorted(place.glob("*")):
        if path.suffix in _READ and path.is_file():
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise EncoderError(
                        f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' in"
                        " the repository, or download the file"
                    )
    if (adapter := place / "adapter_config.json").is_file():
        base = read_json(adapter, dict).get("base_model_name_or_path")
        raise EncoderError(
            f"{place} is an adapter (PEFT, LoRA) of {base!r}, not a complete encoder; merge both:"
            f" model = SentenceTransformer({base!r}); model[0].model ="
            f" PeftModel.from_pretrained(model[0].model, {str(place)!r}).merge_and_unload();"
            " model.save_pretrained(NEW_FOLDER)"
        )


def weight_files(place: Path) -> list[Path]:
    """Return model.safetensors, or else the shards that its index names; [] if there are none.

    Raises EncoderError if a shard is missing or a file is damaged or quantised.
    """
    single, index = place / "model.safetensors", place / "model.safetensors.index.json"
    paths = [single] if single.is_file() else []
    if not paths and index.is_file():
        shards = read_json(index, dict).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else set()
        if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise EncoderError(f"{index}: expected a weight_map from weights to files next to it")
        paths = [place / name for name in sorted(names)]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise EncoderError(
                f"{place} has {len(paths) - len(missing)} of the {len(paths)} files of weights"
                f" that {index.name} names; {missing[0]} is missing; download all of them"
            )
    for path in paths:
        quantised = {d for d, _ in tensors(path).values() if _QUANTISED.match(d)}
        if quantised:
            raise EncoderError(
                f"{path} has quantised weights ({', '.join(sorted(quantised))}); expected float32,"
                " float16 or bfloat16: use the model's unquantised weights"
            )
    return paths


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return each tensor's type and shape from the header of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {key: (p.get_dtype(), tuple(p.get_shape())) for key, p in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise EncoderError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete safetensors file"
            f" ({one_line(error)}); download it again"
        ) from None
    return found


def check_kind(folder: Path, forms: str) -> None:
    """Raise EncoderError if a folder's settings are not those of an encoder."""
    path = folder / "config_sentence_transformers.json"
    settings = read_json(path, dict) if path.is_file() else {}
    kind, prompts = settings.get("model_type"), settings.get("prompts", {})
    if not isinstance(prompts, dict) or not all(
        isinstance(prompt, str | None) for prompt in prompts.values()
    ):
        raise EncoderError(f"{path}: expected prompts from names to texts, not {prompts!r}")
    if kind not in (None, "SentenceTransformer"):
        raise EncoderError(f"{path}: this is a {kind}, not an encoder of single texts. {forms}")


def module_folders(folder: Path) -> list[Path]:
    """Return an encoder's module folders, transformer first; EncoderError for unknown modules."""
    path = folder / "modules.json"
    if not path.is_file():
        return [folder]
    try:
        modules = [(Path(module["path"]), str(module["type"])) for module in read_json(path, list)]
    except (TypeError, KeyError):
        raise EncoderError(f"{path}: expected a list of modules with path and type") from None
    for place, kind in modules:
        if place.is_absolute() or ".." in place.parts:
            raise EncoderError(f"{path}: the path {str(place)!r} leads out of the folder")
        if not kind.startswith("sentence_transformers."):
            raise EncoderError(
                f"{path} names the custom module {kind!r}: code that comes with a model is not run"
            )
    if not modules or not modules[0][1].endswith(".Transformer"):
        found = modules[0][1] if modules else "none"
        raise EncoderError(f"{path}: the first module must be a Transformer, not {found!r}")
    return [folder / place for place, _ in modules]


def check_config(place: Path, *, plain: bool) -> None:
    """Raise EncoderError unless a folder has a text encoder's configuration and a tokenizer.

    ``plain``: without a modules.json, only the architecture states the kind of model.
    """
    from transformers import CONFIG_MAPPING, __version__

    path = place / "config.json"
    config = read_json(path, dict, "copy all files of the model")
    kind = config.get("model_type")
    code = " (code that comes with a model is never run)" if "auto_map" in config else ""
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise EncoderError(
            f"{path}: model_type is {kind!r}, unknown to transformers {__version__}{code}"
        )
    if "quantization_config" in config:
        raise EncoderError(
            f"{path}: the weights are quantised (quantization_config); use the model's"
            " unquantised weights"
        )
    if "dpr" in kind or any(key in config for key in ("vision_config", "audio_config")):
        raise EncoderError(f"{path}: a model of type {kind!r} is not one encoder of single texts")
    names = config.get("architectures") or []
    if plain and (other := [str(name) for name in names if _NO_ENCODER.search(str(name))]):
        raise EncoderError(
            f"{path}: {other[0]} is not an encoder of single texts (a cross-encoder, for example,"
            " reads pairs); there is no modules.json that would make it one"
        )
    if not any(any(place.glob(name)) for name in _TOKENIZERS):
        raise EncoderError(f"{place} has no tokenizer (one of {', '.join(_TOKENIZERS)})")
    if (path := place / "tokenizer_config.json").is_file():
        longest = read_json(path, dict).get("model_max_length")
        if not isinstance(longest, int | float | None):
            raise EncoderError(f"{path}: model_max_length is {longest!r}, expected a number")


# ---- the model as loaded ----------------------------------------------------------------------


def bert_model(model: Any) -> Any:
    """Return a transformer that is a BERT model; EncoderError for any other."""
    if model.config.model_type != "bert":
        raise EncoderError(
            f"layers and trained_layers need a BERT model, this is {model.config.model_type!r}"
        )
    return model


def check_weights(name: str, model: SentenceTransformer, files: Sequence[Path]) -> None:
    """Raise EncoderError for weights that are random, unused, or not finite.

    A pooler may be missing, because it is not used.
    """
    found = {key: shape for path in files for key, (_, shape) in tensors(path).items()}
    transformer: Any = model[0].model
    fresh = [
        key
        for key, p in transformer.named_parameters()
        if not getattr(p, "_is_hf_initialized", False) and "pooler" not in key.split(".")
    ]
    if fresh:
        key, shape = fresh[0], tuple(transformer.get_parameter(fresh[0]).shape)
        stored = [(k, s) for k, s in found.items() if f".{k}".endswith(f".{key}")]
        there = f"{stored[0][0]} has shape {stored[0][1]}" if stored else "it is missing"
        total = len(dict(transformer.named_parameters()))
        raise EncoderError(
            f"encoder {name!r}: {len(fresh)} of {total} weights are not as its config.json has"
            f" them: {key} should have shape {shape}, but in {files[0].parent} {there}"
        )
    known = set(transformer.state_dict())
    kinds, prefix = {_kind(key) for key in known}, f"{transformer.base_model_prefix}."
    for key in (key.removeprefix(prefix) for key in found):
        if key not in known and re.search(r"\.\d+\.", key) and _kind(key) in kinds:
            raise EncoderError(
                f"encoder {name!r}: {key} is among its weights, but its config.json has fewer"
                " layers; use the config.json that belongs to the weights"
            )
    values = {key: t for key, t in model.state_dict().items() if t.is_floating_point()}
    if wrong := [key for key, t in values.items() if not torch.isfinite(t).all()]:
        raise EncoderError(
            f"encoder {name!r}: {len(wrong)} of {len(values)} weights are not finite (NaN or"
            f" infinite), {wrong[0]} first; its embeddings would not be either"
        )


def _kind(key: str) -> str:
    return re.sub(r"\.\d+\.", ".0.", key)


def check_tokenizer(name: str, model: SentenceTransformer) -> None:
    """Raise EncoderError if the tokenizer cannot pad, or has tokens without an embedding."""
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.pad_token_id is None:
        raise EncoderError(
            f"the tokenizer of encoder {name!r} has no padding token; name one as 'pad_token' in"
            " tokenizer_config.json"
        )
    rows = model[0].model.get_input_embeddings().weight.shape[0]
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        raise EncoderError(
            f"encoder {name!r}: its tokenizer has token ids up to {highest:,}, but there are"
            f" embeddings of {rows:,} tokens only; use the tokenizer of these weights"
        )


def limit_length(name: str, model: SentenceTransformer, options: EncoderOptions | None) -> None:
    """Limit ``max_seq_length`` to the model's positions, with a warning if it is larger or missing.

    With ``options``, it is what they ask for, or at most `CORPUS_LENGTH`. Raises EncoderError if it
    is not a positive integer, or they ask for more than the positions.
    """
    transformer: Any = model[0].model
    config = transformer.config.get_text_config()
    positions = min(_positions(transformer), default=None)
    if options is not None and (asked := options.max_length) is not None:
        if not 1 <= asked <= (positions or MOST_LENGTH):
            has = f"encoder {name!r} has positions for {positions or MOST_LENGTH:,} tokens"
            raise EncoderError(f"{has}, but a length of {asked:,} is asked for (--max-length)")
        model.max_seq_length = asked
        return
    most = MOST_LENGTH if options is None else CORPUS_LENGTH
    limit = model.max_seq_length
    number = isinstance(limit, int | float) and not isinstance(limit, bool) and limit >= 1
    if limit is not None and not (number and (limit > MOST_LENGTH or limit == int(limit))):
        raise EncoderError(
            f"encoder {name!r}: max_seq_length is {limit!r} (or model_max_length of its tokenizer),"
            " expected an integer"
        )
    has = ""
    if limit is None or limit > MOST_LENGTH:
        known = positions or getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
        length = min(known, DEFAULT_LENGTH, most)
        has = "no length limit (--max-length, or max_seq_length in sentence_bert_config.json)"
    elif (length := min(int(limit), most, positions or most)) < min(limit, most):
        has = f"a length limit of {limit} tokens, but positions for {positions} only"
    if has:
        message = f"encoder {name!r} has {has}: its texts are truncated at {length} tokens"
        warnings.warn(message, stacklevel=2)
    model.max_seq_length = length


def _positions(transformer: nn.Module) -> Iterator[int]:
    """Yield the number of tokens of each table of learned positions."""
    for name, module in transformer.named_modules():
        if name.split(".")[-1] in _POSITIONS and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1  # as RoBERTa
            yield module.num_embeddings - int(getattr(module, "offset", first))  # BART's: 2
