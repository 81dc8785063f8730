"""`explore`: what its page holds, its size, and what is refused by name. The page itself is tried in tests/site."""

import html
import re
from html.parser import HTMLParser

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dcn_jax.linen
from dcn_jax.nnx import DCNv3, DeformConv
from dcn_jax.viz import _page, explore
from tests.site.zoo import stored_layers

pytestmark = pytest.mark.lenient
X = jax.random.normal(jax.random.key(0), (6, 8, 4))
WILD = {"offset_kernel_init": nnx.initializers.normal(1.0)}


@pytest.fixture(scope="module")
def layer():
    return DeformConv(4, 6, (3, 3), offset_groups=2, strides=(1, 2), **WILD, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def page(layer):
    return explore(layer, X)


def sown(layer, x=X):
    _, seen = nnx.capture(layer, nnx.Intermediate)(x[None])
    return [np.asarray(seen[name][0][0]) for name in ("offset", "mask")]


def test_the_page_holds_what_the_layer_read_and_used(layer, page):
    (stored,) = stored_layers(page.html)
    offset, mask = sown(layer)
    np.testing.assert_array_equal(stored["x"], X)
    np.testing.assert_array_equal(stored["kernel"], layer.kernel[...])
    np.testing.assert_array_equal(stored["bias"], layer.bias[...])
    np.testing.assert_allclose(stored["offset"], offset, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stored["mask"], mask, rtol=1e-6)
    assert stored["strides"] == [1, 2]
    assert stored["out"] == [6, 4]
    assert stored["groups"] == 2
    assert stored["kind"] == "modulated deformable"


def test_a_linen_model_gives_the_same_page(layer, page):
    module = dcn_jax.linen.DeformConv(6, (3, 3), offset_groups=2, strides=(1, 2))
    params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    params["offset_conv"] = {"kernel": layer.offset_conv.kernel[...], "bias": layer.offset_conv.bias[...]}
    (stored,) = stored_layers(explore((module, {"params": params}), X).html)
    for name, value in stored_layers(page.html)[0].items():
        np.testing.assert_array_equal(stored[name], value)


class References(HTMLParser):
    """What a page refers to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "action", "data")]


def test_the_page_refers_to_nothing(page):
    parser = References()
    parser.feed(page.html)
    assert parser.found == ["data:,"]  # no icon
    script = page.html.split('<script type="module">')[1]
    assert not re.findall(r"^\s*(import|export)\b", script, flags=re.MULTILINE)
    assert set(re.findall(r"https?://[^\"' ]+", page.html)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert not re.findall(
        r"@import|url\((?!#)|\b(fetch|XMLHttpRequest|WebSocket)\b", page.html.replace("url(#${", "url(#")
    )


def test_each_module_of_the_page_is_in_it_once(page):
    modules = sorted(path.stem for path in _page._FILES.iterdir() if path.name.endswith(".js"))
    assert sorted(re.findall(r"^const \$(\w+) = \(\(\) => \{$", page.html, flags=re.MULTILINE)) == modules


def test_no_text_of_a_model_breaks_out_of_the_page():
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            return flax.linen.Conv(2, (1, 1), name="</script><b>")(x)

    model = Model()
    page = explore((model, model.init(jax.random.key(0), X[None])), X)
    assert "</script><b>" not in page.html
    assert stored_layers(page.html)[0]["name"] == "</script><b>"


def test_without_a_network_there_is_no_data():
    page = explore()
    assert 'id="dcn-data">null<' in page.html
    assert page.size < 200_000


def test_channels_keeps_those_that_vary_the_most_in_each_group(layer):
    x = X * jnp.array([1.0, 5.0, 3.0, 2.0])
    (stored,) = stored_layers(explore(layer, x, channels=2).html)
    assert stored["inputs"] == [1, 2]
    assert (stored["channels"], stored["features"]) == (4, 6)
    np.testing.assert_array_equal(stored["x"], x[..., [1, 2]])
    y = np.asarray(layer(x[None])[0])
    outputs = sorted(np.argsort(-y.std((0, 1)))[:2].tolist())
    assert stored["outputs"] == outputs
    np.testing.assert_array_equal(stored["kernel"], layer.kernel[...][:, :, [1, 2]][..., outputs])


def test_of_a_grouped_kernel_all_rows_stay():
    layer = DeformConv(4, 8, (1, 1), feature_group_count=2, **WILD, rngs=nnx.Rngs(0))
    (stored,) = stored_layers(explore(layer, X, channels=3).html)
    assert stored["kernel"].shape == (1, 1, 2, 3)


def test_a_dcnv3_has_no_kernel_and_keeps_its_channels_apart():
    layer = DCNv3(8, group=2, rngs=nnx.Rngs(0))
    (stored,) = stored_layers(explore(layer, jnp.tile(X, (1, 1, 2))).html)
    assert stored["kernel"] is None
    assert stored["projects"]
    assert (stored["groups"], stored["featureGroups"], stored["channels"], stored["features"]) == (2, 8, 8, 8)
    assert stored["offset"].shape == (6, 8, 2 * 9 * 2)
    np.testing.assert_allclose(stored["mask"].reshape(6, 8, 2, 9).sum(-1), 1, rtol=1e-5)  # a softmax


def test_float16_halves_the_data(layer, page):
    small = explore(layer, X, dtype="float16")
    (stored,) = stored_layers(small.html)
    assert stored["offset"].dtype == np.float16
    np.testing.assert_allclose(stored["offset"], stored_layers(page.html)[0]["offset"], rtol=5e-4, atol=1e-6)
    assert len(small.html) - len(explore().html) < 0.6 * (len(page.html) - len(explore().html))


class Residual(nnx.Module):
    """A block with a shortcut: the path with the deformable layer is the one that is followed."""

    def __init__(self, rngs):
        self.first = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.second = DeformConv(4, 4, (3, 3), rngs=rngs)
        self.shortcut = nnx.Conv(4, 4, (1, 1), rngs=rngs)
        self.last = nnx.Conv(4, 2, (3, 3), rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        return self.last(self.second(x) + self.shortcut(x))


def test_layers_know_the_one_before_them():
    layers = stored_layers(explore(Residual(nnx.Rngs(0)), X).html)
    names = [layer["name"] for layer in layers]
    before = {layer["name"]: layer["before"] if layer["before"] is None else names[layer["before"]] for layer in layers}
    assert before["first"] is None
    assert before["second"] == "first"
    assert before["last"] == "second"


def test_it_is_saved_and_shown(page, tmp_path):
    assert page.save(tmp_path / "page.html").read_text(encoding="utf-8") == page.html
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', page._repr_html_())[1]) == page.html
    assert repr(page) == f"<Page of {page.size / 1e6:.1f} MB; page.save('explorer.html') writes it>"
    assert page.size == len(page.html.encode())


def test_the_size_is_told_before_much_is_written(page, tmp_path, monkeypatch):
    monkeypatch.setattr(_page, "LARGE", page.size - 1)
    with pytest.raises(ValueError, match=r"the page takes 0\.\d MB; make it smaller by explore\(…, channels=16\)"):
        page.save(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    assert "the page takes" in page._repr_html_()
    assert "srcdoc" not in page._repr_html_()
    assert page.save(tmp_path / "page.html", large=True).exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": None}, ValueError, r"x is given without model; wanted both, or none"),
        ({"x": None}, ValueError, r"model is given without x"),
        ({"x": X[None]}, ValueError, r"x has shape \(1, 6, 8, 4\); wanted one image \(H, W, C\), without a batch axis"),
        ({"channels": 0}, ValueError, r"channels=0 is too small; wanted at least 1"),
        ({"channels": "all"}, TypeError, r"channels='all' is a str; wanted an int"),
        ({"dtype": "bfloat16"}, ValueError, r"dtype='bfloat16' is not known; wanted one of \('float32', 'float16'\)"),
        ({"x": X * 1e6, "dtype": "float16"}, ValueError, r"reaches .*, which float16 cannot hold; use \"float32\""),
    ],
)
def test_errors_name_the_argument(layer, arguments, error, message):
    with pytest.raises(error, match=message):
        explore(**{"model": layer, "x": X} | arguments)


def test_a_model_without_a_convolution_is_refused():
    with pytest.raises(ValueError, match=r"the model called no convolution over an image; found were \[\]"):
        explore(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), X)
