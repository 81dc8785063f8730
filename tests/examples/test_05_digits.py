"""`examples/05_digits.py`: its training, and a short run of the whole."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

program = importlib.import_module("05_digits")
pytestmark = pytest.mark.lenient


# Training


def test_offset_branches_learn_at_a_tenth_of_the_rate():
    params = {"layer": {"kernel": jnp.ones(3), "offset_conv": {"kernel": jnp.ones(3)}}}
    optimizer = program.make_optimizer(0.01, 100)
    state = optimizer.init(params)
    for _ in range(11):  # the rate is highest after the warm-up; Adam moves each parameter by its rate
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, optax.tree.zeros_like(params))
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.01, rtol=1e-3)
    np.testing.assert_allclose(updates["layer"]["offset_conv"]["kernel"], -0.001, rtol=1e-3)


def test_training_lowers_the_loss(data):
    losses = []
    program.train("conv", 0, data, steps=40, batch=8, learning_rate=0.01, report=losses.append)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


# The command


@pytest.mark.slow
def test_a_short_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = Path("new/folder")
    arguments = ["--model", "dcnv2", "--seeds", "2", "--steps", "2", "--batch", "2"]
    assert program.main([*arguments, "--json", "rows.json", "--out", str(out)]) == 0

    rows = json.loads(Path("rows.json").read_text())
    assert [(row["model"], row["seed"]) for row in rows] == [("dcnv2", 0), ("dcnv2", 1)]
    for row in rows:
        assert set(row) == {"model", "seed", "params", "mean_iou", "foreground_accuracy", "step_ms"}
        assert 0 <= row["mean_iou"] <= 1
        assert 0 <= row["foreground_accuracy"] <= 1
        assert row["step_ms"] > 0
        assert row["params"] == 56_540
    assert (out / "sampling.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    assert "mean ± s.d. over 2 seeds" in printed
    assert all(name in printed for name in ("model", "parameters", "mean IoU", "foreground accuracy", "ms a step"))
    assert f"{rows[0]['params']:,}" in printed
    assert "\x1b" not in printed  # a log stays readable
    assert printed.splitlines()[-1] == "picture: new/folder/sampling.png"
    assert "picture: runs/digits/sampling.png" in program.__doc__  # what the last line should be without --out


def test_an_interruption_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    row = {"model": "conv", "seed": 0, "params": 1, "mean_iou": 0.5, "foreground_accuracy": 0.5, "step_ms": 1.0}
    network = program.Network("conv")
    variables = program.init(network, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))

    def train(model, *_, **__):
        if model == "dilated":
            raise KeyboardInterrupt
        return program.Run(row, network, variables)

    monkeypatch.setattr(program, "train", train)
    arguments = ["--model", "conv", "dilated", "--out", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert program.main(arguments) == 130
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    assert (tmp_path / "sampling.png").exists()
    assert "interrupted: what follows is what was finished until then" in capsys.readouterr().out

    arguments[1:3] = ["dilated"]
    assert program.main(arguments) == 130
    assert json.loads((tmp_path / "rows.json").read_text()) == []


def test_a_missing_package_gets_one_clear_line():
    code = "import sys, importlib; sys.modules['rich'] = None; importlib.import_module('05_digits')"
    folder = Path(program.__file__).parent  # where `python -c` looks first, as a program does in its own folder
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=folder)
    assert result.returncode == 1
    said = 'rich.console is not installed; from the root of the repository: pip install -e ".[examples]"\n'
    assert result.stderr == said
