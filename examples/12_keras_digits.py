"""The digits network of 05_digits.py in Keras: trained by model.fit, saved, and loaded again.

A plain network and a modulated deformable one label the positions of warped digits. Offset branches
learn at a tenth of the rate, as in the papers. It takes a minute, and needs the extras "keras" and
"examples". The last line should be "loaded again: runs/keras_digits.keras, the same scores".
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

try:
    import jax
    import keras
    import numpy as np
    from digits_data import BACKGROUND, CANVAS, CLASSES, load_digits, make_batch
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; from the root of the repository: pip install -e ".[examples,keras]"')

from dcn_jax.keras import DeformConv2D

LAYERS = {"conv": keras.layers.Conv2D, "dcnv2": DeformConv2D}


@keras.saving.register_keras_serializable("examples")
class SlowBranches(keras.optimizers.AdamW):
    """AdamW, but for offset branches at a tenth of the rate."""

    def update_step(self, gradient, variable, learning_rate):
        """One variable's step."""
        share = 0.1 if "/offset_conv/" in variable.path else 1.0
        super().update_step(gradient, variable, share * learning_rate)


@keras.saving.register_keras_serializable("examples")
def digit_accuracy(labels: Any, scores: Any) -> Any:
    """The share of the digits' positions that are labelled with the digit."""
    labels = keras.ops.cast(labels, "int32")
    right = keras.ops.equal(keras.ops.argmax(scores, axis=-1), labels)
    digits = keras.ops.not_equal(labels, BACKGROUND)
    return keras.ops.sum(right & digits) / keras.ops.sum(digits)


def make_network(kind: str, features: int = 32) -> keras.Model:
    """Two plain convolutions, to half resolution; three residual layers; the labels' scores."""
    canvas = keras.Input((CANVAS, CANVAS, 1))
    x = keras.layers.Conv2D(16, 3, padding="same")(canvas)
    x = keras.layers.ReLU()(keras.layers.GroupNormalization(8)(x))
    x = keras.layers.Conv2D(features, 3, strides=2, padding="same")(x)  # (B, 16, 16, features)
    for _ in range(3):
        y = LAYERS[kind](features, 3, padding="same")(x)
        x = x + keras.layers.ReLU()(keras.layers.GroupNormalization(8)(y))
    return keras.Model(canvas, keras.layers.Dense(CLASSES)(x), name=kind)


def train(kind: str, batch: tuple[Any, Any], steps: int) -> keras.Model:
    """Train on canvases and labels, 16 at a time, with Keras's own bar of progress."""
    model = make_network(kind)
    schedule = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=0.01, warmup_steps=steps // 10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(SlowBranches(schedule, clipnorm=1.0), loss, metrics=[digit_accuracy])
    canvases, labels = batch
    weights = np.where(labels == BACKGROUND, 1.0, 4.0)  # digits are few
    print(f"{kind}: {model.count_params():,} parameters")
    model.fit(canvases, labels, batch_size=16, shuffle=False, sample_weight=weights)
    return model


def main(path: Path, steps: int = 800) -> None:
    """Train both, compare them on digits that they have not seen, and save the deformable one."""
    keras.utils.set_random_seed(0)
    training_digits, test_digits = load_digits()
    batch = [np.asarray(array) for array in make_batch(jax.random.key(0), training_digits, 16 * steps)]
    test = [np.asarray(array) for array in make_batch(jax.random.key(1), test_digits, 512)]
    for kind in LAYERS:
        model = train(kind, batch, steps)
        _, accuracy = model.evaluate(*test, verbose=0)
        print(f"{kind}: {accuracy:.1%} of the positions of unseen digits are right")

    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path)
    again = keras.models.load_model(path)
    same = np.array_equal(again.predict(test[0], verbose=0), model.predict(test[0], verbose=0))
    print(f"loaded again: {path}, {'the same scores' if same else 'OTHER SCORES'}")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["runs/keras_digits.keras"]))
