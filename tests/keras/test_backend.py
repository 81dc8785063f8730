"""Which backend the layers need, said in a sentence; and that nobody loads Keras who did not ask for it."""

import os
import subprocess
import sys

import pytest

MAKE = {
    "DeformConv2D": "DeformConv2D(4, 3)",
    "MSDeformAttn": "MSDeformAttn(16, 4)",
    "grid_sample": "grid_sample([[[1.0]]], [[[0.0, 0.0]]])",
    "ms_deform_attn": "ms_deform_attn(None, ((1, 1),), None, None)",
}


def run(code, backend):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", MAKE)
def test_another_backend_is_named(name):
    done = run(f"from dcn_jax.keras import *; {MAKE[name]}", "numpy")
    wanted = f"RuntimeError: dcn_jax.keras.{name} needs Keras's backend 'jax', and this is 'numpy'; set the environment"
    assert wanted in done.stderr.splitlines()[-1]


def test_a_backend_that_is_not_installed():
    """Keras's own default is TensorFlow."""
    done = run("import dcn_jax.keras", "tensorflow")
    wanted = (
        "ImportError: Keras's backend needs tensorflow, and dcn_jax.keras needs the backend 'jax'; set the environment"
    )
    assert wanted in done.stderr.splitlines()[-1]


def test_the_advice_works():
    code = 'import os; os.environ["KERAS_BACKEND"] = "jax"\nfrom dcn_jax.keras import DeformConv2D; DeformConv2D(4, 3)'
    assert run(code, "numpy").returncode == 0


def test_nothing_else_loads_keras():
    modules = "dcn_jax, dcn_jax.interop, dcn_jax.linen, dcn_jax.nnx, dcn_jax.optim, dcn_jax.sharding, dcn_jax.viz"
    done = run(f"import sys, {modules}; sys.exit('keras' in sys.modules)", "jax")
    assert done.returncode == 0, done.stderr
