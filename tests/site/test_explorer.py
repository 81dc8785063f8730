"""The explorer in a browser: its numbers are those of `deform_conv`, and mouse, keys, fingers and files move it."""

import itertools
import time
import xml.etree.ElementTree
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcn_jax import deform_conv, sampling_points
from dcn_jax.interop import reorder_offsets
from dcn_jax.nnx import DCNv3, DeformConv
from dcn_jax.viz import explore, looked, sampling_through
from tests.site.zoo import FEATURES, GEOMETRIES, Answers, Zoo, image, stored_layers

pytestmark = pytest.mark.lenient
RNG = np.random.default_rng(0)
LAYERS = [*GEOMETRIES, "plain"]
DOCUMENTED = Path(__file__).parents[2] / "docs" / "explorer.html"


@pytest.fixture(scope="module")
def zoo():
    return explore(Zoo(nnx.Rngs(0)), image())


@pytest.fixture(scope="module")
def zoo_file(zoo, tmp_path_factory):
    return zoo.save(tmp_path_factory.mktemp("pages") / "zoo.html")


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory):
    return explore().save(tmp_path_factory.mktemp("pages") / "sliders.html")


class Stack(nnx.Module):
    """Three layers, each of which reads the one before it."""

    def __init__(self, rngs):
        wild = {"offset_kernel_init": nnx.initializers.normal(0.5), "rngs": rngs}
        self.first = DeformConv(3, 8, (3, 3), strides=2, padding_mode="reflect", **wild)
        self.second = nnx.Conv(8, 8, (3, 3), padding="VALID", rngs=rngs)
        self.third = DeformConv(8, 4, (3, 3), offset_groups=2, **wild)

    def __call__(self, x):
        return self.third(self.second(self.first(x)))


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    model, x = Stack(nnx.Rngs(1)), jnp.asarray(RNG.normal(size=(20, 24, 3)), jnp.float32)
    page = explore(model, x)
    return looked(model, x), stored_layers(page.html), page.save(tmp_path_factory.mktemp("pages") / "stack.html")


# ---- numbers


