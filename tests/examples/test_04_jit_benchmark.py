"""`examples/04_jit_benchmark.py`: its table, and that both programs convolve the same."""

import importlib
import time

import jax
import jax.numpy as jnp
import numpy as np

program = importlib.import_module("04_jit_benchmark")


def test_the_table_fits_a_terminal_and_holds_a_time_for_each_program(run):
    lines = run("04_jit_benchmark", batch=1, size=6, channels=4, rounds=3)
    assert lines[0].startswith("x (1, 6, 6, 4), kernel (3, 3, 4, 4), float32, on ")
    assert max(map(len, lines)) <= 80
    rows = {line[:22].rstrip(): [float(figure) for figure in line[22:].split()] for line in lines[2:-1]}
    assert list(rows) == ["plain, forward", "op, forward", "plain, with gradients", "op, with gradients"]
    for compile_ms, run_ms in rows.values():
        assert compile_ms > run_ms > 0  # compiling is not within the run


def test_without_offsets_the_two_agree_and_so_do_their_gradients():
    x, kernel, offset, mask = program.make_arguments(1, 5, 3)
    assert 1 < offset.std() < 3
    arguments = (x, kernel, jnp.zeros_like(offset), jnp.ones_like(mask))
    results = {name: jax.jit(function)(*arguments) for name, function in program.PROGRAMS.items()}
    np.testing.assert_allclose(results["op, forward"], results["plain, forward"], atol=1e-5)
    gradients, expected = results["op, with gradients"], results["plain, with gradients"]
    assert [g.shape for g in gradients] == [a.shape for a in arguments]
    for ours, theirs in zip(gradients, expected, strict=False):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_time_includes_the_wait_for_the_result():
    class Result:
        def block_until_ready(self):
            time.sleep(0.05)

    assert program.seconds(Result) >= 0.05
