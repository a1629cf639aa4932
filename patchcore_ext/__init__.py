"""PatchCore anomaly detection (Roth et al. 2022, arXiv:2106.08265) with exact C++ kernels behind a thin Python face."""

from . import ops, reference
from ._library import build_info
from ._version import __version__
from .coreset import CoresetSampler, CoresetSelection
from .memory_bank import MemoryBank
from .patchcore import PatchCore, Prediction
from .scoring import PatchScorer, PatchScores

__all__ = [
    "CoresetSampler",
    "CoresetSelection",
    "MemoryBank",
    "PatchCore",
    "PatchScorer",
    "PatchScores",
    "Prediction",
    "__version__",
    "build_info",
    "ops",
    "reference",
]
