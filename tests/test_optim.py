"""`dcn_jax.optim`: the labels, and that the rates they give reach the offset branches and nothing else."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import dcn_jax.linen
import dcn_jax.nnx
from dcn_jax.optim import offset_labels
from tests.support.running import normal

MAIN, OFFSET = 0.1, 0.003
pytestmark = pytest.mark.lenient

X = normal(2, 6, 6, 3)
RATES = {"main": optax.sgd(MAIN), "offset": optax.sgd(OFFSET)}


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(dcn_jax.linen.DeformConv(4, (3, 3))(x))
        return dcn_jax.linen.DeformConv(2, (3, 3), offset_groups=2, modulated=False, name="last")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.plain = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.layers = nnx.List([dcn_jax.nnx.DeformConv(4, 4, (3, 3), use_bias=False, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = nnx.relu(self.plain(x))
        for layer in self.layers:
            x = x + layer(x)
        return x


def paths(tree, is_leaf=None):
    """{"a/b/c": leaf}"""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@functools.cache
def linen_variables():
    return jax.jit(LinenNet().init)(jax.random.key(7), X)


@functools.cache
def linen_gradients():
    return jax.jit(jax.grad(lambda variables: (LinenNet().apply(variables, X) ** 2).mean()))(linen_variables())


def assert_rates(before, after, gradients):
    """Each parameter moved by plain gradient descent at the rate of its branch, and some of each branch moved at all."""
    moved = set()
    for path, gradient in paths(gradients).items():
        rate = OFFSET if "offset_conv" in path else MAIN
        np.testing.assert_allclose(paths(after)[path], paths(before)[path] - rate * gradient, atol=1e-7, err_msg=path)
        if np.abs(gradient).max() > 1e-4:
            moved.add(rate)
    assert moved == {MAIN, OFFSET}


def test_labels_of_linen_parameters():
    labels = offset_labels(linen_variables()["params"])
    assert labels == {
        "Conv_0": {"kernel": "main", "bias": "main"},
        "DeformConv_0": {"kernel": "main", "bias": "main", "offset_conv": {"kernel": "offset", "bias": "offset"}},
        "last": {"kernel": "main", "bias": "main", "offset_conv": {"kernel": "offset", "bias": "offset"}},
    }


def test_the_outer_params_and_frozen_dicts_are_kept():
    variables = linen_variables()
    assert offset_labels(variables) == {"params": offset_labels(variables["params"])}
    labels = offset_labels(freeze(variables))
    assert isinstance(labels, FrozenDict)
    assert labels.unfreeze() == offset_labels(variables)


def test_labels_of_an_nnx_state():
    labels = offset_labels(nnx.state(NnxNet(nnx.Rngs(0)), nnx.Param))
    assert isinstance(labels, nnx.State)
    assert paths(labels) == {
        "plain/kernel": "main",
        "plain/bias": "main",
        "layers/0/kernel": "main",
        "layers/0/offset_conv/kernel": "offset",
        "layers/0/offset_conv/bias": "offset",
        "layers/1/kernel": "main",
        "layers/1/offset_conv/kernel": "offset",
        "layers/1/offset_conv/bias": "offset",
    }


def test_only_a_whole_name_counts():
    tree = {"offset_conv_2": {"kernel": 0.0}, "my_offset_conv": 1.0, "offset": [2.0, {"offset_conv": (3.0, 4.0)}]}
    assert offset_labels(tree) == {
        "offset_conv_2": {"kernel": "main"},
        "my_offset_conv": "main",
        "offset": ["main", {"offset_conv": ("offset", "offset")}],
    }


@pytest.mark.parametrize(
    "names", ["conv_offset", ("conv_offset",), ["conv_offset", "no such"], {"conv_offset": 1}.keys()]
)
def test_branches_have_names_of_their_own(names):
    """One name or several; a string is one name and not its letters. What is called `offset_conv` is then "main"."""
    tree = {"conv_offset": {"weight": 0.0}, "offset_conv": 1.0, "c": 2.0}
    wanted = {"conv_offset": {"weight": "offset"}, "offset_conv": "main", "c": "main"}
    assert offset_labels(tree, names) == wanted
    assert functools.partial(offset_labels, names=names)(tree) == wanted


def test_several_names_of_branches():
    tree = {"offset_conv": 0.0, "a": [{"mask_conv": 1.0}, {"kernel": 2.0}]}
    labels = offset_labels(tree, names=("offset_conv", "mask_conv"))
    assert labels == {"offset_conv": "offset", "a": [{"mask_conv": "offset"}, {"kernel": "main"}]}


def test_a_named_branch_moves_at_its_rate():
    params = {"conv_offset": jnp.ones(2), "kernel": jnp.ones(2)}
    tx = optax.multi_transform(RATES, functools.partial(offset_labels, names="conv_offset"))
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["conv_offset"], -OFFSET, rtol=1e-6)
    np.testing.assert_allclose(updates["kernel"], -MAIN, rtol=1e-6)


LAYERS = {
    "DeformConv": ((8, 8, (3, 3)), {}, {"offset_conv"}),
    "MSDeformAttn": ((8,), {"num_heads": 2}, {"sampling_offsets"}),
    "DCNv3": ((8,), {"group": 2}, {"offset", "mask"}),
    "DCNv4": ((8,), {"group": 2, "dw_kernel_size": 3}, {"offset_mask"}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_branches_of_every_layer(name):
    """In nnx, within a model whose own layers have common names; in linen by the same names."""
    arguments, options, branches = LAYERS[name]

    class Model(nnx.Module):
        def __init__(self):
            self.mask, self.offset = (nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2))
            self.layers = nnx.List([getattr(dcn_jax.nnx, name)(*arguments, **options, rngs=nnx.Rngs(0))])

    labels = paths(offset_labels(nnx.state(Model(), nnx.Param)))
    inside = [path for path, label in labels.items() if label == "offset"]
    assert {path.split("/")[2] for path in inside} == branches
    assert all(path.startswith("layers/0/") for path in inside)
    assert len(inside) == 2 * len(branches)
    linen = getattr(dcn_jax.linen, name)(*((8, (3, 3)) if name == "DeformConv" else arguments), **options)
    called = (jnp.ones((1, 4, 8)), jnp.ones((1, 4, 1, 2)), jnp.ones((1, 85, 8)), ((8, 8), (4, 4), (2, 2), (1, 1)))
    params = jax.eval_shape(
        lambda: linen.init(jax.random.key(0), *(called if name == "MSDeformAttn" else [jnp.ones((1, 8, 8, 8))]))
    )
    labels = paths(offset_labels(params))
    assert {path.split("/")[1] for path, label in labels.items() if label == "offset"} == branches


def test_names_that_no_parameter_has():
    """An error where the model has branches of this library's, which the names were to be; else none."""
    with pytest.raises(
        ValueError,
        match=r"^names=\('offset_cnv',\) is the name of no parameter, but the model has offset branches, .*offset_conv/.* for example; leave names out",
    ):
        offset_labels(linen_variables(), "offset_cnv")
    assert set(paths(offset_labels(linen_variables(), ())).values()) == {"main"}
    assert offset_labels({"mask": {"kernel": 0.0}}, "flow_head") == {"mask": {"kernel": "main"}}


