"""`deformify`: the copy computes what the model did, has its variables and options, and shares nothing with it."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from dcn_jax.nnx import DeformConv, deformify
from tests.support.running import assert_close

pytestmark = pytest.mark.lenient
X = np.random.default_rng(0).standard_normal((2, 7, 6, 4)).astype(np.float32)


def conv(channels=4, features=4, window=(3, 3), **options):
    options = {"bias_init": nnx.initializers.normal(1.0), "rngs": nnx.Rngs(0), **options}
    return nnx.Conv(channels, features, window, **options)


def everywhere(path, module):
    return True


def run(model, *args):
    graph, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graph, state)(*args))(state)


def kinds(model):
    """The paths of the deformable layers and of the convolutions that are no branch."""
    nodes = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Conv | DeformConv)]
    deformable = [path for path, node in nodes if isinstance(node, DeformConv)]
    return deformable, [path for path, node in nodes if isinstance(node, nnx.Conv) and path[-1:] != ("offset_conv",)]


class Net(nnx.Module):
    """Convolutions in every place that a module can be in."""

    def __init__(self, rngs):
        self.stem = conv(window=(1, 1), rngs=rngs)
        self.listed = nnx.List([conv(rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.named = nnx.Dict(a=conv(rngs=rngs), b=nnx.Dict(c=conv(rngs=rngs)))
        self.plain = nnx.data({"x": [conv(rngs=rngs)], "y": (conv(rngs=rngs), nnx.relu)})
        self.chain = nnx.Sequential(conv(rngs=rngs), nnx.relu, nnx.Linear(4, 4, rngs=rngs))
        self.again = self.stem  # one module, used twice

    def __call__(self, x):
        first, norm = self.listed
        x = norm(first(self.stem(x)))
        x = self.named["b"]["c"](nnx.relu(self.named["a"](x)))
        x = x + self.plain["y"][1](self.plain["y"][0](self.plain["x"][0](x)))
        return self.again(self.chain(x))


PLACES = [
    ("again",),  # by its first path, in the order of names
    ("chain", "layers", 0),
    ("listed", 0),
    ("named", "a"),
    ("named", "b", "c"),
    ("plain", "x", 0),
    ("plain", "y", 0),
]


def make():
    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    random = np.random.default_rng(0)
    fill = lambda leaf: jnp.asarray(random.uniform(0.1, 0.6, leaf.shape), leaf.dtype)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(fill, state))


def test_wherever_a_module_is():
    """Each chosen convolution, and no other; one used twice stays one; the result stays what it was."""
    net = make()
    net.eval()
    asked = []
    copy = deformify(net, lambda path, module: asked.append((path, type(module))) or True)
    assert asked == [(path, nnx.Conv) for path in PLACES]
    assert kinds(copy) == (PLACES, [])
    assert kinds(net) == ([], PLACES)
    assert copy.again is copy.stem
    assert isinstance(copy.plain["y"], tuple)
    assert isinstance(copy.plain["x"], list)
    assert_close(run(copy, X), run(net, X), 1e-5)

    graph, state = nnx.split(copy)
    assert kinds(nnx.merge(graph, state)) == (PLACES, [])
    assert copy.listed[1].use_running_average


def test_where_chooses():
    net = make()
    chosen = {("listed", 0), ("plain", "y", 0)}
    deformable, plain = kinds(deformify(net, lambda path, module: path in chosen))
    assert set(deformable) == chosen
    assert set(plain) == set(PLACES) - chosen
    assert kinds(deformify(net, lambda path, module: module.kernel_size == (1, 1)))[0] == [("again",)]
    assert kinds(deformify(net, nnx.PathContains("named")))[0] == [("named", "a"), ("named", "b", "c")]


def test_the_model_itself_and_containers_of_models():
    assert isinstance(deformify(conv(), everywhere), DeformConv)
    copy = deformify({"a": [conv()], "b": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}, everywhere)
    assert isinstance(copy["a"][0], DeformConv)


def test_nothing_is_shared():
    """Neither variables nor arrays, which donation would delete."""
    net = make()
    copy = deformify(net, lambda path, module: path[0] == "named")
    ours = {id(node) for _, node in nnx.iter_graph(net) if isinstance(node, nnx.Variable | nnx.Pytree)}
    theirs = {id(node) for _, node in nnx.iter_graph(copy) if isinstance(node, nnx.Variable | nnx.Pytree)}
    assert not ours & theirs
    before = jax.tree.map(np.asarray, nnx.state(net))
    for leaf in jax.tree.leaves(nnx.state(copy)):
        leaf.delete()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net), before)

    copy = deformify(net, everywhere)
    copy.named["a"].kernel[...] += 1
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net), before)


def test_variables_that_were_tied_stay_tied():
    net = nnx.List([conv(), conv()])
    net[1].kernel = net[0].kernel
    copy = deformify(net, everywhere)
    assert copy[0].kernel is copy[1].kernel
    assert copy[0].bias is not copy[1].bias


def test_variables_keep_kind_and_metadata():
    class Frozen(nnx.Param):
        pass

    layer = conv(kernel_metadata={"note": 1}, bias_metadata={"note": 2})
    layer.bias = Frozen(layer.bias[...], note=3)
    copy = deformify(layer, everywhere)
    assert (type(copy.kernel), copy.kernel.note) == (nnx.Param, 1)
    assert (type(copy.bias), copy.bias.note) == (Frozen, 3)
    np.testing.assert_array_equal(copy.kernel, layer.kernel)


# ---- the options of a convolution

CONVS = {
    "SAME": ((2, 7, 6, 4), {"strides": 2}),
    "even window": ((2, 7, 6, 4), {"window": (2, 4), "strides": (1, 2)}),
    "VALID": ((2, 7, 6, 4), {"padding": "VALID", "strides": None}),
    "int": ((2, 7, 6, 4), {"padding": 2, "kernel_dilation": (1, 2)}),
    "ints": ((2, 7, 6, 4), {"padding": (2, 0), "kernel_dilation": None}),
    "pairs": ((2, 7, 6, 4), {"padding": ((0, 2), (1, 0)), "use_bias": False}),
    "groups": ((2, 7, 6, 4), {"feature_group_count": 2}),
    "depthwise, no batch": ((7, 6, 4), {"feature_group_count": 4, "features": 8}),
    "1-D": ((2, 9, 4), {"window": 3}),
    "3-D": ((1, 3, 4, 5, 4), {"window": (2, 3, 1)}),
    "CIRCULAR": ((2, 7, 6, 4), {"padding": "CIRCULAR", "strides": 2}),
    "REFLECT": ((2, 7, 6, 4), {"padding": "REFLECT", "window": (3, 2)}),
}


@pytest.mark.parametrize("name", CONVS)
def test_each_kind_of_convolution_computes_what_it_did(name):
    shape, options = CONVS[name]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    layer = conv(**options)
    actual, wanted = jax.jit(lambda x: (deformify(layer, everywhere)(x), layer(x)))(x)
    assert_close(actual, wanted, 1e-6)


def test_every_option_of_flax_s_conv_is_kept_or_refused():
    """Each one is given a value that is not its default, and the layer has it."""

    def promote(arrays, *, dtype=None):
        return arrays

    given = {
        "strides": 2,
        "padding": 3,
        "kernel_dilation": 2,
        "feature_group_count": 2,
        "use_bias": False,
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.float16,
        "precision": lax.Precision.HIGHEST,
        "promote_dtype": promote,
        "preferred_element_type": jnp.float32,
    }
    elsewhere = {"self", "in_features", "out_features", "kernel_size", "rngs"}
    variables = {"kernel_init", "bias_init", "kernel_metadata", "bias_metadata"}
    refused = {"input_dilation", "mask", "conv_general_dilated"}
    assert {*given, *elsewhere, *variables, *refused} == set(inspect.signature(nnx.Conv.__init__).parameters)
    copy = nnx.eval_shape(lambda: deformify(conv(4, 6, **given), everywhere))
    assert {name: getattr(copy, name) for name in given} == given
    assert (copy.in_features, copy.out_features, copy.kernel_size) == (4, 6, (3, 3))
    assert (copy.kernel.dtype, copy.offset_conv.kernel.dtype) == (jnp.float16, jnp.float16)
    assert copy.bias is None


def test_bfloat16():
    layer = conv(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    copy = deformify(layer, everywhere)
    y = run(copy, X)
    assert y.dtype == copy.kernel.dtype == jnp.bfloat16
    assert_close(y.astype(np.float32), run(layer, X).astype(np.float32), 2**-7)


def test_a_model_whose_parameters_were_cast():
    layer = conv()
    nnx.update(layer, jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(layer)))
    copy = deformify(layer, everywhere)
    x = X.astype(jnp.bfloat16)
    y = run(copy, x)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(np.float32), run(layer, x).astype(np.float32), 2**-7)


# ---- the options of a deformable layer


def test_options_reach_the_layers():
    options = {"modulated": False, "offset_groups": 2, "max_offset": 3.0, "implementation": "xla"}
    copy = deformify(nnx.List([conv(), conv()]), everywhere, **options)
    for layer in copy:
        assert {name: getattr(layer, name) for name in options} == options
        assert layer.mask_scale == 2.0
    assert deformify(conv(), everywhere, mask_scale=1.0).mask_scale == 1.0


def test_an_activation_of_the_offsets_is_handed_on():
    """A new branch emits zeros, so a function with f(0) = 0 changes nothing."""
    layer = conv()
    deformable = deformify(layer, everywhere, offset_activation=jnp.tanh)
    assert deformable.offset_activation is jnp.tanh
    assert_close(*jax.jit(lambda x: (deformable(x), layer(x)))(X), 1e-6)


def test_without_modulation():
    layer = conv()
    actual, wanted = jax.jit(lambda x: (deformify(layer, everywhere, modulated=False)(x), layer(x)))(X)
    assert_close(actual, wanted, 1e-6)


def test_branches_that_start_at_random():
    normal = nnx.initializers.normal(1.0)
    net = nnx.List([conv(), conv()])
    first, second = (deformify(net, everywhere, offset_kernel_init=normal, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    kernels = [layer.offset_conv.kernel[...] for copy in (first, second) for layer in copy]
    assert not any(np.array_equal(kernels[i], kernels[j]) for i in range(4) for j in range(i))
    again = deformify(net, everywhere, offset_kernel_init=normal)
    np.testing.assert_array_equal(again[1].offset_conv.kernel, kernels[1])


def test_what_is_deformable_already_is_left_alone():
    """Its branch too, which is a convolution."""
    net = nnx.Sequential(DeformConv(4, 4, (3, 3), rngs=nnx.Rngs(0)), conv())
    asked = []
    copy = deformify(net, lambda path, module: asked.append(path) or True)
    assert asked == [("layers", 1)]
    assert type(copy.layers[0].offset_conv) is nnx.Conv
    assert nnx.graphdef(deformify(copy, everywhere)) == nnx.graphdef(copy)


# ---- training


def test_the_copy_trains():
    """Under nnx.value_and_grad and jit, the branches included."""
    net = make()
    copy = deformify(net, lambda path, module: path == ("listed", 0))
    graph, parameters, rest = nnx.split(copy, nnx.Param, ...)

    @jax.jit
    def gradients(parameters):
        copy = nnx.merge(graph, parameters, rest, copy=True)
        return nnx.value_and_grad(lambda model: jnp.sum(jnp.sin(model(X))))(copy)[1]

    found = dict(nnx.to_flat_state(gradients(parameters)))
    for at in (("kernel",), ("offset_conv", "kernel"), ("offset_conv", "bias")):
        assert np.max(np.abs(found["listed", 0, *at][...])) > 0.1


# ---- errors


class Standardized(nnx.Conv):
    pass


REFUSED = {
    "input_dilation": ({"input_dilation": (1, 2)}, r"input_dilation=\(1, 2\), and an offset between pixels"),
    "input_dilation int": ({"input_dilation": 2}, "input_dilation=2, and an offset between pixels"),
    "mask": ({"mask": np.ones((3, 3, 4, 4))}, "it has a mask; multiply it into the kernel"),
    "CAUSAL": ({"padding": "CAUSAL", "window": (3,)}, 'padding="CAUSAL", and an offset may read later positions'),
    "conv": ({"conv_general_dilated": lambda *a, **k: lax.conv_general_dilated(*a, **k)}, "it has its own conv_general_dilated"),
    "four axes": ({"window": (1, 1, 1, 1)}, r"kernel_size=\(1, 1, 1, 1\) has 4 entries; wanted 1, 2 or 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_deformable_is_refused_by_its_path(name):
    options, message = REFUSED[name]
    net = nnx.Dict(a=conv(), b=nnx.List([conv(**options)]))
    with pytest.raises(ValueError, match=f"b/0 cannot become deformable: {message}"):
        deformify(net, everywhere)
    assert kinds(deformify(net, lambda path, module: path == ("a",)))[0] == [("a",)]


def test_a_class_derived_from_conv_is_refused():
    with pytest.raises(ValueError, match=r"the model itself cannot become deformable: it is a Standardized, and what"):
        deformify(Standardized(4, 4, (3, 3), rngs=nnx.Rngs(0)), everywhere)


@pytest.mark.parametrize("dilation", [1, None, (1, 1)])
def test_an_input_dilation_of_one_is_none(dilation):
    assert isinstance(deformify(conv(input_dilation=dilation), everywhere), DeformConv)


def test_arguments_that_make_no_sense():
    with pytest.raises(TypeError, match=r"where is a str; wanted a function of \(path, module\)"):
        deformify(conv(), "layer4")
    with pytest.raises(
        TypeError, match=r"takes no option strides; wanted one that only DeformConv has: offset_groups, modulated, "
    ):
        deformify(conv(), everywhere, strides=2)
    with pytest.raises(TypeError, match=r"model is a dict without nnx modules; wanted an nnx.Module"):
        deformify({"kernel": jnp.ones(3)}, everywhere)
    with pytest.raises(
        ValueError, match="the model itself cannot become deformable: offset_groups=3 must divide the 4"
    ):
        deformify(conv(), everywhere, offset_groups=3)


# ---- biases


def test_layers_without_a_bias_may_get_one():
    """Of zeros; those that have one keep it. None adds none."""
    net = nnx.List([conv(use_bias=False, param_dtype=jnp.bfloat16), conv()])
    copy = deformify(net, everywhere, use_bias=True)
    np.testing.assert_array_equal(copy[0].bias[...], np.zeros(4))
    assert (copy[0].use_bias, copy[0].bias.dtype) == (True, jnp.bfloat16)
    np.testing.assert_array_equal(copy[1].bias[...], net[1].bias[...])
    actual, wanted = jax.jit(lambda x: (copy[1](copy[0](x)), net[1](net[0](x))))(X)
    assert_close(actual, wanted, 1e-2)  # bfloat16 parameters
    for without in (deformify(net, everywhere), deformify(nnx.List([net[0]]), everywhere, use_bias=False)):
        assert (without[0].bias, without[0].use_bias) == (None, False)


def test_a_bias_is_not_dropped_in_silence():
    net = nnx.List([conv(use_bias=False), conv()])
    with pytest.raises(ValueError, match=r"^1 cannot become deformable: use_bias=False, and it has a bias"):
        deformify(net, everywhere, use_bias=False)
    with pytest.raises(TypeError, match="use_bias='yes' is a str; wanted True, False or None"):
        deformify(net, everywhere, use_bias="yes")


def test_a_choice_of_none_names_the_paths():
    """And the path that it proposes works."""
    net = nnx.Dict(first=conv(), blocks=nnx.List([conv(), conv()]))
    message = r"where chose none of the 3 convolutions, whose paths are .*\('blocks', 1\).*such as lambda path, conv: path == (.*)$"
    with pytest.raises(ValueError, match=message) as error:
        deformify(net, lambda path, module: path == "blocks.0")
    proposed = eval(str(error.value).partition("such as ")[2])
    found = [node for _, node in nnx.iter_graph(deformify(net, proposed)) if isinstance(node, DeformConv)]
    assert len(found) == 1
    deformify(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda path, module: False)  # nothing to choose from
