"""How many kernels the programs for a GPU launch, what memory they take, and how wide their loads and adds are.

Each figure is a limit: what was counted, or a little more. JOURNAL.md of the op has the figures themselves.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import dcn_jax
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


def compile_there(f, shapes, folder, kind):
    """The program for a GPU, and the PTX of all its kernels."""
    if reason := aot.missing(kind):
        pytest.skip(reason)
    device = aot.devices(kind)[0]
    here = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here) for s in shapes]
    options = {"xla_dump_to": str(folder)}
    if jax.__version_info__ >= (0, 11):
        options["xla_dump_emitter_re"] = ".*ptx.*"  # without it 0.11 and later dump no PTX
    with aot.target(f"NVIDIA {kind}"):
        program = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).compile(compiler_options=options)
    return program, "".join(file.read_text() for file in pathlib.Path(folder).glob("*.ptx"))


def figures(workload, dtype, mode, folder, kind="H100", **options):
    """Kernels, bytes of scratch, the PTX, whether there is no loop, and the shapes of the map and of the result.

    `options` are those of a convolution that the workload does not have.
    """
    op, shapes = workload.call, workload.shapes(dtype)
    if isinstance(workload, Convolution):  # offsets and modulations of layers are float32
        shapes[2:] = [jax.ShapeDtypeStruct(s.shape, jnp.float32) for s in shapes[2:]]
        op = functools.partial(dcn_jax.deform_conv, **workload.options, **options, implementation="xla")
    if isinstance(workload, Attention):
        shapes[1] = jax.ShapeDtypeStruct(shapes[1].shape, jnp.float32)
    y = jax.eval_shape(op, *shapes)
    program, ptx = compile_there(*((op, shapes) if mode == "forward" else (gradients(op), [y, *shapes])), folder, kind)
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
    assert launches <= most_launches(mode, in_one_block)
    assert scratch <= most_scratch(workload, dtype, mode, spare=256e6 if name != "groups" else 300e6)
    check_vectors(ptx, mode)


def most_launches(mode, in_one_block):
    few, most = {"forward": (4, 20), "gradients": (13, 60)}[mode]
    return few if in_one_block else most


def most_scratch(workload, dtype, mode, spare=256e6):
    share = {"forward": 0.30, "gradients": 0.75}[mode]
    return max(spare, share * workload.columns * jnp.dtype(dtype).itemsize)


# Other borders and ranks: small calls, as those of the parity tests, and calls of several blocks
SMALL_MAP, WIDE_MAP = Convolution((2, 24, 20, 32), 32), CONVOLUTIONS["wide map"]
FORMS = {
    **{border: (SMALL_MAP, {"padding_mode": border}) for border in ("edge", "wrap", "reflect", "symmetric")},
    "1-D": (Convolution((2, 200, 32), 32, window=(3,)), {}),
    "3-D": (Convolution((2, 8, 10, 12, 32), 32, window=(3, 3, 3)), {}),
    "reflect, several blocks": (WIDE_MAP, {"padding_mode": "reflect"}),
    "1-D, several blocks": (Convolution((8, 32768, 128), 128, window=(3,)), {}),
    "3-D, several blocks": (Convolution((2, 12, 56, 56, 64), 64, window=(3, 3, 3)), {}),
}


@pytest.mark.parametrize("mode", ["forward", "gradients"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", FORMS)
def test_every_border_and_rank(name, dtype, mode, tmp_path):
    """Within the limits of a map with zeros beyond it."""
    workload, options = FORMS[name]
    launches, scratch, ptx, in_one_block, *_ = figures(workload, dtype, mode, tmp_path, **options)
    assert launches <= most_launches(mode, in_one_block)
    # The result, which the blocks are written into, is a third of a 1-D call's columns.
    assert scratch <= most_scratch(workload, dtype, mode, spare=256e6 if workload.window != (3,) else 270e6)
    if "several blocks" in name:  # in kernels of few numbers XLA gives a thread one of them
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["conv4", "encoder", "dcnv3"])
def test_gradients_on_an_older_gpu(name, dtype, tmp_path):
    """An A100 launches as few kernels, in the same memory, and reads as wide; it cannot add four floats at once."""
    workload = CONVOLUTIONS.get(name) or FAMILY[name]
    launches, scratch, ptx, in_one_block, features, y = figures(workload, dtype, "gradients", tmp_path, "A100")
    if isinstance(workload, Convolution):
        assert launches <= most_launches("gradients", in_one_block)
        assert scratch <= most_scratch(workload, dtype, "gradients")
    else:
        most, shares = FAMILY_LIMITS[name, "gradients"]
        assert launches <= most
        assert scratch <= shares[dtype] * max(nbytes(features), nbytes(y))
    assert reads_vectors(ptx)
    # XLA of jax 0.10 adds by comparing and swapping, in every scatter: no form of ours avoids it.
    ways = ("add.f32",) if jax.__version_info__ >= (0, 12) else ("add.f32", "cas.b32")
    assert adds_of(ptx)
    assert all(add.endswith(ways) and "v4" not in add for add in adds_of(ptx)), adds_of(ptx)


def check_vectors(ptx, mode):
    """A thread reads at least 8 bytes of a map at once, and adds four floats at once."""
    assert reads_vectors(ptx)
    if mode == "gradients":
        assert adds_of(ptx)
        assert all("v4.f32" in add for add in adds_of(ptx)), adds_of(ptx)


def reads_vectors(ptx):
    return re.search(r"ld\.global\.nc\.(v4\.b16|v4\.b32|v2\.b64)", ptx)


def adds_of(ptx):
    """The instructions that change memory which others change too."""
    return set(re.findall(r"\b(?:red|atom)\.([\w.]+)", ptx))
