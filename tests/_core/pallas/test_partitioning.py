"""When JAX passes the devices to a lowering: `holds_kernels` depends on it, and JAX documents it nowhere."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dcn_jax._core.pallas.partitioning import holds_kernels


def devices_in_lowering(holds):
    """The devices that JAX passes to the lowering of a primitive with the parameter `holds`; None if it passes none."""
    seen = []
    probe = Primitive("probe")
    probe.def_abstract_eval(lambda x, holds: x)

    def lower(context, x, *, holds):
        seen.append(context.module_context.axis_context.device_assignment)
        return [x]

    mlir.register_lowering(probe, lower)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    jax.jit(lambda x: probe.bind(x, holds=holds)).trace(x).lower()
    (devices,) = seen
    return devices


def test_jax_passes_the_devices_to_a_lowering_that_holds_kernels():
    try:
        holds = holds_kernels()
    except Exception as error:
        pytest.fail(f"JAX no longer traces the call of custom_partitioning that `holds_kernels` makes: {error!r}")
    devices = devices_in_lowering(holds)
    assert devices is not None, (
        "JAX no longer passes the devices to the lowering of a primitive that has the jaxpr of `holds_kernels` "
        "among its parameters. `custom_partitioning` needs these devices, so that no GPU kernel can be lowered for "
        "several of them. See what `jax._src.dispatch.jaxpr_has_prim_requiring_devices` looks for now, and make "
        "`holds_kernels` hold that."
    )
    assert len(devices) == 2


def test_jax_passes_no_devices_to_other_lowerings():
    assert devices_in_lowering(None) is None, (
        "JAX now passes the devices to every lowering. That costs nothing: once the oldest JAX that is supported "
        "does so too, `holds_kernels`, `platform_op.Op.holds` and this file can go."
    )
