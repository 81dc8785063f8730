"""The op as TPU kernels, for bounded offsets."""
