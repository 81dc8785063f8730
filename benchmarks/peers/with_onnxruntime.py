"""onnxruntime's DeformConv, for inference on a CPU; its kernel is part of the model, as in a network."""

import numpy as np
import onnxruntime


def prepare(arrays, *, model, copies, **_):
    """`call(i)` of the ONNX file `model` with its own threads, whose inputs are all arrays but the kernel."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    x, _, *more = arrays
    names = [value.name for value in session.get_inputs()]
    inputs = dict(zip(names, [x, *more], strict=True))
    return lambda copy: session.run(None, inputs), {}


def synchronize():
    """Nothing is left running."""


def to_numpy(result):
    """It is an array already."""
    return np.asarray(result)
