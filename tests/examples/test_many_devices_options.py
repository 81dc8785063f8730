"""`examples/many_devices_options.py`: the command line of the program for many devices."""

import importlib
import sys
from pathlib import Path

import pytest

main = importlib.import_module("11_many_devices").main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "cnn"], "--model: invalid choice: 'cnn'"),
        (["--steps", "0"], "--steps 0: wanted at least 1"),
        (["--batch", "0"], "--batch 0: wanted at least 1"),
        (["--save-every", "0"], "--save-every 0: wanted at least 1"),
        (["--log-every", "-1"], "--log-every -1: wanted at least 1"),
        (["--give-up", "0"], "--give-up 0: wanted at least 1"),
        (["--seed", "-1"], "--seed -1: wanted 0 to 4294967295"),
        (["--learning-rate", "inf"], "--learning-rate inf: wanted a positive number"),
        (["--resume"], "--resume: wanted --checkpoints DIR too, to resume from"),
        (["--json", "no/such/folder/rows.json"], "--json no/such/folder/rows.json: wanted the name of a file"),
        (["--process", "1"], "--coordinator, --processes and --process: wanted all three or none"),
        (
            ["--coordinator", "here", "--processes", "2", "--process", "0"],
            "--coordinator here: wanted HOST:PORT, such as 10.0.0.1:1234",
        ),
        (
            ["--coordinator", "here:1", "--processes", "2", "--process", "2"],
            "--process 2: wanted 0 to 1, one less than --processes",
        ),
        (["--tensorboard", "curves"], "--tensorboard: tensorboardX is not installed: pip install tensorboardX"),
    ],
)
def test_wrong_arguments_get_one_clear_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(Path().iterdir())


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for option in (
        "steps",
        "seed",
        "save-every",
        "checkpoints",
        "resume",
        "json",
        "coordinator",
        "processes",
        "process",
    ):
        assert f"--{option}" in said