def close(shown, expected):
    np.testing.assert_allclose(shown, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_numbers_are_those_of_deform_conv(browser, zoo, zoo_file, name):
    """At random positions and at all corners of the map, for random taps, groups and channels."""
    index = LAYERS.index(name)
    layer = stored_layers(zoo.html)[index]
    assert layer["name"] == name
    answers = Answers(layer)
    taps = int(np.prod(layer["window"]))
    rows, columns = layer["out"]
    positions = [
        *itertools.product((0, rows - 1), (0, columns - 1)),
        *RNG.integers((rows, columns), size=(6, 2)).tolist(),
    ]
    browser.open(zoo_file)
    browser.choose(layer=index)
    points = None
    if layer["offset"] is not None:
        geometry = {"strides": layer["strides"], "padding": [tuple(pair) for pair in layer["pads"]]}
        geometry |= {"kernel_dilation": layer["dilation"], "spatial": layer["spatial"]}
        points = np.asarray(sampling_points(jnp.asarray(layer["offset"]), layer["window"], **geometry))
    for position in positions:
        browser.go(position)
        feature, tap = int(RNG.integers(FEATURES)), int(RNG.integers(layer["groups"] * taps))
        browser.choose(output=feature)
        browser.focus_tap(tap)
        g, n = divmod(tap, taps)
        width = layer["channels"] // layer["groups"]
        browser.choose(input=int(g * width + RNG.integers(width)))
        shown, state = browser.numbers(), browser.state()
        assert (state["tap"], state["position"]) == ({"g": g, "n": n}, list(position))
        at = tuple(position)
        for which, everywhere in answers.everywhere.items():
            close(shown[which], everywhere[at][feature])
        close(shown["adds"], answers.adds(position, g, n, state["input"], feature))
        close(shown["weight"] * shown["sample"] * shown["modulation"], shown["adds"])
        corners = [shown[f"corner-{i}-weight"] * shown[f"corner-{i}-value"] for i in range(4)]
        close(sum(corners), shown["sample"])
        if points is not None:
            close([shown["at-y"], shown["at-x"]], points[at][g, n])
            close(shown["modulation"], answers.mask[at][tap])
            close([shown["origin-y"] + shown["step-y"] + shown["delta-y"]], [shown["at-y"]])


def test_the_page_of_the_documentation_has_the_numbers_of_deform_conv(browser):
    layers = stored_layers(DOCUMENTED.read_text(encoding="utf-8"))
    browser.open(DOCUMENTED)
    for index, layer in enumerate(layers):
        answers = Answers(layer).everywhere
        browser.choose(layer=index)
        for position in RNG.integers(layer["out"], size=(3, 2)).tolist():
            feature = int(RNG.integers(layer["features"]))
            browser.go(position)
            browser.choose(output=feature)
            shown = browser.numbers()
            for which, everywhere in answers.items():
                close(shown[which], everywhere[tuple(position)][feature])


def test_what_all_taps_and_channels_add_is_y(browser, zoo, zoo_file):
    layer = stored_layers(zoo.html)[0]
    browser.open(zoo_file)
    browser.choose(layer=0)
    browser.go((0, 3))
    total = float(layer["bias"][0])
    for tap, channel in itertools.product(range(18), range(4)):
        if channel // 2 == tap // 9:
            browser.focus_tap(tap)
            browser.choose(input=channel)
            total += browser.numbers()["adds"]
    close(total, browser.numbers()["y"])


def test_the_question_has_the_weights_of_both_positions(browser, zoo, zoo_file):
    layer = stored_layers(zoo.html)[0]
    browser.open(zoo_file)
    browser.choose(layer=0)
    browser.choose(input=3, output=5)  # of the second offset group
    a, b = browser.state()["position"], browser.state()["second"]
    shown = browser.numbers()
    w = layer["kernel"].reshape(9, 4, FEATURES)[:, 3, 5]
    mask = layer["mask"].reshape(*layer["out"], 2, 9)[:, :, 1]
    close([shown[f"w-{n}"] for n in range(9)], w)
    close([shown[f"a-{n}"] for n in range(9)], w * mask[tuple(a)])
    close([shown[f"b-{n}"] for n in range(9)], w * mask[tuple(b)])
    weights = (w * mask).reshape(-1, 9)
    close(shown["missed"], np.sqrt(((weights - weights.mean(0)) ** 2).sum() / (weights**2).sum()))


def test_a_page_of_some_channels_shows_their_numbers(browser, tmp_path):
    layer = DeformConv(
        8, 12, (3, 3), offset_groups=2, offset_kernel_init=nnx.initializers.normal(0.3), rngs=nnx.Rngs(2)
    )
    x = jnp.asarray(RNG.normal(size=(7, 7, 8)), jnp.float32)
    page = explore(layer, x, channels=4, dtype="float16")
    (stored,) = stored_layers(page.html)
    assert (len(stored["inputs"]), len(stored["outputs"])) == (4, 4)
    assert [channel // 4 for channel in stored["inputs"]] == [0, 0, 1, 1]
    np.testing.assert_array_equal(stored["x"], np.asarray(x, np.float16)[..., stored["inputs"]])
    browser.open(page.save(tmp_path / "page.html"))
    browser.go((3, 6))
    browser.choose(output=2)
    expected = Answers({**stored, "channels": 4}).everywhere["y"]
    close(browser.numbers()["y"], expected[3, 6, 2])
    assert f"4 of {stored['channels']} input channels" in browser.find("#formula").text


def test_a_dcnv3_is_shown_with_what_its_taps_read(browser, tmp_path):
    """It has no kernel: each channel is the sum of what its taps read, by their modulation. Some taps are left out."""
    layer = DCNv3(8, group=2, kernel_size=3, offset_scale=1.5, remove_center=True, rngs=nnx.Rngs(3))
    page = explore(layer, jnp.asarray(RNG.normal(size=(6, 7, 8)), jnp.float32))
    (stored,) = stored_layers(page.html)
    expected = Answers({**stored, "kernel": np.ones((*stored["window"], 1, 8))}).everywhere["y"]
    browser.open(page.save(tmp_path / "page.html"))
    for position in [(0, 0), (3, 4), (5, 6)]:
        browser.go(position)
        browser.choose(output=5)
        close(browser.numbers()["y"], expected[position][5])
    assert "is left out here" in browser.find("#formula").text


def through(layers, position):
    """All paths, one by one: {point of the first map: weight}."""
    *before, layer = layers
    points = layer["points"][tuple(position)].reshape(-1, 2)
    mask = np.ones(len(points)) if layer["mask"] is None else layer["mask"][tuple(position)]
    found = {}
    for point, modulation in zip(points, mask, strict=True):
        if not before:
            key = tuple(point)
            found[key] = found.get(key, 0) + modulation
            continue
        below = np.floor(point).astype(int)
        for corner in itertools.product((0, 1), repeat=2):
            pixel = below + corner
            share = np.prod(1 - np.abs(point - pixel))
            if share and (pixel >= 0).all() and (pixel < before[-1]["out"]).all():
                for key, weight in through(before, pixel).items():
                    found[key] = found.get(key, 0) + modulation * share * weight
    return found


def test_points_through_a_stack_are_those_of_all_paths(browser, stack):
    seen, layers, path = stack
    for layer in layers:
        taps = int(np.prod(layer["window"]))
        offset = np.zeros((*layer["out"], 2 * taps)) if layer["offset"] is None else layer["offset"].astype(float)
        geometry = {name: layer[key] for name, key in [("strides", "strides"), ("kernel_dilation", "dilation")]}
        geometry |= {"padding": [tuple(pair) for pair in layer["pads"]], "spatial": layer["spatial"]}
        layer["points"] = np.asarray(sampling_points(jnp.asarray(offset, jnp.float32), layer["window"], **geometry))
    browser.open(path)
    browser.choose(stacked=True)
    for position in [(0, 0), (4, 5), (7, 9)]:
        browser.go(position)
        cloud = browser.script("return dcn.cloud()")
        expected = through(layers, position)
        assert cloud["found"] >= len(cloud["points"]) > 100
        close(sum(p["weight"] for p in cloud["points"]), sum(sorted(expected.values())[::-1][: len(cloud["points"])]))
        _, weights = sampling_through(seen, position, merge=True)
        close([p["weight"] for p in cloud["points"]], weights)
        keys = np.array(list(expected))
        for p in cloud["points"][:50]:
            # float32 of sampling_points and the page's double precision place a point a little apart
            near = np.abs(keys - p["at"]).max(1) < 1e-4
            close(p["weight"], sum(np.array(list(expected.values()))[near]))


# ---- mouse, keys, fingers


def drag(browser, *points):
    """Press at the first point, move through the others, let go at the last."""
    actions = browser.actions()
    pointer = actions.w3c_actions.pointer_action
    pointer.move_to_location(*map(round, points[0]))
    pointer.pointer_down()
    for point in points[1:]:
        pointer.move_to_location(*map(round, point))
    pointer.pointer_up()
    actions.perform()


def test_dragging_moves_all_maps_in_step(browser, zoo_file):
    browser.open(zoo_file)
    browser.choose(layer=0)
    drag(browser, browser.point(*browser.state()["position"]), browser.point(1.2, 8.8))
    assert browser.state()["position"] == [1, 9]
    crosses = browser.script(
        "return [...document.querySelectorAll('[data-handle=position]')].map((e) => e.getAttribute('transform'))"
    )
    assert crosses == ["translate(9 1)"] * 5  # the map, three panels, and A of the question


def test_a_drag_may_begin_on_a_dot_which_a_press_chooses(browser, plain_file):
    browser.open(plain_file)
    browser.choose(slider_kind="zero")  # dots lie on the grid, one of them on the cross
    browser.go((10, 10))
    drag(browser, browser.point(9, 11))
    assert (browser.state()["tap"], browser.state()["position"]) == ({"g": 0, "n": 2}, [10, 10])
    drag(browser, browser.point(10, 10), browser.point(12, 13), browser.point(14, 6))
    assert (browser.state()["tap"], browser.state()["position"]) == ({"g": 0, "n": 4}, [14, 6])


def test_b_is_dragged_in_the_question_alone(browser, zoo_file):
    browser.open(zoo_file)
    browser.choose(layer=0)
    before = browser.state()
    drag(browser, browser.point(0, 0, "question"))  # nearer to B
    assert browser.state()["second"] == [0, 0]
    assert browser.state()["position"] == before["position"]


def test_a_panel_is_dragged_too(browser, zoo_file):
    browser.open(zoo_file)
    browser.choose(layer=0)
    drag(browser, browser.point(7, 2, "deformable"))
    assert browser.state()["position"] == [7, 2]


def test_hovering_a_tap_chooses_it(browser, zoo_file):
    browser.open(zoo_file)
    browser.choose(layer=0)
    tap = next(t for t in browser.script("return dcn.taps()")[1:] if all(0 < p < 8 for p in t["at"]))
    pointer = browser.actions()
    pointer.w3c_actions.pointer_action.move_to_location(*map(round, browser.point(*tap["at"])))
    pointer.perform()
    chosen = browser.state()["tap"]
    on_top = [t for t in browser.script("return dcn.taps()") if np.abs(np.subtract(t["at"], tap["at"])).max() < 0.6]
    assert chosen in [{"g": t["g"], "n": t["n"]} for t in on_top]


def test_arrows_move_the_position_and_tab_goes_through_the_taps(browser, zoo_file):
    from selenium.webdriver.common.keys import Keys

    browser.open(zoo_file)
    browser.choose(layer=0)
    browser.go((4, 4))
    browser.script("document.querySelector('#stage .handle').focus()")
    keys = [(Keys.ARROW_DOWN, [5, 4]), (Keys.ARROW_RIGHT, [5, 5]), (Keys.ARROW_UP, [4, 5]), (Keys.ARROW_LEFT, [4, 4])]
    for key, expected in keys:
        browser.actions().send_keys(key).perform()
        assert browser.state()["position"] == expected
    for n in range(18):
        browser.actions().send_keys(Keys.TAB).perform()
        assert browser.state()["tap"] == {"g": n // 9, "n": n % 9}
    browser.actions().send_keys(Keys.ARROW_DOWN).perform()  # from a tap too, which stays chosen and focused
    assert browser.state()["position"] == [5, 4]
    assert browser.script("return document.activeElement.getAttribute('aria-label')").startswith(
        "Tap 8, offset group 1"
    )
    browser.actions().key_down(Keys.SHIFT).send_keys(Keys.ARROW_UP).key_up(Keys.SHIFT).perform()
    assert browser.state()["position"] == [0, 4]


def test_a_finger_drags_the_cross_and_taps_the_map(browser, zoo_file):
    browser.resize(360, 780, touch=True)
    browser.open(zoo_file)
    browser.choose(layer=0)
    browser.go((4, 4))

    def touch(kind, *points):
        points = [{"x": x, "y": y} for x, y in points]
        browser.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    start, middle, goal = browser.point(4, 4), browser.point(3, 6), browser.point(2, 9)
    touch("touchStart", start)
    touch("touchMove", middle)
    touch("touchMove", goal)
    touch("touchEnd")
    browser.until(lambda: browser.state()["position"] == [2, 9])
    touch("touchStart", browser.point(8, 1))
    touch("touchEnd")
    browser.until(lambda: browser.state()["position"] == [8, 1])


def test_one_offset_group_or_all(browser, zoo_file):
    browser.open(zoo_file)
    browser.choose(layer=0)
    dots = "return document.querySelectorAll('#stage .dot').length"
    assert browser.script(dots) == 18
    browser.choose(group=1)
    assert browser.script(dots) == 9
    assert browser.state()["tap"]["g"] == 1
    assert browser.state()["input"] in (2, 3)  # the channels of the second group
    browser.choose(input=0)
    assert browser.state()["group"] == 0
    browser.choose(group=-1)
    assert browser.script(dots) == 18


def test_zoom_keeps_the_position_in_view(browser, zoo_file):
    browser.open(zoo_file)
    browser.choose(layer=0)
    browser.go((8, 10))
    browser.find("[data-name=zoom-in]").click()
    left, top, width, height = map(
        float, browser.script("return document.querySelector('#stage svg').getAttribute('viewBox')").split()
    )
    assert left <= 10 <= left + width
    assert top <= 8 <= top + height
    assert width < 11


def test_it_is_said_in_words(browser, zoo_file):
    browser.open(zoo_file)
    browser.choose(layer=0)
    browser.focus_tap(11)
    browser.go((2, 3))
    browser.script("document.getElementById('taps').open = true")
    time.sleep(0.6)
    said = browser.find("#speech").text
    assert said.startswith("Output position row 2, column 3. y is ")
    assert "Tap 2 of 9 of offset group 1 is moved" in said
    assert len(browser.script("return [...document.querySelectorAll('#taps tbody tr')]")) == 18
    assert browser.find("#speech").get_attribute("aria-live") == "polite"


# ---- orders of channels


@pytest.mark.parametrize("order", ["torchvision", "all_y_all_x", "all_x_all_y", "dcnv3", "dcnv4"])
@pytest.mark.parametrize("kind", ["offsets", "masks", "both"])
def test_the_decoder_knows_the_orders(browser, plain_file, order, kind):
    window, groups = (2, 3), 3
    masks = groups * 6
    ours = reorder_offsets(
        np.arange({"offsets": 2 * masks, "masks": masks, "both": 56 if order == "dcnv4" else 3 * masks}[kind]),
        order,
        window=window,
        offset_groups=groups,
    )
    browser.open(plain_file)
    browser.script(
        """const inputs = document.querySelectorAll("#decoder .fields input");
        [3, 2, 3].forEach((value, i) => { inputs[i].value = value; inputs[i].dispatchEvent(new Event("input")); });"""
    )
    browser.choose(decoder_order=order, decoder_kind=kind)
    for our_index, their_index in enumerate(ours.tolist()):
        if our_index >= 2 * masks or kind == "masks":
            g, tap = divmod(our_index - (2 * masks if kind == "both" else 0), 6)
            expected = f"the mask of tap ({tap // 3}, {tap % 3}) of offset group {g}"
        else:
            g, tap, axis = np.unravel_index(our_index, (groups, 6, 2))
            expected = f"Δ{'yx'[axis]} of tap ({tap // 3}, {tap % 3}) of offset group {g}"
        browser.choose(decoder_index=their_index)
        said = browser.text("decoder-meaning")
        assert said.startswith(f"Channel {their_index} is {expected}.")
        assert order == "torchvision" or said.endswith(f"channel {our_index}.")
        # and back: what is chosen there leads to the index again
        browser.script("document.querySelector('[data-name=decoder-tap]').dispatchEvent(new Event('change'))")
        assert browser.script("return document.querySelector('[data-name=decoder-index]').value") == str(their_index)
    if order == "dcnv4" and kind == "both":
        browser.choose(decoder_index=55)
        assert browser.text("decoder-meaning").startswith("Channel 55 of 56 is padding")


# ---- files


def shown_layer(browser):
    """The layer that the page shows, its arrays as NumPy's."""
    layer = browser.script("return dcn.layer()")
    for name in ("x", "kernel", "bias", "offset", "mask"):
        if layer[name] is not None:
            layer[name] = np.array(layer[name]["data"], np.float64).reshape(layer[name]["shape"])
    return layer


def give(browser, *paths):
    browser.script("document.querySelector('[data-name=files-message]').textContent = ''")
    browser.find("[data-name=files]").send_keys("\n".join(map(str, paths)))
    browser.until(lambda: browser.text("files-message"))
    return browser.text("files-message")


H, W, GROUPS = 6, 7, 2
OFFSET = RNG.normal(size=(H, W, GROUPS * 18)).astype(np.float32)
MASK = RNG.random((H, W, GROUPS * 9)).astype(np.float32)
X = RNG.random((H, W, 4)).astype(np.float32)
KERNEL = RNG.normal(size=(3, 3, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", ["ours", "torch"])
def test_arrays_of_ones_own_give_the_numbers_of_deform_conv(browser, plain_file, tmp_path, save, layout):
    arrays = {"x": X, "offset": OFFSET, "mask": MASK, "kernel": KERNEL}
    if layout == "torch":
        arrays = {name: np.moveaxis(array, -1, 0)[None] for name, array in arrays.items() if name != "kernel"}
        arrays["weight"] = KERNEL.transpose(3, 2, 0, 1)
        arrays["x"] = arrays["x"][0].transpose(1, 2, 0)  # a map of 4 channels: height, width, channels
        arrays["offset"] = np.asfortranarray(arrays["offset"].astype(np.float64))
    save(tmp_path / "arrays.npz", **arrays)
    browser.open(plain_file)
    browser.sources("files")
    assert "2 offset groups, with modulation" in give(browser, tmp_path / "arrays.npz")
    layer = shown_layer(browser)
    np.testing.assert_allclose(layer["offset"], OFFSET, rtol=1e-6)
    np.testing.assert_allclose(layer["mask"], MASK, rtol=1e-6)
    y = deform_conv(*map(jnp.asarray, (X, KERNEL, OFFSET, MASK)))
    for position in [(0, 0), (5, 6), (2, 3)]:
        browser.go(position)
        browser.choose(output=1)
        close(browser.numbers()["y"], y[position][1])


@pytest.mark.parametrize("order", ["all_y_all_x", "all_x_all_y", "dcnv3", "dcnv4"])
def test_offsets_in_another_order_are_sorted(browser, plain_file, tmp_path, order):
    both = np.concatenate([OFFSET, MASK], -1)
    theirs = reorder_offsets(both, order, window=(3, 3), offset_groups=GROUPS, inverse=True)
    np.save(tmp_path / "offset.npy", theirs)
    browser.open(plain_file)
    browser.sources("files")
    browser.choose(files_order=order, files_kind="both")
    assert "with modulation" in give(browser, tmp_path / "offset.npy")
    layer = shown_layer(browser)
    np.testing.assert_allclose(layer["offset"], OFFSET, rtol=1e-6)
    np.testing.assert_allclose(layer["mask"], MASK, rtol=1e-6)


@pytest.mark.parametrize("kind", ["channels last", "channels first", "png"])
def test_a_picture_of_bytes_is_read_from_0_to_1(browser, plain_file, tmp_path, kind):
    from PIL import Image

    picture = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
    np.save(tmp_path / "offset.npy", OFFSET[..., :18])
    if kind == "png":
        Image.fromarray(picture).save(tmp_path / "picture.png")
        file = tmp_path / "picture.png"
    else:
        file = tmp_path / "image.npy"
        np.save(file, picture if kind == "channels last" else picture.transpose(2, 0, 1))
    browser.open(plain_file)
    browser.sources("files")
    assert give(browser, file, tmp_path / "offset.npy").startswith("Shown: 1 offset group, without modulation")
    np.testing.assert_allclose(shown_layer(browser)["x"], picture / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        ({"mask": MASK}, {}, "No offsets yet"),
        ({"offset": OFFSET[..., :17]}, {}, "offset has 17 channels; wanted a multiple of 18"),
        ({"offset": OFFSET[..., :20]}, {}, "offset has 20 channels; wanted a multiple of 18"),
        ({"offset": OFFSET, "x": np.zeros((8, 7, 4))}, {}, "a map of 8 × 7 has 8 × 7 output positions"),
        ({"offset": OFFSET, "mask": MASK[..., :9]}, {}, "mask has 9 channels; wanted 18"),
        (
            {"offset": OFFSET, "x": X, "kernel": KERNEL[:2]},
            {},
            "kernel has the shape (2, 3, 4, 3); wanted (3, 3, C, F)",
        ),
        ({"offset": OFFSET, "x": X[..., :3], "kernel": KERNEL}, {}, "which 2 offset groups cannot share evenly"),
        ({"offset": OFFSET, "x": X}, {"files_window_0": 9, "files_padding": "VALID"}, "leaves no output position"),
    ],
)
def test_a_wrong_shape_gets_a_sentence(browser, plain_file, tmp_path, arrays, settings, message):
    np.savez(tmp_path / "arrays.npz", **arrays)
    browser.open(plain_file)
    browser.sources("files")
    browser.choose(**settings)
    assert message in give(browser, tmp_path / "arrays.npz")
    assert "wrong" in browser.find("[data-name=files-message]").get_attribute("class")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"nonsense nonsense", "a.npy: this is no .npy file"),
        ("a.npz", b"nonsense nonsense nonsense", "a.npz: this is no .npz file"),
        ("a.txt", b"1 2 3", "a.txt: wanted .npy, .npz or a picture"),
    ],
)
def test_a_file_of_another_kind_gets_a_sentence(browser, plain_file, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    browser.open(plain_file)
    browser.sources("files")
    assert message in give(browser, tmp_path / name)


def test_a_file_is_dropped_onto_the_page(browser, plain_file, tmp_path):
    np.save(tmp_path / "offset.npy", OFFSET)
    browser.open(plain_file)
    data = {"items": [], "files": [str(tmp_path / "offset.npy")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": 200, "y": 300, "data": data}
        browser.driver.execute_cdp_cmd("Input.dispatchDragEvent", event)
    browser.until(lambda: browser.text("files-message").startswith("Shown: 2 offset groups"))
    np.testing.assert_allclose(shown_layer(browser)["offset"], OFFSET)


def test_hostile_offsets_read_as_in_deform_conv(browser, plain_file, tmp_path):
    offset = np.zeros((4, 4, 18), np.float32)
    offset[0, 0, :6] = [np.inf, 0, -np.inf, 1e30, 2**31, -(2**31)]
    offset[1, 1, 3] = np.nan
    x, kernel = X[:4, :4, :1], KERNEL[:, :, :1]
    np.savez(tmp_path / "a.npz", x=x, offset=offset, kernel=kernel)
    browser.open(plain_file)
    browser.sources("files")
    give(browser, tmp_path / "a.npz")
    for mode in ("zeros", "edge", "wrap", "reflect", "symmetric"):
        browser.choose(files_mode=mode)
        y = deform_conv(*map(jnp.asarray, (x, kernel, offset)), padding_mode=mode)
        for position in [(0, 0), (1, 1), (2, 2)]:
            browser.go(position)
            close(browser.numbers()["y"], y[position][0])


# ---- sliders


def test_sliders_give_the_numbers_of_deform_conv(browser, plain_file):
    browser.open(plain_file)
    for kind, mode, stride, dilation, window, bound, groups in [
        ("zero", "zeros", 1, 1, 3, 1.5, 1),
        ("sine", "edge", 2, 2, 3, 6, 2),
        ("random", "wrap", 1, 3, 5, 2, 3),
        ("random", "symmetric", 4, 1, 7, 0, 1),
    ]:
        browser.choose(slider_kind=kind, slider_mode=mode, slider_stride=stride, slider_dilation=dilation)
        browser.choose(slider_window=window, slider_maxOffset=bound, slider_groups=groups)
        layer = shown_layer(browser)
        assert (layer["groups"], layer["modes"], layer["window"]) == (groups, [mode, mode], [window, window])
        assert (layer["strides"], layer["dilation"]) == ([stride, stride], [dilation, dilation])
        assert np.abs(layer["offset"]).max() <= bound
        y = Answers({**layer, "name": "made"}).everywhere["y"]
        for position in [(0, 0), (y.shape[0] - 1, 2)]:
            browser.go(position)
            browser.choose(output=0)
            close(browser.numbers()["y"], y[position][0])


# ---- saving, themes, widths


def test_the_map_is_saved_as_svg_and_png(browser, zoo_file):
    from PIL import Image

    browser.open(zoo_file)
    browser.choose(layer=0)
    browser.find("#save-svg").click()
    svg = browser.saved("sampling.svg").read_text(encoding="utf-8")
    root = xml.etree.ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "var(" not in svg
    assert svg.count("<circle") >= 18 * 3
    browser.find("#save-png").click()
    picture = Image.open(browser.saved("sampling.png"))
    assert max(picture.size) == 1600
    assert len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 50
    for name in ("sampling.svg", "sampling.png"):
        (browser.downloads / name).unlink()


def colours(browser):
    return browser.script(
        """const probe = (variable) => {
            const element = document.body.appendChild(document.createElement("i"));
            element.style.color = `var(--${variable})`;
            const colour = getComputedStyle(element).color;
            element.remove();
            return colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
        };
        return Object.fromEntries(["page", "card", "soft", "ink", "muted", "accent", "wrong"].map((v) => [v, probe(v)]))"""
    )


def contrast(a, b):
    """By the Web Content Accessibility Guidelines."""

    def luminance(colour):
        share = np.array(colour) / 255
        return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_dark_and_light_by_the_system_and_by_the_switch(browser, plain_file):
    browser.open(plain_file)
    drawn = "return document.querySelector('#stage image').getAttribute('href')"
    pictures = {}
    for scheme, dark in [("light", False), ("dark", True)]:
        browser.prefer(scheme)
        browser.until(lambda: browser.script(drawn) not in pictures.values())  # redrawn after the page is told
        seen = colours(browser)
        pictures[scheme] = browser.script(drawn)
        assert (seen["page"][0] < 128) == dark
        for text, ground in itertools.product(("ink", "muted", "accent", "wrong"), ("page", "card")):
            assert contrast(seen[text], seen[ground]) >= 4.5, (scheme, text, ground)
    browser.find("#theme").click()  # light, whatever the system says
    assert colours(browser)["page"][0] > 128
    assert browser.find("#theme").text == "theme: light"
    browser.until(lambda: browser.script(drawn) == pictures["light"])
    browser.find("#theme").click()
    assert colours(browser)["page"][0] < 128
    browser.find("#theme").click()
    assert browser.find("#theme").text == "theme: as the system"


@pytest.mark.parametrize("source", ["network", "sliders", "files"])
def test_nothing_is_cut_off_at_360_pixels(browser, zoo_file, source):
    browser.resize(360, 780)
    browser.open(zoo_file)
    browser.sources(source)
    browser.script("document.getElementById('taps').open = true")
    assert browser.script("return document.documentElement.scrollWidth") <= 360
    too_wide = browser.script(
        """return [...document.querySelectorAll("body *")].filter((element) =>
            !element.closest(".scroll, svg, .decoder-grid") && element.getBoundingClientRect().right > 360.5).map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert too_wide == []


def test_every_control_has_a_name(browser, zoo_file):
    browser.open(zoo_file)
    browser.choose(layer=0)
    for source in ("network", "sliders", "files"):
        browser.sources(source)
        nameless = browser.script(
            """return [...document.querySelectorAll("button, input, select, [tabindex='0']")].filter((element) => {
                if (!element.checkVisibility()) return false;
                const label = element.closest("label")?.textContent ?? "";
                return !(element.getAttribute("aria-label") || label.trim() || (element.tagName === "BUTTON" && element.textContent.trim()));
            }).map((element) => element.outerHTML.slice(0, 100))"""
        )
        assert nameless == []


def test_a_notebook_shows_it(browser, zoo, tmp_path):
    path = tmp_path / "notebook.html"
    path.write_text(
        f"<!doctype html><meta charset=utf-8><link rel=icon href=data:,>{zoo._repr_html_()}", encoding="utf-8"
    )
    browser.open(path)
    browser.driver.switch_to.frame(0)
    browser.go((3, 4))
    assert browser.state()["position"] == [3, 4]
    browser.driver.switch_to.default_content()


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_to_look_at(browser, plain_file, pictures, scheme, width):
    browser.resize(width, 900)
    browser.prefer(scheme)
    for name, path in [("network", DOCUMENTED), ("sliders", plain_file)]:
        browser.open(path)
        time.sleep(0.5)
        picture = pictures / f"{name}-{scheme}-{width}.png"
        browser.screenshot(picture)
        assert picture.stat().st_size > 30_000
