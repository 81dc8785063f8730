"""Exchange with PyTorch, linen, Keras and ONNX; checkpoints and orders of channels."""

from dcn_jax._core import extras
from dcn_jax.interop._files import read_checkpoint
from dcn_jax.interop._orders import reorder_offsets

try:
    from dcn_jax.interop._keras import from_keras, to_keras
    from dcn_jax.interop._linen import from_linen, to_linen
    from dcn_jax.interop._onnx.export import to_onnx
    from dcn_jax.interop._torch import from_torch, to_torch
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.interop", "interop") from error

__all__ = [
    "from_keras",
    "from_linen",
    "from_torch",
    "read_checkpoint",
    "reorder_offsets",
    "to_keras",
    "to_linen",
    "to_onnx",
    "to_torch",
]
