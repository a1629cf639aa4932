"""PatchCore and k-nearest-neighbour distances as scikit-learn outlier detectors.

Both keep scikit-learn's contract: ``fit``, ``score_samples`` (the larger, the more normal), ``decision_function`` (``score_samples - offset_``, negative for
outliers), ``predict`` (+1 normal, -1 outlier), ``fit_predict``; ``clone``, ``Pipeline``, ``GridSearchCV`` and pickle. Neighbours and scores are exact and the
same bits for any batch and number of threads (docs/exactness.md), so a row alone gets what it gets among others.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor, nn

from .. import _checks
from .._calibration import calibrate
from .._extraction import PatchBatch, gather_good_patches
from ..coreset import CoresetSampler
from ..memory_bank import MemoryBank
from ..patchcore import PatchCore
from ..scoring import PatchScorer

__all__ = ["KNNDetector", "PatchCoreDetector"]

_DTYPES = [np.float32, np.float16]  # anything else is brought to the first
Floats = npt.NDArray[np.float64]


class _Detector(OutlierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is not typed
    """What follows from scores and an offset."""

    offset_: float
    n_features_in_: int

    def score_samples(self, X: Any) -> Floats:  # noqa: N803
        """The opposite of the anomaly scores."""
        raise NotImplementedError

    def decision_function(self, X: Any) -> Floats:  # noqa: N803
        """``score_samples(X) - offset_``: negative for outliers.

        Args:
            X: As for ``fit``.

        Returns:
            float64 ``[n_samples]``.
        """
        difference: Floats = self.score_samples(X) - self.offset_
        return difference

    def predict(self, X: Any) -> npt.NDArray[np.int64]:  # noqa: N803
        """+1 for samples that look normal, -1 for outliers.

        Args:
            X: As for ``fit``.

        Returns:
            int64 ``[n_samples]``.
        """
        return np.where(self.decision_function(X) >= 0, 1, -1).astype(np.int64)

    def _share(self) -> float:
        share = self.contamination
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) <= 0.5:
            raise ValueError(f"{type(self).__name__}: expected contamination to lie in (0, 0.5], got {share!r}.")
        return float(share)

    def _seed(self) -> int:
        if isinstance(self.random_state, Integral) and int(self.random_state) >= 0:
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))


class KNNDetector(_Detector):
    """Outliers by the distance to the nearest training rows, exactly, on all rows or on a coreset of them.

    The score of a row is minus the distance to its ``n_neighbors``-th nearest training row (Ramaswamy, Rastogi, Shim 2000), or minus the mean of the distances
    to all ``n_neighbors``. ``offset_`` is the ``contamination`` quantile of the training rows' scores.

    Where all rows are kept (``coreset_ratio=1``), a row is not its own neighbour: a query that equals a training row bit for bit is taken for that row, and one
    distance of zero is left out. So ``fit_predict(X)`` and ``fit(X).predict(X)`` are the same leave-one-out decisions. With a coreset the kept rows find
    themselves.

    Args:
        n_neighbors: Neighbours to look at; reduced, with a warning, to the rows there are.
        aggregation: "largest": the distance to the farthest of them. "mean": the mean of their distances.
        coreset_ratio: Share of the rows to search in, in (0, 1], chosen by ``CoresetSampler``. 1 keeps all.
        projection_dim: Dimension of the random projection the coreset is chosen in; None: none.
        contamination: Share of outliers among the training rows, in (0, 0.5].
        random_state: Of the coreset: an int, a RandomState, or None for NumPy's global one.

    Attributes:
        offset_: Scores below it are outliers.
        scorer_: The ``PatchScorer`` that searches; ``scorer_.bank`` are the rows, float32 or float16.
        indices_: int64, the training rows that were kept.
        n_neighbors_: Neighbours in use.
        n_features_in_: Dimension of the rows.

    Note:
        Rows are rounded to float32, in which the kernels take them; float16 stays as it is. Subtract a large common offset from float64 data first.

    Example:
        >>> import numpy as np
        >>> rows = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
        >>> KNNDetector(n_neighbors=3, contamination=0.05).fit(rows).predict([[0, 0, 0, 0], [9, 9, 9, 9]])
        array([ 1, -1])
    """

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        aggregation: str = "largest",
        coreset_ratio: float = 1.0,
        projection_dim: int | str | None = 128,
        contamination: float = 0.1,
        random_state: Any = 0,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.aggregation = aggregation
        self.coreset_ratio = coreset_ratio
        self.projection_dim = projection_dim
        self.contamination = contamination
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> KNNDetector:  # noqa: N803
        """Keeps the rows and sets ``offset_``.

        Args:
            X: ``[n_samples, n_features]`` finite numbers, at least two rows.
            y: Ignored.

        Returns:
            The detector.

        Raises:
            ValueError: A parameter out of its range, or rows that do not fit.
        """
        share = self._share()
        wanted = _checks.integer("KNNDetector", "n_neighbors", self.n_neighbors, 1)
        _checks.choice("KNNDetector", "aggregation", self.aggregation, ("largest", "mean"))
        sampler = CoresetSampler(self.coreset_ratio, projection_dim=self.projection_dim, seed=self._seed(), progress=False)
        rows = torch.from_numpy(np.array(validate_data(self, X, dtype=_DTYPES, ensure_min_samples=2), order="C"))  # a copy: X stays the caller's
        indices = sampler.select(rows).indices
        self.indices_ = indices.numpy()
        self._all_kept = self.coreset_ratio == 1
        most = len(rows) - 1 if self._all_kept else len(indices)
        if wanted > most:
            warnings.warn(f"KNNDetector: n_neighbors is {wanted}, but there are {most} rows to find; n_neighbors_ is {most}.", UserWarning, stacklevel=2)
        self.n_neighbors_ = min(wanted, most)
        self.scorer_ = PatchScorer(rows if self._all_kept else rows[indices])
        self.offset_ = float(np.percentile(self._scores(rows), 100 * share))
        return self

    def score_samples(self, X: Any) -> Floats:  # noqa: N803
        """Minus the distances to the training rows.

        Args:
            X: ``[n_samples, n_features]``.

        Returns:
            float64 ``[n_samples]``, 0 or less: the larger, the more normal.
        """
        check_is_fitted(self)
        return self._scores(torch.from_numpy(np.array(validate_data(self, X, dtype=_DTYPES, reset=False), order="C")))

    def _scores(self, rows: Tensor) -> Floats:
        count = self.n_neighbors_
        if not self._all_kept:
            distances = self.scorer_.nearest(rows, count)[0]
        else:
            distances = self.scorer_.nearest(rows, count + 1)[0]  # [n, k + 1]
            distances = torch.where(distances[:, :1] == 0, distances[:, 1:], distances[:, :-1])  # [n, k]: without the row itself
        values = distances.double()
        scores: Floats = -(values[:, -1] if self.aggregation == "largest" else values.mean(1)).numpy()
        return scores


class PatchCoreDetector(_Detector):
    """PatchCore (Roth et al. 2022, arXiv:2106.08265) on images, on patch features, or on a plain feature matrix.

    What ``fit`` is given decides what a sample is:

    - *Images*: a list or array of paths, a list of PIL images or of arrays ``[H, W, 3]`` (uint8, or float in 0..1) or ``[H, W]`` (uint8), or one array
      ``[n, H, W, 3]`` or tensor ``[n, 3, H, W]``. They go through the backbone (``PatchCore.fit``); the parameters up to ``batch_size`` matter here alone.
    - *Patch features* ``[n_samples, patches, n_features]``: a sample is an image with so many patches.
    - *A matrix* ``[n_samples, n_features]``: a sample is an image of one patch, as scikit-learn's own detectors take it.

    ``offset_``: for images and patch features, ``contamination`` is the share of further *good* images that may be flagged, and the threshold comes from
    images held out of the memory bank (see ``PatchCore.fit``), because the patches of an image in the bank find themselves. 0.01 is usual for an inspection.
    For a matrix it is that quantile of the training rows' scores, as in scikit-learn's own detectors.

    Args:
        backbone: Of ``PatchCore``, as the following ones: torchvision name or module.
        layers: Modules whose outputs are used.
        weights: Weights name, state-dict file or None.
        aggregation: "concat" or "paper".
        patch_size: p, odd.
        stride: s.
        feature_dim: d of "paper".
        resize: (height, width), int or None.
        crop: Centre crop or None.
        device: Where the backbone runs.
        batch_size: Images at once; None: what memory takes.
        coreset_ratio: Share of the patches that is kept.
        num_neighbors: b of Eq. (7).
        projection_dim: Dimension of the random projection the coreset is chosen in.
        projection: "sparse" or "gaussian".
        image_score: "paper", "max", "anomalib" or "amazon", the ``score`` of ``PatchScorer`` (a name that scikit-learn keeps for methods).
        contamination: See above; in (0, 0.5].
        random_state: Of the coreset and the held-out images: an int, a RandomState, or None for NumPy's global one.

    Attributes:
        offset_: Scores below it are outliers.
        scorer_: The ``PatchScorer``; None after a fit on images, whose ``model_`` has it.
        model_: The fitted ``PatchCore`` (anomaly maps: ``model_.predict``); None after a fit on features.
        n_features_in_: Dimension of the features; not set for images.

    Example:
        >>> import numpy as np
        >>> good = np.random.default_rng(0).normal(size=(30, 16, 8)).astype(np.float32)  # 30 images of 16 patches
        >>> detector = PatchCoreDetector(contamination=0.05).fit(good)
        >>> detector.predict(np.stack([good[0], good[0] + 9]))
        array([ 1, -1])
    """

    def __init__(
        self,
        backbone: str | nn.Module = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        *,
        weights: str | os.PathLike[str] | None = "DEFAULT",
        aggregation: str = "concat",
        patch_size: int = 3,
        stride: int = 1,
        feature_dim: int = 1024,
        resize: tuple[int, int] | int | None = (256, 256),
        crop: tuple[int, int] | int | None = None,
        device: str | torch.device = "auto",
        batch_size: int | None = None,
        coreset_ratio: float = 0.1,
        num_neighbors: int = 9,
        projection_dim: int | str | None = 128,
        projection: str = "sparse",
        image_score: str = "paper",
        contamination: float = 0.1,
        random_state: Any = 0,
    ) -> None:
        self.backbone = backbone
        self.layers = layers
        self.weights = weights
        self.aggregation = aggregation
        self.patch_size = patch_size
        self.stride = stride
        self.feature_dim = feature_dim
        self.resize = resize
        self.crop = crop
        self.device = device
        self.batch_size = batch_size
        self.coreset_ratio = coreset_ratio
        self.num_neighbors = num_neighbors
        self.projection_dim = projection_dim
        self.projection = projection
        self.image_score = image_score
        self.contamination = contamination
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def fit(self, X: Any, y: Any = None) -> PatchCoreDetector:  # noqa: N803
        """Makes the memory bank and sets ``offset_``.

        Args:
            X: Images, patch features or a matrix; see the class.
            y: Ignored.

        Returns:
            The detector.

        Raises:
            ValueError: A parameter out of its range, an image that cannot be read, features that are not finite.
        """
        share, seed = self._share(), self._seed()
        images = _images_in(X)
        self.model_: PatchCore | None = None
        self.scorer_: PatchScorer | None = None
        if images is not None:
            if hasattr(self, "n_features_in_"):
                del self.n_features_in_  # of an earlier fit on features
            options = {name: value for name, value in self.get_params(deep=False).items() if name not in ("contamination", "random_state", "image_score")}
            self.model_ = PatchCore(**options, score=self.image_score, seed=seed).fit(images, false_alarm_rate=share, progress=False)
            self.offset_ = -self.model_.threshold
            return self
        features = self._features(X, reset=True)
        sampler = CoresetSampler(self.coreset_ratio, projection_dim=self.projection_dim, projection=self.projection, seed=seed, progress=False)
        if features.ndim == 3:
            self.offset_ = -self._fit_patches(features, sampler, seed, share)
            return self
        self.scorer_ = self._make_scorer(features[sampler.select(features).indices])
        self._patches = False
        self.offset_ = float(np.percentile(self._scores(features), 100 * share))
        return self

    def score_samples(self, X: Any) -> Floats:  # noqa: N803
        """Minus the image scores.

        Args:
            X: Of the kind that ``fit`` was given.

        Returns:
            float64 ``[n_samples]``, 0 or less: the larger, the more normal.
        """
        check_is_fitted(self)
        images = _images_in(X)
        if self.model_ is not None:
            if images is None:
                raise ValueError("PatchCoreDetector: expected X to be images, as fit was given, got something else; fit on features to score features.")
            return -np.array([prediction.score for prediction in self.model_.predict(images, progress=False)], dtype=np.float64)
        if images is not None:
            raise ValueError("PatchCoreDetector: expected X to be features, as fit was given, got images; fit on images to score images.")
        features = self._features(X, reset=False)
        if (features.ndim == 3) != self._patches:
            wanted = "patch features [n_samples, patches, n_features]" if self._patches else "a matrix [n_samples, n_features]"
            raise ValueError(f"PatchCoreDetector: expected X to be {wanted}, as fit was given, got {_checks.describe(features)}.")
        return self._scores(features)

    def _features(self, X: Any, reset: bool) -> Tensor:  # noqa: N803
        """``[n, D]`` or ``[n, P, D]``, checked."""
        if getattr(X, "ndim", 2) != 3:
            return torch.from_numpy(np.array(validate_data(self, X, dtype=_DTYPES, reset=reset, ensure_min_samples=2 if reset else 1), order="C"))
        array = check_array(X, dtype=_DTYPES, allow_nd=True, ensure_min_features=1, estimator=self, input_name="X")
        if array.shape[2] == 0 or not (reset or array.shape[2] == self.n_features_in_):
            wanted = "at least one feature" if reset else f"{self.n_features_in_} features a patch, as fit was given"
            raise ValueError(f"PatchCoreDetector: expected X to have {wanted}, got {_checks.describe(array)}.")
        if reset:
            self.n_features_in_ = array.shape[2]
        return torch.from_numpy(np.array(array, order="C"))

    def _make_scorer(self, bank: Tensor) -> PatchScorer:
        return PatchScorer(bank, num_neighbors=self.num_neighbors, score=self.image_score)

    def _fit_patches(self, features: Tensor, sampler: CoresetSampler, seed: int, share: float) -> float:
        """The road of PatchCore.fit behind the backbone; returns the threshold."""
        count, num_patches, _ = features.shape
        names = [f"image {index}" for index in range(count)]
        grid = (num_patches, 1)
        good = gather_good_patches([PatchBatch(names, [grid] * count, grid, features, grid)], seed)
        kept = sampler.select(good.rows).indices
        origins = good.patch_origins[kept]  # [M, 3]
        bank = MemoryBank(good.rows[kept], image_indices=origins[:, 0].contiguous(), positions=origins[:, 1:].contiguous(), image_names=good.names)
        self.scorer_ = self._make_scorer(bank.features)
        self._patches = True
        threshold, _ = calibrate(good, bank, self._make_scorer, share)
        return threshold

    def _scores(self, features: Tensor) -> Floats:
        assert self.scorer_ is not None
        patches = features if features.ndim == 3 else features[:, None]  # [n, P, D]
        scores: Floats = -self.scorer_(patches).image_scores.double().numpy()
        return scores


def _images_in(source: Any) -> Any:
    """What PatchCore takes as images, when the samples are images; None when they are features."""
    if isinstance(source, Tensor | np.ndarray):
        if source.ndim == 4:
            return [_image(image) for image in source] if isinstance(source, np.ndarray) else source
        if isinstance(source, Tensor) or source.ndim != 1 or source.dtype.kind not in "UO":
            return None
        source = source.tolist()
    elif isinstance(source, str | os.PathLike):
        raise ValueError(f"PatchCoreDetector: expected X to be a list with one entry a sample, got one path; pass list_images({os.fspath(source)!r}).")
    if not isinstance(source, Sequence) or len(source) == 0:
        return None
    first = source[0]
    if isinstance(first, str | os.PathLike | Image.Image):
        return list(source)
    is_image = isinstance(first, np.ndarray) and (first.ndim == 3 or (first.ndim == 2 and first.dtype == np.uint8))
    return [_image(image) for image in source] if is_image else None


def _image(array: npt.NDArray[Any]) -> Any:
    """uint8 as PIL has it, so that an array gets the score of its file; floats as a tensor [C, H, W]."""
    if array.dtype == np.uint8:
        return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    return torch.from_numpy(np.array(array, dtype=np.float32).reshape(*array.shape[:2], -1)).permute(2, 0, 1)
