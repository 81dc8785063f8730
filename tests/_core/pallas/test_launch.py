"""Launching kernels: arrays by name, the stack, the scope of `interpret`, and a refusal of JAX's that it translates."""

import functools
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dcn_jax._core.pallas.launch import interpret, interpreting, launch, on_platform


def run(body, operands, results):
    return launch(body, operands, results, name="test", grid=(1, 1), warps=4, interpret=True)


def test_arrays_go_by_name_and_each_member_of_the_stack_meets_its_own():
    def body(x_ref, shared_ref, absent_ref, sum_ref, twice_ref):
        assert absent_ref is None
        sum_ref[...] = x_ref[...] + shared_ref[...]
        twice_ref[...] = 2 * x_ref[...]

    x, shared = jnp.arange(6.0).reshape(2, 3), jnp.array([[10.0, 20.0, 30.0]])
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    made = run(body, {"x": x, "absent": None, "shared": shared}, {"twice": shape, "sum": shape})
    assert list(made) == ["twice", "sum"]
    np.testing.assert_array_equal(made["sum"], np.asarray(x) + np.asarray(shared))
    np.testing.assert_array_equal(made["twice"], 2 * np.asarray(x))


def test_a_result_given_as_an_array_starts_as_it():
    def body(x_ref, new_ref, total_ref):
        new_ref[...] = x_ref[...]
        total_ref[...] += x_ref[...]

    x, start = jnp.ones((1, 4)), jnp.arange(4.0)[None]
    made = run(body, {"x": x}, {"new": jax.ShapeDtypeStruct((1, 4), jnp.float32), "total": start})
    np.testing.assert_array_equal(made["total"], [[1, 2, 3, 4]])
    np.testing.assert_array_equal(made["new"], [[1, 1, 1, 1]])


def test_results_have_the_stack_even_where_all_operands_are_shared():
    def body(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    made = run(body, {"x": jnp.ones((1, 2))}, {"y": jax.ShapeDtypeStruct((3, 2), jnp.float32)})
    np.testing.assert_array_equal(made["y"], np.ones((3, 2)))


def test_interpret_holds_in_its_own_thread_and_ends_with_it():
    seen = []
    with interpret():
        thread = threading.Thread(target=lambda: seen.append(interpreting()))
        thread.start()
        thread.join()
        with interpret():
            pass
        assert interpreting()
    assert seen == [False]
    assert not interpreting()


def test_interpret_ends_with_an_error():
    with pytest.raises(KeyError), interpret():
        raise KeyError
    assert not interpreting()


def test_a_tpu_kernel_in_a_partitioned_program_says_to_use_shard_map():
    """`launch` recognises JAX's own error by its words, and JAX may change them. Lowering for a TPU needs no TPU."""
    call = pl.pallas_call(lambda x_ref, y_ref: None, out_shape=[jax.ShapeDtypeStruct((8, 128), jnp.float32)])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, P("data")))

    def refusal(f):
        try:
            jax.jit(f).trace(x).lower(lowering_platforms=("tpu",))
        except Exception as error:
            return error
        return None

    of_jax = refusal(call)
    assert isinstance(of_jax, NotImplementedError), (
        "JAX no longer raises NotImplementedError for a TPU kernel in a program that is partitioned over devices. "
        f"It gave {of_jax!r}. If this is an error, `launch._lower` must catch it; if None, JAX partitions kernels, "
        "and `launch._lower` need not catch anything."
    )
    assert "automatically partitioned" in str(of_jax), (
        "JAX has changed the words of this error, and `launch._lower` looks for 'automatically partitioned' in "
        "them. Until it looks for the new words, users see JAX's error and not our advice. JAX's error now: "
        f"{of_jax}"
    )
    ours = refusal(functools.partial(on_platform, "tpu", call))
    assert isinstance(ours, NotImplementedError)
    assert re.search(r"'pallas_tpu' runs on one device.*inside jax\.shard_map", str(ours))
