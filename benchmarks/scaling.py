"""What devices exchange in a step, for each way to divide the work, read in compiled programs.

    python -m benchmarks.scaling                            # one layer, on eight CPU devices of this machine
    python -m benchmarks.scaling --target H100 "TPU v5e"    # on eight and on four, by their compilers
    python -m benchmarks.scaling --resnet                   # a training step of ResNet-50 on eight H100s

Nothing runs. `make test-aot` installs the compilers of GPUs and TPUs into .venv-aot.

    sent       is what a device sends in a step, in MB, if every exchange goes around a ring;
    exchanges  are how often devices wait for each other, in loops as often as they turn.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from benchmarks import training
from benchmarks.collectives import Collective, memory_traffic, read_collectives
from benchmarks.convolution import Convolution
from benchmarks.report import STYLE
from dcn_jax import deform_conv
from dcn_jax.sharding import halo_deform_conv
from tests.support import aot  # the compilers of devices that are not here

P = PartitionSpec
TARGETS = {"CPU": 8, "H100": 8, "TPU v5e": 4}  # devices
LAYER = Convolution((8, 64, 64, 256), 256)
BOUND = 2  # pixels, of the offsets where maps are split


class Way(NamedTuple):
    """A way to divide the layer: where its arrays lie, and what each device computes."""

    axes: tuple[str, ...]  # of the mesh; of two, the second has two devices
    x: PartitionSpec
    kernel: PartitionSpec
    points: PartitionSpec  # of offset and mask
    y: PartitionSpec
    each: Callable | None = None  # on each device, inside shard_map; None: plain jit divides the op itself
    op: Callable = deform_conv


def summed(x, kernel, offset, mask):
    """Each device has some input channels: it adds its result to those of the others."""
    return lax.psum(deform_conv(x, kernel, offset, mask), "model")


def gathered(x, kernel, offset, mask):
    """The kernel, which lies in parts on all devices, is put together once before it is used."""
    return deform_conv(x, lax.with_sharding_constraint(kernel, P()), offset, mask)


def bounded(x, kernel, offset, mask):
    """The op with a bound, as `haloed` has."""
    return deform_conv(x, kernel, offset, mask, max_offset=BOUND)


def haloed(x, kernel, offset, mask):
    """Each device has some rows of the maps."""
    return halo_deform_conv(x, kernel, offset, mask, max_offset=BOUND, axis_name="space")


# Of axes of an image or map (B, H, W, C), of a kernel (kh, kw, C, F), or of both
WHOLE, DATA, ROWS = P(), P("data"), P(None, "space")
CHANNELS, LAST = P(None, None, "model"), P(None, None, None, "model")
BOTH, PARTS = P("data", None, None, "model"), P(None, None, None, "data")
WAYS = {
    "batch": Way(("data",), DATA, WHOLE, DATA, DATA),
    "batch, shard_map": Way(("data",), DATA, WHOLE, DATA, DATA, deform_conv),
    "features": Way(("model",), WHOLE, LAST, WHOLE, LAST),
    "features, shard_map": Way(("model",), WHOLE, LAST, WHOLE, LAST, deform_conv),
    "channels": Way(("model",), LAST, CHANNELS, WHOLE, WHOLE),
    "channels, shard_map": Way(("model",), LAST, CHANNELS, WHOLE, WHOLE, summed),
    "batch × features, shard_map": Way(("data", "model"), DATA, LAST, DATA, BOTH, deform_conv),
    "batch × channels, shard_map": Way(("data", "model"), BOTH, CHANNELS, DATA, DATA, summed),
    "FSDP": Way(("data",), DATA, PARTS, DATA, DATA),
    "FSDP, gathered": Way(("data",), DATA, PARTS, DATA, DATA, op=gathered),
    "rows": Way(("space",), ROWS, WHOLE, ROWS, ROWS, op=bounded),
    "rows, halo_deform_conv": Way(("space",), ROWS, WHOLE, ROWS, ROWS, haloed),
}


def devices_of(target: str) -> list:
    """The devices of a target."""
    count = TARGETS[target]
    return (jax.devices("cpu") if target == "CPU" else aot.devices(target, count))[:count]


def compile_on(devices: list, f: Callable, *args: Any) -> Any:
    """`f` compiled for these devices, which may be here or not."""
    if devices[0].platform == "cpu":
        return jax.jit(f).lower(*args).compile()
    return aot.compile_for(devices[0], f, *args)


def compile_way(way: Way, devices: list, layer: Convolution) -> Any:
    """A layer's result and the gradients of its four arrays, divided over devices, as a compiled program."""
    sizes = (len(devices),) if len(way.axes) == 1 else (len(devices) // 2, 2)
    mesh = Mesh(np.array(devices).reshape(sizes), way.axes)
    places = [NamedSharding(mesh, spec) for spec in (way.x, way.kernel, way.points, way.points)]
    result = NamedSharding(mesh, way.y)
    op = way.op
    if way.each:
        op = jax.shard_map(way.each, mesh=mesh, in_specs=tuple(place.spec for place in places), out_specs=way.y)

    def step(y_bar, *arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            y, pull = jax.vjp(op, *arrays)
            return lax.with_sharding_constraint((y, pull(y_bar)), (result, tuple(places)))

    arrays = [
        jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
        for shape, place in zip(layer.shapes(jnp.float32), places, strict=True)
    ]
    y_bar = jax.ShapeDtypeStruct((layer.x[0], *layer.out_spatial, layer.features), jnp.float32, sharding=result)
    return compile_on(devices, step, y_bar, *arrays)


def describe(found: Sequence[Collective]) -> dict[str, Any]:
    """What a program exchanges, as a row's entries."""
    kinds = Counter()
    for one in found:
        kinds[one.opcode] += one.runs
    return {
        "sent_bytes": round(sum(one.sent for one in found)),
        "exchanges": sum(kinds.values()),
        "kinds": ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in kinds.items()),
    }


def layer_rows(targets: Sequence[str]) -> list[dict]:
    """A row for each way and target."""
    rows = []
    for target in targets:
        devices = devices_of(target)
        for name, way in WAYS.items():
            program = compile_way(way, devices, LAYER)
            rows.append(
                {"way": name, "target": target, "devices": len(devices)}
                | describe(read_collectives(program.as_text()))
                | {"scratch_bytes": program.memory_analysis().temp_size_in_bytes}
            )
    return rows


# ResNet-50, whose 13 convolutions 3×3 of conv3 to conv5 are modulated deformable convolutions

IMAGES, SIZE = 32, 224  # of a device, in bfloat16

# The simple model of an H100: data sheet of the H100 SXM5, but for the last, which is assumed.
FLOPS = 989e12  # per second, of bfloat16 products
MEMORY = 3.35e12  # bytes per second
LINK = 450e9  # bytes per second that a device sends, over NVLink
WAIT = 20e-6  # seconds that an exchange takes beside its bytes

# The implementation of the op, options of the network, and whether the state is sharded.
TRAININGS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain ResNet-50, batch": ("plain", {}, False),
    "batch": ("xla", {}, False),
    "batch, remat": ("xla", {"remat": True}, False),
    "FSDP": ("xla", {}, True),
    'batch, "pallas_gpu"': ("pallas_gpu", {}, False),
}


