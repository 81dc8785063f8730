"""The ResNets: their sizes, their numbers beside a network written out, training, memory, export."""

import functools
import inspect
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export, lax

from dcn_jax.models import resnet
from dcn_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from dcn_jax.nnx import DeformConv
from dcn_jax.optim import offset_labels
from tests.support.running import assert_close

pytestmark = pytest.mark.lenient
MAKERS = {name: getattr(resnet, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101")}
CONV3_TO_5 = ("conv3", "conv4", "conv5")


def abstract(make, *args, **options):
    """A model of shapes alone, which costs no initializing."""
    return nnx.eval_shape(lambda: make(*args, rngs=nnx.Rngs(0), **options))


def fill(model, scale=1.0):
    """Parameters and statistics from a seed, in NumPy: the variables of an abstract model, each of a likely size."""
    random = np.random.default_rng(0)

    def draw(path, variable):
        if path[-1] in ("scale", "var"):
            value = random.uniform(0.5, 1.5, variable.shape)
        elif path[-1] == "kernel":
            value = random.standard_normal(variable.shape) * scale * np.sqrt(2 / np.prod(variable.shape[:-1]))
        else:
            value = random.standard_normal(variable.shape) * 0.1 * scale
        return variable.replace(jnp.asarray(value, variable.dtype))

    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    return nnx.merge(graph, nnx.from_flat_state([(path, draw(path, variable)) for path, variable in flat]))


def tiny(block=BasicBlock, num_classes=5, depths=(1, 1, 1, 1), **options):
    return fill(abstract(ResNet, block, depths, num_classes, width=4, **options))


def images(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def count(model):
    return sum(int(np.prod(p.shape)) for _, p in nnx.to_flat_state(nnx.state(model, nnx.Param)))


def layers(model):
    return [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, DeformConv)]


# ---- sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032), ("resnet101", 44_549_160)],
)
def test_parameters_are_as_many_as_torchvision_s(name, parameters):
    assert count(abstract(MAKERS[name])) == parameters


@pytest.mark.parametrize(
    ("name", "stages", "modulated", "channels"),
    [
        # By stage: channels of the 3×3 convolutions' inputs, once for each of them.
        ("resnet50", CONV3_TO_5, True, [128] * 4 + [256] * 6 + [512] * 3),  # DCNv2
        ("resnet50", ("conv5",), False, [512] * 3),  # DCNv1
        ("resnet18", ("conv2", "conv5"), True, [64] * 4 + [256] + [512] * 3),
    ],
)
def test_each_deformable_layer_adds_exactly_its_branch(name, stages, modulated, channels):
    model = abstract(MAKERS[name], deform_stages=stages, modulated=modulated)
    assert sorted(layer.in_features for _, layer in layers(model)) == channels
    emitted = 27 if modulated else 18
    assert count(model) - count(abstract(MAKERS[name])) == sum(emitted * (9 * c + 1) for c in channels)


@pytest.mark.parametrize(("size", "sizes"), [((64, 64), (16, 8, 4, 2)), ((33, 97), ((9, 25), (5, 13), (3, 7), (2, 4)))])
def test_stages_and_logits(size, sizes):
    model = abstract(ResNet, Bottleneck, (1, 2, 1, 1), 7, deform_stages=("conv4",))
    x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    seen = nnx.eval_shape(lambda model, x: model.stages(x), model, x)
    assert isinstance(seen, tuple)
    sizes = [s if isinstance(s, tuple) else (s, s) for s in sizes]
    assert [y.shape for y in seen] == [(2, *s, 256 * 2**i) for i, s in enumerate(sizes)]
    assert nnx.eval_shape(lambda model, x: model(x), model, x).shape == (2, 7)
    assert nnx.eval_shape(lambda model, x: model(x), abstract(ResNet, Bottleneck, (1, 1, 1, 1), None), x).shape == (
        2,
        2048,
    )


def test_any_batch_axes():
    model = abstract(ResNet, BasicBlock, (1, 1, 1, 1), 5, width=4, deform_stages=("conv2",))
    for batch in ((), (2, 3)):
        x = jax.ShapeDtypeStruct((*batch, 32, 32, 3), jnp.float32)
        assert nnx.eval_shape(lambda model, x: model(x), model, x).shape == (*batch, 5)


def test_options_reach_the_layers():
    options = {
        "modulated": False,
        "offset_groups": 2,
        "mask_scale": 2.0,
        "max_offset": 3.0,
        "implementation": "xla",
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.float16,
        "precision": "highest",
    }
    model = abstract(ResNet, Bottleneck, (1, 1, 1, 1), width=8, deform_stages=CONV3_TO_5, in_features=2, **options)
    assert [path for path, _ in layers(model)] == [(f"layer{i}", 0, "conv2") for i in (2, 3, 4)]
    for _, layer in layers(model):
        assert {name: getattr(layer, name) for name in options} == options
    others = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Conv | nnx.Linear | nnx.BatchNorm)]
    convs, branches, norms, fc = 1 + 4 * 4 - 3, 3, 1 + 4 * 4, 1
    assert len(others) == convs + branches + norms + fc
    for node in others:
        assert (node.dtype, node.param_dtype) == (jnp.bfloat16, jnp.float16)
        assert isinstance(node, nnx.BatchNorm) or node.precision == "highest"
    x = jnp.ones((1, 32, 32, 2), jnp.bfloat16)
    assert nnx.eval_shape(lambda model, x: model(x), model, x).dtype == jnp.bfloat16


