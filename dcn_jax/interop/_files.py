"""Reading checkpoints, without running anything that stands in them."""

import importlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dcn_jax._core import extras

# torch.load(…, weights_only=True) of older versions could be made to run code: CVE-2025-32434 and CVE-2026-24747.
_SAFE_TORCH = (2, 10)


def read_checkpoint(path: str | PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by name, for `from_torch`.

    `.safetensors` is read by the safetensors library. `.pth` and `.pt` are pickles, which may hold any program: they are
    read by torch, if it is installed, with `weights_only=True` and never otherwise, so that none is run. Of a file that
    keeps its arrays under "state_dict" (mmdetection's) or "model", beside an optimizer and the like, these are returned.

    Args:
        path: of a file that ends in `.safetensors`, `.pth` or `.pt`.

    Returns:
        NumPy arrays by name, in the dtypes of the file (bfloat16 by ml_dtypes).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, damaged, hostile, or holds something else than arrays by name.
        ImportError: safetensors is not installed (the extra "interop"), or torch is not, or is too old to be safe.

    Source: https://github.com/huggingface/safetensors and torch's `torch.load`.

    Example:
        >>> import os, tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "layer.safetensors")
        ...     save_file({"weight": np.ones((8, 4, 3, 3), np.float32)}, path)
        ...     read_checkpoint(path)["weight"].shape
        (8, 4, 3, 3)
    """
    path = Path(path)
    readers = {".safetensors": _read_safetensors, ".pth": _read_torch, ".pt": _read_torch}
    if path.suffix not in readers:
        raise ValueError(
            f"path={str(path)!r} ends in {path.suffix!r}; wanted {', '.join(readers)}. Other kinds are saved as .safetensors "
            "where they come from"
        )
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is no file")
    return readers[path.suffix](path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file
    except ModuleNotFoundError as error:
        raise extras.missing("read_checkpoint", "interop") from error
    try:
        return load_file(path)
    except Exception as error:  # whatever a hostile file brings about
        raise ValueError(f"path={str(path)!r} is damaged, or is no .safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = _safe_torch(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"path={str(path)!r} is damaged, or holds more than torch reads with weights_only=True, which runs nothing "
            f"that stands in a file. Where it can be trusted, save its state_dict as .safetensors. torch says: {error}"
        ) from error
    state = next((state for state in _candidates(loaded) if _is_state(state, torch)), None)
    if state is None:
        held = list(loaded) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ValueError(
            f'path={str(path)!r} holds no arrays by name, nor has any under "state_dict" or "model": {held}'
        )
    return {name: _to_numpy(tensor, torch) for name, tensor in state.items()}


def _safe_torch(path: Path) -> Any:
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"path={str(path)!r} is read by torch, which is not installed: pip install torch; or save the state_dict as "
            ".safetensors where torch is (safetensors.torch.save_file)"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _SAFE_TORCH:
        wanted = ".".join(map(str, _SAFE_TORCH))
        raise ImportError(
            f"torch {torch.__version__} can be made to run code by a file, even with weights_only=True (CVE-2025-32434, "
            f"CVE-2026-24747); wanted {wanted} or newer: pip install 'torch>={wanted}'"
        )
    return torch


def _candidates(loaded: Any) -> list[Any]:
    return [loaded] + [loaded[key] for key in ("state_dict", "model") if isinstance(loaded, Mapping) and key in loaded]


def _is_state(state: Any, torch: Any) -> bool:
    return isinstance(state, Mapping) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which NumPy itself does not know
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
