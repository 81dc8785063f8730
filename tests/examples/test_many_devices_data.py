"""`examples/many_devices_data.py`: a batch has the same bits, whoever makes it."""

import jax
import many_devices_data
import numpy as np
import pytest
from digits_data import BACKGROUND

pytestmark = pytest.mark.lenient


def on(devices):
    """The rows of a batch over so many devices."""
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    return jax.NamedSharding(mesh, jax.P("data"))


def batch(k, devices, data, seed=0):
    arrays = many_devices_data.global_batch(jax.random.key(seed), k, data[0], 8, on(devices))
    assert all(len(array.addressable_shards) == devices for array in arrays)
    return [np.asarray(array) for array in arrays]


def test_a_batch_is_the_same_on_any_number_of_devices_and_in_float64(data):
    canvases, labels = batch(3, 1, data)
    assert canvases.shape == (8, 32, 32, 1)
    assert labels.shape == (8, 16, 16)
    assert canvases.dtype == np.float32
    for devices in (2, 8):
        np.testing.assert_array_equal(batch(3, devices, data)[0], canvases)
        np.testing.assert_array_equal(batch(3, devices, data)[1], labels)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(batch(3, 2, data)[0], canvases)


def test_batches_rows_and_seeds_differ(data):
    canvases, labels = batch(3, 1, data)
    assert len({canvas.tobytes() for canvas in canvases}) == 8
    assert (labels != BACKGROUND).any((1, 2)).all()
    for other in (batch(4, 1, data), batch(3, 1, data, seed=1)):
        assert np.abs(canvases - other[0]).max(axis=(1, 2, 3)).min() > 0.1


def test_a_process_makes_the_rows_of_its_own_devices_only(data, monkeypatch):
    made = []
    make = many_devices_data.make_canvas
    monkeypatch.setattr(many_devices_data, "make_canvas", lambda *args: made.append(args[2]) or make(*args))
    batch(0, 8, data)
    assert sorted(made) == list(range(8))  # each once, for canvases and labels together
    made.clear()

    sharding = on(8)
    mine = dict(list(sharding.addressable_devices_indices_map((8,)).items())[:4])
    monkeypatch.setattr(
        jax, "make_array_from_callback", lambda shape, _, rows: [rows(index) for index in mine.values()]
    )
    many_devices_data.global_batch(jax.random.key(0), 0, data[0], 8, sharding)
    assert sorted(made) == list(range(4))