def split_longest(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """FSDP's place of an array: its longest axis over "data", if that divides by the devices."""
    axis = max(range(len(shape)), key=lambda a: shape[a], default=None)
    if axis is None or shape[axis] % devices:
        return P()
    return P(*[None] * axis, "data")


def compile_training(name: str, devices: list) -> Any:
    """A training step of ResNet-50 on GPUs that need not be here, batch-sharded, as a compiled program."""
    implementation, options, sharded = TRAININGS[name]
    mesh = Mesh(np.array(devices), ("data",))
    network = training.make_network(implementation, 50, "bfloat16", **options)

    def place(array):
        return NamedSharding(mesh, split_longest(array.shape, len(devices)) if sharded else P())

    places = jax.tree.map(place, network.state)

    def step(state, images, labels):
        state, loss = network.step(state, images, labels)
        return lax.with_sharding_constraint(state, places), loss

    def shape(array, sharding):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    split = NamedSharding(mesh, P("data"))
    count = IMAGES * len(devices)
    images = jax.ShapeDtypeStruct((count, SIZE, SIZE, 3), jnp.bfloat16, sharding=split)
    labels = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=split)
    state = jax.tree.map(shape, network.state, places)
    with aot.target("NVIDIA H100"):  # the new state takes the memory of the old one
        traced = jax.jit(step, donate_argnums=0).trace(state, images, labels)
        return traced.lower(lowering_platforms=("cuda",)).compile()


