"""What the layers of linen and nnx share."""
