"""OpenVINO's op, for inference on a CPU; its kernel is part of the model, as in a network."""

import numpy as np
import openvino
from openvino import opset8

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}


def prepare(arrays, *, options, threads, **_):
    """`call(i)` of the op compiled for this shape."""
    x, kernel, offset, *mask = arrays
    inputs = [x, offset, *mask]
    parameters = [opset8.parameter(array.shape, np.float32) for array in inputs]
    y = opset8.deformable_convolution(
        parameters[0],
        parameters[1],
        opset8.constant(kernel),
        [options["strides"]] * 2,
        options["padding"],
        options["padding"],
        [options["kernel_dilation"]] * 2,
        mask=parameters[2] if mask else None,
        auto_pad="EXPLICIT",
        group=options["feature_group_count"],
        deformable_group=offset.shape[1] // (2 * kernel.shape[2] * kernel.shape[3]),
        bilinear_interpolation_pad=True,  # a corner outside counts zero
    )
    settings = SETTINGS | {"INFERENCE_NUM_THREADS": str(threads)}
    compiled = openvino.Core().compile_model(openvino.Model([y], parameters, "op"), "CPU", settings)
    request = compiled.create_infer_request()
    for position, array in enumerate(inputs):
        request.set_input_tensor(position, openvino.Tensor(array))

    def call(copy):
        request.infer()
        return [request.get_output_tensor(0).data]

    return call, {}


def synchronize():
    """Nothing is left running."""


def to_numpy(result):
    """A copy: the next call writes to the same place."""
    return np.array(result)
