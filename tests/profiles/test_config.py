"""Profiles: those that are shipped load, those that are broken say where and why, overrides and inheritance."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from adaptive_margins.device import default_device
from adaptive_margins.profiles import config as profiles
from adaptive_margins.profiles.load import ProfileError, available, load_profile

SHIPPED = Path(profiles.__file__).parent


@pytest.fixture
def values():
    return yaml.safe_load((SHIPPED / "smoke.yaml").read_text("utf-8"))


def changed(values, key, value):
    """``values`` with a dotted key set, or (value ``...``) removed."""
    values = copy.deepcopy(values)
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return values


def write(folder, values, name="my.yaml"):
    path = folder / name
    path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
    return path


# ---- shipped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", available())
def test_shipped_profiles_load(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.about
    assert profile.reference_encoder in profile.encoders
    assert all(encoder.label for encoder in profile.encoders.values())
    assert load_profile(SHIPPED / f"{name}.yaml") == profile
    assert load_profile(str(SHIPPED / f"{name}.yaml")) == profile


def test_the_device_is_by_default_the_best_there_is(tmp_path, values):
    del values["device"]
    assert load_profile(write(tmp_path, values)).device == default_device()
    assert load_profile("laptop").device == "cpu"


def test_a_number_may_be_written_with_an_exponent(tmp_path, values):
    text = yaml.safe_dump(changed(values, "training.weight_decay", 7)).replace(
        "decay: 7", "decay: 1e-6"
    )
    (tmp_path / "my.yaml").write_text(text)
    assert load_profile(tmp_path / "my.yaml").training.weight_decay == 1e-6


def test_a_profile_cannot_be_changed():
    profile = load_profile("smoke")
    with pytest.raises(ValidationError, match="frozen"):
        profile.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        profile.static.triples = 3


# ---- broken ----------------------------------------------------------------------------------------------------------

BROKEN = [
    # key, value, what the message must hold besides the file
    ("colour", "red", ["unknown key 'colour'", "'red'", "known are name, about, collection"]),
    ("encoders.minilm-3.layer", 3, ["encoders.minilm-3", "unknown key 'layer'", "trained_layers"]),
    ("static.triples", "many", ["static.triples", "'many'", "integer"]),
    ("static.triples", True, ["static.triples", "True", "integer"]),
    ("training.weight_decay", True, ["training.weight_decay", "True", "a number"]),
    ("static.triples", -16, ["static.triples", "-16", "greater than 0"]),
    ("static.triples", 4, ["static", "triples 4", "batch of 8"]),
    ("adaptive.triples", 4, ["adaptive", "triples 4", "batch of 8"]),
    ("static.targets", 0.5, ["static.targets", "0.5", "tuple"]),
    ("static.targets", [0.0, "adaptive"], ["static.targets.1", "'adaptive'", "number"]),
    ("static.targets", [0.0, float("nan")], ["static.targets.1", "finite"]),
    ("static.seeds", {"minilm-9": [1]}, ["static.seeds", "'minilm-9'", "minilm-3"]),
    ("static.tuned", {"minilm-9": [0.1, 0.2]}, ["static.tuned", "'minilm-9'", "minilm-3"]),
    ("static.tuned", {"minilm-3": [0.1]}, ["static.tuned.minilm-3"]),
    ("reference_encoder", "bert", ["reference_encoder", "'bert'", "minilm-3", "minilm-4"]),
    ("untrained", {"minilm-3": {"base": "minilm"}}, ["both name minilm-3"]),
    ("untrained", {"bm25": {"base": "minilm"}}, ["cannot be named 'bm25'"]),
    ("encoders.bm25", {"base": "minilm"}, ["cannot be named 'bm25'"]),
    ("encoders.minilm-3.trained_layers", 4, ["encoders.minilm-3", "trained_layers 4 of 3 layers"]),
    ("encoders.minilm-3.pooling", "max", ["encoders.minilm-3.pooling", "'max'", "'cls+linear'"]),
    ("encoders.minilm-3.base", ..., ["encoders.minilm-3.base", "required"]),
    ("adaptive.evaluate_every", 12, ["adaptive", "evaluate_every 12", "batch size 8"]),
    ("comparison.decay", 1.5, ["comparison.decay", "1.5", "less than or equal to 1"]),
    ("training.learning_rate", -1e-3, ["training.learning_rate", "-0.001", "greater than 0"]),
    ("training.optimizer", "sgd", ["training.optimizer", "'sgd'", "'adamw_8bit'"]),
    ("candidates.negative_ranks", [20, 4], ["candidates", "20, 4", "smaller"]),
    ("measures.selection", "AP", ["measures", "'AP'", "nDCG@10"]),
    ("measures.rerank", ["nDCG@10", "Hits@5"], ["measures", "'Hits@5'", "ir_measures"]),
    ("measures.full", ["R(rel=2)@51"], ["measures", "'R(rel=2)@51'", "full_depth of 51, not 50"]),
    ("measures.full", ["nDCG(cutoff=None)"], ["measures", "'nDCG(cutoff=None)' is not a measure"]),
    ("sets.validation", "dev", ["'dev'", "validation, test1, test2"]),
    ("sets.tests", ["test1", "train"], ["'train'", "validation, test1, test2"]),
    ("collection.kind", "msmarco-v9", ["collection", "'msmarco-v9'", "'kind'", "'pydocs'"]),
    ("collection.packages", "numpy", ["collection.packages", "'numpy'"]),
    ("lengths.query", 2, ["lengths.query", "2", "greater than or equal to 3"]),
    ("lengths", [10, 12], ["lengths", "[10, 12]"]),
    ("seed", -1, ["seed", "-1", "greater than or equal to 0"]),
    ("differences.seeds", [1, 1 << 32], ["differences.seeds.1", "4294967296"]),
    ("comparison.budgets", {"statc": 64}, ["comparison", "'statc'", "static, static in-batch"]),
    ("comparison.seeds", {"minilm-4": [1, 2, 1]}, ["comparison", "'minilm-4': [1, 2, 1]", "twice"]),
    ("comparison.budgets", {"distributed": 7}, ["comparison", "7 triples", "batch of 8"]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), BROKEN, ids=lambda x: str(x)[:40])
def test_a_broken_profile_says_where_and_why(tmp_path, values, key, value, words):
    path = write(tmp_path, changed(values, key, value))
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    for word in (f"{path} has 1 error(s)", *words):
        assert word in str(error.value)
    assert "\n" in str(error.value)
    assert "pydantic" not in str(error.value)


def test_all_errors_are_listed_for_the_file_that_was_asked_for(tmp_path, values):
    write(tmp_path, changed(changed(values, "workers", 0), "training.optimizer", "sgd"), "a.yaml")
    path = write(tmp_path, {"extends": "a.yaml", "name": "b"})
    listed = r"has 2 error\(s\):\n  training.optimizer: .*\n  workers"
    with pytest.raises(ProfileError, match=f"{path} {listed}"):
        load_profile(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"static: [1, 2", "is not YAML"),
        (b"a: 1\n b: 2", "is not YAML"),
        (b"- 1\n- 2", "expected keys and values, got list"),
        (b"", "expected keys and values, got NoneType"),
        (b"just words", "expected keys and values, got str"),
        (b"name: \xff\xfe", "cannot be read"),
        (b"!!python/object/apply:os.system ['true']", "is not YAML"),
        (b"extends: smoke\nseed: 1\nseed: 2", "my.yaml:3: the file is not YAML: the key 'seed'"),
        (
            b"static: {triples: 8,\n triples: 9}",
            "my.yaml:2: the file is not YAML: the key 'triples'",
        ),
        (b"extends: smoke\nname: a\x00b", "special characters are not allowed"),
        (b"extends: nothing-like-it", "unknown profile 'nothing-like-it' (which"),
        (b"extends: [smoke]", "extends): known are"),
        (b"extends: no.yaml", "no.yaml (which"),
    ],
)
def test_a_file_that_is_no_profile(tmp_path, content, words):
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_anchors_and_merged_keys(tmp_path):
    """A key may be given again where it replaces one that `<<` merges, also of a merged mapping."""
    path = tmp_path / "my.yaml"
    path.write_text(
        "extends: smoke\n"
        "adaptive: &one {<<: &two {triples: 64, decay: 0.5}, decay: 0.75}\n"
        "distributed: {<<: *one, triples: 128}\n"
        "comparison: {<<: *two, budgets: {static in-batch: 32}}\n"
    )
    p = load_profile(path)
    found = [(c.triples, c.decay) for c in (p.adaptive, p.distributed, p.comparison)]
    assert found == [(64, 0.75), (128, 0.75), (64, 0.5)]
    assert p.comparison.budgets == {"static in-batch": 32}


def test_names_that_are_not_there(tmp_path):
    with pytest.raises(ProfileError, match=r"unknown profile 'lapto': known are .*laptop.*smoke"):
        load_profile("lapto")
    with pytest.raises(ProfileError, match=rf"{tmp_path}/no.yaml does not exist"):
        load_profile(tmp_path / "no.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ProfileError, match=r"folder\.yaml does not exist"):
        load_profile(tmp_path / "folder.yaml")
    with pytest.raises(ProfileError, match="unknown profile"):
        load_profile("../profiles/smoke")


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_overrides():
    plain = load_profile("smoke")
    changed = load_profile("smoke", seed=7, static__triples=64, candidates__negative_ranks=[5, 9])
    assert (changed.seed, changed.static.triples) == (7, 64)
    assert changed.candidates.negative_ranks == (5, 9)
    assert changed.static.targets == plain.static.targets
    assert load_profile("smoke", seed=None, static__triples=None) == plain
    deep = load_profile("smoke", **{"encoders__minilm-3__label": "another"})
    assert deep.encoders["minilm-3"].label == "another"
    assert deep.encoders["minilm-4"] == plain.encoders["minilm-4"]
    assert load_profile("smoke") == plain


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"sed": 7}, ["unknown key 'sed'", "7", "seed"]),
        ({"static__triple": 64}, ["static", "unknown key 'triple'", "64", "triples"]),
        ({"statics__triples": 64}, ["unknown key 'statics'", "64", "static"]),
        ({"static__triples": "x"}, ["static.triples", "'x'"]),
        ({"seed__deep": 1}, ["seed", "integer"]),
        ({"static__targets__0": 1.0}, ["static.targets", "tuple"]),
        ({"encoders__new__layers": 2}, ["encoders.new.base", "required"]),
    ],
    ids=str,
)
def test_overrides_that_are_none(overrides, words):
    with pytest.raises(ProfileError) as error:
        load_profile("smoke", **overrides)
    for word in ("profiles/smoke.yaml", *words):
        assert word in str(error.value)


# ---- extends ---------------------------------------------------------------------------------------------------------


def test_extends(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    write(tmp_path, {"extends": "smoke", "name": "a", "static": {"triples": 64}}, "a.yaml")
    b = write(tmp_path / "deep", {"extends": "../a.yaml", "name": "b", "seed": 5}, "b.yaml")
    plain = load_profile("smoke")
    for place in (tmp_path, tmp_path / "deep", Path("/")):
        monkeypatch.chdir(place)
        for path in (b, Path(os.path.relpath(b))):
            profile = load_profile(path)
            assert (profile.name, profile.seed, profile.static.triples) == ("b", 5, 64)
            assert profile.static.targets == plain.static.targets
            assert profile.encoders == plain.encoders
    without = {"extends": "smoke", "encoders": {"minilm-3": None}, "static": {"seeds": None}}
    profile = load_profile(write(tmp_path, without, "c.yaml"))  # null removes a mapping
    assert list(profile.encoders) == ["minilm-4"] and profile.static.seeds == {}


def test_extending_in_a_circle(tmp_path):
    write(tmp_path, {"extends": "b.yaml"}, "a.yaml")
    write(tmp_path, {"extends": "./a.yaml"}, "b.yaml")
    with pytest.raises(ProfileError, match=r"circle: .*a\.yaml → .*b\.yaml → .*a\.yaml"):
        load_profile(tmp_path / "a.yaml")
    for name, base in (("c", "smoke"), ("d", "c.yaml")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {base}\nnotes: &a {{notes: *a}}\n")
    with pytest.raises(ProfileError, match=r"d\.yaml: an alias .* stands for what it is part of"):
        load_profile(tmp_path / "d.yaml")
    folder = tmp_path / "x"
    folder.mkdir()
    write(folder, {"extends": "../x/a.yaml"}, "a.yaml")
    with pytest.raises(ProfileError, match="circle"):
        load_profile(folder / "a.yaml")


def test_paper_and_released_differ_as_the_notes_on_the_released_code_say():
    paper, released = load_profile("paper"), load_profile("released")
    differing = {
        "name", "about", "collection", "encoders", "lengths", "training", "static", "adaptive", "distributed", "comparison",
        "teacher",
    }  # fmt: skip
    assert {k for k in paper.model_dump() if getattr(paper, k) != getattr(released, k)} == differing
    assert (paper.lengths.query, released.lengths.query) == (30, 20)
    assert paper.lengths.passage == released.lengths.passage == 200
    assert (paper.training.learning_rate, released.training.learning_rate) == ("5e-6/B", 5e-7)
    assert released.static.learning_rate == 5e-6
    assert (paper.training.orientation, released.training.orientation) == ("paper", "released")
    assert (paper.comparison.keep, released.comparison.keep) == ("best", "last")
    assert (paper.comparison.validation, released.comparison.validation) == (None, "TREC-DL20")
    assert paper.sets.validation == released.sets.validation == "TREC-DL19"
    poolings = [{n: e.pooling for n, e in p.encoders.items()} for p in (paper, released)]
    assert poolings == [
        {"distilbert": "cls", "roberta": "cls+linear", "mpnet": "cls+linear"},
        {"distilbert": "cls", "roberta": "cls+pooler", "mpnet": "cls"},
    ]
    for p in (paper, released):
        c = p.comparison
        assert (c.check_steps(128), c.patience, c.decay) == (500, 16, 0.99999)
        assert c.batch_sizes == (128,)
        assert p.distributed.check_steps(64) == p.adaptive.check_steps(128) == 1000
        assert (p.training.optimizer, p.training.weight_decay) == ("adamw_8bit", 1e-6)
        assert all(len(e.revision) == 40 for e in p.encoders.values())
    assert paper.static.targets == tuple(i / 10 for i in range(11))
    assert released.static.targets == paper.static.targets[1:]
    assert paper.static.triples == released.static.triples == 2_560_000
    grids = (released.static, released.adaptive, released.distributed, released.comparison)
    assert [grid.seed for grid in grids] == [166613, 166613, 153201820, 153201820]