def test_options_are_keywords():
    for make in (ResNet.__init__, *MAKERS.values()):
        parameters = list(inspect.signature(make).parameters.values())
        at = [p.name for p in parameters].index("num_classes")
        assert parameters[at].default == 1000
        assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters[at + 1 :])


# ---- numbers


def written_out(p, x, block, depths):
    """The stages' features and the logits in eval mode, by torchvision's names, with convolutions in its NCHW."""

    def conv(name, x, stride, pad):
        k = p[f"{name}.kernel"].transpose(3, 2, 0, 1)
        return lax.conv_general_dilated(x, k, (stride, stride), [(pad, pad)] * 2)

    def bn(name, x):
        mean, var, scale, bias = (p[f"{name}.{key}"][:, None, None] for key in ("mean", "var", "scale", "bias"))
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    def relu(x):
        return jnp.maximum(x, 0)

    x = relu(bn("bn1", conv("conv1", x.transpose(0, 3, 1, 2), 2, 3)))
    x = jnp.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])  # zero is as good as -inf after a relu
    h, w = ((size - 3) // 2 + 1 for size in x.shape[2:])
    x = functools.reduce(
        jnp.maximum, [x[:, :, i:, j:][:, :, ::2, ::2][:, :, :h, :w] for i in range(3) for j in range(3)]
    )
    seen = []
    for stage, depth in enumerate(depths, 1):
        for i in range(depth):
            at = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            if block is BasicBlock:
                y = relu(bn(f"{at}.bn1", conv(f"{at}.conv1", x, stride, 1)))
                y = bn(f"{at}.bn2", conv(f"{at}.conv2", y, 1, 1))
            else:
                y = relu(bn(f"{at}.bn1", conv(f"{at}.conv1", x, 1, 0)))
                y = relu(bn(f"{at}.bn2", conv(f"{at}.conv2", y, stride, 1)))
                y = bn(f"{at}.bn3", conv(f"{at}.conv3", y, 1, 0))
            if f"{at}.downsample.0.kernel" in p:
                x = bn(f"{at}.downsample.1", conv(f"{at}.downsample.0", x, stride, 0))
            x = relu(x + y)
        seen.append(x.transpose(0, 2, 3, 1))
    return seen, x.mean((2, 3)) @ p["fc.kernel"] + p["fc.bias"]


@pytest.mark.parametrize(("block", "depths"), [(BasicBlock, (2, 1, 1, 1)), (Bottleneck, (1, 2, 1, 1))])
def test_the_network_is_torchvision_s(block, depths):
    """By names and padding, beside a network written out; a fresh branch of mask_scale 2 changes nothing. Odd sizes."""
    x = images(2, 37, 50, 3)
    model = tiny(block, depths=depths)
    model.eval()
    deformed = tiny(block, depths=depths, deform_stages=("conv3", "conv5"), mask_scale=2.0)
    deformed.eval()
    state = nnx.state(deformed)
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    branches = {path: p.replace(jnp.zeros_like(p[...])) for path, p in nnx.to_flat_state(state) if path not in flat}
    assert all("offset_conv" in path for path in branches)
    nnx.update(deformed, nnx.from_flat_state({**flat, **branches}))

    parameters = {".".join(map(str, path)): p[...] for path, p in flat.items()}
    seen, logits = jax.jit(functools.partial(written_out, block=block, depths=depths))(parameters, x)
    for net in (model, deformed):
        graph, state = nnx.split(net)

        def run(state, x, graph=graph):
            net = nnx.merge(graph, state)
            return net.stages(x), net(x)

        stages, y = jax.jit(run)(state, x)
        assert_close(y, logits, 1e-5)
        for actual, wanted in zip(stages, seen, strict=True):
            assert_close(actual, wanted, 1e-5)


# ---- training


def train(model, optimizer, x, labels, *, steps):
    """The losses of some steps, which change the model."""
    model.train()
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    def step(state):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        model, optimizer = nnx.merge(graph, state)
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value, nnx.state((model, optimizer))

    losses = []
    for _ in range(steps):
        value, state = step(state)
        losses.append(float(value))
    nnx.update((model, optimizer), state)
    return losses


def statistics(model):
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model, nnx.BatchStat))}


