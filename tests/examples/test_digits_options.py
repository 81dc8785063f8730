"""`examples/digits_options.py`: the command line of the digits program."""

import importlib
from pathlib import Path

import pytest

main = importlib.import_module("05_digits").main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "cnn"], "--model: invalid choice: 'cnn'"),
        (["--model"], "--model: expected at least one argument"),
        (["--steps", "0"], "--steps 0: wanted at least 1"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--seeds", "-1"], "--seeds -1: wanted at least 1"),
        (["--batch", "0"], "--batch 0: wanted at least 1"),
        (["--learning-rate", "0"], "--learning-rate 0.0: wanted a positive number"),
        (["--learning-rate", "nan"], "--learning-rate nan: wanted a positive number"),
        (["--json", "no/such/folder/rows.json"], "--json no/such/folder/rows.json: wanted the name of a file"),
        (["--json", "."], "--json .: wanted the name of a file"),
        (["--out", "a-file"], "--out a-file: cannot make this folder"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_wrong_arguments_get_one_clear_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for option in ("--model", "--steps", "--seeds", "--batch", "--learning-rate", "--json", "--out", "sampling.png"):
        assert option in said
