"""`from_torch` and `to_torch`: PyTorch's own numbers from its weights, exact round trips, and errors that list everything."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcn_jax.interop import from_torch, reorder_offsets, to_torch
from dcn_jax.nnx import DeformConv
from tests.support import interop

pytestmark = pytest.mark.lenient


class Net(nnx.Module):
    """That of make_interop.py."""

    def __init__(self, rngs, dtype=jnp.float32):
        kinds = {"rngs": rngs, "param_dtype": dtype}
        self.conv1 = nnx.Conv(3, 6, (3, 3), 2, padding=1, use_bias=False, **kinds)
        self.bn1 = nnx.BatchNorm(6, use_running_average=True, **kinds)
        packed = DeformConv(6, 8, (3, 3), 2, padding=1, use_bias=False, **kinds)
        self.body = nnx.Sequential(packed, nnx.BatchNorm(8, use_running_average=True, **kinds), nnx.relu)
        self.fc = nnx.Linear(8, 5, **kinds)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        return self.fc(self.body(x).mean((1, 2)))


class Block(nnx.Module):
    """A layer with a name, as legacy checkpoints need it."""

    def __init__(self, *args, **options):
        self.conv2 = DeformConv(*args, **options)

    def __call__(self, x):
        return self.conv2(x)


MODELS = {
    "torchvision": functools.partial(
        DeformConv, 4, 6, (3, 3), 2, padding=1, feature_group_count=2, offset_groups=2
    ),
    "torchvision 1": functools.partial(
        DeformConv, 3, 2, (3, 2), (1, 2), padding=(2, 1), kernel_dilation=(2, 1), use_bias=False, modulated=False
    ),
    "mmcv": functools.partial(DeformConv, 4, 6, (3, 3), 2, padding=1, offset_groups=2),
    "mmcv 1": functools.partial(
        DeformConv, 4, 6, (3, 3), padding=2, kernel_dilation=2, use_bias=False, offset_groups=2, modulated=False
    ),
    "charlesshang": functools.partial(DeformConv, 4, 6, (3, 3), padding=1),
    "legacy": functools.partial(Block, 4, 6, (3, 3), 2, padding=1, use_bias=False),
    "paddle": functools.partial(DeformConv, 4, 6, (3, 3), 2, padding=1),
    "all_y_all_x": functools.partial(DeformConv, 4, 6, (3, 3), padding=1, use_bias=False),
    "net": lambda *, rngs, param_dtype: Net(rngs, param_dtype),
}  # fmt: skip


def make(case, dtype=jnp.float32):
    """An abstract model: filling it needs no more."""
    return nnx.eval_shape(lambda: MODELS[case](rngs=nnx.Rngs(0), param_dtype=dtype))


def filled(model, seed=0):
    """The same model, every variable drawn from N(0, 1)."""
    rng = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(jnp.asarray(rng.normal(size=variable.shape), variable.dtype))
    return model


def from_all_y_all_x(state):
    """4uiiurz1's names and order, as docs/migrating.md has it."""
    for kind in ("weight", "bias"):
        state[f"offset_conv.{kind}"] = reorder_offsets(
            state.pop(f"p_conv.{kind}"), "all_y_all_x", window=(3, 3), axis=0
        )
        state[f"mask_conv.{kind}"] = state.pop(f"m_conv.{kind}")
    return state | {"weight": state.pop("conv.weight")}


@pytest.mark.parametrize("case", MODELS)
def test_pytorch_s_weights_give_its_numbers(case, x64):
    state = interop.state(case)
    if case == "all_y_all_x":
        state = from_all_y_all_x(state)
    model = make(case, jnp.float64)
    assert from_torch(model, state) is model
    x = jnp.asarray(interop.x(case))
    y = nnx.jit(lambda model, x: model(x))(model, x)
    np.testing.assert_allclose(y, interop.y(case), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["torchvision", "torchvision 1", "mmcv", "charlesshang", "legacy", "paddle", "net"])
