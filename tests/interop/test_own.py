"""Parameters of one's own, which `from_torch` and `to_torch` match by their paths."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcn_jax.interop import from_torch, to_torch
from dcn_jax.nnx import DCNv3

pytestmark = pytest.mark.lenient


class Block(nnx.Module):
    """InternImage's: a layer scale beside its layers."""

    def __init__(self, rngs):
        self.gamma1 = nnx.Param(jnp.ones(4))
        self.temperature = nnx.Param(jnp.float32(1.0))
        self.dcn = DCNv3(4, group=2, center_feature_scale=True, rngs=rngs)


class Gained(nnx.Linear):
    """A layer of Flax's with one parameter more."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gain = nnx.Param(jnp.ones(3))


class Model(nnx.Module):
    """Deformable DETR's: an embedding of the levels, as a bare parameter; others in lists."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.level_embed = nnx.Param(jnp.zeros((3, 5)))
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.scales = nnx.List([nnx.Param(jnp.ones(2))])
        self.gained = Gained(2, 3, rngs=rngs)


def drawn(state):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=array.shape).astype(np.float32) for name, array in state.items()}


OURS = {"level_embed": np.transpose}


def test_the_path_is_the_name():
    """There and back: one axis and none as they are, two by a function."""
    written = to_torch(Model(), arrays=OURS)
    assert written["level_embed"].shape == (5, 3)
    own = {"level_embed", "scales.0", "gained.gain"}
    own |= {f"blocks.{i}.{name}" for i in (0, 1) for name in ("gamma1", "temperature")}
    assert own < written.keys()
    state = drawn(written)
    model = from_torch(nnx.eval_shape(Model), {f"net.{k}": v for k, v in state.items()}, prefix="net.", arrays=OURS)
    np.testing.assert_array_equal(model.level_embed[...], state["level_embed"].T)
    np.testing.assert_array_equal(model.blocks[1].gamma1[...], state["blocks.1.gamma1"])
    np.testing.assert_array_equal(model.blocks[0].temperature[...], state["blocks.0.temperature"])
    np.testing.assert_array_equal(model.gained.kernel[...], state["gained.weight"].T)
    for name, array in to_torch(model, arrays=OURS).items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


def test_a_longer_name_goes_before_a_shorter_one():
    class Two(nnx.Module):
        def __init__(self):
            self.one = nnx.Dict(table=nnx.Param(jnp.zeros((2, 3))))
            self.other = nnx.Dict(table=nnx.Param(jnp.zeros((2, 3))))

    state = {"one.table": np.arange(6.0).reshape(3, 2), "other.table": np.arange(6.0).reshape(2, 3)}
    model = from_torch(Two(), state, arrays={"table": np.transpose, "other.table": lambda array: -array})
    np.testing.assert_array_equal(model.one["table"][...], state["one.table"].T)
    np.testing.assert_array_equal(model.other["table"][...], -state["other.table"])


def test_what_is_left_over_is_named_with_the_advice():
    advice = r"level_embed \(3, 5\): a parameter of your own with 2 axes; say how .*arrays={'level_embed': lambda array"
    with pytest.raises(ValueError, match=advice):
        to_torch(Model())
    state = to_torch(Model(), arrays=OURS)
    with pytest.raises(ValueError, match=r"other \(1\):\n    " + advice):
        from_torch(Model(), state)
    del state["blocks.0.gamma1"], state["level_embed"]
    with pytest.raises(ValueError, match=r"missing \(2\):\n    .*blocks.0.gamma1 \(4,\)") as caught:
        from_torch(Model(), state | {"gamma": np.ones(4)}, arrays=OURS)
    assert "    level_embed" in str(caught.value)
    assert "unexpected (1):\n    gamma (4,)" in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({**OURS, "level_embeds": np.transpose}, ValueError, "arrays has 'level_embeds', but the model has no parameter"),
        ({**OURS, "weight": np.transpose}, ValueError, "arrays has 'weight', but .* it has .*'level_embed'"),
        ({"level_embed": 3}, TypeError, "wanted a dictionary from names of parameters of your own to functions"),
        ({"level_embed": lambda array: array}, ValueError, r"level_embed became an array of shape \(5, 3\) by arrays; .*\(3, 5\)"),
    ],
)  # fmt: skip
def test_functions_that_make_no_sense(arrays, error, message):
    state = to_torch(Model(), arrays=OURS)
    with pytest.raises(error, match=message):
        from_torch(Model(), state, arrays=arrays)


def test_layers_of_flax_that_are_not_known_stay_so():
    """A class derived from one too: PyTorch calls its scale otherwise."""

    class Norm(nnx.InstanceNorm):
        pass

    with pytest.raises(ValueError, match=r"scale .*PyTorch's name for it in Norm is not known"):
        to_torch(Norm(3, rngs=nnx.Rngs(0)))


def test_a_parameter_without_a_rule_is_listed_once():
    state = to_torch(Model(), arrays=OURS)
    with pytest.raises(ValueError, match="level_embed") as error:
        from_torch(Model(), state)
    assert "unexpected" not in str(error.value)
