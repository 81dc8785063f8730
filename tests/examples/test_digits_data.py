"""`examples/digits_data.py`: digits, warps, labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from digits_data import BACKGROUND, Digits, make_batch, random_warp, warp

pytestmark = pytest.mark.lenient


def test_train_and_test_digits_come_from_different_originals(data):
    train, test = ({image.tobytes() for image in np.asarray(part.images)} for part in data)
    assert not train & test
    assert len(train) + len(test) == 1797  # and none is there twice
    assert len(test) == 1797 // 5
    for part in data:
        assert part.images.shape == (len(part.digits), 8, 8)
        assert part.images.min() == 0
        assert part.images.max() == 1
        assert set(part.digits.tolist()) == set(range(10))


def test_a_warp_turns_scales_and_places_the_image(data):
    image = data[0].images[0]
    middle = jnp.array([15.5, 15.5])
    plain = np.asarray(warp(image, jnp.eye(2), middle))[..., 0]
    np.testing.assert_allclose(plain[12:20, 12:20], image, atol=1e-6)
    assert plain.sum() == pytest.approx(float(image.sum()))

    quarter_turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])  # takes the row axis to the column axis
    turned = np.asarray(warp(image, quarter_turn, middle + jnp.array([-3.0, 5.0])))[..., 0]
    np.testing.assert_allclose(turned[9:17, 17:25], np.rot90(image), atol=1e-6)

    larger = np.asarray(warp(image, 3 * jnp.eye(2), middle))[..., 0]
    np.testing.assert_allclose(larger[5:27:3, 5:27:3], image, atol=1e-5)


def test_labels_and_canvases_agree(data):
    canvases, labels = make_batch(jax.random.key(0), data[0], 64)
    assert canvases.shape == (64, 32, 32, 1)
    assert labels.shape == (64, 16, 16)
    for canvas, label in zip(np.asarray(canvases)[..., 0], np.asarray(labels), strict=True):
        for row in range(16):
            for column in range(16):
                ink = canvas[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean()
                assert (label[row, column] != BACKGROUND) == (ink > 0.4) or abs(ink - 0.4) < 1e-6
        assert len(set(label.ravel().tolist()) - {BACKGROUND}) == 1  # one digit on each canvas, and always some of it


def test_the_label_is_that_of_the_original(data):
    """With one original in the pool, every canvas is of it."""
    for i in range(3):
        one = Digits(data[0].images[i : i + 1], data[0].digits[i : i + 1])
        _, labels = make_batch(jax.random.key(i), one, 8)
        assert set(np.unique(labels).tolist()) == {int(one.digits[0]), BACKGROUND}


def test_warps_span_a_threefold_range_and_stay_on_the_canvas():
    matrices, centers = jax.vmap(random_warp)(jax.random.split(jax.random.key(0), 2000))
    scales = np.sqrt(np.linalg.det(matrices))  # turning and shearing leave areas alone
    assert scales.min() == pytest.approx(1.25, rel=0.01)
    assert scales.max() == pytest.approx(3.75, rel=0.01)
    half = 8 * scales[:, None] / 2
    assert (centers - half >= -0.51).all()
    assert (centers + half <= 31.51).all()


def test_batches_are_endless(data):
    (first, _), (again, _), (other, _) = (make_batch(jax.random.key(k), data[0], 4) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max(axis=(1, 2, 3)).min() > 0.1
