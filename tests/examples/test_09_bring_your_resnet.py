"""`examples/09_bring_your_resnet.py`: the network stays what it was, learns, and says the same in ONNX Runtime."""

import importlib
import re
import sys

import numpy as np
import pytest

program = importlib.import_module("09_bring_your_resnet")
pytestmark = pytest.mark.lenient


def numbers(line):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e[-+]\d+)?", line)]


@pytest.mark.slow
def test_a_resnet_becomes_deformable_learns_and_is_run_elsewhere(run):
    deformed, before, after, exported = run("09_bring_your_resnet", steps=20)
    layers, difference, largest = numbers(deformed)
    assert layers == 8  # two in each of two blocks of two stages
    assert difference < 1e-5 * largest
    (loss,) = numbers(before)
    steps, trained, percent = numbers(after)
    assert steps == 20
    assert trained < 0.5 * loss
    assert percent > 60
    difference, largest = numbers(exported)
    assert difference < 1e-5 * largest


@pytest.mark.slow
def test_weights_have_torchvisions_names_and_axes():
    state = program.draw_weights()
    assert state["conv1.weight"].shape == (program.WIDTH, 3, 7, 7)
    assert state["layer4.0.downsample.1.running_var"].shape == (8 * program.WIDTH,)
    assert state["fc.weight"].shape == (1000, 8 * program.WIDTH)
    assert len(state) == 102  # of torchvision's 122, the 20 num_batches_tracked are not needed


@pytest.mark.parametrize(("module", "reason"), [("onnxruntime", "import of onnxruntime"), ("onnx", "to_onnx needs")])
def test_without_onnx_it_says_what_to_install(module, reason, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    program.compare_with_onnx(program.make_resnet(), np.zeros((1, 64, 64, 3)), np.zeros((1, 10)))
    (line,) = capsys.readouterr().out.splitlines()
    assert reason in line
    assert line.endswith('pip install onnx "onnxruntime>=1.25"')


def test_the_offset_branches_learn_at_a_tenth_of_the_rate():
    parameters = {"kernel": np.ones(3, np.float32), "offset_conv": {"kernel": np.ones(3, np.float32)}}
    optimizer = program.make_optimizer()
    updates, _ = optimizer.update(parameters, optimizer.init(parameters))
    np.testing.assert_allclose(updates["offset_conv"]["kernel"], 0.1 * updates["kernel"], rtol=1e-5)