def count_flops() -> dict[str, float]:
    """Floating-point operations of a device's step, for each training."""
    network = training.make_network("plain", 50, "bfloat16")
    images = jax.ShapeDtypeStruct((IMAGES, SIZE, SIZE, 3), jnp.bfloat16)
    counted: Any = jax.jit(network.step).lower(network.state, images, jax.ShapeDtypeStruct((IMAGES,), jnp.int32))
    plain = counted.cost_analysis()["flops"]
    # A branch makes 27 channels of what its layer reads: conv3, conv4 and conv5 have 4, 6 and 3 layers.
    branches = sum(
        2 * n * IMAGES * (SIZE // stride) ** 2 * 9 * channels * 27
        for n, stride, channels in ((4, 8, 128), (6, 16, 256), (3, 32, 512))
    )

    def flops(implementation, options, _):  # forward and two gradients; with remat forward twice
        deformed = plain if implementation == "plain" else plain + 3 * branches
        return deformed * (4 / 3 if options.get("remat") else 1)

    return {name: flops(*how) for name, how in TRAININGS.items()}


def training_row(name: str, program: Any, flops: float) -> dict[str, Any]:
    """Memory and bytes from the program, time and efficiency from the simple model."""
    memory, text = program.memory_analysis(), program.as_text()
    found = describe(read_collectives(text))
    traffic = memory_traffic(text)
    compute = flops / FLOPS + traffic / MEMORY
    exchange = found["sent_bytes"] / LINK + found["exchanges"] * WAIT
    return {
        "training": name,
        "peak_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        **found,
        "flops": flops,
        "traffic_bytes": traffic,
        "compute_ms": 1e3 * compute,
        "exchange_ms": 1e3 * exchange,
        "step_ms": 1e3 * (compute + exchange),
        "efficiency": compute / (compute + exchange),
    }


def training_rows(names: Sequence[str]) -> list[dict]:
    """A row for each training, on eight H100s."""
    flops = count_flops()
    return [training_row(name, compile_training(name, devices_of("H100")), flops[name]) for name in names]


# The report


def table(rows: Sequence[dict], columns: dict[str, Callable[[dict], str]]) -> Table:
    """A line for each row."""
    made = Table(*columns, **STYLE)
    for row in rows:
        made.add_row(*(cell(row) for cell in columns.values()))
    return made


LAYER_COLUMNS: dict[str, Callable[[dict], str]] = {
    "way": lambda row: row["way"],
    "target": lambda row: f"{row['devices']} {row['target']}",
    "sent MB": lambda row: f"{row['sent_bytes'] / 1e6:.2f}",
    "exchanges": lambda row: row["kinds"] or "none",
    "scratch MB": lambda row: f"{row['scratch_bytes'] / 1e6:.0f}",
}
TRAINING_COLUMNS: dict[str, Callable[[dict], str]] = {
    "training": lambda row: row["training"],
    "peak GB": lambda row: f"{row['peak_bytes'] / 1e9:.2f}",
    "sent MB": lambda row: f"{row['sent_bytes'] / 1e6:.0f}",
    "exchanges": lambda row: f"{row['exchanges']}",
    "traffic GB": lambda row: f"{row['traffic_bytes'] / 1e9:.0f}",
    "compute ms": lambda row: f"{row['compute_ms']:.1f}",
    "exchange ms": lambda row: f"{row['exchange_ms']:.1f}",
    "step ms": lambda row: f"{row['step_ms']:.1f}",
    "efficiency": lambda row: f"{row['efficiency']:.2f}",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        usage=argparse.SUPPRESS,  # an error is one line then
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--target", nargs="+", choices=TARGETS, help="devices of the layer's programs (default: CPU)")
    p.add_argument("--resnet", action="store_true", help="ResNet-50 on eight H100s; alone, without the layer")
    p.add_argument("--json", metavar="FILE", help="the rows, as a JSON list of objects")
    args = p.parse_args(argv)
    args.target = args.target or ([] if args.resnet else ["CPU"])
    for target in [*args.target, *["H100"] * args.resnet]:
        if target != "CPU" and (problem := aot.missing(target)):
            p.error(problem)
    return args


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Compile, print the tables, write the file; returns the rows."""
    args, console = parse(argv), Console()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", TARGETS["CPU"])
    rows = layer_rows(args.target)
    if rows:
        console.print(f"{LAYER}, float32, result and gradients; jax {jax.__version__}", highlight=False)
        console.print(table(rows, LAYER_COLUMNS))
    if args.resnet:
        trainings = training_rows(list(TRAININGS))
        console.print(
            f"ResNet-50, {IMAGES} images of {SIZE}² on each of 8 H100s; jax {jax.__version__}", highlight=False
        )
        console.print(table(trainings, TRAINING_COLUMNS))
        rows += trainings
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
