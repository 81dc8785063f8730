"""The error for a module whose optional dependency is not installed."""


def missing(module: str, extra: str) -> ImportError:
    """The ImportError that says what `module` needs and how to install it."""
    return ImportError(f'{module} needs the extra "{extra}": pip install "dcn-jax[{extra}]"')
