"""How many kernels the programs for a GPU launch, what memory they take, and how wide their loads and adds are."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.convolution import Convolution
from benchmarks.family import Attention, Depthwise
from benchmarks.launches import count_launches
from benchmarks.workloads import WORKLOADS
from tests.support import aot
from tests.support.running import value_and_gradients

CONVOLUTIONS = {
    "wide map": Convolution((8, 100, 168, 128), 128),
    "conv3": Convolution((8, 50, 84, 256), 256),
    "conv4": Convolution((8, 25, 42, 512), 512),
    "small map": Convolution((16, 56, 56, 64), 64),
    "offset groups": Convolution((8, 50, 84, 256), 256, offset_groups=4),
    "groups": Convolution((8, 50, 84, 256), 256, groups=4, offset_groups=2),
}
MAPS = ((100, 152), (50, 76), (25, 38), (13, 19))
FAMILY = {
    "encoder": Attention(MAPS, batch=2),
    "decoder": Attention(MAPS, queries=300, batch=2),
    "grid_sample": WORKLOADS["grid-sample"],
    "dcnv3": Depthwise("dcnv3", (8, 56, 56, 128), 4),
    "dcnv4": Depthwise("dcnv4", (8, 56, 56, 128), 4),
}


def gradients(op):
    """The gradients alone: a function of the result's cotangent and the arguments."""
    return lambda y_bar, *arrays: value_and_gradients(op, arrays, y_bar)[1]


def compile_there(f, shapes, folder):
    """The program for an H100, and the PTX of all its kernels."""
    if reason := aot.missing("H100"):
        pytest.skip(reason)
    device = aot.devices("H100")[0]
    here = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here) for s in shapes]
    options = {"xla_dump_to": str(folder)}
    if jax.__version_info__ >= (0, 11):
        options["xla_dump_emitter_re"] = ".*ptx.*"  # without it 0.11 and later dump no PTX
    with aot.target("NVIDIA H100"):
        program = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).compile(compiler_options=options)
    return program, "".join(file.read_text() for file in pathlib.Path(folder).glob("*.ptx"))


def figures(workload, dtype, mode, folder):
    """Kernels, bytes of scratch, the PTX, whether there is no loop, and the shapes of the map and of the result."""
    op, shapes = workload.call, workload.shapes(dtype)
    if isinstance(workload, Convolution):  # offsets and modulations of layers are float32
        shapes[2:] = [jax.ShapeDtypeStruct(s.shape, jnp.float32) for s in shapes[2:]]
        op = functools.partial(op, implementation="xla")
    if isinstance(workload, Attention):
        shapes[1] = jax.ShapeDtypeStruct(shapes[1].shape, jnp.float32)
    y = jax.eval_shape(op, *shapes)
    program, ptx = compile_there(*((op, shapes) if mode == "forward" else (gradients(op), [y, *shapes])), folder)
    text, scratch = program.as_text(), program.memory_analysis().temp_size_in_bytes
    return count_launches(text), scratch, ptx, " while(" not in text, shapes[0], y


def nbytes(array):
    return array.size * array.dtype.itemsize


@pytest.mark.parametrize("mode", ["forward", "gradients"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, dtype, mode, tmp_path):
    """In one block at most 4 kernels, with gradients 13; in several 20 and 60. In 256 MB (groups: 300) or a share of the columns."""
    workload = CONVOLUTIONS[name]
    launches, scratch, ptx, in_one_block, *_ = figures(workload, dtype, mode, tmp_path)
    columns = workload.columns * jnp.dtype(dtype).itemsize
    few, most, share = {"forward": (4, 20, 0.30), "gradients": (13, 60, 0.75)}[mode]
    assert launches <= (few if in_one_block else most)
    assert scratch <= max(256e6 if name != "groups" else 300e6, share * columns)
    check_vectors(ptx, mode)


# Limits of kernels, and of scratch memory over the larger of result and map
FAMILY_LIMITS = {
    ("encoder", "forward"): (12, {"bfloat16": 5.7, "float32": 1.1}),
    ("encoder", "gradients"): (40, {"bfloat16": 4.5, "float32": 1.1}),
    ("decoder", "forward"): (12, {"bfloat16": 4.0, "float32": 1.1}),
    ("decoder", "gradients"): (40, {"bfloat16": 4.0, "float32": 1.1}),
    ("grid_sample", "forward"): (3, {"bfloat16": 4.0, "float32": 1.1}),
    ("grid_sample", "gradients"): (10, {"bfloat16": 4.0, "float32": 1.1}),
    ("dcnv3", "forward"): (8, {"bfloat16": 4.0, "float32": 2.2}),
    ("dcnv3", "gradients"): (30, {"bfloat16": 5.6, "float32": 2.2}),
    ("dcnv4", "forward"): (8, {"bfloat16": 4.0, "float32": 2.2}),
    ("dcnv4", "gradients"): (30, {"bfloat16": 6.2, "float32": 2.2}),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "mode"), FAMILY_LIMITS)
def test_family(name, mode, dtype, tmp_path):
    launches, scratch, ptx, _, features, y = figures(FAMILY[name], dtype, mode, tmp_path)
    most, shares = FAMILY_LIMITS[name, mode]
    assert launches <= most
    assert scratch <= shares[dtype] * max(nbytes(features), nbytes(y))
    check_vectors(ptx, mode)


def check_vectors(ptx, mode):
    """A thread reads at least 8 bytes of a map at once, and adds four floats at once."""
    if not ptx:
        return
    assert re.search(r"ld\.global\.nc\.(v4\.b16|v4\.b32|v2\.b64)", ptx)
    if mode == "gradients":
        adds = set(re.findall(r"\b(?:red|atom)\.([\w.]*add[\w.]*)", ptx))
        assert adds
        assert all("v4.f32" in add or "v4" in add for add in adds), adds
