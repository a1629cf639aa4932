"""integrations.sklearn: scikit-learn's own contract checks, and the same scores as the parts underneath."""

from __future__ import annotations

import doctest
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import make_features
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from small_model import SIDE, SmallNet, images_of, make_model, write_images

from patchcore_ext import CoresetSampler, PatchScorer
from patchcore_ext.integrations import sklearn as integration
from patchcore_ext.integrations.sklearn import KNNDetector, PatchCoreDetector


@parametrize_with_checks([KNNDetector(), KNNDetector(3, aggregation="mean", coreset_ratio=0.5), PatchCoreDetector(), PatchCoreDetector(image_score="max")])
def test_the_contract_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


def test_docstring_examples_run() -> None:
    found = doctest.testmod(integration)
    assert found.attempted > 0
    assert found.failed == 0


def rows_of(count: int, dim: int = 6, seed: int = 0) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = make_features("random", count, dim, seed=seed).numpy()
    return array


@pytest.mark.parametrize("aggregation", ["largest", "mean"])
@pytest.mark.parametrize("n_neighbors", [1, 5])
def test_knn_scores_are_the_distances_that_scikit_learn_finds(n_neighbors: int, aggregation: str) -> None:
    rows, queries = rows_of(150), rows_of(40, seed=1)
    detector = KNNDetector(n_neighbors, aggregation=aggregation).fit(rows)
    index = NearestNeighbors(n_neighbors=n_neighbors, algorithm="brute").fit(rows.astype(np.float64))
    for found, distances in (
        (detector.score_samples(queries), index.kneighbors(queries.astype(np.float64))[0]),
        (detector.score_samples(rows), index.kneighbors()[0]),  # a training row is not its own neighbour
    ):
        expected = distances[:, -1] if aggregation == "largest" else distances.mean(1)
        np.testing.assert_allclose(-found, expected, rtol=1e-6)


def test_knn_on_duplicates_leaves_out_one_row_only() -> None:
    detector = KNNDetector(2).fit([[0.0], [0.0], [5.0], [6.0]])
    assert detector.score_samples([[0.0], [5.0], [5.5]]).tolist() == [-5.0, -5.0, -0.5]


def test_knn_with_a_coreset_searches_the_samplers_rows() -> None:
    rows, queries = rows_of(200), rows_of(30, seed=1)
    detector = KNNDetector(3, coreset_ratio=0.2, random_state=4).fit(rows)
    kept = CoresetSampler(0.2, seed=4).select(rows).indices
    assert detector.indices_.tolist() == kept.tolist()
    distances, _ = PatchScorer(torch.from_numpy(rows)[kept]).nearest(queries, 3)
    assert detector.score_samples(queries).tolist() == (-distances[:, 2].double()).tolist()


@pytest.mark.parametrize("detector", [KNNDetector(contamination=0.06), PatchCoreDetector(contamination=0.06)])
def test_contamination_is_the_share_of_flagged_training_rows(detector: Any) -> None:
    rows = rows_of(200)
    labels = detector.fit_predict(rows)
    assert (labels == -1).sum() == 12
    assert np.array_equal(labels, detector.fit(rows).predict(rows))
    assert np.array_equal(labels == -1, detector.decision_function(rows) < 0)


def test_a_row_alone_gets_the_bits_it_gets_among_others() -> None:
    rows, queries = rows_of(400, 16), rows_of(70, 16, seed=1)
    for detector in (KNNDetector().fit(rows), PatchCoreDetector().fit(rows)):
        together = detector.score_samples(queries)
        assert together.tolist() == [detector.score_samples(query[None])[0] for query in queries]


def test_too_few_rows_for_the_neighbors_warn() -> None:
    with pytest.warns(UserWarning, match="n_neighbors is 5, but there are 2 rows to find; n_neighbors_ is 2"):
        assert KNNDetector().fit(rows_of(3)).n_neighbors_ == 2


