"""The peers: what they are asked, whether their results are ours, and what is said where one is missing."""

import contextlib
import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.convolution import Convolution
from benchmarks.family import Attention
from benchmarks.measure import Settings, compile_workload, prepare_workload
from benchmarks.peers import process
from benchmarks.peers.process import Peer, importable, start_peers
from benchmarks.programs import add_cotangent, deviation, truth
from benchmarks.workloads import WORKLOADS

STRANGE = Convolution((2, 7, 6, 4), 6, window=(3, 2), strides=2, dilation=2, groups=2, offset_groups=4)
ATTENTION = Attention(((5, 4), (3, 2)), queries=7, batch=2, heads=2, channels=4, points=3)


@pytest.fixture
def start():
    """A function that starts a peer in this Python."""
    with contextlib.ExitStack() as peers:

        def start(name):
            return peers.enter_context(contextlib.closing(Peer(name, sys.executable, "cpu", allow_tf32=False)))

        yield start


@pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="needs onnxruntime")
@pytest.mark.parametrize("modulated", [True, False])
def test_onnxruntime_computes_what_ours_does(monkeypatch, start, modulated):
    monkeypatch.setitem(WORKLOADS, "strange", STRANGE._replace(modulated=modulated))
    work = WORKLOADS["strange"]
    peer, arrays = start("onnxruntime"), work.arrays(0, "float32")
    answer = peer.prepare(work, arrays, "float32", "forward", 1, "name")
    assert answer["results"][0].shape == work.call(*arrays).shape
    assert deviation(truth(work, "forward", arrays), answer["results"]) < 1e-5
    assert peer.run("name", 2) > 0


# zeromodels' function by ours: (B, heads, channels, pixels) and flat weights, as that one takes them
ZEROMODELS = """
import dcn_jax
def ms_deform_attn_core(value, value_spatial_shapes, sampling_locations, attention_weights):
    weights = attention_weights.reshape(sampling_locations.shape[:-1])
    return dcn_jax.ms_deform_attn(
        value.transpose(0, 3, 1, 2), tuple(value_spatial_shapes), sampling_locations, weights
    )
"""


@pytest.fixture(params=["itself", "a stand-in"])
def zeromodels(request, tmp_path, monkeypatch):
    """A Python that has zeromodels, or this one with a stand-in for it; PEER_PYTHON may name the former."""
    if request.param == "itself":
        python = os.environ.get("PEER_PYTHON", sys.executable)
        return python if "zeromodels" in importable(python) else pytest.skip(f"{python} has no zeromodels")
    folder = tmp_path / "zeromodels" / "models" / "rt_detr_v2"
    folder.mkdir(parents=True)
    (tmp_path / "zeromodels" / "__init__.py").write_text("__version__ = '1'")
    (folder / "rt_detr_v2_layers.py").write_text(ZEROMODELS)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, root))))
    return sys.executable


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_zeromodels_computes_what_ours_does(zeromodels, mode, dtype):
    """And tells how much memory that takes."""
    inputs = [ATTENTION.arrays(0, dtype)]
    arguments = inputs[0] if mode == "forward" else add_cotangent(ATTENTION.call, inputs)[0]
    with contextlib.closing(Peer("zeromodels", zeromodels, "cpu", allow_tf32=False)) as peer:
        answer = peer.prepare(ATTENTION, arguments, dtype, mode, 1, "name")
        assert peer.run("name", 2) > 0
    right = truth(ATTENTION, mode, arguments)
    assert [a.shape for a in answer["results"]] == [a.shape for a in right]
    assert deviation(right, answer["results"]) < (1e-5 if dtype == "float32" else 0.1)
    assert answer["peak_bytes"] > answer["scratch_bytes"] > 0


class StandIn:
    """A peer in this process, which computes what it is told."""

    name = "torchvision"

    def __init__(self, function):
        self.function = function

    def prepare(self, work, inputs, dtype, mode, copies, name):
        return {"results": jax.tree.leaves(self.function(*inputs)), "peak_bytes": 5}

    def run(self, name, calls):
        return 1.0


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("float32", 0.01), ("bfloat16", 0.01), ("bfloat16", 1)])
def test_a_peer_that_computes_something_else_has_an_error_and_no_time(tiny, dtype, error):
    peer, wrong = StandIn(lambda *a: tiny.call(*a) + error), (dtype, error) in (("float32", 0.01), ("bfloat16", 1))
    settings = Settings("cpu", "a stand-in", ("xla",), 1, True, {"torchvision": peer})
    compiled = compile_workload("tiny", dtype, "forward", settings)
    (row,), runs = prepare_workload("tiny", dtype, "forward", True, settings, compiled)
    assert (row["torchvision_parity"] > 1e-4) == bool(error)
    assert (row["torchvision_error"] or "").startswith("torchvision computes something else: " if wrong else "")
    assert {case.program for case in runs} == {"dense", "xla"} | (set() if wrong else {"torchvision"})


