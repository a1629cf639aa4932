"""Random projections and start indices that are the same on every machine.

All randomness is 64-bit words of the counter-based generator Philox4x64-10 (Salmon et al. 2011) as NumPy implements it, whose stream NumPy keeps stable;
keyed by (seed, stream). What is made of the words uses integers, IEEE additions, multiplications, divisions and square roots only, so that no math library's
last bit comes in.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_STREAM_START = 0
_STREAM_PROJECTION = 1
_STREAM_SPLIT = 2


def _words(seed: int, stream: int, count: int) -> npt.NDArray[np.uint64]:
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def start_index(seed: int, num_rows: int) -> int:
    """A row in [0, num_rows), each as likely as any other up to 2^-32."""
    return int(_words(seed, _STREAM_START, 1)[0]) * num_rows >> 64


def permutation(seed: int, count: int) -> npt.NDArray[np.int64]:
    """The numbers 0 .. count - 1 in random order (sorted by random words; equal words keep their order)."""
    return np.argsort(_words(seed, _STREAM_SPLIT, count), kind="stable")


def sparse_projection_matrix(dim: int, projection_dim: int, seed: int) -> npt.NDArray[np.float64]:
    """Very sparse random projection: Li, Hastie, Church 2006, as in sklearn.random_projection.SparseRandomProjection.

    Entries are 0 with probability 1 - density, else +-1 / sqrt(density * projection_dim) with equal odds; density = 1 / sqrt(dim).

    Returns:
        ``[projection_dim, dim]`` float64.
    """
    words = _words(seed, _STREAM_PROJECTION, projection_dim * dim).reshape(projection_dim, dim)
    threshold = np.uint64(min(int(2.0**63 / math.sqrt(dim)), 2**63))  # dim 1: density 1
    magnitude = math.sqrt(math.sqrt(dim)) / math.sqrt(projection_dim)
    signs = np.where(words & np.uint64(1), 1.0, -1.0)
    return np.where(words >> np.uint64(1) < threshold, signs * magnitude, 0.0)


def gaussian_projection_matrix(dim: int, projection_dim: int, seed: int) -> npt.NDArray[np.float64]:
    """Gaussian random projection as in sklearn.random_projection.GaussianRandomProjection: entries from N(0, 1 / projection_dim).

    Returns:
        ``[projection_dim, dim]`` float64.
    """
    words = _words(seed, _STREAM_PROJECTION, projection_dim * dim).reshape(projection_dim, dim)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), never an end
    return inverse_normal_cdf(uniform) / math.sqrt(projection_dim)


# Coefficients of PPND16, highest power first: Wichura 1988, "Algorithm AS 241: The percentage points of the normal distribution", Applied Statistics 37.
# fmt: off
_CENTRAL = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457, 13731.693765509461125, 1971.5909503065514427,
     133.14166789178437745, 3.387132872796366608),
    (5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867, 5394.1960214247511077, 687.1870074920579083,
     42.313330701600911252, 1.0),
)
_MIDDLE = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258, 3.64784832476320460504, 5.7694972214606914055,
     4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459, 0.68976733498510000455, 1.6763848301838038494,
     2.05319162663775882187, 1.0),
)
_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093, 0.29656057182850489123, 1.7848265399172913358,
     5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4, 0.0148753612908506148525,
     0.13692988092273580531, 0.59983220655588793769, 1.0),
)
# fmt: on


def _rational(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    numerator, denominator = (np.full_like(x, row[0]) for row in coefficients)
    for a, b in zip(coefficients[0][1:], coefficients[1][1:], strict=True):
        numerator = numerator * x + a
        denominator = denominator * x + b
    return numerator / denominator


def _log(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Natural logarithm for 0 < x < 1 by the series of artanh; the same bits everywhere, within a few ulp."""
    mantissa, exponent = np.frexp(x)  # mantissa in [1/2, 1)
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)  # |ratio| < 0.172
    square = ratio * ratio
    series = np.full_like(square, 1.0 / 23.0)
    for n in range(21, 0, -2):
        series = series * square + 1.0 / n
    return 2.0 * ratio * series + (exponent - low) * 0.6931471805599453


def inverse_normal_cdf(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The normal distribution's quantile for 0 < p < 1, to about 1e-15 (relative), with the same bits everywhere.

    Source: Wichura 1988, Algorithm AS 241 (PPND16).
    """
    q = p - 0.5
    central = q * _rational(_CENTRAL, 0.180625 - q * q)
    r = np.sqrt(-_log(np.where(q < 0, p, 1.0 - p)))
    outer = np.where(r <= 5.0, _rational(_MIDDLE, r - 1.6), _rational(_TAIL, r - 5.0))
    return np.where(np.abs(q) <= 0.425, central, np.where(q < 0, -outer, outer))
