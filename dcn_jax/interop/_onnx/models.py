"""Converters of the ResNets."""

from typing import Any

from dcn_jax.interop._onnx import functions
from dcn_jax.interop._onnx.graph import Graph, Value
from dcn_jax.models.resnet import BasicBlock, Bottleneck, ResNet


def _shortcut(graph: Graph, block: Any, x: Value, y: Value) -> Value:
    """The end of a block: relu(y + downsample(x))."""
    for layer in block.downsample:
        x = graph.add(layer, x)
    return graph.node("Relu", graph.node("Add", y, x))


def basic_block(graph: Graph, block: BasicBlock, x: Value) -> Value:
    """Two convolutions."""
    y = graph.node("Relu", graph.add(block.bn1, graph.add(block.conv1, x)))
    y = graph.add(block.bn2, graph.add(block.conv2, y))
    return _shortcut(graph, block, x, y)


def bottleneck(graph: Graph, block: Bottleneck, x: Value) -> Value:
    """Three convolutions."""
    y = graph.node("Relu", graph.add(block.bn1, graph.add(block.conv1, x)))
    y = graph.node("Relu", graph.add(block.bn2, graph.add(block.conv2, y)))
    y = graph.add(block.bn3, graph.add(block.conv3, y))
    return _shortcut(graph, block, x, y)


def resnet(graph: Graph, model: ResNet, x: Value) -> Value:
    """A whole ResNet."""
    x = graph.node("Relu", graph.add(model.bn1, graph.add(model.conv1, x)))
    x = functions.max_pool(graph, x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            x = graph.add(block, x)
    x = functions.mean(graph, x, axis=(1, 2))
    return x if model.fc is None else graph.add(model.fc, x)
