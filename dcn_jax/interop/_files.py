"""Reading checkpoints, without running code that a file contains."""

import importlib
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dcn_jax._core import extras

# Older versions run code of some files despite weights_only: CVE-2025-32434, CVE-2026-24747.
_SAFE_TORCH = (2, 10)


# Under which keys training programs keep the arrays of a network.
_PARTS = ("state_dict", "model", "model_state_dict", "net", "params", "params_ema", "ema.module")


def read_checkpoint(path: str | PathLike[str], key: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by name, for `from_torch`.

    `.safetensors` files are read by the safetensors library. `.pth`, `.pt`, `.bin` and `.ckpt`
    files are pickles, which may contain code. They are read by torch, if it is installed, and
    always with `weights_only=True`, so that no code runs.

    If a file keeps its arrays in a part, beside an optimizer for example, only these are returned.
    Known parts are "state_dict" (mmdetection, Lightning), "model" (detectron2), "model_state_dict",
    "net", "params" and "params_ema" (BasicSR) and "ema.module" (RT-DETR). Entries that are no
    arrays, such as a counter, are ignored.

    Args:
        path: of a file that ends in `.safetensors`, `.pth`, `.pt`, `.bin` or `.ckpt`.
        key: the part to read, "ema.module" for example, if the file has several, or one that is not
            known; "" for the arrays that lie in no part.

    Returns:
        NumPy arrays by name, in the dtypes of the file (bfloat16 is that of ml_dtypes).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, damaged or hostile, has no arrays by name, or not
            under `key`; it has several parts that differ, or only unknown ones; or an array has a
            dtype that NumPy lacks.
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
    if path.is_dir():
        files = sorted(each.name for each in path.iterdir() if each.is_file())
        raise ValueError(
            f"path={str(path)!r} is a folder; wanted one of its files, {', '.join(files) or 'of which it has none'}"
        )
    readers = {".safetensors": _read_safetensors} | dict.fromkeys((".pth", ".pt", ".bin", ".ckpt"), _read_torch)
    if path.suffix not in readers:
        raise ValueError(
            f"path={str(path)!r} ends in {path.suffix!r}; wanted {', '.join(readers)}. Save files of other kinds as "
            ".safetensors with the library that wrote them"
        )
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file")
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key={key!r} is a {type(key).__name__}; wanted a string such as 'ema.module', or None")
    return readers[path.suffix](path, key)


def _read_safetensors(path: Path, key: str | None) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file
    except ModuleNotFoundError as error:
        raise extras.missing("read_checkpoint", "interop") from error
    if key:
        raise ValueError(
            f"key={key!r} names a part of a file, and .safetensors files have none, only names: leave key out, and give "
            "from_torch the beginning of the names as prefix"
        )
    try:
        return load_file(path)
    except Exception as error:  # a hostile file may raise anything
        for name, dtype in _dtypes_that_numpy_lacks(path).items():
            raise _foreign_dtype(path, name, dtype) from error
        raise ValueError(f"path={str(path)!r} is damaged, or is not a .safetensors file: {error}") from error


def _dtypes_that_numpy_lacks(path: Path) -> dict[str, str]:
    """The dtypes of a .safetensors file's arrays that NumPy cannot hold, by the arrays' names."""
    from safetensors import safe_open

    dtypes = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                try:
                    file.get_tensor(name)
                except (AttributeError, KeyError, TypeError):
                    dtypes[name] = file.get_slice(name).get_dtype()
    except Exception:  # the file is damaged
        return {}
    return dtypes


def _foreign_dtype(path: Path, name: str, dtype: Any) -> ValueError:
    return ValueError(
        f"path={str(path)!r} has an array {name!r} of dtype {dtype}, which NumPy lacks; save it in another dtype, "
        "bfloat16 or float32 for example, with the library that wrote the file"
    )


def _read_torch(path: Path, key: str | None) -> dict[str, np.ndarray]:
    torch = _safe_torch(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"path={str(path)!r} is damaged, or holds objects that torch does not read with weights_only=True, which "
            f"runs no code of the file. If you trust the file, save its state_dict as .safetensors. torch says: {error}"
        ) from error
    parts = dict(_parts(loaded, torch))
    if not parts:
        held = list(loaded) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ValueError(f"path={str(path)!r} holds no arrays by name: {held}")
    if key is None:
        chosen = [name for name in _PARTS if name in parts] or list(parts)
    else:
        chosen = [name for name in (key,) if name in parts]
    states = [{name: _to_numpy(path, name, a, torch) for name, a in parts[part].items()} for part in chosen]
    if not states or not all(_equal(states[0], state) for state in states[1:]):
        given = "several parts with arrays that differ" if key is None else f"no arrays under key={key!r}"
        raise ValueError(
            f"path={str(path)!r} has {given}; wanted one of {', '.join(f'key={name!r}' for name in parts)}"
        )
    return states[0]


def _parts(loaded: Any, torch: Any, at: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Any]]]:
    """The mappings in `loaded` that hold arrays by name: each one's key, and those arrays."""
    if not isinstance(loaded, Mapping):
        return
    named = {name: value for name, value in loaded.items() if isinstance(name, str)}
    arrays = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    if arrays:
        yield at, arrays
    for name, value in named.items() if depth else ():
        yield from _parts(value, torch, f"{at}.{name}" if at else name, depth - 1)


def _equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Whether two states have the same arrays, to the bit."""

    def same(a, b):
        return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())

    return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)


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


def _to_numpy(path: Path, name: str, tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # a dtype that torch cannot give to NumPy
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return tensor.numpy()
    except TypeError as error:
        raise _foreign_dtype(path, name, tensor.dtype) from error
