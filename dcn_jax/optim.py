"""Learning rates: which parameters belong to an offset branch, so that they can learn at a rate of their own."""

from typing import Any

import jax


def offset_labels(params: Any) -> Any:
    """Label each parameter "offset", if it lies under an `offset_conv`, or "main", for `optax.multi_transform`.

    The papers train the branches that emit offsets and modulation at a tenth of the learning rate. It is one line, with
    this function as the labels (or its result, as Optax takes both):

        optax.multi_transform({"main": optax.adam(1e-3), "offset": optax.adam(1e-4)}, offset_labels)

    Args:
        params: parameters, gradients or anything of their structure: a linen dictionary or `FrozenDict`, with or
            without the outer "params", an `nnx.State`, or a pytree in which the branch is called `offset_conv`.

    Returns:
        The same containers with a label in the place of each array (of each `nnx.Variable`, in an `nnx.State`).

    Source: Dai et al. (arXiv 1703.06211), section 4.1; Zhu et al. (arXiv 1811.11168), section 3.2.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from dcn_jax.linen import DeformConv
        >>> from dcn_jax.optim import offset_labels
        >>> params = DeformConv(features=16, kernel_size=(3, 3)).init(jax.random.key(0), jnp.ones((8, 8, 4)))["params"]
        >>> offset_labels(params)
        {'bias': 'main', 'kernel': 'main', 'offset_conv': {'bias': 'offset', 'kernel': 'offset'}}
    """
    # An nnx.Variable gets one label and is no container: nnx.Optimizer hands Optax variables at first, bare arrays later.
    return jax.tree_util.tree_map_with_path(_label, params, is_leaf=lambda node: hasattr(node, "dtype"))


def _label(path: tuple[Any, ...], _: Any) -> str:
    return "offset" if "offset_conv" in jax.tree_util.keystr(path, simple=True, separator="/").split("/") else "main"
