"""The sum, and which algorithm computes it on which platform."""

import functools
from typing import Any

import jax

from dcn_jax.ops.weighted_reads import few_kernels, loops
from dcn_jax.ops.weighted_reads.levels import Level, Operands, zeros
from dcn_jax.sampling import countable


@functools.partial(jax.jit, static_argnums=0)  # a call outside of jit compiles once, not each time
def sum_readings(levels: tuple[Level, ...], operands: Operands) -> jax.Array:
    """The sum, `(B, Q, *M, D)`, in the dtype of the features."""
    # Imported here: platform_op imports Pallas by way of `jax.extend`, and that is slow.
    from dcn_jax._core.platform_op import Op, platform_op, type_of

    if not countable(operands.features.shape[1]):
        raise ValueError(f"maps of {operands.features.shape[1]} pixels; wanted fewer than 2**31")
    return platform_op(Op(levels, type_of(zeros, operands), algorithms(levels, operands)), operands)


def algorithms(levels: tuple[Level, ...], operands: Operands) -> tuple[Any, Any]:
    """By platform: the algorithm of the sum, and the algorithm of its derivatives."""
    from dcn_jax._core.platform_op import Algorithm

    def loop(result, number):
        blocks = loops.divide(operands.points.shape[1], number)
        return Algorithm(result, loops.gradients, blocks, gradients_can_be_mapped=True)

    on_gpu = Algorithm(few_kernels.result, few_kernels.gradients, None, gradients_can_be_mapped=True)
    of_derivatives = loop(loops.sum_by_levels, loops.blocks_of_derivatives(levels, operands))
    return (
        # On a TPU the rows that a step gathers lie in memory, so a step takes a block of queries.
        (
            ("default", on_gpu),
            ("cpu", loop(loops.sum_by_points, 1)),
            ("tpu", loop(loops.sum_by_points_in_blocks, loops.FEWEST)),
        ),
        (("default", on_gpu), ("cpu", of_derivatives), ("tpu", of_derivatives)),
    )
