import numpy as np
import pytest

from pipelines.mixing import AREA, RATIO, blend, erase, mix


def pictures(number: int = 200, height: int = 20, width: int = 30) -> np.ndarray:
    """Each of one grey level of its own, none of which noise has."""
    levels = np.arange(number, dtype=np.float32)[:, None, None, None] + 0.5
    return np.broadcast_to(levels, (number, height, width, 1)).copy()


def generator(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


# erasing


def test_erasing_fills_one_rectangle_of_some_images() -> None:
    images, before = pictures(), pictures()
    erase(images, 0.5, generator())
    touched = [index for index in range(200) if not np.array_equal(images[index], before[index])]
    assert 75 < len(touched) < 125
    shares, ratios = [], []
    for index in touched:
        changed = images[index, ..., 0] != before[index, ..., 0]
        rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        shares.append(changed.mean())
        ratios.append(len(rows) / len(columns))
        noise = images[index][changed]
        assert noise.min() >= 0 and noise.max() <= 255 and np.array_equal(noise, np.round(noise))
    # Rounding to whole pixels moves the bounds a little.
    assert AREA[0] / 1.6 < min(shares) and max(shares) < AREA[1] * 1.1
    assert RATIO[0] / 1.6 < min(ratios) < 0.5 and 2 < max(ratios) < RATIO[1] * 1.6
    assert np.ptp(shares) > 0.25


@pytest.mark.parametrize(("probability", "touched"), [(0.0, False), (1.0, True)])
def test_erasing_none_or_all(probability: float, touched: bool) -> None:
    images = pictures()
    erase(images, probability, generator())
    assert ((images != pictures()).any((1, 2, 3)) == touched).all()


# mixing


def test_mixup_blends_each_image_with_its_partner() -> None:
    images = pictures(8)
    mixed, partner, share = mix(images, 0.4, 0.0, generator())
    assert sorted(partner) == list(range(8)) and 0 < share < 1
    expected = share * images[:, 0, 0, 0] + (1 - share) * images[partner, 0, 0, 0]
    assert mixed.dtype == np.float32
    assert np.allclose(mixed, expected[:, None, None, None])
    assert np.array_equal(images, pictures(8))


def test_cutmix_pastes_a_rectangle_of_the_partner() -> None:
    images, shares = pictures(8), []
    for seed in range(50):
        mixed, partner, share = mix(images, 0.0, 1.0, generator(seed))
        moved = np.flatnonzero(partner != np.arange(8))
        own = mixed[moved] == images[moved]
        assert (own | (mixed[moved] == images[partner][moved])).all()
        # The same rectangle in each, and the share is that of what is left.
        assert (own == own[:1]).all()
        assert own[0].mean() == pytest.approx(share)
        rows, columns = (~own[0, ..., 0]).any(1).sum(), (~own[0, ..., 0]).any(0).sum()
        assert rows * columns == (~own[0]).sum()
        shares.append(share)
    assert min(shares) < 0.3 and max(shares) > 0.95


def test_where_both_are_on_a_coin_decides() -> None:
    images = pictures(8)
    pasted = [
        np.isin(mix(images, 1.0, 1.0, generator(seed))[0], images).all() for seed in range(100)
    ]
    assert 30 < sum(pasted) < 70


@pytest.mark.parametrize("alpha", [0.2, 5.0])
def test_shares_are_of_a_beta_distribution(alpha: float) -> None:
    images = pictures(2, 2, 2)
    shares = [mix(images, alpha, 0.0, generator(seed))[2] for seed in range(2000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_labels_are_blended_likewise() -> None:
    labels = np.eye(4, dtype=np.float32)
    partner = np.array([1, 0, 2, 3])
    expected = [[0.7, 0.3, 0, 0], [0.3, 0.7, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert np.allclose(blend(labels, partner, 0.7), expected)
    assert blend(labels, partner, 0.7).dtype == np.float32


def test_the_same_draws_give_the_same_batch() -> None:
    for first, second, other in zip(*(drawn(seed) for seed in (3, 3, 4)), strict=True):
        assert np.array_equal(first, second) and not np.array_equal(first, other)


def drawn(seed: int) -> list[np.ndarray]:
    images, rng = pictures(8), generator(seed)
    erase(images, 0.5, rng)
    mixed, partner, share = mix(images, 0.4, 1.0, rng)
    return [images, mixed, partner, np.array(share)]
