// A layer from arrays of one's own. What does not fit gets a sentence: an Error with a message to show.

import { resolve } from "./geometry.js";
import { greyFor } from "./playground.js";
import { channelCount, reorder } from "./orders.js";

export const SETTINGS = {
  kind: "offsets",
  order: "torchvision",
  window: [3, 3],
  strides: [1, 1],
  padding: "SAME",
  dilation: [1, 1],
  mode: "zeros",
};

const ROLES = [
  ["offset", /offset|^p$/i],
  ["mask", /mask|modulation/i],
  ["kernel", /kernel|weight/i],
  ["picture", /image|picture|input|map|^x$/i],
];
const words = (shape) => `(${shape.join(", ")})`;

/** What an array is: by its name, else by its shape. */
export function roleOf(name, shape) {
  const named = ROLES.find(([, pattern]) => pattern.test(name));
  if (named) return named[0];
  if (shape.length === 2 || (shape.length === 3 && [1, 3, 4].includes(shape[2]))) return "picture";
  return "offset";
}

/** The layer of dropped arrays {picture, offset, mask, kernel} (each {data, shape}), read as `settings` say; its picture. */
export function layerOfFiles(arrays, settings) {
  if (!arrays.offset)
    throw new Error("No offsets yet: drop an .npy or .npz file with an array named “offset”.");
  const { order, kind } = settings;
  const kernel = arrays.kernel && kernelOf(arrays.kernel, settings.window);
  const picture = arrays.picture ? pictureOf(arrays.picture) : blank(arrays.offset, settings);
  const window = resolve({
    ...settings,
    spatial: picture.shape.slice(0, 2),
    modes: [settings.mode, settings.mode],
  });
  if (window.out.some((size) => size < 1)) {
    throw new Error(
      `A window of ${settings.window.join(" × ")} leaves no output position in a map of ` +
        `${window.spatial.join(" × ")}: pad more, or use a smaller window or dilation.`,
    );
  }
  const taps = settings.window[0] * settings.window[1];
  const offset = channelsLast(arrays.offset, "offset", window);
  const groups = groupsOf(offset, settings);
  const shape = { window: settings.window, groups };
  const all = reorder(offset.data, order, kind, shape);
  const [offsets, packed] = kind === "both" ? split(all, groups * taps) : [all, null];
  let mask = packed;
  if (arrays.mask) {
    const given = channelsLast(arrays.mask, "mask", window);
    if (given.shape[2] !== groups * taps) {
      throw new Error(
        `mask has ${given.shape[2]} channels; wanted ${groups * taps}: one for each of ${taps} taps in ` +
          `${groups} offset group${groups > 1 ? "s" : ""}, as the offsets have.`,
      );
    }
    mask = reorder(given.data, order, "masks", shape);
  }
  const x = picture.shape[2] % groups && !kernel ? greyFor(groups, picture) : picture;
  const channels = x.shape[2];
  if (channels % groups) {
    throw new Error(
      `The map has ${channels} channel${channels > 1 ? "s" : ""}, which ${groups} offset groups cannot ` +
        "share evenly: drop the map that the layer reads, as “x” (height, width, channels).",
    );
  }
  const features = kernel ? kernel.shape[3] : 1;
  const featureGroups = kernel ? channels / kernel.shape[2] : 1;
  if (kernel && (!Number.isInteger(featureGroups) || features % featureGroups)) {
    throw new Error(
      `kernel has the shape ${words(kernel.shape)}, for ${kernel.shape[2]} input channels in a feature ` +
        `group; the map has ${channels}. Drop the map that the layer reads, as “x”.`,
    );
  }
  const layer = {
    name: "your arrays",
    kind: "deformable",
    ...window,
    groups,
    featureGroups,
    channels,
    features,
    inputs: [...Array(channels).keys()],
    outputs: [...Array(features).keys()],
    x,
    kernel: kernel ?? null,
    bias: null,
    offset: { data: offsets, shape: [...window.out, groups * taps * 2] },
    mask: mask && { data: mask, shape: [...window.out, groups * taps] },
  };
  return { layer, picture: arrays.picture ? picture : null };
}

/** One image of an array: the first of a batch. */
function first({ data, shape }, rank) {
  while (shape.length > rank) {
    shape = shape.slice(1);
    data = data.subarray(
      0,
      shape.reduce((a, b) => a * b, 1),
    );
  }
  return { data, shape };
}

