"""What devices have to exchange to divide a small layer, by arithmetic."""

from benchmarks.convolution import Convolution

LAYER = Convolution((8, 32, 4, 8), 16)  # 3 rows of halo: padding, and the bound of 2
X, KERNEL, OFFSET, MASK = (4 * shape.size for shape in LAYER.shapes("float32"))  # bytes
POINTS, Y, ROW = OFFSET + MASK, 4 * 8 * 32 * 4 * 16, X // 32


def around(devices, nbytes):
    """What a device sends to add up arrays around a ring."""
    return 2 * (devices - 1) / devices * nbytes


def bytes_sent(n):
    """By ways of `benchmarks.scaling`: what each of n devices sends; of two mesh axes, the second has two devices."""
    m = n // 2
    return {
        "batch, shard_map": around(n, KERNEL),
        "features, shard_map": around(n, X + POINTS),
        "channels, shard_map": around(n, Y + POINTS),
        "batch × features, shard_map": around(m, KERNEL / 2) + around(2, (X + POINTS) / m),
        "batch × channels, shard_map": around(m, KERNEL / 2) + around(2, (Y + POINTS) / m),
        "rows, halo_deform_conv": around(n, KERNEL) + 4 * 3 * ROW,
    }
