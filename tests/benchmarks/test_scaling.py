"""Each way to divide a layer computes what one device does, and exchanges what the page says."""

import functools
import json

import jax
import numpy as np
import pytest

from benchmarks import scaling
from benchmarks.collectives import read_collectives
from dcn_jax import deform_conv
from tests.support.running import assert_close, value_and_gradients
from tests.support.scaling import LAYER, bytes_sent

pytestmark = pytest.mark.lenient
slow = pytest.mark.slow
SENT = bytes_sent(8)
QUICK = {"batch, shard_map", "rows, halo_deform_conv"}
ON_A_CPU = pytest.mark.xfail(
    reason="XLA's CPU backend refuses to add over devices what all_taps spells `a - -b`", strict=True
)


def marks(name):
    return [] if name in QUICK else [slow, ON_A_CPU] if name == "channels" else [slow]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in scaling.WAYS])
def test_a_way(name):
    program = scaling.compile_way(scaling.WAYS[name], jax.devices(), LAYER)
    arrays = LAYER.arrays(0, "float32")
    y_bar = np.random.default_rng(1).standard_normal((8, 32, 4, 16), np.float32)
    shardings, _ = program.input_shardings
    found = program(*map(jax.device_put, (y_bar, *arrays), shardings))
    bound = scaling.BOUND if name.startswith("rows") else None
    whole = functools.partial(deform_conv, max_offset=bound)
    wanted = jax.jit(functools.partial(value_and_gradients, whole))(arrays, y_bar)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), found, wanted)
    if name in SENT:
        assert sum(one.sent for one in read_collectives(program.as_text())) == SENT[name]


def test_the_simple_model():
    """A program of one kernel and one sum."""
    text = """HloModule f

ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  %y = f32[1000]{0} negate(%x)
  ROOT %z = f32[1000]{0} all-reduce(%y), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}
"""

    class Program:
        def as_text(self):
            return text

        def memory_analysis(self):
            return type("Memory", (), dict(zip(SIZES, (5, 7, 11, 3), strict=True)))

    row = scaling.training_row("a name", Program(), flops=scaling.FLOPS)
    assert row["peak_bytes"] == 5 + 7 + 11 - 3
    assert row["sent_bytes"] == 4000
    assert row["compute_ms"] == pytest.approx(1e3 * (1 + 8000 / scaling.MEMORY))
    assert row["exchange_ms"] == pytest.approx(1e3 * (4000 / scaling.LINK + scaling.WAIT))
    assert row["efficiency"] == pytest.approx(row["compute_ms"] / row["step_ms"])


SIZES = [f"{what}_size_in_bytes" for what in ("argument", "output", "temp", "alias")]


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "WAYS", {"batch": scaling.WAYS["batch, shard_map"]})
    monkeypatch.setattr(scaling, "LAYER", LAYER)
    rows = scaling.main(["--json", str(tmp_path / "rows.json")])
    assert rows == json.loads((tmp_path / "rows.json").read_text())
    assert (rows[0]["kinds"], rows[0]["sent_bytes"]) == ("all-reduce", SENT["batch, shard_map"])
    assert "8 CPU" in capsys.readouterr().out


@slow
def test_the_flops_of_a_step():
    """ResNet-50 multiplies and adds 4.09e9 times an image, less at borders; a step has three such passes."""
    flops = scaling.count_flops()
    dense = 3 * 2 * 4.09e9 * scaling.IMAGES
    assert 0.95 * dense < flops["plain ResNet-50, batch"] < dense
    assert flops["batch"] / flops["plain ResNet-50, batch"] == pytest.approx(1.048, abs=1e-3)
    assert flops["batch, remat"] == pytest.approx(4 / 3 * flops["batch"])
