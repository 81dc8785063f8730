"""`reorder_offsets`: each order against loops that place every channel by the words that describe the order."""

import itertools

import numpy as np
import pytest

from dcn_jax.interop import reorder_offsets

WINDOW, GROUPS = (2, 3), 2
K = 6


def described(order):
    """Channels as labels (group, i, j, "y" | "x" | "mask"), in the order that a library has them."""
    rows = list(itertools.product(range(2), range(3)))
    columns = [(i, j) for j in range(3) for i in range(2)]
    groups = range(GROUPS)
    masks = [(g, i, j, "mask") for g in groups for i, j in rows]
    return {
        "torchvision": [(g, i, j, a) for g in groups for i, j in rows for a in "yx"] + masks,
        "all_y_all_x": [(g, i, j, a) for a in "yx" for g in groups for i, j in rows] + masks,
        "all_x_all_y": [(g, i, j, a) for a in "xy" for g in groups for i, j in rows] + masks,
        "dcnv3": [(g, i, j, a) for g in groups for i, j in columns for a in "xy"]
        + [(g, i, j, "mask") for g in groups for i, j in columns],
        "dcnv4": [
            label
            for g in groups
            for label in [(g, i, j, a) for i, j in columns for a in "xy"] + [(g, i, j, "mask") for i, j in columns]
        ],
    }[order]


def labelled(order, kind):
    labels = described(order)
    offset, mask = ([label for label in labels if (label[-1] == "mask") == is_mask] for is_mask in (False, True))
    chosen = {"both": labels, "offset": offset, "mask": mask}[kind]
    number = {label: n for n, label in enumerate(described("torchvision"))}
    return np.array([number[label] for label in chosen])


@pytest.mark.parametrize("kind", ["both", "offset", "mask"])
@pytest.mark.parametrize("order", ["torchvision", "all_y_all_x", "all_x_all_y", "dcnv3", "dcnv4"])
def test_channels_go_where_the_words_say(order, kind):
    theirs, ours = labelled(order, kind), labelled("torchvision", kind)
    options = {"window": WINDOW, "offset_groups": GROUPS}
    np.testing.assert_array_equal(reorder_offsets(theirs, order, **options), ours)
    back = reorder_offsets(ours, order, **options, inverse=True)
    np.testing.assert_array_equal(back[: len(theirs)], theirs)
    assert not back[len(theirs) :].any()
    assert len(back) == (40 if (order, kind) == ("dcnv4", "both") else len(theirs))


def test_dcnv4_s_padding_is_dropped():
    theirs = np.concatenate([labelled("dcnv4", "both"), [-1] * 4])
    np.testing.assert_array_equal(
        reorder_offsets(theirs, "dcnv4", window=WINDOW, offset_groups=GROUPS), np.arange(3 * GROUPS * K)
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_any_axis_and_dtype(axis):
    rng = np.random.default_rng(0)
    shape = [2, 3, 4]
    shape[axis] = 36
    array = rng.normal(size=shape).astype(np.float16)
    options = {"window": WINDOW, "offset_groups": GROUPS, "axis": axis}
    ours = reorder_offsets(array, "all_x_all_y", **options)
    assert ours.dtype == np.float16
    np.testing.assert_array_equal(
        np.moveaxis(ours, axis, 0), np.moveaxis(array, axis, 0)[np.argsort(labelled("all_x_all_y", "both"))]
    )
    np.testing.assert_array_equal(reorder_offsets(ours, "all_x_all_y", **options, inverse=True), array)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": "mmcv"}, ValueError, "order='mmcv' is not known; wanted one of"),
        ({}, ValueError, r"array has 18 channels along axis -1 of its shape \(5, 18\); .*, 16 \(offsets\), 8 \(masks\) or 24"),
        ({"offset_groups": 2.0}, TypeError, "offset_groups=2.0 is a float"),
        ({"window": (3,)}, ValueError, r"window=\(3,\) has 1 entries; wanted an int or 2 ints"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(options, error, message):
    arguments = {"order": "dcnv3", "window": (2, 2), "offset_groups": 2} | options
    with pytest.raises(error, match=message):
        reorder_offsets(np.zeros((5, 18)), **arguments)
