"""Encoders of many architectures, and what can be chosen of one: prompts, dimensions and length."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (  # fmt: skip
    Dense,
    Normalize,
    Pooling,
    Transformer,
)

from adaptive_margins.data.collection import Texts
from adaptive_margins.encoder.checks import EncoderError
from adaptive_margins.encoder.embed import embed, embed_chunks
from adaptive_margins.encoder.load import open_encoder, options_of, prompts, save_encoder
from adaptive_margins.encoder.options import EncoderOptions
from adaptive_margins.encoder.speed import batcher
from adaptive_margins.encoder.tokens import tokenize
from adaptive_margins.losses import margin_loss
from adaptive_margins.retrieval.dense import DenseRetriever
from conftest import TEXTS, WORDS, write_tokenizer

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 512,
}  # fmt: skip
KINDS = {
    "bert": SIZES,
    "xlm-roberta": SIZES,
    "mpnet": SIZES,
    "modernbert": {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    "qwen3": {**SIZES, "num_key_value_heads": 1, "head_dim": 8},
}
NO_LIMIT = 10**30


def write(folder: Path, kind: str, limit: int = 512) -> Path:
    """A random encoder: transformer, pooling as usual for its kind, a linear layer 16 → 12, length 1."""
    from transformers import AutoConfig, AutoModel, T5EncoderModel

    plain = folder.with_name(f"{folder.name}-plain")
    pad = 1 if kind in ("mpnet", "xlm-roberta") else 0
    config = AutoConfig.for_model(
        kind, vocab_size=len(WORDS), pad_token_id=pad, initializer_range=0.5, **KINDS[kind]
    )
    torch.manual_seed(3)
    (T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)).save_pretrained(
        plain
    )
    write_tokenizer(plain, "mpnet" if pad else "bert")
    edit(plain / "tokenizer_config.json", model_max_length=limit)
    mode = {"qwen3": "lasttoken", "modernbert": "cls"}.get(kind, "mean")
    modules = [Transformer(str(plain)), Pooling(16, pooling_mode=mode), Dense(16, 12), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def embedded(model: SentenceTransformer, texts: list[str] = TEXTS) -> np.ndarray:
    return embed(model, tokenize(model, texts, model.max_seq_length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`write`'s BERT, with stored prompts of queries and of passages."""
    made = write(tmp_path_factory.mktemp("encoders") / "bert", "bert")
    stored = {"query": "sort ", "passage": "path "}
    edit(made / "config_sentence_transformers.json", prompts=stored)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_any_architecture_is_read_as_by_sentence_transformers_and_trained(tmp_path, kind):
    folder = write(tmp_path / kind, kind)
    model = open_encoder(str(folder), EncoderOptions(dimensions=8))
    assert model.max_seq_length == 256
    plain = SentenceTransformer(str(folder), truncate_dim=8, device="cpu")
    texts = [*TEXTS, "graph node " * 20]  # longer than ModernBERT's local attention
    expected = np.stack([plain.encode(text, normalize_embeddings=True) for text in texts])
    np.testing.assert_allclose(embedded(model, texts), expected, atol=1e-5)

    tokens = tokenize(model.train(), texts, 256)
    chunks = [batcher(model)(tokens, rows) for rows in ([2, 0], [1, 6])]
    triples = embed_chunks(model, chunks, torch.tensor([[0, 1], [2, 3], [3, 0]]))
    margin_loss(*triples, target="distributed").backward()
    gradients = [p.grad for p in model[0].parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients)
    assert sum(g.abs().sum() for g in gradients) > 0
    linear = model[2].linear.weight.grad.abs()
    assert linear[:8].sum() > 1e4 * linear[8:].sum()  # the loss sees 8 dimensions, but for rounding


