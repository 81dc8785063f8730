"""`examples/many_devices_checkpoints.py`: what comes back, and what is said when something is wrong."""

import logging
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from many_devices_checkpoints import Checkpoints
from many_devices_step import State
from many_devices_stop import Problem

RUN = {"model": "dcnv2", "seed": 0}
pytestmark = pytest.mark.lenient


@pytest.fixture(autouse=True)
def _logging_and_hooks(monkeypatch):
    """Checkpoints silence Orbax's logger and its threads' last words: here only for the test."""
    logger = logging.getLogger("absl")
    monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


def state(step=0, features=3):
    params = {"layer": {"kernel": step + jnp.arange(2.0 * features).reshape(2, features)}}
    return State(jnp.int32(step), jax.random.key_data(jax.random.key(step)), params, optax.adam(0.1).init(params))


def saved(folder, *steps, run=RUN):
    checkpoints = Checkpoints(folder, run, resume=True)
    for step in steps:
        checkpoints.save(step, state(step))
    checkpoints.finish()
    return folder


def restored(folder, like=None, run=RUN):
    return Checkpoints(folder, run, resume=True).restore(like or state())


def problem(folder, **how):
    with pytest.raises(Problem) as raised:
        restored(folder, **how)
    return str(raised.value)


def test_the_last_of_three_comes_back_bit_for_bit_on_any_devices(tmp_path):
    saved(tmp_path / "new" / "folder", 1, 2, 3, 4)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["2", "3", "4"]
    for devices in (1, 8):
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        everywhere = jax.NamedSharding(mesh, jax.P())
        back = restored(tmp_path / "new" / "folder", like=jax.device_put(state(), everywhere))
        jax.tree.map(np.testing.assert_array_equal, back, state(4))
        assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(back))


def test_without_a_checkpoint_a_run_begins(tmp_path):
    nothing = state()
    assert restored(tmp_path / "none", like=nothing) is nothing


def test_what_was_not_completed_is_ignored_and_cleared_away(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    assert restored(tmp_path).step == 1
    saved(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["1", "3"]


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    assert problem(tmp_path).startswith(f"{tmp_path} holds photos and no checkpoint; name an empty folder")
    assert os.listdir(tmp_path) == ["photos"]
    (tmp_path / "photos").rename(tmp_path / "2026")
    (tmp_path / "2026" / "a.jpg").touch()
    said = problem(tmp_path)
    assert said.startswith(
        f"the checkpoint {tmp_path / '2026'} cannot be read: it is damaged, or another program wrote it"
    )
    assert os.listdir(tmp_path / "2026") == ["a.jpg"]


def test_a_folder_that_is_none_or_closed(tmp_path):
    (tmp_path / "file").touch()
    assert problem(tmp_path / "file") == f"--checkpoints {tmp_path / 'file'} is a file; name a folder"
    said = problem(tmp_path / "file" / "below")
    assert said.startswith(f"cannot write checkpoints to {tmp_path / 'file' / 'below'} (NotADirectoryError: ")


def test_checkpoints_are_not_written_over(tmp_path):
    saved(tmp_path, 1, 2)
    with pytest.raises(Problem, match="has checkpoints already, the last of step 2; go on from it with --resume"):
        Checkpoints(tmp_path, RUN, resume=False)


def test_another_run_or_network_is_refused(tmp_path):
    saved(tmp_path, 1)
    said = problem(tmp_path, run=RUN | {"model": "dcnv1", "seed": 1})
    assert "is of another run or network: model is dcnv2 there and dcnv1 here, and 1 more; resume it with" in said
    said = problem(tmp_path, like=state(features=4))
    assert "layer/kernel is float32[2, 3] there and float32[2, 4] here; " in said
    with jax.enable_x64(True):
        double = state()._replace(params={"layer": {"kernel": jnp.zeros((2, 3), float)}})
        assert "layer/kernel is float32[2, 3] there and float64[2, 3] here; " in problem(tmp_path, like=double)
    other = state()._replace(params={"other": jnp.zeros(3)})
    assert "layer/kernel is float32[2, 3] there and missing here, and 1 more; " in problem(tmp_path, like=other)
    assert restored(tmp_path).step == 1
