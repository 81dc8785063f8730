"""Adding to elements that other programs add to: in the interpreter, and as Triton IR for a GPU."""

import functools
import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib.triton import dialect
from jax.experimental import pallas as pl

from dcn_jax._core.pallas import atomics, blocks
from dcn_jax._core.pallas.launch import launch
from tests.support import aot

SIZE = 21  # of two blocks of 16, the second ragged


def add_at(add, values, index, *, interpret):
    """An array of ones `(1, 4, 4)` after each value has been added to all of the row that its index names."""

    def body(values_ref, index_ref, sums_ref):
        these = blocks.block(pl.program_id(0), 16, SIZE)
        row, value = blocks.load(index_ref, these), blocks.load(values_ref, these)
        rows = blocks.Elements((row,), these.exists & (row >= 0) & (row < 4))
        columns = blocks.block(0, 4, 4)
        add(sums_ref, blocks.outer(rows, columns), jnp.broadcast_to(value[:, None], (16, 4)))

    operands, results = {"values": values, "index": index}, {"sums": jnp.ones((1, 4, 4))}
    return launch(body, operands, results, name="t", grid=(2,), warps=1, interpret=interpret)["sums"]


def test_the_interpreter_adds_each_value_that_exists():
    """Several values add to one row, from one block and from both. Values whose index is no row are masked."""
    rng = np.random.default_rng(0)
    values, index = rng.standard_normal((1, SIZE), np.float32), rng.integers(0, 4, (1, SIZE), np.int32)
    index[0, [2, 17]] = -1, 4
    values[0, [2, 17]] = np.nan
    add = functools.partial(blocks.add, interpret=True)
    sums = add_at(add, jnp.asarray(values), jnp.asarray(index), interpret=True)
    wanted, exists = np.ones((1, 4, 4)), ~np.isnan(values)
    np.add.at(wanted[0], index[exists], np.float64(values[exists])[:, None])
    np.testing.assert_allclose(sums, wanted, rtol=1e-5)


def atomic_adds(add):
    """(memory order, for example "relaxed", and number of operands) of each atomic add in a kernel."""
    shapes = [jax.ShapeDtypeStruct((1, SIZE), dtype) for dtype in (jnp.float32, jnp.int32)]
    text = aot.triton(functools.partial(add_at, add, interpret=False), *shapes)
    return [
        (order, len(re.findall("%", rest))) for order, rest in re.findall(r"atomic_rmw fadd, (\w+), gpu(.*):", text)
    ]


def test_a_gpu_adds_relaxed_and_masked():
    add = functools.partial(blocks.add, interpret=False)
    assert atomic_adds(add) == [("relaxed", 3)]  # where, what, and the mask


@pytest.mark.parametrize("gone", ["a module", "a name"])
def test_where_pallas_has_changed_its_own_add_serves(monkeypatch, gone):
    if gone == "a module":
        monkeypatch.setitem(sys.modules, "jax._src.pallas.triton.primitives", None)
    else:
        monkeypatch.delattr(dialect, "MemSemantic")
    found = importlib.util.spec_from_file_location("atomics_elsewhere", atomics.__file__)
    elsewhere = importlib.util.module_from_spec(found)
    found.loader.exec_module(elsewhere)
    monkeypatch.undo()
    assert atomic_adds(lambda ref, elements, value: elsewhere.add(ref, elements.index, value, elements.exists)) == [
        ("acq_rel", 3)
    ]