def test_the_way_back_is_exact(case, x64):
    state = interop.state(case)
    layout = case.split()[0] if case != "net" else "mmcv"
    back = to_torch(from_torch(make(case, jnp.float64), state), layout=layout)
    assert back.keys() == state.keys()
    for name, array in back.items():
        assert array.flags["C_CONTIGUOUS"]
        assert array.flags["WRITEABLE"]
        np.testing.assert_array_equal(array, state[name], err_msg=name)
        # Flax keeps statistics in float32, whatever the parameters are in.
        assert array.dtype == (np.float32 if "running" in name else np.float64)


@pytest.mark.parametrize("layout", ["mmcv", "torchvision", "paddle", "charlesshang"])
@pytest.mark.parametrize(
    ("window", "options"),
    [
        ((3,), {"offset_groups": 2}),
        ((2, 3), {"feature_group_count": 2, "use_bias": False}),
        ((1, 2, 3), {"modulated": False}),
        ((3, 3), {"param_dtype": jnp.bfloat16}),
        ((3, 3), {"offset_branch": False}),
        ((3, 3), {"offset_conv_cls": functools.partial(nnx.Conv, kernel_size=(1, 1), use_bias=False)}),
        ((3, 3), {"offset_conv_cls": lambda i, o, rngs: nnx.Sequential(nnx.Linear(i, 5, rngs=rngs), nnx.relu, nnx.Linear(5, o, rngs=rngs))}),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_any_layer_comes_back_as_it_was(window, options, layout):
    make_layer = functools.partial(nnx.eval_shape, lambda: DeformConv(4, 6, window, rngs=nnx.Rngs(0), **options))
    layer = filled(make_layer())
    other = from_torch(make_layer(), to_torch(layer, layout=layout))
    for (path, variable), (_, expected) in zip(*map(nnx.to_flat_state, map(nnx.state, (other, layer))), strict=True):
        assert variable.dtype == expected.dtype
        np.testing.assert_array_equal(variable[...], expected[...], err_msg=str(path))


def test_names_of_branches_of_several_layers():
    def branch(channels, features, *, rngs):
        return nnx.Sequential(nnx.Linear(channels, 5, rngs=rngs), nnx.Linear(5, features, rngs=rngs))

    model = nnx.List([DeformConv(4, 6, (1, 1), use_bias=False, offset_conv_cls=branch, rngs=nnx.Rngs(0))])
    expected = {"0.weight"} | {f"0.conv_offset.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert to_torch(model_of(model)).keys() == {f"layers_.{name}" for name in expected}


def model_of(modules):
    """A module that holds others under the name `layers_`."""
    model = nnx.Module()
    model.layers_ = modules
    return model


# ---- which names, and under which prefix


@pytest.mark.parametrize("prefix", ["backbone.", "backbone"])
def test_a_prefix_takes_one_module_of_many(prefix):
    state = {f"backbone.{name}": value for name, value in interop.state("net").items()} | {"neck.weight": np.ones(3)}
    model = from_torch(make("net"), state, prefix=prefix)
    np.testing.assert_array_equal(model.fc.kernel[...], state["backbone.fc.weight"].T.astype(np.float32))


def test_legacy_names_are_found_beside_a_lone_layer():
    state = interop.state("legacy") | {"conv20.weight": np.ones(3)}
    layer = from_torch(make("legacy").conv2, state, prefix="conv2.")
    np.testing.assert_array_equal(
        to_torch(layer)["conv_offset.weight"], state["conv2_offset.weight"].astype(np.float32)
    )


def test_counts_of_batches_are_not_needed_and_elsewhere_not_known():
    state = interop.state("net")
    from_torch(make("net"), state | {"bn1.num_batches_tracked": np.array(3)})
    with pytest.raises(ValueError, match=r"unexpected \(1\):\n    fc.num_batches_tracked \(\)$"):
        from_torch(make("net"), state | {"fc.num_batches_tracked": np.array(3)})


def test_an_abstract_model_is_filled_without_being_initialized():
    model = from_torch(nnx.eval_shape(lambda: make("net").fc), {"weight": np.ones((5, 8)), "bias": np.zeros(5)})
    np.testing.assert_array_equal(model(jnp.ones((1, 8))), np.full((1, 5), 8.0))


def test_random_keys_of_an_abstract_model_are_given_afterwards():
    """As the docstring says: they stay abstract, and `nnx.reseed` makes them."""

    def make_net():
        rngs = nnx.Rngs(params=0, dropout=1)
        return nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))

    state = {"0.weight": np.ones((3, 2)), "0.bias": np.ones(3)}
    model = from_torch(nnx.eval_shape(make_net), state)
    nnx.reseed(model, dropout=1)
    y = model(jnp.ones((1, 2)))
    np.testing.assert_array_equal(y, from_torch(make_net(), state)(jnp.ones((1, 2))))
    assert set(y[0].tolist()) == {0.0, 6.0}  # it drops, and doubles what it keeps


def test_a_model_does_not_share_memory_with_the_state():
    state = {name: value.astype(np.float32) for name, value in interop.state("mmcv").items()}
    layer = from_torch(make("mmcv"), state)
    before = to_torch(layer)
    for array in state.values():
        array[...] = 7
    for name, array in to_torch(layer).items():
        np.testing.assert_array_equal(array, before[name])


def test_random_keys_and_what_was_sown_are_no_weights():
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    model.seen = nnx.Intermediate((jnp.ones(3),))
    assert to_torch(from_torch(model, {})) == {}


def test_a_sharded_model_stays_sharded():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, None, None, "model"))
    layer = filled(make("mmcv"))
    layer.kernel.set_value(jax.device_put(layer.kernel[...], sharding))
    assert from_torch(layer, interop.state("mmcv")).kernel[...].sharding == sharding


