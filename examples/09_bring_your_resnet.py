"""A torchvision ResNet made deformable: its weights brought in, fine-tuned on digits, taken out to ONNX Runtime.

    torchvision's names and arrays  --from_torch-->  ResNet  --deformify-->  the same, deformable
    --Optax-->  one that knows digits  --to_onnx-->  a file for ONNX Runtime

With torchvision installed, the weights are

    {k: v.numpy() for k, v in torchvision.models.resnet18(weights="DEFAULT").state_dict().items()}

Here they are drawn at random, for a network a quarter as wide, so that no PyTorch is needed. The
last step needs `pip install onnx "onnxruntime>=1.25"`, the others do not.

The last line is like "largest difference from ONNX Runtime: 9.8e-06, of logits up to 10.2".
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits_data import Digits, load_digits
from flax import nnx

from dcn_jax.interop import from_torch, to_onnx, to_torch
from dcn_jax.models.resnet import ResNet, resnet18
from dcn_jax.nnx import DeformConv, deformify
from dcn_jax.optim import offset_labels

WIDTH = 16  # features of the stem; 64 for torchvision's own weights
SIZE, BATCH, RATE = 64, 64, 1e-3
# Of the images that torchvision's weights were trained on, by channel.
MEAN, DEVIATION = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)


def make_resnet() -> ResNet:
    """A plain ResNet-18 of 1,000 classes, by torchvision's names."""
    return resnet18(width=WIDTH, rngs=nnx.Rngs(0))


def draw_weights() -> dict[str, np.ndarray]:
    """Weights by torchvision's names, in its axes, in the place of trained ones."""
    return to_torch(make_resnet())


def make_images(digits: Digits) -> jax.Array:
    """`(N, 8, 8)` -> `(N, SIZE, SIZE, 3)`, normalised as torchvision's weights want it."""
    large = jax.image.resize(digits.images, (len(digits.digits), SIZE, SIZE), "linear")
    return (large[..., None] - MEAN) / DEVIATION


def is_late_3x3(path: tuple, conv: nnx.Conv) -> bool:
    """Whether a convolution is one of the 3×3 ones of the last two stages, conv4 and conv5 of the papers."""
    return path[0] in ("layer3", "layer4") and conv.kernel_size == (3, 3)


def loss_of(logits: jax.Array, digits: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean()


def make_optimizer() -> optax.GradientTransformation:
    """Adam; the offset branches, which start at zero, at a tenth of the rate: at the full one taps leap far away."""
    return optax.multi_transform({"main": optax.adam(RATE), "offset": optax.adam(0.1 * RATE)}, offset_labels)


def fine_tune(model: ResNet, images: jax.Array, digits: jax.Array, steps: int) -> None:
    """Train all of the model, in place, on random batches."""
    optimizer = nnx.Optimizer(model, make_optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, digits):
        gradients = nnx.grad(lambda model: loss_of(model(images), digits))(model)
        optimizer.update(model, gradients)

    model.train()  # batch norms use the batch's statistics, and keep a running mean of them
    for key in jax.random.split(jax.random.key(0), steps):
        chosen = jax.random.choice(key, len(digits), (BATCH,), replace=False)
        step(model, optimizer, images[chosen], digits[chosen])
    model.eval()


def run_by_onnx(model: ResNet, images: jax.Array) -> np.ndarray:
    """The logits by ONNX Runtime, from a graph that takes any number of images."""
    import onnxruntime

    proto = to_onnx(model, (None, SIZE, SIZE, 3))  # onnx.save(proto, "resnet.onnx") writes it
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["output"], {"input": np.asarray(images)})
    return np.asarray(logits)


def difference(one: np.ndarray | jax.Array, other: jax.Array) -> str:
    """The largest difference, beside the largest number."""
    return f"{jnp.abs(one - other).max():.1e}, of logits up to {jnp.abs(other).max():.1f}"


def compare_with_onnx(model: ResNet, images: jax.Array, logits: jax.Array) -> None:
    """Print how far ONNX Runtime's logits are from these, or what is not installed."""
    try:
        by_onnx = run_by_onnx(model, images)
    except ImportError as error:
        print(f'not exported, {error}; to see it: pip install onnx "onnxruntime>=1.25"')
    else:
        print(f"largest difference from ONNX Runtime: {difference(by_onnx, logits)}")


def main(steps: int = 40) -> None:
    """Bring a network in, make it deformable, fine-tune it, and take it out."""
    train, test = load_digits()
    images = make_images(test)
    evaluate = nnx.jit(lambda model, images: model(images))

    plain = from_torch(nnx.eval_shape(make_resnet), draw_weights())
    plain.fc = nnx.Linear(8 * WIDTH, 10, rngs=nnx.Rngs(1))  # ten classes in the place of 1,000
    plain.eval()
    model = deformify(plain, is_late_3x3)
    layers = sum(isinstance(module, DeformConv) for _, module in nnx.iter_modules(model))
    before, logits = evaluate(plain, images), evaluate(model, images)
    print(f"{layers} layers became deformable; largest difference: {difference(logits, before)}")

    print(f"loss on the test digits before fine-tuning: {loss_of(logits, test.digits):.2f}")
    fine_tune(model, make_images(train), train.digits, steps)
    logits = evaluate(model, images)
    right = jnp.mean(logits.argmax(-1) == test.digits)
    print(f"after {steps} steps: {loss_of(logits, test.digits):.2f}, and {right:.0%} of them are named right")

    compare_with_onnx(model, images, logits)


if __name__ == "__main__":
    main()
