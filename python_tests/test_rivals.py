"""The rivals in benchmarks/rivals against their formulas, written once more in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.rivals import ivfpq, padim, samplers, spade

Array = NDArray[np.float64]


def rows_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 3, 50])
def test_spade_image_score_is_the_mean_distance_to_the_nearest_images(k: int) -> None:
    train, test = rows_of(7, 5), rows_of(4, 5, seed=1)
    scores, nearest = spade.image_neighbors(train, test, k)
    every = np.linalg.norm(test.double().numpy()[:, None] - train.double().numpy()[None], axis=2)
    order = np.argsort(every, axis=1)[:, : min(k, 7)]
    assert np.array_equal(nearest.numpy(), order)
    assert scores.numpy() == pytest.approx(np.take_along_axis(every, order, 1).mean(1), rel=1e-6)


def test_spade_pixels_look_at_the_nearest_images_only() -> None:
    images, patches = rows_of(6, 9, 4), rows_of(9, 4, seed=1)
    found = spade.pixel_distances(patches, torch.tensor([4, 1]), spade.Gallery(images.flatten(0, 1), 9))
    kept = images[[1, 4]].double().numpy().reshape(18, 4)
    expected = [min(float(np.sqrt(((patch - row) ** 2).sum())) for row in kept) for patch in patches.double().numpy()]
    assert found.numpy() == pytest.approx(expected, rel=1e-6)
    everywhere = torch.cdist(patches, images.flatten(0, 1)).min(1).values
    assert (found > everywhere + 1e-3).any()  # else the choice of images would not show


def naive_mahalanobis(train: Array, test: Array, regularisation: float) -> Array:
    """Per place: mean, covariance by loops, and the explicit inverse."""
    images, places, channels = train.shape
    result = np.zeros((len(test), places))
    for place in range(places):
        mean = train[:, place].mean(0)
        covariance = np.zeros((channels, channels))
        for image in range(images):
            difference = train[image, place] - mean
            covariance += np.outer(difference, difference) / max(images - 1, 1)
        inverse = np.linalg.inv(covariance + regularisation * np.eye(channels))
        for image in range(len(test)):
            difference = test[image, place] - mean
            result[image, place] = np.sqrt(difference @ inverse @ difference)
    return result


@pytest.mark.parametrize("images", [1, 2, 12])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_padim_distances(images: int, offset: float) -> None:
    train, test = rows_of(images, 6, 8) + offset, rows_of(5, 6, 8, seed=1) + offset
    channels = torch.tensor([0, 2, 3, 7])
    found = padim.distances(lambda: train.split(4), lambda: test.split(2), channels)
    expected = naive_mahalanobis(train.double().numpy()[:, :, channels], test.double().numpy()[:, :, channels], 0.01)
    assert found.shape == (5, 6)
    assert found.numpy() == pytest.approx(expected, rel=1e-5)


def test_padim_blocks_change_nothing() -> None:
    train, test = rows_of(5, 6, 8), rows_of(3, 6, 8, seed=1)
    whole, parts = (padim.distances(lambda: [train], lambda: [test], torch.arange(8), block_bytes=size) for size in (1 << 20, 2 * 8 * 64))
    assert torch.equal(whole, parts)


def test_padim_channels_are_drawn_without_repetition() -> None:
    drawn = padim.drawn_channels(40, 10, seed=3)
    assert len(set(drawn.tolist())) == 10
    assert drawn.tolist() == sorted(drawn.tolist())
    assert min(drawn.tolist()) >= 0
    assert max(drawn.tolist()) < 40
    assert torch.equal(drawn, padim.drawn_channels(40, 10, seed=3))
    assert not torch.equal(drawn, padim.drawn_channels(40, 10, seed=4))
    assert padim.drawn_channels(4, 10, seed=0).tolist() == [0, 1, 2, 3]


def test_random_rows_are_different_and_all_come_up() -> None:
    picked = [samplers.random_rows(20, 5, seed) for seed in range(40)]
    assert all(len(set(rows.tolist())) == 5 for rows in picked)
    assert set(torch.cat(picked).tolist()) == set(range(20))


@pytest.mark.parametrize("sign", [-1, 1])
def test_eq_8(sign: int) -> None:
    rows, proxies = rows_of(6, 3), rows_of(4, 3, seed=1)
    total = 0.0
    for row in rows.double().numpy():
        weights = [np.exp(sign * np.sqrt(((row - proxy) ** 2).sum())) for proxy in proxies.double().numpy()]
        mixed = sum(weight * proxy for weight, proxy in zip(weights, proxies.double().numpy(), strict=True)) / sum(weights)
        total += ((row - mixed) ** 2).sum() / 6
    assert float(samplers.reconstruction_loss(rows, proxies, sign)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("sign", [-1, 1])
def test_learned_proxies_lower_the_loss(sign: int) -> None:
    rows = rows_of(300, 4) + 5 * torch.eye(4)[torch.arange(300) % 4]
    starts = samplers.random_rows(300, 8, seed=0)
    learned = [samplers.learned_proxies(rows, starts, sign, steps=60, batch_size=32) for _ in range(2)]
    before, after = (float(samplers.reconstruction_loss(rows, proxies, sign)) for proxies in (rows[starts], learned[0]))
    assert after < 0.97 * before
    assert torch.equal(*learned)


def test_learned_proxies_do_not_depend_on_threads() -> None:
    rows, starts = rows_of(2000, 32), samplers.random_rows(2000, 300, seed=0)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(samplers.learned_proxies(rows, starts, steps=5))
        assert torch.get_num_threads() == threads
    assert torch.equal(*found)


def test_ivfpq_finds_most_of_the_nearest_rows_and_is_the_same_again() -> None:
    pytest.importorskip("faiss", reason="faiss is not installed: the approximate search was not tested")
    bank, queries = rows_of(6000, 16), rows_of(100, 16, seed=1)
    every = torch.cdist(queries.double(), bank.double())
    distances, nearest = ivfpq.search(ivfpq.build_index(bank), queries, 5)
    assert distances.shape == nearest.shape == (100, 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again, rows_again = ivfpq.search(ivfpq.build_index(bank), queries, 5)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(distances, again)
    assert torch.equal(nearest, rows_again)
    true_nearest = every.argmin(1)
    assert float((nearest == true_nearest[:, None]).any(1).double().mean()) > 0.5  # 8 of 77 lists are looked at
    found = every.gather(1, nearest[:, :1])[:, 0]
    assert float(((distances[:, 0].double() - found) / found).abs().median()) < 0.1  # quantised, but not far off


@pytest.mark.parametrize(("dim", "expected"), [(384, 64), (448, 64), (14, 14), (100, 50), (97, 1)])
def test_ivfpq_code_bytes(dim: int, expected: int) -> None:
    assert ivfpq.code_bytes(dim) == expected
    assert dim % expected == 0