# ---- errors


def snapshot(model):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))


def test_all_that_does_not_fit_is_listed_at_once_and_nothing_is_changed():
    model, state = filled(make("net")), interop.state("net")
    before = snapshot(model)
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    state["fc.weight"] = state["fc.weight"].astype(np.int8)
    del state["bn1.running_var"], state["body.0.conv_offset.bias"]
    with pytest.raises(ValueError, match="left as it was") as caught:
        from_torch(model, state | {"head.weight": np.ones((2, 3)), "body.0.bias": np.ones(8)})
    assert str(caught.value).splitlines()[1:] == [
        "  missing (2):",
        "    bn1.running_var (6,)",
        "    body.0.conv_offset.bias (27,)",
        "  unexpected (2):",
        "    head.weight (2, 3)",
        "    body.0.bias (8,)",
        "  misshapen (2):",
        "    conv1.weight has shape (6, 1, 3, 3); the model wants (6, 3, 3, 3)",
        "    fc.weight has dtype int8; wanted floating-point numbers",
    ]
    jax.tree.map(np.testing.assert_array_equal, before, snapshot(model))


def test_missing_names_are_those_of_the_layout_that_is_there():
    state = interop.state("torchvision")
    del state["mask_conv.weight"]
    with pytest.raises(ValueError, match=r"missing \(1\):\n    mask_conv.weight \(18, 4, 3, 3\)$"):
        from_torch(make("torchvision"), state)


def test_an_own_name_for_the_prefix_is_told():
    state = {f"module.{name}": value for name, value in interop.state("mmcv").items()}
    with pytest.raises(ValueError, match=r"all of these names are there with a prefix: prefix='module\.'"):
        from_torch(make("mmcv"), state)


