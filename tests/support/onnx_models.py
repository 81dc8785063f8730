"""Models in ONNX: random parameters, and what onnxruntime and ONNX's reference evaluator make of a graph."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from flax import nnx
from onnx.reference import ReferenceEvaluator

from dcn_jax.interop import to_onnx
from tests.support.running import assert_close

SHAPE = (None, None, None, 4)


def filled(make, seed=0, scale=0.3):
    """What `make(rngs)` makes, with every parameter and statistic from N(0, scale²), variances from U(0.5, 2)."""
    model, rng = make(nnx.Rngs(0)), np.random.default_rng(seed)

    def fill(path, variable):
        shape = variable.shape
        values = rng.uniform(0.5, 2, shape) if path[-1] == "var" else rng.normal(0, scale, shape)
        return variable.replace(jnp.asarray(values, variable.dtype))

    nnx.update(model, nnx.map_state(fill, nnx.state(model, (nnx.Param, nnx.BatchStat))))
    model.eval()
    return model


def images(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def checked(model, input_shape, **options):
    """The ONNX model, once onnx has nothing against it."""
    proto = to_onnx(model, input_shape, **options)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def check(proto, call, *inputs, tolerance=1e-5, reference=True):
    """onnxruntime, and for the first inputs the reference evaluator, compute what `call` does.

    Inputs are an array, or a dict of the call's arguments.
    """
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    run = jax.jit(lambda arguments: call(**arguments) if isinstance(arguments, dict) else call(arguments))
    for number, given in enumerate(inputs):
        feed = given if isinstance(given, dict) else {"input": given}
        wanted = run(given)
        (y,) = session.run(["output"], feed)
        assert_close(y, wanted, tolerance)
        if reference and number == 0:
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # its sigmoid computes exp(x) of a large x, and does not use it
                (y,) = ReferenceEvaluator(proto).run(["output"], feed)
            assert_close(y, wanted, tolerance)


def operators(proto):
    return [node.op_type for node in proto.graph.node]
