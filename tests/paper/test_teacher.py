"""The teacher of a profile: what it computes and stores, and the rows of Table 4 that need it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from adaptive_margins import paper, teachers
from adaptive_margins.data.stored import seeded_order
from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.paper.experiments import teacher_runs
from adaptive_margins.paper.store import StoredRun
from adaptive_margins.profiles.load import ProfileError, load_profile
from adaptive_margins.teachers import TeacherError, open_cross_encoder
from conftest import in_child, kill_in, linked


@pytest.fixture
def home(smoke_home, tmp_path):
    """A copy of the smoke profile's collection and tokens, without runs and teacher."""
    names = ("collections", "cache/collections", "cache/tokens", "cache/states")
    return linked(smoke_home, tmp_path, *names)


def runs_of(reproduction, **values):
    found = [c for c in teacher_runs(reproduction.experiments) if c.seed == 1]
    return [c for c in found if all(getattr(c, k) == v for k, v in values.items())]


def test_table4_has_all_rows(smoke):
    frame = smoke.table4()
    rows = frame.drop_duplicates(["loss", "sampling", "in_batch"])
    taught = rows[rows["loss"] == "MarginMSE"]
    sampling = ["Rand.", "TAS-B", "TAS-B, hard"]
    assert [*zip(taught["sampling"], taught["in_batch"], strict=True)] == [*product(sampling, "✗✓")]
    assert (rows["block"] != "not in the paper").sum() == 3 + 6 + 4  # 15 of the paper, 2 shared
    for row in taught.to_dict("records"):
        ids = row["run_ids"].split()
        runs = [StoredRun(smoke.store.folder / run_id) for run_id in ids]
        assert [run.config.seed for run in runs] == [1, 2]
        teacher = runs[0].result["teacher"]["seconds"]
        student = np.mean([run.result["train_seconds"] for run in runs])
        assert row["teacher_seconds"] == teacher > 0
        assert row["seconds"] == pytest.approx(student + teacher)
    others = rows[rows["loss"] != "MarginMSE"]
    assert (others["teacher_seconds"] == 0).all()


def test_students_are_ranked_by_inner_product_from_step_0(smoke):
    cosine = smoke.zero_shot("minilm-4").evaluation("rerank", "validation").mean["nDCG@10"]
    starts = {smoke.store.get(c).curve["nDCG@10"][0] for c in teacher_runs(smoke.experiments)}
    assert len(starts) == 1 and starts != {cosine}


def test_scores_are_those_of_the_stored_model(smoke):
    teacher, collection = smoke.runner.teacher, smoke.inputs.collection
    known = [tuple(t) for t in collection.triples]
    ids = [
        (smoke.inputs.queries.ids[q], collection.passages.ids[p], collection.passages.ids[n])
        for q, p, n in teacher.triples.tolist()
    ]
    assert ids[: len(known)] == known and len(set(ids)) == len(ids) == 3 * len(known)
    assert {q for q, _, _ in ids} == {q for q, _, _ in known}
    model = open_cross_encoder(
        teacher.settings, max_length=32, device="cpu", folder=teacher.folder / "model"
    )
    queries = collection.queries["train"]
    for number in (0, 40, 95):
        q, *both = ids[number]
        pairs = [(queries[q], collection.passages[d]) for d in both]
        found = model.predict(pairs, show_progress_bar=False)
        np.testing.assert_allclose(teacher.scores[number], found, atol=1e-4)
    quality = teacher.about["validation"]
    assert set(quality) == {"cross-encoder", "in-batch"}
    assert all(0 <= v <= 1 for scores in quality.values() for v in scores.values())


def test_random_batches_are_those_of_all_other_runs(smoke):
    for config in runs_of(smoke, sampling="random"):
        order = smoke.runner.teacher.order(config)
        assert order.tolist() == seeded_order(32, 1).tolist()
    for config in runs_of(smoke, sampling="topics-balanced"):
        order = smoke.runner.teacher.order(config)
        assert order.max() >= 32  # also triples that the collection does not have