def test_gradients_are_compared_but_for_a_few_at_the_kinks(tiny):
    arguments = add_cotangent(tiny.call, [tiny.arrays(0, "float32")])[0]
    right = truth(tiny, "forward_backward", arguments)
    kink = [np.array(a) for a in right]
    kink[3][0, 0, 0, 0] += 1  # one of 360
    assert deviation(right, right) < 1e-5
    assert deviation(right, kink) > 1e-2
    assert deviation(right, kink, 0.99) < 1e-5
    assert deviation(right, [*right[:3], -right[3], right[4]], 0.99) > 1e-2


@pytest.mark.parametrize(
    ("work", "dtype", "mode", "sentence"),
    [
        (Convolution((1, 8, 4), 4, window=(3,)), "float32", "forward", "onnxruntime's op has two spatial axes"),
        (STRANGE, "bfloat16", "forward", "onnxruntime is asked for inference in float32 on a CPU"),
        (STRANGE, "float32", "forward_backward", "onnxruntime is asked for inference in float32 on a CPU"),
    ],
)
def test_what_a_peer_is_not_asked(start, work, dtype, mode, sentence):
    peer = start("onnxruntime")
    assert peer.prepare(work, [], dtype, mode, 1, "name") == {"error": sentence}


def test_only_peers_that_have_the_op_on_the_device_are_started(monkeypatch):
    monkeypatch.setattr(process, "importable", lambda python: tuple(process.PEERS))
    monkeypatch.setattr(process, "Peer", lambda name, python, device, allow_tf32: (name, device))

    def started(op, device):
        return list(start_peers([sys.executable], {op}, device, allow_tf32=False))

    assert started("an op that nobody has", "cpu") == []
    assert started("deform_conv", "cpu") == ["torchvision", "onnxruntime", "openvino"]
    assert started("deform_conv", "gpu") == ["torchvision", "deformops"]
    assert started("ms_deform_attn", "cpu") == ["torch", "zeromodels"]


def test_a_peer_is_of_the_first_python_that_has_it(monkeypatch):
    has = {"one": ("torch",), "two": ("torch", "zeromodels"), "three": ("zeromodels",)}
    monkeypatch.setattr(process, "importable", has.get)
    monkeypatch.setattr(process, "Peer", lambda name, python, device, allow_tf32: python)
    assert start_peers(["one", "two", "three"], {"ms_deform_attn"}, "cpu", allow_tf32=False) == {
        "torch": "one",
        "zeromodels": "two",
    }
    assert start_peers([], {"ms_deform_attn"}, "cpu", allow_tf32=False) == {}


# Hands its arguments back as results, the kernel's place apart.
ECHO = f"""#!{sys.executable}
import json, shutil, sys
print(json.dumps({{"version": "an echo"}}), flush=True)
for line in sys.stdin:
    command = json.loads(line)["prepare"]
    shutil.copy(command["arrays"], command["results"])
    print(json.dumps({{}}), flush=True)
"""


SENT = {
    STRANGE: [(2, 4, 3, 6), (2, 7, 6, 4), (6, 2, 3, 2), (2, 4, 3, 48), (2, 4, 3, 24)],
    ATTENTION: [(2, 7, 8), (2, 26, 2, 4), (2, 7, 2, 2, 3, 2), (2, 7, 2, 2, 3)],
}


@pytest.mark.parametrize("work", SENT, ids=lambda work: work.op)
def test_deformops_has_maps_as_ours(tmp_path, work):
    (tmp_path / "python").write_text(ECHO)
    (tmp_path / "python").chmod(0o755)
    inputs = add_cotangent(work.call, [work.arrays(0, "float32")])[0]
    with contextlib.closing(Peer("deformops", str(tmp_path / "python"), "gpu", allow_tf32=True)) as peer:
        answer = peer.prepare(work, inputs, "float32", "forward_backward", 1, "name")
        with np.load(f"{peer.folder.name}/arrays.npz") as sent:
            shapes = [sent[key].shape for key in sent.files]
    assert shapes == SENT[work]
    for sent, back in zip(inputs, answer["results"], strict=True):
        np.testing.assert_array_equal(sent, back)


