"""The package as its users meet it: what a name promises, what an import loads and costs."""

import importlib
import inspect
import subprocess
import sys

import pytest

import dcn_jax

PUBLIC = {name: getattr(dcn_jax, name) for name in dcn_jax.__all__}
PUBLIC["halo_deform_conv"] = dcn_jax.sharding.halo_deform_conv

SIGNATURES = {
    "deform_conv": "x, kernel, offset, mask=None, bias=None, *, strides=1, padding='SAME', kernel_dilation=1, "
    "feature_group_count=1, padding_mode='zeros', precision=None, preferred_element_type=None, max_offset=None, "
    "implementation=None",
    "select_implementation": "x, kernel, offset, mask=None, *, strides=1, padding='SAME', kernel_dilation=1, "
    "feature_group_count=1, padding_mode='zeros', precision=None, preferred_element_type=None, max_offset=None, "
    "implementation=None",
    "dcnv3": "x, offset, mask, *, window=(3, 3), strides=1, padding=1, kernel_dilation=1, offset_scale=1.0, "
    "remove_center=False",
    "dcnv4": "x, offset_mask, *, groups, window=(3, 3), strides=1, padding=1, kernel_dilation=1, offset_scale=1.0, "
    "remove_center=False",
    "linear_sample": "features, points, *, padding_mode='zeros'",
    "affine_grid": "theta, spatial, *, align_corners=False",
    "grid_sample": "features, grid, *, method='linear', padding_mode='zeros', align_corners=False",
    "ms_deform_attn": "value, spatial_shapes, sampling_locations, attention_weights, *, points_per_level=None, "
    "method='linear', implementation=None",
    "roi_align": "x, rois, *, output_size, spatial_scale=1.0, sampling_ratio=2, aligned=True",
    "deform_roi_pool": "x, rois, offset=None, mask=None, *, output_size, spatial_scale=1.0, sampling_ratio=2, gamma=0.1, "
    "aligned=True",
    "sampling_points": "offset, window, *, strides=1, padding='SAME', kernel_dilation=1, spatial",
}


def plain(signature):
    """A signature without its annotations."""
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))[1:-1]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_contracts(name):
    assert plain(inspect.signature(getattr(dcn_jax, name))) == SIGNATURES[name]


@pytest.mark.parametrize("public", PUBLIC.values(), ids=PUBLIC)
def test_public_functions_are_documented(public):
    """One line first; every parameter under its name; what is returned, what is raised; an example to run."""
    doc = inspect.getdoc(public)
    assert doc is not None
    first, rest = doc.split("\n", 1)
    assert first.endswith(".")
    assert rest.startswith("\n")
    for section in ("Args:", "Returns:", "Raises:", "Example:\n    >>> "):
        assert section in doc, f"{public.__name__} has no {section}"
    if "Args: those of `deform_conv`" not in doc:
        for parameter in inspect.signature(public).parameters:
            assert f"\n    {parameter}: " in doc, f"{public.__name__} does not document {parameter}"


@pytest.mark.parametrize("public", PUBLIC.values(), ids=PUBLIC)
def test_options_are_keywords(public):
    """Arrays go by position; whatever changes how they are read has to be named."""
    arrays = {"x", "kernel", "offset", "mask", "bias", "features", "points", "offset_mask", "grid", "rois"}
    arrays |= {"value", "spatial_shapes", "sampling_locations", "attention_weights", "theta"}
    # Which are of the shape there, not options.
    shapes = {dcn_jax.sampling_points: {"window"}, dcn_jax.affine_grid: {"spatial"}}
    arrays |= shapes.get(public, set())
    for name, parameter in inspect.signature(public).parameters.items():
        wanted = parameter.POSITIONAL_OR_KEYWORD if name in arrays else parameter.KEYWORD_ONLY
        assert parameter.kind is wanted, f"{public.__name__}({name})"


@pytest.mark.parametrize("name", ["DeformConv", "DCNv3", "DCNv4", "MSDeformAttn"])
@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_layers_are_documented(module, name):
    layer = getattr(importlib.import_module(f"dcn_jax.{module}"), name)
    doc = inspect.getdoc(layer)
    assert ">>> " in doc
    parameters = set(inspect.signature(layer.__init__).parameters) - {"self", "parent", "name"}
    assert {name for name in parameters if f"\n    {name}: " not in doc} == set()


def fresh_python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


def test_import_loads_jax_and_numpy_only():
    code = "import sys, jax; before = set(sys.modules); import dcn_jax; print(*sorted(set(sys.modules) - before))"
    loaded = fresh_python("-c", code).stdout.split()
    tops = {module.split(".")[0] for module in loaded}
    assert tops - set(sys.stdlib_module_names) <= {"dcn_jax", "jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum"}
    assert not [module for module in loaded if "pallas" in module]
    assert "flax" not in fresh_python("-c", "import sys, dcn_jax; print(*sys.modules)").stdout


MODULES = ["interop", "linen", "models", "nnx", "optim", "viz"]


def test_modules_load_when_they_are_asked_for():
    code = (
        "import dcn_jax\nfor name in {}:\n    assert name in dir(dcn_jax)\n    print(getattr(dcn_jax, name).__name__)"
    )
    loaded = fresh_python("-c", code.format(MODULES)).stdout.split()
    assert loaded == [f"dcn_jax.{name}" for name in MODULES]
    with pytest.raises(AttributeError, match=r"^module 'dcn_jax' has no attribute 'deform'$"):
        dcn_jax.deform  # noqa: B018


@pytest.mark.parametrize("code", ["import dcn_jax; dcn_jax.nnx", "from dcn_jax import nnx"])
def test_without_flax_a_module_names_its_extra(code):
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['flax'] = None; {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'ImportError: dcn_jax.nnx needs the extra "flax": pip install "dcn-jax[flax]"' in ran.stderr


def test_import_costs_less_than_a_fifth_of_a_second():
    """Beyond that of JAX, in the best of up to five runs, since the machine may be busy."""

    def seconds():
        log = fresh_python("-X", "importtime", "-c", "import jax, dcn_jax").stderr
        rows = [line.removeprefix("import time:").split("|") for line in log.splitlines()[1:]]
        return next(int(cumulative) for _, cumulative, name in rows if name.strip() == "dcn_jax") / 1e6

    assert any(seconds() < 0.2 for _ in range(5))
