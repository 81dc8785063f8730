"""The peers: what they are asked, whether their results are ours, and what is said where one is missing."""

import contextlib
import importlib.util
import sys

import jax
import numpy as np
import pytest

from benchmarks.convolution import Convolution
from benchmarks.measure import Settings, prepare_workload
from benchmarks.peers.process import Peer, start_peers
from benchmarks.programs import add_cotangent, deviation, exact
from benchmarks.workloads import WORKLOADS

STRANGE = Convolution((2, 7, 6, 4), 6, window=(3, 2), strides=2, dilation=2, groups=2, offset_groups=4)


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
    assert deviation("strange", "forward", arrays, answer["results"]) < 1e-5
    assert peer.run("name", 2) > 0


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
    (row,), runs = prepare_workload("tiny", dtype, "forward", True, settings)
    assert (row["torchvision_parity"] > 1e-4) == bool(error)
    assert (row["torchvision_error"] or "").startswith("torchvision computes something else: " if wrong else "")
    assert {case.program for case in runs} == {"dense", "xla"} | (set() if wrong else {"torchvision"})


def test_gradients_are_compared_but_for_a_few_at_the_kinks(tiny):
    arguments = add_cotangent(tiny.call, [tiny.arrays(0, "float32")])[0]
    right = jax.tree.leaves(exact("tiny", "forward_backward")(*arguments))
    kink = [np.array(a) for a in right]
    kink[3][0, 0, 0, 0] += 1  # one of 360
    assert deviation("tiny", "forward_backward", arguments, right) < 1e-5
    assert deviation("tiny", "forward_backward", arguments, kink) > 1e-2
    assert deviation("tiny", "forward_backward", arguments, kink, 0.99) < 1e-5
    assert deviation("tiny", "forward_backward", arguments, [*right[:3], -right[3], right[4]], 0.99) > 1e-2


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


def test_only_peers_that_have_the_op_are_started():
    assert start_peers(sys.executable, {"an op that nobody has"}, "cpu", allow_tf32=False) == {}


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
