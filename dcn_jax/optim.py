"""Labels of the parameters of offset branches, which the papers train at a lower learning rate."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

# The branches of this library's layers. Beside each name: the names that must lie next to it, where
# a name is so common that it may also be a user's.
_BRANCHES = {
    "offset_conv": (),  # DeformConv
    "sampling_offsets": (),  # MSDeformAttn
    "offset": ("mask", "dw_conv"),  # DCNv3
    "mask": ("offset", "dw_conv"),
    "offset_mask": (),  # DCNv4
}


def offset_labels(params: Any, names: str | Iterable[str] | None = None) -> Any:
    """Label parameters of offset branches "offset", others "main", for `optax.multi_transform`.

    The papers train the branches that emit offsets and modulation at a tenth of the learning rate.
    Give Optax this function, or its result:

        optax.multi_transform({"main": optax.adam(1e-3), "offset": optax.adam(1e-4)}, offset_labels)

    | layer | its branch | published recipe |
    |---|---|---|
    | `DeformConv` | `offset_conv` | a tenth of the rate |
    | `MSDeformAttn` | `sampling_offsets` | a tenth; `attention_weights` at the full rate |
    | `DCNv3` | `offset`, `mask` | InternImage: the full rate |
    | `DCNv4` | `offset_mask` | FlashInternImage: the full rate |

    For branches with other names: `functools.partial(offset_labels, names=("conv_offset",))`. The
    names replace those of the table. Deformable DETR slows a layer of its own too, so its recipe is
    `names=("sampling_offsets", "reference_points")`.

    Args:
        params: parameters, gradients or anything with their structure: a linen dictionary or
            `FrozenDict`, with or without the outer "params", an `nnx.State`, or another pytree.
        names: the names of the branches, whole, or a single one; None for the table's. A model
            without branches is labelled "main" everywhere, so plain networks can share the
            optimizer.

    Returns:
        The same containers, with a label for each array, or each `nnx.Variable` of an `nnx.State`.

    Raises:
        TypeError: `names` is not made of strings.
        ValueError: no parameter goes by any of `names`, but the model has branches of the table.

    Source: Dai et al. (arXiv 1703.06211), section 4.1; Zhu et al. (arXiv 1811.11168), section 3.2;
    Zhu et al., Deformable DETR (arXiv 2010.04159), section 5, and the projects' training programs.

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
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_parameter)
    paths = [tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/")) for path, _ in leaves]
    chosen = _BRANCHES if names is None else _without_neighbours(names)
    is_offset = _in_branches(paths, chosen)
    if chosen and not any(is_offset):
        _refuse_if_others(paths, chosen)
    return jax.tree_util.tree_unflatten(structure, ["offset" if found else "main" for found in is_offset])


def _is_parameter(node: Any) -> bool:
    # One label per nnx.Variable: nnx.Optimizer gives Optax variables first and bare arrays later.
    return hasattr(node, "dtype")


def _without_neighbours(names: Any) -> dict[str, tuple[str, ...]]:
    """The user's names, in the form of `_BRANCHES`."""
    branches = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if not all(isinstance(name, str) for name in branches):
        raise TypeError(f"names={names!r} is not made of names; wanted a string, or several: ('offset_conv',)")
    return dict.fromkeys(branches, ())


def _in_branches(paths: Sequence[tuple[str, ...]], branches: Mapping[str, Sequence[str]]) -> list[bool]:
    """Whether each parameter lies in a branch, by its path."""
    places = {path[:depth] for path in paths for depth in range(len(path) + 1)}

    def is_branch(*place: str) -> bool:
        *parent, name = place
        return name in branches and all((*parent, beside) in places for beside in branches[name])

    return [any(is_branch(*path[:depth]) for depth in range(1, len(path) + 1)) for path in paths]


def _refuse_if_others(paths: Sequence[tuple[str, ...]], names: Mapping[str, Any]) -> None:
    """Raise if the model has branches of this library's layers, none of which the user named."""
    others = [path for path, found in zip(paths, _in_branches(paths, _BRANCHES), strict=True) if found]
    if others:
        raise ValueError(
            f"names={tuple(names)} is the name of no parameter, but the model has offset branches, {'/'.join(others[0])} "
            'for example; leave names out to label these, or correct it; with names=() nothing is labelled "offset"'
        )