@pytest.mark.parametrize("names", [3, (3,), ("offset_conv", None)])
def test_names_that_make_no_sense(names):
    with pytest.raises(TypeError, match=r"^names=.* is not made of names; wanted a string, or several"):
        offset_labels({"kernel": 0.0}, names)


def test_a_model_without_deformable_layers_is_all_main():
    assert offset_labels(nn.Dense(2).init(jax.random.key(7), X)) == {"params": {"kernel": "main", "bias": "main"}}


@pytest.mark.parametrize("container", [dict, freeze])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("as_tree", [False, True])
def test_a_linen_step_moves_each_branch_at_its_rate(container, inner, as_tree):
    params, gradients = [
        container(tree["params"] if inner else tree) for tree in (linen_variables(), linen_gradients())
    ]
    tx = optax.multi_transform(RATES, offset_labels(params) if as_tree else offset_labels)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(gradients, state, params)
        before, params = params, optax.apply_updates(params, updates)
        assert_rates(before, params, gradients)


@pytest.mark.parametrize("as_tree", [False, True])
def test_an_nnx_step_moves_each_branch_at_its_rate(as_tree):
    model = NnxNet(nnx.Rngs(0))
    labels = offset_labels(nnx.state(model, nnx.Param)) if as_tree else offset_labels
    optimizer = nnx.Optimizer(model, optax.multi_transform(RATES, labels), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: (model(X) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return gradients

    for _ in range(2):
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        gradients = step(model, optimizer)
        assert_rates(before, nnx.state(model, nnx.Param), gradients)


def test_it_loads_neither_flax_nor_optax():
    code = "import sys, dcn_jax.optim; sys.exit(bool({'flax', 'optax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
