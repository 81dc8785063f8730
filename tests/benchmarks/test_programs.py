"""What is timed is checked against an exact result."""

import math

import jax
import numpy as np

from benchmarks import programs
from benchmarks.programs import Program, compile_chain, deviation, truth


def test_a_wrong_result_is_seen(tiny):
    inputs = [tiny.arrays(0, "float32")]
    right = truth(tiny, "forward", inputs[0])

    def error(function):
        return deviation(right, jax.tree.leaves(Program(function, inputs).compiled(*inputs[0])))

    assert error(tiny.call) < 1e-6
    assert error(lambda *a: tiny.call(*a).at[0, 0, 0, 0].add(1)) > 1e-2
    assert math.isnan(error(lambda *a: tiny.call(*a).at[0, 0, 0, 0].set(np.nan)))


def test_a_chain_calls_the_function_once_for_each_of_the_inputs(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(programs, "compile_chain", lambda *_: lambda *inputs: calls.append(len(inputs)) or inputs)
    program = Program(tiny.call, [tiny.arrays(0, "float32")] * 3, chained=True)
    monkeypatch.setattr(programs, "warm_up", lambda device: 0)
    milliseconds = program.run(7)  # in steps of three calls, after one that counts for nothing
    assert calls == [3] * 4
    assert milliseconds < 1


def test_a_chain_gives_each_result(tiny):
    inputs = [tiny.arrays(seed, "float32") for seed in range(3)]
    results = compile_chain(tiny.call, inputs)(*inputs)
    assert len(results) == 3
    for arguments, result in zip(inputs, results, strict=True):
        np.testing.assert_allclose(result, tiny.call(*arguments), rtol=1e-5, atol=1e-6)
