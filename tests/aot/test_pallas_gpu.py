"""What the compiler for an H100 makes of the fused GPU kernels, on a machine that has none (`make test-aot`)."""

import functools
import importlib.util
import math
import pathlib
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    SingleDeviceSharding,
    use_abstract_mesh,
)
from jax.sharding import PartitionSpec as P

from benchmarks import workloads
from dcn_jax import deform_conv
from tests.support import aot
from tests.support.running import value_and_gradients

if reason := aot.missing("H100"):
    pytest.skip(reason, allow_module_level=True)

# ResNet-50's deformable layers at 800×1344 in batches of 8, and a small map: x and features, all 3×3.
WORKLOADS = {name.removeprefix("gpu-"): workloads.WORKLOADS[name][:2] for name in workloads.GPU}
# Channels and features that fill no tile, in one group and in many.
RAGGED = {
    "odd": ((2, 33, 47, 45), 21, {}),
    "wide": ((2, 33, 47, 24), 300, {}),
    "groups": ((2, 33, 47, 48), 72, {"feature_group_count": 6, "offset_groups": 4}),
}
FORWARD = {"deform_conv_forward"}
BACKWARD = {"deform_conv_backward_x", "deform_conv_backward_kernel"}
# What else a window may be: 1-D, of 3-D points with eight corners, and other borders.
WINDOWS = {
    "1-D": ((8, 4000, 128), 128, {"window": (5,)}),
    "3-D": ((2, 16, 28, 28, 64), 64, {"window": (3, 3, 3)}),
    "3-D, odd": ((2, 8, 9, 10, 45), 70, {"window": (3, 3, 3)}),
    "wrap": (*WORKLOADS["conv4"], {"padding_mode": "wrap"}),
}
# Scratch memory as a share of the columns: rows and weights, 32 bytes a point; in the backward pass also the weights'
# gradient, 16 bytes a point for each block of channels × features, and float32 sums for x and the kernel.
LIMITS = {"forward": 0.30, "backward": 0.75}
# Bytes that one tile spills, with which float32 was fastest all the same (pallas_gpu/JOURNAL.md): 104 on jax 0.11.2, 208 on 0.12.
MEASURED = {"deform_conv_backward_kernel": 640}


def program(x, features, dtype, mode, *, window=(3, 3), feature_group_count=1, offset_groups=1, **options):
    """A function and the shapes of its arguments; "backward" is the gradients alone."""
    *positions, channels = x
    points = math.prod(window) * offset_groups
    shapes = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in [
            (x, dtype),
            ((*window, channels // feature_group_count, features), dtype),
            ((*positions, len(window) * points), jnp.float32),
            ((*positions, points), jnp.float32),
            ((*positions, features), dtype),
        ]
    ]
    op = functools.partial(deform_conv, feature_group_count=feature_group_count, implementation="pallas_gpu", **options)
    if mode == "forward":
        return op, shapes[:4]
    return lambda *arrays: value_and_gradients(op, arrays[:4], arrays[4])[1], shapes


def compile_with_ptx(folder, f, shapes):
    """The program compiled for an H100, and the PTX of each of its kernels by name."""
    (device, *_) = aot.devices("H100")
    shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=SingleDeviceSharding(device)) for s in shapes]
    options = {"xla_dump_to": str(folder)}
    if jax.__version_info__ >= (0, 11):
        options["xla_dump_emitter_re"] = ".*ptx.*"  # without it 0.11 and later dump no PTX
    with aot.target("NVIDIA H100"):
        lowered = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile(compiler_options=options)
    kernels = {}
    for file in pathlib.Path(folder).glob("*.ptx"):
        for name in re.findall(r"\.entry (deform_conv_\w+)", file.read_text()):
            kernels[name] = file
    return compiled, kernels


