"""`deform_conv` as TPU kernels, for bounded offsets."""