class Tensor(np.ndarray):
    """As much of torch's as is asked for."""

    device = "a GPU"

    def unflatten(self, axis, sizes):
        return self.reshape(*self.shape[:axis], *sizes)


@pytest.fixture
def deformops(monkeypatch):
    """The peer's module, on a GPU of no kind yet, and what its library is asked."""
    asked, kernels = {}, types.ModuleType("deformops.backends.triton._kernels")
    kernels.conv_deform2d = None
    registry = types.ModuleType("deformops.registry")
    registry.Backend = types.SimpleNamespace(TRITON="fused")
    registry.conv = lambda *arrays, **options: asked.update(options, shapes=[a.shape for a in arrays])
    registry.msda = lambda *arrays, **options: asked.update(options, arrays=arrays)
    timing = types.ModuleType("with_torch")
    timing.make_calls = timing.synchronize = timing.to_numpy = None
    torch = types.ModuleType("torch")
    torch.tensor = lambda values, device: (values, device)
    stand_ins = [types.ModuleType(name) for name in ("triton", "deformops")]
    for module in (*stand_ins, torch, registry, kernels, timing):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    peer = importlib.import_module("benchmarks.peers.with_deformops")
    del sys.modules[peer.__name__]  # whose imports were stand-ins
    return peer, asked


@pytest.mark.parametrize(("capability", "in_float32"), [((8, 0), True), ((9, 0), False)])
def test_deformops_is_asked_for_its_fused_attention(monkeypatch, deformops, capability, in_float32):
    """With the level table that its kernels read, and the sums that the library itself would choose there."""
    peer, asked = deformops
    monkeypatch.setattr(
        peer.torch, "cuda", types.SimpleNamespace(get_device_capability=lambda: capability), raising=False
    )
    arrays = [np.asarray(a).view(Tensor) for a in ATTENTION.arrays(0, "float32")]
    peer.ms_deform_attn(*arrays, spatial_shapes=[[5, 4], [3, 2]])  # as JSON has them
    value, sizes, starts, *others = asked.pop("arrays")
    assert [id(a) for a in (value, *others)] == [id(a) for a in arrays]
    assert (sizes, starts) == ((((5, 4), (3, 2)), "a GPU"), ([0, 20], "a GPU"))
    assert asked == {"backend": "fused", "fp32acc": in_float32}


def test_deformops_is_asked_for_its_fused_kernels(deformops):
    peer, asked = deformops
    x, kernel, offset, mask = (np.asarray(a).view(Tensor) for a in STRANGE.arrays(0, "float32"))
    peer.deform_conv(x, kernel.transpose(3, 2, 0, 1), offset, mask, **STRANGE.options)
    assert asked.pop("backend") == "fused"
    assert asked.pop("mask").shape == (2, 4, 3, 4, 6)
    assert asked == {
        "shapes": [(2, 7, 6, 4), (2, 4, 3, 4, 6, 2), (6, 2, 3, 2)],
        "stride": 2,
        "padding": (2, 1),
        "dilation": 2,
        "groups": 2,
        "offset_groups": 4,
    }


def test_a_peer_that_cannot_be_imported_says_so(tmp_path, monkeypatch, start):
    (tmp_path / "torchvision.py").write_text("raise OSError('a library is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peer = start("torchvision")
    assert peer.problem == "torchvision cannot be imported (a library is missing)"
    assert peer.prepare(STRANGE, [], "float32", "forward", 1, "name") == {"error": peer.problem}


def test_a_call_that_fails_there_is_an_error_here(tmp_path, monkeypatch, start):
    (tmp_path / "torchvision.py").write_text("__version__ = '1'")
    (tmp_path / "torch.py").write_text(
        "__version__ = '1'\ndef set_num_threads(n): raise RuntimeError('too few\\nof them')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peer = start("torchvision")
    assert peer.version == "torchvision 1"
    answer = peer.prepare(STRANGE, STRANGE.arrays(0, "float32"), "float32", "forward", 1, "name")
    assert answer == {"error": "torchvision: too few"}