def test_the_first_dimensions_alone_are_used_and_saved(folder, tmp_path):
    tokens = tokenize(whole := open_encoder(str(folder)), TEXTS, 256)
    first = embed(whole, tokens)[:, :5]
    expected = first / np.linalg.norm(first, axis=1, keepdims=True)
    model = open_encoder(str(folder), EncoderOptions(dimensions=5))
    np.testing.assert_allclose(embed(model, tokens), expected, atol=1e-6)
    save_encoder(model, tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert plain.get_embedding_dimension() == 5
    np.testing.assert_allclose(plain.encode(TEXTS, normalize_embeddings=True), expected, atol=1e-6)
    again = open_encoder(str(tmp_path / "saved"))
    np.testing.assert_allclose(embed(again, tokens), expected, atol=1e-6)
    complete = open_encoder(str(tmp_path / "saved"), EncoderOptions(dimensions=12))
    np.testing.assert_array_equal(embed(complete, tokens), embed(whole, tokens))
    assert complete.truncate_dim is None
    for wrong in (0, 13):
        with pytest.raises(EncoderError, match=f"12 dimensions, but {wrong} are asked for"):
            open_encoder(str(folder), EncoderOptions(dimensions=wrong))


def test_prompts_replace_stored_ones_and_are_saved(folder, tmp_path):
    assert prompts(open_encoder(str(folder), EncoderOptions())) == ("sort ", "path ")
    model = open_encoder(str(folder), EncoderOptions(query_prompt="edge ", passage_prompt=""))
    assert options_of(model) == {
        "query_prompt": "edge ", "passage_prompt": "", "dimensions": 12, "max_length": 256,
    }  # fmt: skip
    retriever = DenseRetriever(model, Texts(["a", "b"], TEXTS[:2]))
    plain = SentenceTransformer(str(folder), device="cpu")
    queries = plain.encode(TEXTS, prompt="edge ", normalize_embeddings=True)
    passages = plain.encode(TEXTS[:2], normalize_embeddings=True)
    np.testing.assert_allclose(retriever.embed_queries(TEXTS), queries, atol=1e-6)
    np.testing.assert_allclose(retriever.embeddings, passages, atol=1e-6)
    save_encoder(model, tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    found = plain.encode_query(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(found, queries, atol=1e-6)
    found = plain.encode_document(TEXTS[:2], normalize_embeddings=True)
    np.testing.assert_allclose(found, passages, atol=1e-6)


def test_length_is_the_encoders_up_to_256_or_as_asked_for(folder, tmp_path):
    assert open_encoder(str(folder)).max_seq_length == 512
    assert open_encoder(str(folder), EncoderOptions(max_length=300)).max_seq_length == 300
    for wrong in (0, 513):
        with pytest.raises(EncoderError, match=rf"for 512 tokens, but .* {wrong} is asked for"):
            open_encoder(str(folder), EncoderOptions(max_length=wrong))
    saved = tmp_path / "saved"
    save_encoder(open_encoder(str(folder), EncoderOptions(max_length=20)), saved)
    assert open_encoder(str(saved), EncoderOptions()).max_seq_length == 20
    save_encoder(open_encoder(str(folder), EncoderOptions(max_length=300)), saved)
    assert open_encoder(str(saved), EncoderOptions()).max_seq_length == 256
    (saved / "training.json").write_text('{"options": {"max_length": 300}}')  # `finetune` wrote it
    assert open_encoder(str(saved), EncoderOptions()).max_seq_length == 300

    unlimited = str(write(tmp_path / "t5", "t5", NO_LIMIT))
    with pytest.warns(UserWarning, match=r"no length limit \(--max-length.* 256 tokens"):
        assert open_encoder(unlimited, EncoderOptions()).max_seq_length == 256
    assert open_encoder(unlimited, EncoderOptions(max_length=600)).max_seq_length == 600


def test_how_much_is_truncated_is_counted(folder):
    options = EncoderOptions(max_length=10, passage_prompt="path ", query_prompt="")
    model = open_encoder(str(folder), options)
    texts = ["graph " * 40, "node", "edge " * 7, "edge " * 8]  # and three tokens each
    retriever = DenseRetriever(model, Texts(list("abcd"), texts))
    with pytest.warns(UserWarning, match=r"2 of 4 passages are longer than 10 tokens \(50 %"):
        retriever.search(Texts(["q"], ["node " * 8]), 1)
    lost = {"queries": 0.0, "passages": (33 + 1) / (43 + 4 + 10 + 11)}
    assert retriever.truncation == {"queries": 0, "passages": 2, "lost": lost}
