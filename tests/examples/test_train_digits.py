"""`examples/train_digits.py`: its data, its scores, its command line, and a short run of the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
matplotlib.use("Agg")

import train_digits as program  # noqa: E402

pytestmark = pytest.mark.lenient
BACKGROUND = program.BACKGROUND


@pytest.fixture(scope="module")
def data():
    return program.load_digits()


@pytest.fixture(autouse=True)
def _few_test_canvases(monkeypatch):
    monkeypatch.setattr(program, "TEST_CANVASES", program.TEST_BATCH)


make_batch = jax.jit(program.make_batch, static_argnums=2)


# The data


def test_train_and_test_digits_come_from_different_originals(data):
    train, test = ({image.tobytes() for image in np.asarray(part.images)} for part in data)
    assert not train & test
    assert len(train) + len(test) == 1797  # and none is there twice
    assert len(test) == 1797 // 5
    for part in data:
        assert part.images.shape == (len(part.digits), 8, 8)
        assert part.images.min() == 0
        assert part.images.max() == 1
        assert set(part.digits.tolist()) == set(range(10))


def test_a_warp_turns_scales_and_places_the_image(data):
    image = data[0].images[0]
    middle = jnp.array([15.5, 15.5])
    plain = np.asarray(program.warp(image, jnp.eye(2), middle))[..., 0]
    np.testing.assert_allclose(plain[12:20, 12:20], image, atol=1e-6)
    assert plain.sum() == pytest.approx(float(image.sum()))

    quarter_turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])  # takes the row axis to the column axis
    turned = np.asarray(program.warp(image, quarter_turn, middle + jnp.array([-3.0, 5.0])))[..., 0]
    np.testing.assert_allclose(turned[9:17, 17:25], np.rot90(image), atol=1e-6)

    larger = np.asarray(program.warp(image, 3 * jnp.eye(2), middle))[..., 0]
    np.testing.assert_allclose(larger[5:27:3, 5:27:3], image, atol=1e-5)


def test_labels_and_canvases_agree(data):
    canvases, labels = make_batch(jax.random.key(0), data[0], 64)
    assert canvases.shape == (64, 32, 32, 1)
    assert labels.shape == (64, 16, 16)
    for canvas, label in zip(np.asarray(canvases)[..., 0], np.asarray(labels), strict=True):
        for row in range(16):
            for column in range(16):
                ink = canvas[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean()
                assert (label[row, column] != BACKGROUND) == (ink > 0.4) or abs(ink - 0.4) < 1e-6
        assert len(set(label.ravel().tolist()) - {BACKGROUND}) == 1  # one digit on each canvas, and always some of it


def test_the_label_is_that_of_the_original(data):
    """With one original in the pool, every canvas is of it."""
    for i in range(3):
        one = program.Digits(data[0].images[i : i + 1], data[0].digits[i : i + 1])
        _, labels = make_batch(jax.random.key(i), one, 8)
        assert set(np.unique(labels).tolist()) == {int(one.digits[0]), BACKGROUND}


def test_warps_span_a_threefold_range_and_stay_on_the_canvas():
    matrices, centers = jax.vmap(program.random_warp)(jax.random.split(jax.random.key(0), 2000))
    scales = np.sqrt(np.linalg.det(matrices))  # turning and shearing leave areas alone
    assert scales.min() == pytest.approx(1.25, rel=0.01)
    assert scales.max() == pytest.approx(3.75, rel=0.01)
    half = 8 * scales[:, None] / 2
    assert (centers - half >= -0.51).all()
    assert (centers + half <= 31.51).all()


def test_batches_are_endless(data):
    (first, _), (again, _), (other, _) = (make_batch(jax.random.key(k), data[0], 4) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max(axis=(1, 2, 3)).min() > 0.1


# Networks, loss and scores


@pytest.mark.parametrize("model", ["dcnv1", "dcnv2"])
def test_a_fresh_deformable_network_is_the_plain_one(model, data):
    canvases, _ = make_batch(jax.random.key(0), data[0], 2)
    plain, deformable = program.Network("conv"), program.Network(model)
    variables = jax.jit(deformable.init)(jax.random.key(1), canvases)
    without_branches = {
        name: {key: value for key, value in layer.items() if key != "offset_conv"}
        for name, layer in variables["params"].items()
    }
    expected = jax.jit(plain.apply)({"params": without_branches}, canvases)
    assert expected.shape == (2, 16, 16, 11)
    np.testing.assert_allclose(jax.jit(deformable.apply)(variables, canvases), expected, atol=1e-4)


def test_offset_branches_learn_at_a_tenth_of_the_rate():
    params = {"layer": {"kernel": jnp.ones(3), "offset_conv": {"kernel": jnp.ones(3)}}}
    optimizer = program.make_optimizer(0.01, 100)
    state = optimizer.init(params)
    for _ in range(11):  # the rate is highest after the warm-up; Adam moves each parameter by its rate
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, optax.tree.zeros_like(params))
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.01, rtol=1e-3)
    np.testing.assert_allclose(updates["layer"]["offset_conv"]["kernel"], -0.001, rtol=1e-3)


def test_the_loss_weighs_digits_fourfold():
    scores = jnp.zeros((1, 1, 2, 11)).at[..., 3].set(2.0)
    wrong, right = (float(jax.nn.logsumexp(scores[0, 0, 0])) - s for s in (0, 2))
    loss = program.loss_of(scores, jnp.array([[[BACKGROUND, 3]]]))
    assert float(loss) == pytest.approx((wrong + 4 * right) / 5, rel=1e-6)


def test_scores_of_a_confusion_matrix():
    confusion = np.zeros((11, 11), int)
    confusion[BACKGROUND, BACKGROUND] = 90
    confusion[BACKGROUND, 3] = 10
    confusion[3, 3] = 6
    confusion[3, 4] = 2
    mean_iou, accuracy = program.scores_of(confusion)
    assert mean_iou == pytest.approx((90 / 100 + 6 / 18 + 0 / 2) / 11)
    assert accuracy == 6 / 8


# The command


def test_a_short_run(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    arguments = ["--model", "dcnv2", "--seeds", "2", "--steps", "2", "--batch", "2"]
    assert program.main([*arguments, "--json", str(tmp_path / "rows.json"), "--out", str(out)]) == 0

    rows = json.loads((tmp_path / "rows.json").read_text())
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


def test_training_lowers_the_loss(data):
    losses = []
    program.train("conv", 0, data, steps=40, batch=8, learning_rate=0.01, report=losses.append)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_the_table_gives_mean_and_deviation():
    row = {"model": "conv", "seed": 0, "params": 1234, "mean_iou": 0.5, "foreground_accuracy": 0.25, "step_ms": 10.0}
    table = program.results_table([row, row | {"seed": 1, "mean_iou": 0.6}])
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["conv", "1,234", "0.550 ± 0.071", "0.250 ± 0.000", "10.0 ± 0.0"]
    assert [next(iter(column.cells)) for column in program.results_table([row]).columns][2:] == [
        "0.500",
        "0.250",
        "10.0",
    ]


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
        program.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for option in ("--model", "--steps", "--seeds", "--batch", "--learning-rate", "--json", "--out", "sampling.png"):
        assert option in said


def test_an_interruption_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    row = {"model": "conv", "seed": 0, "params": 1, "mean_iou": 0.5, "foreground_accuracy": 0.5, "step_ms": 1.0}
    network = program.Network("conv")
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))

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
    code = f"import sys, runpy; sys.modules['rich'] = None; runpy.run_path({str(EXAMPLES / 'train_digits.py')!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert result.returncode == 1
    assert (
        result.stderr
        == 'rich.console is not installed; from the root of the repository: pip install -e ".[examples]"\n'
    )