def patches_of(count: int, seed: int = 0, defect: float = 0.0) -> npt.NDArray[np.float32]:
    patches = rows_of(count * 9, 6, seed).reshape(count, 9, 6).copy()
    patches[:, 4] += defect
    return patches


def test_patch_features_are_scored_as_images() -> None:
    good, test = patches_of(40), np.concatenate([patches_of(5, seed=1), patches_of(5, seed=2, defect=6.0)])
    detector = PatchCoreDetector(coreset_ratio=0.5, contamination=0.1, num_neighbors=4).fit(good)
    assert detector.n_features_in_ == 6
    scores = PatchScorer(detector.scorer_.bank, num_neighbors=4)(test).image_scores
    assert detector.score_samples(test).tolist() == (-scores.double()).tolist()
    assert detector.predict(test)[5:].tolist() == [-1] * 5
    with pytest.raises(ValueError, match=r"expected X to be patch features \[n_samples, patches, n_features\], as fit was given"):
        detector.predict(rows_of(4))
    with pytest.raises(ValueError, match="expected X to have 6 features a patch, as fit was given, got float32 of shape"):
        detector.predict(test[:, :, :5])


@pytest.mark.parametrize("detector", [KNNDetector(random_state=3), PatchCoreDetector(random_state=3)])
def test_clone_and_pickle(detector: Any) -> None:
    rows, queries = rows_of(300, 20), rows_of(20, 20, seed=1)
    fitted = detector.fit(rows)
    again = pickle.loads(pickle.dumps(fitted))
    assert again.score_samples(queries).tolist() == fitted.score_samples(queries).tolist()
    assert again.offset_ == fitted.offset_
    fresh = clone(fitted)
    assert fresh.get_params() == fitted.get_params()
    assert not hasattr(fresh, "offset_")
    assert fresh.fit(rows).score_samples(queries).tolist() == fitted.score_samples(queries).tolist()


@pytest.mark.parametrize("detector", [KNNDetector(), PatchCoreDetector()])
def test_pipeline_and_grid_search(detector: Any) -> None:
    normal, odd = rows_of(150), rows_of(30, seed=1) * 4
    rows = np.concatenate([normal, odd])
    labels = np.r_[np.ones(150), -np.ones(30)]
    pipeline = make_pipeline(StandardScaler(), detector).fit(normal)
    assert (pipeline.predict(odd) == -1).mean() > 0.5
    name = "n_neighbors" if isinstance(detector, KNNDetector) else "num_neighbors"
    options = {f"{type(detector).__name__.lower()}__{name}": [1, 4]}
    search = GridSearchCV(pipeline, options, scoring="roc_auc", cv=StratifiedKFold(3), error_score="raise").fit(rows, labels)
    assert search.best_score_ > 0.8
    assert len(search.cv_results_["mean_test_score"]) == 2


def image_detector(**options: Any) -> PatchCoreDetector:
    settings = {"resize": (SIDE, SIDE), "batch_size": 7, "device": "cpu", **options}
    return PatchCoreDetector(SmallNet(), ("first", "second"), **settings)


def test_images_go_through_patchcore(tmp_path: Path) -> None:
    good, bad = write_images(tmp_path / "good", images_of(24)), write_images(tmp_path / "bad", images_of(4, seed=5, defect=True))
    detector = image_detector(contamination=0.1).fit(good)
    model = make_model().fit(good, false_alarm_rate=0.1, progress=False)
    expected = [-prediction.score for prediction in model.predict(bad, progress=False)]
    assert detector.offset_ == -model.threshold
    assert detector.predict(bad).tolist() == [-1] * 4
    arrays = [np.asarray(Image.open(path)) for path in bad]
    for same in (bad, [Path(path) for path in bad], np.array(bad), [Image.open(path) for path in bad], arrays, np.stack(arrays)):
        assert detector.score_samples(same).tolist() == expected
    floats = np.stack(arrays).astype(np.float32) / 255  # resized by torch, not in 8 bits
    np.testing.assert_allclose(detector.score_samples(floats), expected, rtol=0.05)
    assert np.array_equal(detector.score_samples(floats), detector.score_samples(torch.from_numpy(floats).permute(0, 3, 1, 2)))
    assert pickle.loads(pickle.dumps(detector)).score_samples(bad).tolist() == expected
    assert clone(detector).fit(good).score_samples(bad).tolist() == expected
    with pytest.raises(ValueError, match="expected X to be images, as fit was given"):
        detector.predict(rows_of(3))
    with pytest.raises(ValueError, match="expected X to be features, as fit was given, got images"):
        PatchCoreDetector().fit(rows_of(30)).predict(bad)
    with pytest.raises(ValueError, match="expected X to be a list with one entry a sample, got one path"):
        detector.fit(tmp_path)