def test_a_killed_teacher_is_resumed(home, smoke):
    def killed():
        kill_in(teachers, "atomic_file", 1)  # before the first scores are stored
        paper.open("smoke", home).runner.teacher.prepare()

    assert in_child(killed) == "died"
    teacher = paper.open("smoke", home).runner.teacher
    assert (teacher.folder / "model").is_dir() and not teacher.about
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptive_margins.paper.teacher.fine_tune", None)  # it is not done again
        teacher.prepare()
    assert not (teacher.folder / "pairs").exists()
    np.testing.assert_allclose(teacher.scores, smoke.runner.teacher.scores, atol=1e-3)
    assert teacher.identity == smoke.runner.teacher.identity


def test_a_published_file_gives_the_same_students(home, smoke, tmp_path):
    teacher = smoke.runner.teacher
    queries, passages = smoke.inputs.queries.ids, smoke.inputs.collection.passages.ids
    lines = [
        f"{p}\t{n}\t{queries[q]}\t{passages[positive]}\t{passages[negative]}\n"
        for (p, n), (q, positive, negative) in zip(teacher.scores, teacher.triples, strict=True)
    ]
    path = tmp_path / "scores.tsv"
    path.write_text("".join(reversed(lines)))
    read = paper.open("smoke", home, teacher__scores=str(path), workers=1)
    (config,) = runs_of(read, sampling="topics-balanced", in_batch=True)
    (theirs,) = runs_of(smoke, sampling="topics-balanced", in_batch=True)
    assert config.teacher != theirs.teacher
    (found,) = read.runner.ensure([config])
    np.testing.assert_array_equal(read.runner.teacher.scores, teacher.scores)
    columns = ["nDCG@10", "Success(rel=2)@5"]
    np.testing.assert_allclose(
        found.curve[columns], smoke.store.get(theirs).curve[columns], atol=1e-6
    )
    path.write_text("".join(lines[:90]))  # another file, another teacher
    short = paper.open("smoke", home, teacher__scores=str(path), workers=1)
    with pytest.raises(TeacherError, match=r"no scores of 6 of 96 triples, first of number 91"):
        short.runner.ensure(runs_of(short, sampling="random"))
    assert [p.name for p in (home / "runs").iterdir()] == [config.run_id]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"teacher__clusters": 33}, "32 training queries cannot be put into 33 clusters"),
        ({"teacher__hard_margin": -99.0}, "'topics-hard' has triples of 0 queries"),
        ({"teacher__scores": "nowhere.tsv"}, "teacher.scores: there is no file nowhere.tsv"),
        ({"teacher__model": {"base": "nowhere"}}, "unknown encoder 'nowhere'"),
        ({"teacher__in_batch": {"base": "me/it"}}, "a hub id needs its revision"),
    ],
)
def test_what_is_refused_before_anything_is_trained(home, smoke_home, values, message):
    linked(smoke_home, home, "cache/teachers")
    reproduction = paper.open("smoke", home, workers=1, **values)
    with pytest.raises(AdaptiveMarginsError, match=message):
        reproduction.runner.ensure(teacher_runs(reproduction.experiments))
    assert not (home / "runs").exists()


def test_a_run_of_another_teacher(smoke):
    config = runs_of(smoke)[0].model_copy(update={"teacher": "another"})
    with pytest.raises(TeacherError, match=r"teacher another; the teacher of profile 'smoke' is"):
        smoke.runner._distillation(config)


def test_only_pydocs_gets_more_triples():
    with pytest.raises(ProfileError, match=r"teacher.negatives: only for PyDocs"):
        load_profile("paper", teacher__negatives=4)


def test_without_a_cross_encoder_late_interaction_scores_all_pairs(home):
    path = home / "one-teacher.yaml"
    path.write_text("{extends: smoke, teacher: {model: null}}\n")
    teacher = paper.open(path, home).runner.teacher
    assert teacher.settings.model is None
    teacher.prepare()
    for number in (0, 50, 95):
        query, *both = teacher.triples[number]
        found = teacher.in_batch(np.array([query]), np.array(both))[0]
        np.testing.assert_allclose(teacher.scores[number], found, atol=1e-4)
    assert set(teacher.about["validation"]) == {"in-batch"} and teacher.about["seconds"] > 0