function pictureOf(array) {
  let { data, shape } = first(array, array.shape.length === 4 ? 3 : array.shape.length);
  if (shape.length === 2) shape = [...shape, 1];
  if (shape.length !== 3) {
    throw new Error(
      `The picture has the shape ${words(array.shape)}; wanted (height, width) or (height, width, channels).`,
    );
  }
  const framework = [1, 3].includes(shape[0]) && ![1, 3, 4].includes(shape[2]); // (3, H, W)
  if (framework) ({ data, shape } = moveFirstLast({ data, shape }));
  if (/u1|b1/.test(array.dtype ?? "")) data = data.map((v) => v / (array.dtype.includes("u1") ? 255 : 1));
  return { data, shape };
}

/** A map without a picture, as large as offsets with "SAME" say. */
function blank(offset, { kind, order, window, strides }) {
  const { shape } = first(offset, 3);
  const channelsFirst =
    groupsIn(shape[0], order, kind, window) > 0 && !groupsIn(shape[2], order, kind, window);
  const [height, width] = (channelsFirst ? shape.slice(1) : shape.slice(0, 2)).map(
    (size, a) => size * strides[a],
  );
  return { data: new Float32Array(height * width), shape: [height, width, 1] };
}

function channelsLast(array, name, { out, spatial }) {
  const one = first(array, 3);
  const fits = (sizes) => sizes.every((size, a) => size === out[a]);
  if (one.shape.length === 3 && fits(one.shape.slice(0, 2))) return one;
  if (one.shape.length === 3 && fits(one.shape.slice(1))) return moveFirstLast(one);
  throw new Error(
    `${name} has the shape ${words(array.shape)}; wanted ${words([...out, "channels"])} or ` +
      `${words(["channels", ...out])}: a map of ${spatial.join(" × ")} has ${out.join(" × ")} output positions with these ` +
      "settings. Set window, strides, padding and dilation as in the layer, or drop the map that it reads.",
  );
}

function moveFirstLast({ data, shape: [channels, height, width] }) {
  const result = new Float32Array(data.length);
  for (let c = 0; c < channels; c++) {
    for (let p = 0; p < height * width; p++) result[p * channels + c] = data[c * height * width + p];
  }
  return { data: result, shape: [height, width, channels] };
}

/** How many offset groups so many channels are; 0 if they are no whole number. */
function groupsIn(channels, order, kind, window) {
  const per = (kind === "both" ? 3 : 2) * window[0] * window[1];
  const groups = Math.floor(channels / per);
  return channelCount(order, kind, { window, groups }) === channels ? groups : 0;
}

function groupsOf(offset, { order, kind, window }) {
  const groups = groupsIn(offset.shape[2], order, kind, window);
  if (groups) return groups;
  const taps = window[0] * window[1];
  const [held, per] = kind === "both" ? ["offsets and masks", 3 * taps] : ["offsets", 2 * taps];
  throw new Error(
    `offset has ${offset.shape[2]} channels; wanted a multiple of ${per}: ${held} of ${taps} taps for each ` +
      `offset group${order === "dcnv4" && kind === "both" ? ", padded to a multiple of 8" : ""}. Choose the window, or ` +
      "what the array holds.",
  );
}

function split(all, masks) {
  const rows = all.length / (3 * masks);
  const [offsets, mask] = [new Float32Array(rows * 2 * masks), new Float32Array(rows * masks)];
  for (let row = 0; row < rows; row++) {
    const start = row * 3 * masks;
    offsets.set(all.subarray(start, start + 2 * masks), row * 2 * masks);
    mask.set(all.subarray(start + 2 * masks, start + 3 * masks), row * masks);
  }
  return [offsets, mask];
}

/** A kernel as (kh, kw, C, F); PyTorch's is (F, C, kh, kw). */
function kernelOf({ data, shape }, window) {
  const fits = (sizes) => sizes.every((size, a) => size === window[a]);
  if (shape.length === 4 && fits(shape.slice(0, 2))) return { data, shape };
  if (shape.length !== 4 || !fits(shape.slice(2))) {
    throw new Error(
      `kernel has the shape ${words(shape)}; wanted ${words([...window, "C", "F"])}, or PyTorch's ` +
        `${words(["F", "C", ...window])}. Set the window to the kernel's.`,
    );
  }
  const [features, channels] = shape;
  const taps = window[0] * window[1];
  const result = new Float32Array(data.length);
  for (let f = 0; f < features; f++) {
    for (let c = 0; c < channels; c++) {
      for (let n = 0; n < taps; n++)
        result[(n * channels + c) * features + f] = data[(f * channels + c) * taps + n];
    }
  }
  return { data: result, shape: [...window, channels, features] };
}
