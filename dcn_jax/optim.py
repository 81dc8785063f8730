"""Labels of the parameters of offset branches, which the papers train at a lower learning rate."""

from collections.abc import Iterable
from typing import Any

import jax


def offset_labels(params: Any, names: str | Iterable[str] = ("offset_conv",)) -> Any:
    """Label parameters under an `offset_conv` "offset", others "main", for `optax.multi_transform`.

    The papers train the branches that emit offsets and modulation at a tenth of the learning rate.
    Give Optax this function, or its result:

        optax.multi_transform({"main": optax.adam(1e-3), "offset": optax.adam(1e-4)}, offset_labels)

    For branches with other names: `functools.partial(offset_labels, names=("conv_offset",))`.

    Args:
        params: parameters, gradients or anything with their structure: a linen dictionary or
            `FrozenDict`, with or without the outer "params", an `nnx.State`, or another pytree.
        names: the names of the branches, whole, or a single one. A model without such branches is
            labelled "main" everywhere, so plain networks can share the optimizer.

    Returns:
        The same containers, with a label for each array, or each `nnx.Variable` of an `nnx.State`.

    Raises:
        TypeError: `names` is not made of strings.

    Source: Dai et al. (arXiv 1703.06211), section 4.1; Zhu et al. (arXiv 1811.11168), section 3.2.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from dcn_jax.linen import DeformConv
        >>> from dcn_jax.optim import offset_labels
        >>> params = DeformConv(features=16, kernel_size=(3, 3)).init(jax.random.key(0), jnp.ones((8, 8, 4)))["params"]
        >>> offset_labels(params)
        {'bias': 'main', 'kernel': 'main', 'offset_conv': {'bias': 'offset', 'kernel': 'offset'}}
        >>> offset_labels({"conv_offset": {"weight": 0.0}, "weight": 1.0}, names="conv_offset")
        {'conv_offset': {'weight': 'offset'}, 'weight': 'main'}
    """
    branches = {names} if isinstance(names, str) or not isinstance(names, Iterable) else set(names)
    if not all(isinstance(name, str) for name in branches):
        raise TypeError(f"names={names!r} is not made of names; wanted a string, or several: ('offset_conv',)")

    def label(path: tuple[Any, ...], _: Any) -> str:
        on_the_way = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return "main" if branches.isdisjoint(on_the_way) else "offset"

    # One label per nnx.Variable: nnx.Optimizer gives Optax variables first and bare arrays later.
    return jax.tree_util.tree_map_with_path(label, params, is_leaf=lambda node: hasattr(node, "dtype"))
