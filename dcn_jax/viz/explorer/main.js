// Puts the page together: the data, the state, and the parts that draw it.

import { decode } from "./arrays.js";
import { heat } from "./colours.js";
import { makeControls } from "./controls.js";
import { makeDecoder } from "./decoder.js";
import { number } from "./format.js";
import { makeFormula } from "./formula.js";
import { look } from "./look.js";
import { makePanels } from "./panels.js";
import { makeQuestion } from "./question.js";
import { savePng, saveSvg } from "./save.js";
import { makeSource } from "./source.js";
import { makeSpeech, makeTable, sentence } from "./speech.js";
import { makeStage } from "./stage.js";
import { makeStore } from "./state.js";
import { SLIDERS, drawnPicture, playgroundLayer } from "./playground.js";

const find = (id) => document.getElementById(id);

/** The layers that the page was made with, their arrays decoded; null without a network. */
function readNetwork() {
  const stored = JSON.parse(find("dcn-data").textContent);
  if (!stored) return null;
  const array = (packed) => packed && decode(packed);
  const layers = stored.layers.map((layer) => ({
    ...layer,
    ...Object.fromEntries(
      ["x", "kernel", "bias", "offset", "mask"].map((name) => [name, array(layer[name])]),
    ),
  }));
  return { layers, picture: array(stored.picture), about: stored.about, first: stored.first };
}

const network = readNetwork();
const made = drawnPicture();
const start = network ?? { layers: [playgroundLayer(SLIDERS, made)], picture: made, first: 0 };
const { out } = start.layers[start.first];
const store = makeStore({
  layers: start.layers,
  picture: start.picture,
  layer: start.first,
  position: [Math.floor(out[0] * 0.55), Math.floor(out[1] * 0.5)],
  second: [Math.floor(out[0] * 0.2), Math.floor(out[1] * 0.25)],
  tap: { g: 0, n: 0 },
  group: -1,
  input: 0,
  output: 0,
  stacked: false,
  ground: "picture",
  zoom: 0,
  dragging: false,
});

const actions = {
  onMove: (handle, position) => store.set({ [handle]: position }),
  onDrag: (dragging) => store.set({ dragging }),
};
const choose = (tap) => {
  const now = store.get().tap;
  if (tap.g !== now.g || tap.n !== now.n) store.set({ tap });
};

const stage = makeStage({
  label: "The map and where the taps read. Arrow keys move the position, Tab goes through the taps.",
  name: "main",
  ...actions,
  onTap: choose,
});
find("stage").append(stage.element);
const question = makeQuestion(find("question"), actions);
const parts = [
  makeControls(find("controls"), store),
  (now) => stage.draw(now, { ...now.variants.modulated, chosen: now.chosen }),
  makeFormula(find("formula")),
  makePanels(find("panels"), actions),
  question,
  makeTable(find("taps"), choose),
  makeSpeech(find("speech")),
  caption,
];
makeDecoder(find("decoder"));

/** What the picture shows, in a line below it. */
function caption({ layer, state, variants, base, most }) {
  const geometry = [
    `window ${layer.window.join(" × ")}`,
    `stride ${layer.strides.join(", ")}`,
    `dilation ${layer.dilation.join(", ")}`,
    `border ${[...new Set(layer.modes)].join(", ")}`,
    `map ${base.spatial.join(" × ")}`,
    `output ${layer.out.join(" × ")}`,
  ];
  find("geometry").textContent = geometry.join(" · ");
  const { cloud } = variants.modulated;
  find("cut").textContent = !cloud
    ? ""
    : cloud.found > cloud.points.length
      ? `${cloud.found} places of the first map are read; the ${cloud.points.length} strongest are drawn.`
      : `${cloud.found} places of the first map are read.`;
  for (const key of document.querySelectorAll(".of-taps")) key.hidden = state.stacked;
  find("legend-most").textContent = state.stacked ? "largest" : number(most);
  find("legend-name").textContent = state.stacked ? "weight of a point" : "Δm";
  find("legend-bar").style.background =
    `linear-gradient(to right, ${[0, 0.2, 0.4, 0.6, 0.8, 1].map(heat).join(", ")})`;
}

let seen = null;
function draw(state) {
  seen = look(state);
  for (const part of parts) part(seen);
}

/** Put another source on the page; `keep` holds on to the position. */
function show({ layers, picture, first = 0, keep = false }) {
  const now = store.get();
  if (now.layers === layers) return;
  store.set({
    layers,
    picture,
    layer: keep ? Math.min(now.layer, layers.length - 1) : first,
    stacked: false,
    ...(keep ? {} : { zoom: 0, group: -1 }),
  });
}

for (const [id, save] of [
  ["save-svg", saveSvg],
  ["save-png", savePng],
]) {
  find(id).addEventListener("click", () => save(stage.element));
}
const THEMES = ["", "light", "dark"];
find("theme").addEventListener("click", () => {
  const { dataset } = document.documentElement;
  dataset.theme = THEMES[(THEMES.indexOf(dataset.theme ?? "") + 1) % THEMES.length];
  if (!dataset.theme) delete dataset.theme;
  find("theme").textContent = `theme: ${dataset.theme ?? "as the system"}`;
  draw(store.get());
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(store.get()));

store.listen(draw);
draw(store.get());
makeSource(find("source"), network, show)(network ? "network" : "sliders");

// To be read by tests and in the console: what is shown, in whole numbers, and the arrays of the layer.
window.dcn = Object.freeze({
  state: () => {
    const { layer, position, second, tap, group, input, output, stacked, zoom } = store.get();
    return { layer, position, second, tap, group, input, output, stacked, zoom };
  },
  cloud: () => seen.variants.modulated.cloud,
  taps: () => seen.variants.modulated.taps,
  layer: () => {
    const plain = (array) => array && { shape: array.shape, data: [...array.data] };
    const { x, kernel, bias, offset, mask, ...geometry } = seen.layer;
    return {
      ...geometry,
      x: plain(x),
      kernel: plain(kernel),
      bias: plain(bias),
      offset: plain(offset),
      mask: plain(mask),
    };
  },
  sentence: () => sentence(seen),
});
