"""The fused GPU kernels, in Pallas's interpreter: tests beyond the op's own suite, which runs over them too."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from dcn_jax import deform_conv, select_implementation
from dcn_jax._core.pallas.launch import interpret
from dcn_jax.ops.deform_conv.pallas_gpu import backend as pallas_gpu
from tests.support import aot
from tests.support.cases import draw
from tests.support.running import assert_close, check_against_oracle, value_and_gradients

CASE = draw((2, 4, 3, 2), (2, 3), 2, offset_groups=2, strides=(1, 2))
LINE = draw((2, 4, 2), (2,), 2)
fused = functools.partial(deform_conv, implementation="pallas_gpu")
BACKWARD = ["backward_kernel", "backward_x"]


@pytest.fixture
def interpreted():
    with interpret():
        yield


# In the interpreter a tile has 16 positions, channels and features. Each of these cases fills tiles in part,
# or takes several.
RAGGED = {
    "positions": draw((3, 5, 7, 2), (2, 2), 3),
    "channels": draw((1, 3, 3, 21), (2, 2), 2, bias=False),
    "channels of groups": draw((1, 3, 3, 40), (2, 1), 2, offset_groups=2, mask=False),
    "features of groups": draw((1, 3, 3, 4), (1, 2), 38, feature_group_count=2),
    "groups that do not nest": draw((1, 3, 3, 12), (1, 2), 8, feature_group_count=4, offset_groups=6),
    "strips": draw((1, 2, 40, 2), (1, 2), 2),
}


@pytest.mark.parametrize("case", RAGGED.values(), ids=RAGGED)
def test_ragged_tiles(interpreted, case):
    check_against_oracle(fused, case, 1e-5)


def test_offset_and_mask_in_float64(interpreted, x64):
    """With a float32 map. Gradients of float64 arrays are float64."""
    x, kernel, offset, mask, bias = CASE.arrays
    check_against_oracle(fused, CASE._replace(arrays=(x, kernel, np.float64(offset), np.float64(mask), bias)), 1e-5)


def check_against_xla(program, *arrays):
    """`program(op, *arrays)` has the same results by the kernels as by XLA."""
    ops = (functools.partial(deform_conv, implementation=name) for name in ("pallas_gpu", "xla"))
    found, wanted = (jax.tree.leaves(jax.jit(functools.partial(program, op))(*arrays)) for op in ops)
    for by_kernels, by_xla in zip(found, wanted, strict=True):
        assert_close(by_kernels, by_xla, 1e-5)


def gradients(op, *arrays):
    return jax.grad(lambda *arrays: jnp.sum(jnp.sin(op(*arrays))), range(5))(*arrays)


def tangents(op, *arrays):
    return jax.jvp(op, arrays, arrays)


def tangents_of_gradients(op, *arrays):
    return jax.jvp(functools.partial(gradients, op), arrays, arrays)


@pytest.mark.parametrize("program", [tangents, tangents_of_gradients])
def test_forward_mode(interpreted, program):
    check_against_xla(program, *LINE.arrays)


# The axes of x, kernel, offset, mask and bias that are mapped over; None: one array for all members.
MAPS = {"all": (0, 0, 0, 0, 0), "one kernel": (0, None, 1, 0, None), "one x": (None, None, 0, None, None)}


def gradients_of_map(axes, op, *arrays):
    return gradients(jax.vmap(op, axes), *arrays)


def stacks(axes):
    arrays = zip(LINE.arrays, axes, strict=True)
    return [a if axis is None else np.stack([a, a[..., ::-1]], axis) for a, axis in arrays]


@pytest.mark.parametrize("axes", [MAPS["one kernel"], MAPS["one x"]])
def test_the_gradients_of_a_map(interpreted, axes):
    check_against_xla(functools.partial(gradients_of_map, axes), *stacks(axes))


@pytest.mark.parametrize(
    ("program", "arrays", "wanted"),
    [
        pytest.param(tangents, LINE.arrays, ["forward"], id="tangents"),
        pytest.param(tangents_of_gradients, LINE.arrays, [*BACKWARD, "forward"], id="tangents of gradients"),
        pytest.param(
            lambda op, *a: gradients(jax.checkpoint(op), *a), LINE.arrays, [*BACKWARD, "forward"], id="checkpoint"
        ),
        *(
            pytest.param(functools.partial(gradients_of_map, axes), stacks(axes), [*BACKWARD, "forward"], id=name)
            for name, axes in MAPS.items()
        ),
    ],
)
def test_one_launch_for_each_pass(program, arrays, wanted):
    """One launch serves all members of a map. Tangents, and derivatives of gradients, are computed by XLA."""
    with aot.target("NVIDIA H100"):
        traced = jax.jit(functools.partial(program, fused)).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert sorted(re.findall(r'name = "deform_conv_(\w+)"', text)) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.complex64}, "x has dtype complex64"),
        ({"precision": lax.DotAlgorithmPreset.F64_F64_F64}, "precision=.*F64_F64_F64"),
    ],
    ids=["complex", "precision"],
)
def test_refused_calls_say_why(interpreted, change, message):
    dtype = change.get("dtype", jnp.float32)
    x, kernel = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 3, 3, 4), (1, 1, 4, 5)))
    offset = jax.ShapeDtypeStruct((2, 3, 3, 2), jnp.float32)
    for call in (select_implementation, lambda *a, **k: jax.eval_shape(functools.partial(deform_conv, **k), *a)):
        with pytest.raises(
            ValueError, match=f"implementation='pallas_gpu' cannot take this call: {message}.*use .*'xla'"
        ):
            call(x, kernel, offset, implementation="pallas_gpu", precision=change.get("precision"))


def test_a_shard_map_over_some_axes_is_refused(interpreted):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    call = jax.shard_map(fused, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data"})
    with pytest.raises(ValueError, match="it is in a shard_map over some axes of its mesh"):
        jax.eval_shape(call, *LINE.arrays[:4])


def test_float64_is_refused(interpreted, x64):
    with pytest.raises(ValueError, match="x has dtype float64"):
        fused(*draw((2, 3, 3, 1), (1, 1), 1).astype(np.float64).arrays)


def test_a_refusal_gives_all_reasons(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.complex64) for shape in ((2, 3, 3, 4), (1, 1, 4, 5)))
    offset = jax.ShapeDtypeStruct((2, 3, 3, 2), jnp.float32)
    reasons = "x has dtype complex64", "kernel has dtype complex64", "precision=", "CUDA GPUs"
    with pytest.raises(ValueError, match=".*; and .*".join(reasons)):
        select_implementation(
            x, kernel, offset, precision=lax.DotAlgorithmPreset.F64_F64_F64, implementation="pallas_gpu"
        )


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # nor the plugin to compile for one
    with pytest.raises(ValueError, match="runs on CUDA GPUs, and JAX's backend here is 'cpu'"):
        jax.eval_shape(functools.partial(fused, **CASE.options), *CASE.arrays)


def test_lowered_for_another_platform_it_says_so():
    with aot.target("NVIDIA H100"):
        traced = jax.jit(functools.partial(fused, **CASE.options)).trace(*CASE.arrays)
        with pytest.raises(ValueError, match="runs on CUDA GPUs alone"):
            traced.lower(lowering_platforms=("cpu",))


@pytest.mark.parametrize("dtype", pallas_gpu.DTYPES)
def test_the_kernels_are_in_the_lowered_program(dtype):
    """Lowering for a GPU needs no GPU. It gives no warning."""
    arrays = CASE.astype(jnp.dtype(dtype)).arrays
    op = functools.partial(fused, **CASE.options)
    cotangent = jax.ShapeDtypeStruct((2, 4, 2, 2), dtype)
    with aot.target("NVIDIA H100"):
        lowered = jax.jit(functools.partial(value_and_gradients, op)).trace(arrays, cotangent)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    names = {f"deform_conv_{name}" for name in ("forward", "backward_x", "backward_kernel")}
    assert set(re.findall(r'name = "(deform_conv\w+)"', text)) == names


def test_the_modes_share_no_trace():
    """A program that was traced in the interpreter is traced again for the GPU."""
    call = jax.jit(functools.partial(fused, **CASE.options))
    with interpret():
        call(*CASE.arrays)
    with aot.target("NVIDIA H100"):
        assert "deform_conv_forward" in call.trace(*CASE.arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_a_backward_pass_runs_in_the_mode_of_its_forward_pass():
    with interpret():
        y, pull = jax.vjp(functools.partial(fused, **CASE.options), *CASE.arrays)
    assert all(jnp.all(jnp.isfinite(gradient)) for gradient in pull(y))  # outside, where there is no GPU


@pytest.mark.parametrize(
    ("precision", "context", "wanted"),
    [
        (None, None, "TF32_TF32_F32"),
        ("high", None, "TF32_TF32_F32"),
        ("highest", None, "F32_F32_F32"),
        (None, "float32", "F32_F32_F32"),
        (None, "TF32_TF32_F32_X3", "TF32_TF32_F32_X3"),
        (lax.DotAlgorithmPreset.TF32_TF32_F32_X3, "float32", "TF32_TF32_F32_X3"),
        (lax.DotAlgorithmPreset.F64_F64_F64, None, None),
    ],
)
def test_precision_is_read_as_lax_reads_it(precision, context, wanted):
    with jax.default_matmul_precision(context):
        found = pallas_gpu._dot_algorithm(precision)
    assert (found and found.name) == wanted


def test_importing_the_package_leaves_pallas_alone():
    code = "import dcn_jax, sys; print([m for m in sys.modules if 'pallas_gpu' in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_automatic_choice_is_xla_and_says_why(monkeypatch):
    name, reason = select_implementation(*CASE.arrays[:4], **CASE.options)
    assert name == "xla"
    assert "not been timed beside it" in reason
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    assert "atomically" in select_implementation(*CASE.arrays[:4], **CASE.options)[1]