def spilled(file):
    """Bytes of registers that the assembler spills; skips the test where there is no assembler to ask."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = [pathlib.Path(root) for root in nvidia.submodule_search_locations] if nvidia else []
    installed = [str(path) for root in roots for path in root.glob("**/bin/ptxas")]
    ptxas = next(iter(installed), None) or shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("there is no ptxas, which tells whether registers are spilled; `make test-aot` installs it")
    command = [ptxas, "-v", "--gpu-name", "sm_90a", "-o", file.with_suffix(".cubin"), file]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill", report)
    assert spills, f"{ptxas} said nothing of spills: {report}"
    return sum(map(int, spills))


def check_kernels(kernels, names, instruction="wgmma.mma_async", *, spills=None):
    """All there, on the tensor cores, and without spilled registers but those that are allowed."""
    assert set(kernels) == names
    for name, file in kernels.items():
        if instruction:
            assert instruction in file.read_text()
        assert spilled(file) <= (spills or {}).get(name, 0)


def kinds_of_adds(file):
    """The kinds of atomic adds in a kernel, "global.gpu.relaxed.add.v4.f32" say; it has no barrier of memory."""
    text = file.read_text()
    assert not re.search(r"\b(membar|fence\.(sc|acq_rel))\b", text)
    return set(re.findall(r"\b(?:red|atom)\.([\w.]+)", text))


def loads_at_once(file):
    """How many loads of 16 bytes stand between two barriers, wherever some do."""
    counts = [part.count("ld.global.v4") for part in file.read_text().split("bar.sync")]
    return [count for count in counts if count]


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads(tmp_path, name, dtype, mode):
    """Tensor cores, no spills, and little scratch memory.

    Pixels are weighed in one instruction, and Triton moves none: all corners are loaded before one is waited for, and
    few barriers stand in a kernel. Adds are of four floats, without barriers of memory.
    """
    x, features = WORKLOADS[name]
    compiled, kernels = compile_with_ptx(tmp_path, *program(x, features, dtype, mode))
    check_kernels(
        kernels, FORWARD if mode == "forward" else BACKWARD, spills=MEASURED if dtype == jnp.float32 else None
    )
    if mode == "forward":
        (file,) = kernels.values()
        gathers, barriers = file, 8
    else:
        gathers, barriers = kernels["deform_conv_backward_kernel"], 50 if dtype == jnp.float32 else 25
        assert kinds_of_adds(kernels["deform_conv_backward_x"]) == {"global.gpu.relaxed.add.v4.f32"}
        assert kinds_of_adds(gathers) <= {"global.gpu.relaxed.add.v4.f32"}
    text = gathers.read_text()
    assert max(loads_at_once(gathers)) >= 8
    assert text.count("bar.sync") <= barriers
    assert text.count("fma.rn.f32") >= 12
    if dtype != jnp.float32:
        assert f"cvt.rn.{'bf16x2' if dtype == jnp.bfloat16 else 'f16x2'}.f32" in text
    columns, scratch = math.prod(x) * 9 * jnp.dtype(dtype).itemsize, compiled.memory_analysis().temp_size_in_bytes
    assert scratch <= LIMITS[mode] * columns
    if mode == "forward":
        assert scratch <= 34 * 9 * math.prod(x[:-1])  # 32 bytes a point


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WINDOWS)
def test_other_windows_and_borders(tmp_path, name, dtype, mode):
    x, features, options = WINDOWS[name]
    _, kernels = compile_with_ptx(tmp_path, *program(x, features, dtype, mode, **options))
    spills = MEASURED if dtype == jnp.float32 and "3-D" not in name else None
    check_kernels(kernels, FORWARD if mode == "forward" else BACKWARD, "mma", spills=spills)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_channels_and_features(tmp_path, name, dtype, mode):
    x, features, options = RAGGED[name]
    _, kernels = compile_with_ptx(tmp_path, *program(x, features, dtype, mode, **options))
    check_kernels(kernels, FORWARD if mode == "forward" else BACKWARD, "mma")


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize(
    ("precision", "instruction"),
    [(lax.DotAlgorithmPreset.TF32_TF32_F32_X3, "wgmma.mma_async"), (lax.Precision.HIGHEST, None)],
    ids=["TF32x3", "HIGHEST"],
)
def test_precisions(tmp_path, precision, instruction, mode):
    f, shapes = program(*WORKLOADS["conv4"], jnp.float32, mode, precision=precision)
    _, kernels = compile_with_ptx(tmp_path, f, shapes)
    check_kernels(kernels, FORWARD if mode == "forward" else BACKWARD, instruction)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("gpu", ["NVIDIA A100", "NVIDIA B200"])
def test_lowers_for_other_gpus(gpu, dtype):
    for x, features in WORKLOADS.values():
        f, shapes = program(x, features, dtype, "backward")
        with aot.target(gpu):
            text = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert set(re.findall(r'name = "(deform_conv_backward\w+)"', text)) == BACKWARD


@pytest.mark.parametrize("over", ["jit", "shard_map", "types"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_batch_sharded_it_stays_local(mode, over):
    """Under plain `jit` on 8 GPUs, in `shard_map` with its checks, or with shardings in the types.

    All that the GPUs exchange is the gradient of the kernel.
    """
    kind = AxisType.Explicit if over == "types" else AxisType.Auto
    mesh = Mesh(np.array(aot.devices("H100", 8)[:8]), ("data",), axis_types=(kind,))
    f, shapes = program((16, 32, 32, 64), 64, jnp.bfloat16, mode)
    if over == "types" and mode == "backward":  # as a cotangent would have to be given a sharding first
        op, shapes = program((16, 32, 32, 64), 64, jnp.bfloat16, "forward")
        f = jax.grad(lambda *arrays: jnp.sum(op(*arrays).astype(jnp.float32) ** 2), range(4))
    places = [P() if i == 1 else P("data") for i in range(len(shapes))]
    if over == "shard_map":
        results = (P("data"), P(), P("data"), P("data")) if mode == "backward" else P("data")
        f = jax.shard_map(f, mesh=mesh, in_specs=tuple(places), out_specs=results)
    shapes = [
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, p))
        for s, p in zip(shapes, places, strict=True)
    ]
    axes = ((8,), ("data",), (kind,)) if over == "types" else ((), ())
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh(*axes, abstract_device=device)):
        text = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).compile().as_text()
    launched = set(re.findall(r"deform_conv_(?:forward|backward_[a-z]+)", text))
    assert launched >= (BACKWARD if mode == "backward" else FORWARD)
    found = re.findall(r"= (\S+).* (all-\w+|reduce-scatter|collective-\w+?)(?:-start)?\(", text)
    assert [kind for _, kind in found] == (["all-reduce"] if mode == "backward" else [])
    assert all(
        math.prod(map(int, re.search(r"\[([\d,]+)\]", shape)[1].split(","))) == 9 * 64 * 64 for shape, _ in found
    )
