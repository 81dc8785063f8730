"""Whole networks for `flax.nnx`, whose convolutions may be deformable."""

from dcn_jax.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101

__all__ = ["ResNet", "resnet18", "resnet34", "resnet50", "resnet101"]