def test_training_steps():
    """The loss falls, the statistics follow the batches, and the branches learn; in eval mode nothing changes."""
    model = tiny(deform_stages=("conv4",))
    before = statistics(model)
    losses = train(model, optax.sgd(0.05, momentum=0.9), images(4, 32, 32, 3), np.arange(4), steps=4)
    assert losses[-1] < 0.8 * losses[0]
    after = statistics(model)
    assert all(np.any(before[path] != after[path]) for path in before)
    assert all(np.any(layer.offset_conv.kernel[...] != 0) for _, layer in layers(model))

    model.eval()
    graph, state = nnx.split(model)

    def run(state):
        model = nnx.merge(graph, state)
        model(images(1, 32, 32, 3))
        return nnx.state(model)

    jax.tree.map(np.testing.assert_array_equal, jax.jit(run)(state), state)


@pytest.mark.slow
def test_remat_changes_neither_gradients_nor_statistics():
    """Each block is computed anew, and its batch norms still keep what they saw."""
    results, anew = [], []
    for remat in (False, True):
        model = tiny(depths=(1, 1, 1, 1), remat=remat)
        graph, parameters, rest = nnx.split(model, nnx.Param, ...)

        def loss(parameters, x, graph=graph, rest=rest):
            model = nnx.merge(graph, parameters, rest, copy=True)
            return jnp.sum(jnp.sin(model(x))), nnx.state(model, nnx.BatchStat)

        f = jax.grad(loss, has_aux=True)
        x = images(2, 32, 32, 3)
        anew.append(len(re.findall(r"= (?:checkpoint|remat)\w*\[", str(jax.make_jaxpr(loss)(parameters, x)))))
        results.append(jax.jit(f)(parameters, x))
    assert anew == [0, 4]
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), *results)


