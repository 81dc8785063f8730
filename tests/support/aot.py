"""Compile for GPUs and TPUs on a machine that has neither, to read what their compilers make of the library.

    device, *_ = devices("H100")
    program = compile_for(device, f, *shapes)           # raises where XLA, Triton or the assembler refuses it
    program.memory_analysis().temp_size_in_bytes        # scratch memory on that device
    program.as_text()                                   # the optimised program

Nothing runs. The compilers come with JAX's plugins for GPUs and TPUs, which `make test-aot` installs.
"""

import importlib.util
import os

# Read by the plugins as they load: no TPU to ask where it is, no CUDA driver to check, several processes at once.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_TOPOLOGY", "2x2")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

PLUGINS = {"gpu": "jax_plugins.xla_cuda13", "tpu": "libtpu"}
TPUS = {"TPU v5e": "v5e", "TPU v6e": "v6e"}

# What the compiler has to know of a GPU: data sheets (H100 SXM5, A100 SXM4) and CUDA's limits for compute capabilities.
GPU = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  %s
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "%s"
"""
H100 = """core_count: 132 fpus_per_core: 128 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 }"""
A100 = """core_count: 108 fpus_per_core: 64 shared_memory_per_block_optin: 166912 shared_memory_per_core: 167936
  memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 85094170624
  cuda_compute_capability { major: 8 }"""
GPUS = {"H100": GPU % (H100, "NVIDIA H100 80GB HBM3"), "A100": GPU % (A100, "NVIDIA A100-SXM4-80GB")}


def missing(kind: str) -> str | None:
    """Why nothing can be compiled for `kind`, "H100", "A100", "TPU v5e" or "TPU v6e"; None where it can."""
    plugin = PLUGINS["tpu" if kind in TPUS else "gpu"]
    try:
        found = importlib.util.find_spec(plugin)
    except ModuleNotFoundError:  # the package around it
        found = None
    return None if found else f"{plugin}, which compiles for the {kind}, is not installed; `make test-aot` installs it"


def devices(kind: str, count: int = 1) -> list:
    """At least `count` devices of a kind that need not be here: "H100", "A100", "TPU v5e" or "TPU v6e"."""
    if kind in TPUS:
        name = f"{TPUS[kind]}:{'2x2' if count <= 4 else '2x4'}"
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return topologies.get_topology_desc(
        platform="cuda", topology_name=f"{kind}x{count}", topology=f"1x1x{count}", target_config=GPUS[kind]
    ).devices


def target(gpu: str):
    """A context in which the GPU kernels are traced and lowered for a named GPU, "NVIDIA H100" say, that need not be here."""
    device = AbstractDevice(device_kind=gpu, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def triton(f, *shapes) -> str:
    """The kernel that `f` launches, in Triton's words; to lower it for a GPU takes none, nor its compiler."""
    from jax._src.interpreters import mlir
    from jax._src.lib.triton import dialect
    from jaxlib.mlir import ir

    with target("NVIDIA H100"):
        program = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).compiler_ir()
    kernels = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call":
            kernels.append(operation.attributes["mhlo.backend_config"]["ir"].value_bytes)
        return ir.WalkResult.ADVANCE

    program.operation.walk(visit)
    (kernel,) = kernels
    with ir.Context() as context:
        dialect.register_dialect(context)
        context.append_dialect_registry(mlir.upstream_dialects)
        context.load_all_available_dialects()
        return str(ir.Module.parse(kernel))


def compile_for(device, f, *args):
    """`f` compiled for `device`; `args` are trees of `jax.ShapeDtypeStruct`, on `device` unless they have a sharding."""
    here = SingleDeviceSharding(device)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or here), args)
    if device.platform == "tpu":
        return jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    with target("NVIDIA H100"):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).compile()
