"""Training steps of a plain network and a deformed one, of no size."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import training
from dcn_jax.models.resnet import BasicBlock
from dcn_jax.nnx import DeformConv


class OneLayer(nnx.Module):
    """A convolution, plain or deformable, a batch norm and a classifier, in place of a ResNet."""

    def __init__(self, block, depths, classes, *, dtype, rngs, deform_stages=(), implementation=None):
        more = {"padding": 1, "dtype": dtype, "rngs": rngs}
        if deform_stages:
            self.conv = DeformConv(3, 4, (3, 3), implementation=implementation, **more)
        else:
            self.conv = nnx.Conv(3, 4, (3, 3), **more)
        self.norm = nnx.BatchNorm(4, dtype=dtype, rngs=rngs)
        self.fc = nnx.Linear(4, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.norm(self.conv(x)).mean((1, 2)))


@pytest.fixture
def one_layer(monkeypatch):
    """Networks of one layer, though the command counts two: those of a block."""
    monkeypatch.setitem(training.NETWORKS, 18, (BasicBlock, (1, 1, 1, 1)))
    monkeypatch.setattr(training, "DEFORMED", ("conv5",))
    monkeypatch.setattr(training, "ResNet", OneLayer)


@pytest.mark.slow
def test_a_step_of_a_resnet_trains_every_parameter():
    plain, deformed = (training.make_network(name, 18, "bfloat16") for name in ("plain", "xla"))
    batch = jax.ShapeDtypeStruct((2, 32, 32, 3), "bfloat16"), jax.ShapeDtypeStruct((2,), "int32")
    with jax.numpy_dtype_promotion("standard"):  # Flax's batch norm mixes dtypes
        (parameters, *_), loss = jax.eval_shape(deformed.step, deformed.state, *batch)
    assert loss.dtype == "float32"
    assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(jnp.shape, deformed.state[0])
    counts = [len(jax.tree.leaves(network.state[0])) for network in (plain, deformed)]
    assert counts[1] - counts[0] == 2 * training.deformable_layers(18) == 24  # kernel and bias of each branch


@pytest.mark.slow
def test_a_row_for_each_network_that_can_train(one_layer, tmp_path, capsys):
    command = ["--depth", "18", "--batch", "2", "--size", "16", "--quick", "--json", str(tmp_path / "rows.json")]
    rows = training.main([*command, "--implementation", "xla", "pallas_gpu"])
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert [row["network"] for row in rows] == ["plain", "xla"]
    plain, deformed = rows
    assert plain["ms"] > 0
    assert 0 < plain["loss"] < 20
    assert plain["loss"] != deformed["loss"]
    assert 0 < plain["peak_bytes"] < deformed["peak_bytes"]  # offset branches are parameters too
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 layers deformed" in printed
    assert "pallas_gpu: not available: " in printed
    assert "images / s ratio" in printed


def test_launches_of_a_layer_are_those_beyond_the_plain_network_s(one_layer):
    args = training.parse(["--depth", "18", "--batch", "2"])
    common = {"ms": 4.0, "peak_bytes": 1, "compile_s": 1.0}
    rows = [common | {"network": "plain", "launches": 10}, common | {"network": "xla", "ms": 6.0, "launches": 50}]
    cells = [list(column.cells) for column in training.table_of(rows, args).columns]
    assert cells[3] == ["1.00", "1.50"]
    assert cells[6] == ["–", "20.0"]  # of two layers


def test_a_batch_of_nothing_is_refused_in_words(capsys):
    with pytest.raises(SystemExit):
        training.parse(["--batch", "0"])
    assert "--batch 0: wanted at least 1" in capsys.readouterr().err