def test_offsets_can_be_looked_at_under_remat():
    model = abstract(ResNet, BasicBlock, (1, 1, 1, 1), width=4, deform_stages=("conv5",), remat=True)
    _, seen = nnx.eval_shape(nnx.capture(nnx.Intermediate)(lambda model, x: model(x)), model, images(1, 32, 32, 3))
    assert seen["layer4"][0]["conv1"]["offset"][0].shape == (1, 1, 1, 18)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_the_whole_networks_train(name):
    """A forward and some training steps at 64×64, with the paper's placement."""
    model = fill(abstract(MAKERS[name], 4, deform_stages=CONV3_TO_5, remat=True))
    for _, layer in layers(model):
        nnx.update(layer.offset_conv, jax.tree.map(jnp.zeros_like, nnx.state(layer.offset_conv)))
    # Adam moves each weight by its rate: one for all makes offsets leap by pixels, and the loss with them.
    optimizer = optax.multi_transform({"main": optax.adam(1e-3), "offset": optax.adam(1e-5)}, offset_labels)
    losses = train(model, optimizer, images(4, 64, 64, 3), np.arange(4), steps=3)
    assert losses[-1] < 0.5 * losses[0]
    assert all(np.any(layer.offset_conv.kernel[...] != 0) for _, layer in layers(model))


# ---- export


@pytest.mark.slow
def test_a_fresh_process_calls_the_exported_network(tmp_path):
    """For three platforms at once, with batch, height and width open."""
    model = tiny(BasicBlock, deform_stages=CONV3_TO_5)
    model.eval()
    batch, height, width = export.symbolic_shape("batch, height, width", constraints=["height >= 32", "width >= 32"])
    f = jax.jit(lambda x: (model(x), model.stages(x)))
    shape = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)
    exported = export.export(f, platforms=("cpu", "cuda", "tpu"))(shape)
    (tmp_path / "program").write_bytes(exported.serialize())
    given = [images(1, 32, 32, 3), images(3, 45, 70, 3)]
    np.savez(tmp_path / "given.npz", *given)
    code = (
        "import sys, numpy as np; from jax import export, tree\n"
        "folder = sys.argv[1]\n"
        "program = export.deserialize(bytearray(open(f'{folder}/program', 'rb').read()))\n"
        "for i, x in enumerate(np.load(f'{folder}/given.npz').values()):\n"
        "    np.savez(f'{folder}/{i}.npz', *tree.leaves(program.call(x)))\n"
        "assert 'dcn_jax' not in sys.modules and 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for i, x in enumerate(given):
        for actual, wanted in zip(np.load(tmp_path / f"{i}.npz").values(), jax.tree.leaves(f(x)), strict=True):
            assert_close(actual, wanted, 1e-5)


# ---- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"deform_stages": ("conv3", "layer4")},
            ValueError,
            r"deform_stages has 'layer4', which is not a stage; wanted .*conv5",
        ),
        (
            {"deform_stages": "conv3"},
            TypeError,
            r"deform_stages='conv3' is a str; wanted a tuple of names from \('conv2'",
        ),
        ({"deform_stages": 3}, TypeError, "deform_stages=3 is a int"),
        ({"num_classes": 0}, ValueError, "num_classes=0 is too small"),
        ({"in_features": 1.0}, TypeError, "in_features=1.0 is a float"),
        ({"width": 0}, ValueError, "width=0 is too small"),
        ({"deform_stages": ("conv3",), "mask_scale": 0.0}, ValueError, "mask_scale=0.0 must be positive"),
        ({"strides": 2}, TypeError, "strides"),
    ],
)
def test_options_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        abstract(resnet.resnet18, **options)


@pytest.mark.parametrize("shape", [(32, 32), (1, 3, 32, 32)])
def test_images_of_another_shape(shape):
    model = abstract(resnet.resnet18)
    with pytest.raises(ValueError, match=r"x has shape \(.*\); wanted images \(\*batch, height, width, 3\)"):
        nnx.eval_shape(lambda model, x: model(x), model, images(*shape))


def test_without_flax_the_error_names_the_extra():
    """In a fresh process that cannot import Flax."""
    program = "import sys; sys.modules['flax'] = None; import dcn_jax.models"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'ImportError: dcn_jax.models needs the extra "flax": pip install "dcn-jax[flax]"' in result.stderr