def test_grid_search_over_paths(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "good", images_of(18)) + write_images(tmp_path / "bad", images_of(6, seed=5, defect=True))
    labels = [1] * 18 + [-1] * 6
    options = {"coreset_ratio": [0.05, 0.5]}
    search = GridSearchCV(image_detector(image_score="max"), options, scoring="roc_auc", cv=StratifiedKFold(2), error_score="raise").fit(paths, labels)
    assert sorted(search.cv_results_["param_coreset_ratio"]) == [0.05, 0.5]
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.predict(paths).shape == (24,)


def test_a_backbone_by_name_pickles(tmp_path: Path) -> None:
    paths = write_images(tmp_path, images_of(3))
    detector = PatchCoreDetector("resnet18", ("layer1",), weights=None, resize=(SIDE, SIDE), device="cpu", coreset_ratio=0.5).fit(paths)
    assert pickle.loads(pickle.dumps(detector)).score_samples(paths).tolist() == detector.score_samples(paths).tolist()


def test_a_fit_on_other_samples_forgets_the_first(tmp_path: Path) -> None:
    paths = write_images(tmp_path, images_of(20))
    detector = image_detector().fit(rows_of(40))
    assert detector.n_features_in_ == 6
    detector.fit(paths)
    assert detector.scorer_ is None
    assert not hasattr(detector, "n_features_in_")
    detector.fit(rows_of(40, 3))
    assert detector.model_ is None
    assert detector.predict(rows_of(5, 3)).shape == (5,)


def test_random_state_is_an_int_a_generator_or_none() -> None:
    rows = rows_of(100)
    kept = [KNNDetector(coreset_ratio=0.1, random_state=np.random.RandomState(7)).fit(rows).indices_.tolist() for _ in range(2)]
    assert kept[0] == kept[1]
    assert len(KNNDetector(coreset_ratio=0.1, random_state=None).fit(rows).indices_) == 10
    assert KNNDetector(coreset_ratio=0.1, random_state=np.int64(5)).fit(rows).indices_.tolist() == CoresetSampler(0.1, seed=5).select(rows).indices.tolist()


def test_parameters_are_checked_by_fit_and_named() -> None:
    rows = rows_of(20)
    for contamination in (0, 0.6, "auto", True, float("nan")):
        for detector in (KNNDetector(contamination=contamination), PatchCoreDetector(contamination=contamination)):  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"Detector: expected contamination to lie in \(0, 0.5\], got"):
                detector.fit(rows)
    with pytest.raises(ValueError, match="KNNDetector: expected n_neighbors to be at least 1, got 0"):
        KNNDetector(0).fit(rows)
    with pytest.raises(ValueError, match="KNNDetector: expected aggregation to be one of 'largest', 'mean', got 'median'"):
        KNNDetector(aggregation="median").fit(rows)
    with pytest.raises(ValueError, match="expected ratio to lie in"):
        KNNDetector(coreset_ratio=2).fit(rows)
    with pytest.raises(ValueError, match="expected score to be one of"):
        PatchCoreDetector(image_score="mean").fit(rows)


def test_the_caller_keeps_the_rows() -> None:
    rows, queries = rows_of(50), rows_of(5, seed=1)
    detector = KNNDetector().fit(rows)
    before = detector.score_samples(queries)
    rows += 100
    assert detector.score_samples(queries).tolist() == before.tolist()
