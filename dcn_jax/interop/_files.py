"""Reading checkpoints, without running code that a file contains."""

import importlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dcn_jax._core import extras

# Older versions run code of some files despite weights_only: CVE-2025-32434, CVE-2026-24747.
_SAFE_TORCH = (2, 10)


def read_checkpoint(path: str | PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by name, for `from_torch`.

    `.safetensors` files are read by the safetensors library. `.pth` and `.pt` files are pickles,
    which may contain code. They are read by torch, if it is installed, and always with
    `weights_only=True`, so that no code runs. If a file keeps its arrays under "state_dict"
    (mmdetection) or "model", beside an optimizer for example, only these arrays are returned.

    Args:
        path: of a file that ends in `.safetensors`, `.pth` or `.pt`.

    Returns:
        NumPy arrays by name, in the dtypes of the file (bfloat16 is that of ml_dtypes).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, damaged or hostile, or has no arrays by name.
        ImportError: safetensors (the extra "interop") or a safe version of torch is missing.

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
            f"path={str(path)!r} ends in {path.suffix!r}; wanted {', '.join(readers)}. Save files of other kinds as "
            ".safetensors with the library that wrote them"
        )
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file")
    return readers[path.suffix](path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file
    except ModuleNotFoundError as error:
        raise extras.missing("read_checkpoint", "interop") from error
    try:
        return load_file(path)
    except Exception as error:  # a hostile file may raise anything
        raise ValueError(f"path={str(path)!r} is damaged, or is not a .safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = _safe_torch(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"path={str(path)!r} is damaged, or holds objects that torch does not read with weights_only=True, which "
            f"runs no code of the file. If you trust the file, save its state_dict as .safetensors. torch says: {error}"
        ) from error
    inner = [loaded[key] for key in ("state_dict", "model") if isinstance(loaded, Mapping) and key in loaded]
    state = next((state for state in (loaded, *inner) if _is_state(state, torch)), None)
    if state is None:
        held = list(loaded) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ValueError(f'path={str(path)!r} holds no arrays by name, and none under "state_dict" or "model": {held}')
    return {name: _to_numpy(tensor, torch) for name, tensor in state.items()}


def _safe_torch(path: Path) -> Any:
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"path={str(path)!r} is read by torch, which is not installed: pip install torch; or, on a machine with "
            "torch, save the state_dict as .safetensors (safetensors.torch.save_file)"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _SAFE_TORCH:
        wanted = ".".join(map(str, _SAFE_TORCH))
        raise ImportError(
            f"torch {torch.__version__} may run code of a file even with weights_only=True (CVE-2025-32434, "
            f"CVE-2026-24747); wanted {wanted} or newer: pip install 'torch>={wanted}'"
        )
    return torch


def _is_state(state: Any, torch: Any) -> bool:
    return isinstance(state, Mapping) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # a dtype that torch cannot give to NumPy
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
