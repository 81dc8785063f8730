"""`read_checkpoint`: what it reads, and that no file makes it run code or fail without saying why."""

import importlib.util
import io
import json
import pickle
import struct
import subprocess
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from dcn_jax.interop import read_checkpoint

ARRAYS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.ones(2, np.float16),
    "brain": np.array([1.5, -2.0], ml_dtypes.bfloat16),
}


def test_safetensors(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    read = read_checkpoint(tmp_path / "x.safetensors")
    assert read.keys() == ARRAYS.keys()
    for name, array in read.items():
        np.testing.assert_array_equal(array, ARRAYS[name], strict=True)


def with_header(header, body=b"\0" * 16, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": b"",
    "cut in its size": b"\x08\0\0",
    "cut in its header": save(ARRAYS)[:20],
    "cut in its arrays": save(ARRAYS)[:-1],
    "something behind": save(ARRAYS) + b"\0",
    "a header larger than the file": with_header({"w": entry([4], 0, 16)}, size=10_000),
    "a header of 2**63 bytes": with_header({"w": entry([4], 0, 16)}, size=2**63),
    "a header that is no JSON": with_header(b"{'w': 1}"),
    "a shape larger than its bytes": with_header({"w": entry([5], 0, 16)}),
    "a shape that overflows": with_header({"w": entry([2**62, 8], 0, 16)}),
    "a negative shape": with_header({"w": entry([-4], 0, 16)}),
    "bytes beyond the end": with_header({"w": entry([8], 0, 32)}),
    "bytes before the start": with_header({"w": entry([4], -16, 0)}),
    "bytes that overlap": with_header({"w": entry([4], 0, 16), "v": entry([2], 8, 16)}),
    "an unknown dtype": with_header({"w": entry([4], 0, 16, "F33")}),
    "a pickle": pickle.dumps(ARRAYS),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_damaged_safetensors(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(ValueError, match=r"x.safetensors' is damaged, or is not a .safetensors file: "):
        read_checkpoint(path)


class Bomb:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def bombs(proof):
    """A bare pickle, and one in a zip as torch.save makes them."""
    bare, zipped = pickle.dumps({"weight": Bomb(proof)}), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("x/data.pkl", bare)
        archive.writestr("x/version", "3\n")
    return {"bare": bare, "zipped": zipped.getvalue()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pkl"])
@pytest.mark.parametrize("kind", ["bare", "zipped"])
def test_a_bomb_does_not_go_off(tmp_path, kind, suffix):
    """Whether torch is installed or not."""
    path = tmp_path / f"x{suffix}"
    path.write_bytes(bombs(tmp_path / "proof")[kind])
    with pytest.raises((ValueError, ImportError), match="path="):
        read_checkpoint(path)
    assert not (tmp_path / "proof").exists()


def test_the_bomb_is_a_bomb(tmp_path):
    pickle.loads(bombs(tmp_path / "proof")["bare"])["weight"].close()
    assert (tmp_path / "proof").exists()


# ---- .pth, by a torch that is not there


class Tensor:
    """What `read_checkpoint` uses of torch's."""

    def __init__(self, array):
        self.array = np.asarray(array)
        self.dtype = "bfloat16" if self.array.dtype == ml_dtypes.bfloat16 else str(self.array.dtype)

    def detach(self):
        return self

    def contiguous(self):
        return self

    def view(self, dtype):
        return Tensor(self.array.view(dtype))

    def numpy(self):
        assert self.dtype != "bfloat16"
        return self.array


def fake_torch(monkeypatch, loads, version="2.12.0+cu130"):
    """A torch whose `load` gives `loads`, or raises it; returns the calls."""
    calls = []

    def load(path, **options):
        calls.append(options)
        if isinstance(loads, Exception):
            raise loads
        return loads

    torch = types.SimpleNamespace(load=load, Tensor=Tensor, bfloat16="bfloat16", int16="int16", __version__=version)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return calls


@pytest.fixture
def pth(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"\x80\x02")
    return path


STATE = {name: Tensor(array) for name, array in ARRAYS.items()}
OTHER = {"weight": Tensor(np.zeros(2))}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_it_is_read_with_weights_only(monkeypatch, tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"")
    calls = fake_torch(monkeypatch, STATE)
    read = read_checkpoint(path)
    assert calls == [{"map_location": "cpu", "weights_only": True}]
    for name, array in read.items():
        np.testing.assert_array_equal(array, ARRAYS[name], strict=True)
    assert read.keys() == ARRAYS.keys()


@pytest.mark.parametrize(
    ("loads", "key"),
    [
        ({**STATE, "epoch": 3, "meta": {"date": "today"}, "none": None}, None),
        *[
            ({part: STATE, "meta": {"epoch": 3}, "mean": Tensor([1.0])}, None)
            for part in ("state_dict", "model", "params_ema", "params", "net", "model_state_dict")
        ],
        ({"ema": {"module": STATE, "updates": 3}}, None),
        ({"params_ema": STATE, "params": dict(STATE)}, None),
        ({"state_dict": STATE, "optimizer": {"state": {0: {"exp_avg": Tensor(1.0)}}, "named": {"a": Tensor(1.0)}}}, None),
        ({"params": OTHER, "params_ema": STATE}, "params_ema"),
        ({"model": OTHER, "ema": {"module": STATE}}, "ema.module"),
        ({"generator": STATE}, "generator"),
        ({"ema.module": STATE}, "ema.module"),
        ({**STATE, "net": OTHER}, ""),
    ],
)  # fmt: skip
def test_the_part_with_the_arrays_is_found(monkeypatch, pth, loads, key):
    fake_torch(monkeypatch, loads)
    read = read_checkpoint(pth, key)
    assert read.keys() == ARRAYS.keys()
    for name, array in read.items():
        np.testing.assert_array_equal(array, ARRAYS[name], strict=True)


@pytest.mark.parametrize(
    ("loads", "key", "message"),
    [
        ({"params": OTHER, "params_ema": STATE}, None, "has several parts with arrays that differ; wanted one of key='params', key='params_ema'$"),
        ({"params": STATE, "net": {**STATE, "half": Tensor(np.zeros(2, np.float16))}}, None, "that differ; wanted one of key='params', key='net'$"),
        ({"model": OTHER, "ema": {"module": STATE}}, None, "wanted one of key='model', key='ema.module'$"),
        ({**STATE, "decoder": OTHER}, None, "wanted one of key='', key='decoder'$"),
        ({"model": STATE}, "ema", "has no arrays under key='ema'; wanted one of key='model'$"),
    ],
)  # fmt: skip
def test_parts_that_differ(monkeypatch, pth, loads, key, message):
    fake_torch(monkeypatch, loads)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(pth, key)


def test_a_key_that_cannot_be(tmp_path, pth):
    with pytest.raises(TypeError, match="key=3 is a int; wanted a string"):
        read_checkpoint(pth, 3)
    save_file({"weight": ARRAYS["weight"]}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"key='model' names a part of a file, and .safetensors files have none"):
        read_checkpoint(tmp_path / "x.safetensors", "model")


def test_a_dtype_that_numpy_lacks(monkeypatch, tmp_path, pth):
    class Float8(Tensor):
        def numpy(self):
            raise TypeError("Got unsupported ScalarType Float8_e4m3fn")

    array = Float8(np.zeros(2))
    array.dtype = "torch.float8_e4m3fn"
    fake_torch(monkeypatch, {"scale": array})
    with pytest.raises(ValueError, match=r"has an array 'scale' of dtype torch.float8_e4m3fn, which NumPy lacks; save"):
        read_checkpoint(pth)
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header({"w": entry([4], 0, 4, "F8_E4M3")}, body=b"\0" * 4))
    with pytest.raises(ValueError, match=r"has an array 'w' of dtype F8_E4M3, which NumPy lacks; save it in another"):
        read_checkpoint(path)


@pytest.mark.parametrize("error", [pickle.UnpicklingError("no"), RuntimeError("no"), EOFError("no"), ValueError("no")])
def test_what_torch_refuses_is_not_tried_again(monkeypatch, pth, error):
    calls = fake_torch(monkeypatch, error)
    with pytest.raises(
        ValueError, match=r"x.pth' is damaged, or holds objects that torch does not read with weights_only=True.*: no"
    ):
        read_checkpoint(pth)
    assert calls == [{"map_location": "cpu", "weights_only": True}]


@pytest.mark.parametrize("loads", [{"model": {"weight": 3}}, [Tensor(1.0)], {3: Tensor(1.0)}, {"optimizer": {}}])
def test_what_holds_no_arrays_by_name(monkeypatch, pth, loads):
    fake_torch(monkeypatch, loads)
    with pytest.raises(ValueError, match="holds no arrays by name"):
        read_checkpoint(pth)


@pytest.mark.parametrize("version", ["2.5.1", "2.9.1+cpu", "1.13.0"])
def test_a_torch_that_can_be_made_to_run_code_is_refused(monkeypatch, pth, version):
    calls = fake_torch(monkeypatch, {}, version)
    with pytest.raises(ImportError, match=r"CVE-2025-32434.* wanted 2\.10 or newer"):
        read_checkpoint(pth)
    assert calls == []


def test_without_torch_the_error_says_what_to_do(monkeypatch, pth):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ImportError, match=r"x.pth' is read by torch, which is not installed: pip install torch; or, on a machine"
    ):
        read_checkpoint(pth)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is no dependency of the tests")
def test_what_torch_itself_saves(tmp_path):
    import torch

    torch.save({"state_dict": {"w": torch.ones(2, 3, dtype=torch.bfloat16)}}, tmp_path / "x.pth")
    np.testing.assert_array_equal(
        read_checkpoint(tmp_path / "x.pth")["w"], np.ones((2, 3), ml_dtypes.bfloat16), strict=True
    )


# ---- the rest


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("x.pkl", ValueError, r"ends in '.pkl'; wanted .safetensors, .pth, .pt, .bin, .ckpt"),
        ("x.safetensors", FileNotFoundError, "x.safetensors' is not a file"),
        ("x.pth", FileNotFoundError, "x.pth' is not a file"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        read_checkpoint(tmp_path / name)


def test_a_folder(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    with pytest.raises(ValueError, match="weights' is a folder; wanted one of its files, of which it has none"):
        read_checkpoint(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).touch()
    with pytest.raises(ValueError, match=r"wanted one of its files, config.json, model.safetensors"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("missing", "program", "message"),
    [
        ("flax", "import dcn_jax.interop", "dcn_jax.interop needs the extra"),
        ("safetensors", "open('x.safetensors', 'w'); import dcn_jax.interop as i; i.read_checkpoint('x.safetensors')", "read_checkpoint needs"),
    ],
)  # fmt: skip
def test_without_a_dependency_the_error_names_the_extra(tmp_path, missing, program, message):
    program = f"import sys; sys.modules[{missing!r}] = None; {program}"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert 'pip install "dcn-jax[interop]"' in result.stderr


def test_nothing_of_torch_or_safetensors_is_loaded_before_it_is_needed():
    program = "import sys, dcn_jax.interop; sys.exit(bool({'torch', 'safetensors'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