@pytest.mark.parametrize("layer", [DeformConv, nnx.Conv])
@pytest.mark.parametrize("way", [to_torch, lambda model: from_torch(model, {})])
def test_same_at_a_stride_is_refused_with_the_pairs(layer, way):
    model = model_of(layer(4, 6, (3, 5), (1, 2), rngs=nnx.Rngs(0)))
    message = r"layers_ has padding='SAME' at strides \(1, 2\), .* usually padding=\(\(1, 1\), \(2, 2\)\)"
    with pytest.raises(ValueError, match=message) as caught:
        way(model)
    assert str(caught.value).count("SAME") == 1  # and not for the branch again


@pytest.mark.parametrize(
    ("window", "options"),
    [
        ((3, 3), {}),
        ((2, 2), {"padding": "same"}),
        ((1, 1), {"strides": 2}),
        ((3, 3), {"strides": 2, "padding": "VALID"}),
    ],
)
def test_paddings_that_pytorch_has_as_well(window, options):
    to_torch(filled(nnx.eval_shape(lambda: DeformConv(4, 6, window, rngs=nnx.Rngs(0), **options))))


def test_paddle_s_branch_has_no_dilation():
    def dilated(**options):
        make_layer = functools.partial(DeformConv, 4, 6, (3, 3), 2, padding=2, kernel_dilation=2, **options)
        return nnx.eval_shape(lambda: make_layer(rngs=nnx.Rngs(0)))

    with pytest.raises(
        ValueError, match=r"has kernel_dilation \(2, 2\), and Paddle's branch has none.*offset_conv_cls="
    ):
        from_torch(dilated(), interop.state("paddle"))
    branch = functools.partial(nnx.Conv, kernel_size=(3, 3), strides=2, padding=1)
    from_torch(dilated(offset_conv_cls=branch), interop.state("paddle"))


def test_norms_and_embeddings_keep_their_axes():
    """As DETR has them: an embedding's rows are not its columns, and a norm's scale is called weight."""
    rngs = nnx.Rngs(0)
    model = nnx.Dict(queries=nnx.Embed(5, 3, rngs=rngs), norm=nnx.GroupNorm(4, num_groups=2, rngs=rngs))
    state = {
        name: np.arange(1.0, 1 + math.prod(shape), dtype=np.float32).reshape(shape)
        for name, shape in {"queries.weight": (5, 3), "norm.weight": (4,), "norm.bias": (4,)}.items()
    }
    filled = from_torch(model, state)
    np.testing.assert_array_equal(filled.queries.embedding[...], state["queries.weight"])
    np.testing.assert_array_equal(filled.norm.scale[...], state["norm.weight"])
    back = to_torch(filled)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)


def test_what_has_no_counterpart_is_named():
    model = nnx.Module()
    model.norm = nnx.InstanceNorm(3, rngs=nnx.Rngs(0))
    model.kept = nnx.data({"scales": [nnx.BatchStat(jnp.ones(2))]})
    with pytest.raises(ValueError, match="no counterpart in PyTorch") as caught:
        to_torch(model)
    for line in (
        r"norm.scale \(3,\): PyTorch's name for it in InstanceNorm",
        r"norm.bias \(3,\)",
        r"kept.scales.0 \(2,\): PyTorch's name for it in list",
    ):
        assert re.search(line, str(caught.value)), line
    with pytest.raises(ValueError, match=r"other \(3\)"):
        from_torch(model, {})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: from_torch(make("mmcv"), "x.safetensors"),
            TypeError,
            r"state is a str; wanted a dictionary of arrays by name: from_torch\(model, read_checkpoint\(path\)\)",
        ),
        (lambda: to_torch(make("mmcv"), layout="tf"), ValueError, "layout='tf' is not known; wanted one of"),
        (lambda: to_torch({}), TypeError, "model is a dict; wanted an nnx.Module"),
        (lambda: to_torch(nnx.eval_shape(lambda: make("mmcv"))), ValueError, "has no value yet, only a shape"),
    ],
)
def test_arguments_that_make_no_sense(call, error, message):
    with pytest.raises(error, match=message):
        call()
