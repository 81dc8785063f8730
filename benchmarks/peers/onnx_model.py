"""The op as an ONNX model of one node, which onnxruntime reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def write_model(path: str, arrays: Sequence[np.ndarray], options: Mapping[str, Any]) -> None:
    """A model of DeformConv whose kernel is part of it; `arrays` are x, kernel, offset and maybe mask, channels first."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kernel = arrays[1]
    window = kernel.shape[2:]
    node = helper.make_node(
        "DeformConv",
        ["x", "kernel", "offset", "", "mask"][: 3 if len(arrays) == 3 else 5],  # "" is the bias
        ["y"],
        kernel_shape=window,
        strides=[options["strides"]] * 2,
        pads=[*options["padding"], *options["padding"]],
        dilations=[options["kernel_dilation"]] * 2,
        group=options["feature_group_count"],
        offset_group=arrays[2].shape[1] // (2 * window[0] * window[1]),
    )
    shapes = {name: a.shape for name, a in zip(("x", "kernel", "offset", "mask"), arrays, strict=False)}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items() if n != "kernel"]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "op", inputs, [result], [numpy_helper.from_array(kernel, "kernel")])
    opsets = [helper.make_opsetid("", 19)]  # the first with DeformConv
    version = helper.find_min_ir_version_for(opsets)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=version), path)
