// One layer at one output position: where its taps read, what they read, and what each adds to y.
//
//     y(p0) = Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  b
//
// A layer has a window (geometry.js), `groups` (OG), `featureGroups`, and arrays {data, shape}: x (H, W, C),
// kernel (kh, kw, C / featureGroups, F), bias (F,), offset (Ho, Wo, OG * K * 2), mask (Ho, Wo, OG * K). A page of a
// large network keeps some channels only: `inputs` and `outputs` say which, out of `channels` and `features`.

import { neighbours } from "./border.js";
import { placeOf, tapCount, tapStep } from "./geometry.js";

/** What the three panels differ in: whether offsets and modulation count. */
export const VARIANTS = {
  regular: { moved: false, modulated: false },
  deformable: { moved: true, modulated: false },
  modulated: { moved: true, modulated: true },
};

/** Where tap n of offset group g reads for an output position, and how strongly. */
export function tapAt(layer, position, g, n, variant = "modulated") {
  const { moved, modulated } = VARIANTS[variant];
  const taps = tapCount(layer);
  const place = (position[0] * layer.out[1] + position[1]) * layer.groups * taps + g * taps + n;
  const origin = placeOf(layer, position);
  const step = tapStep(layer, n);
  const delta = [0, 1].map((a) => (moved && layer.offset ? layer.offset.data[2 * place + a] : 0));
  const regular = [0, 1].map((a) => origin[a] + step[a]);
  return {
    g,
    n,
    origin,
    step,
    delta,
    regular,
    at: [0, 1].map((a) => regular[a] + delta[a]),
    modulation: modulated && layer.mask ? layer.mask.data[place] : 1,
  };
}

/** The four pixels around a tap's point: where they are, which pixel of the map is read, and their weights. */
export function corners(layer, tap) {
  const [rows, columns] = [0, 1].map((a) =>
    neighbours(tap.regular[a], tap.delta[a], layer.spatial[a], layer.modes[a]),
  );
  return rows.flatMap((row) =>
    columns.map((column) => ({
      index: [row.index, column.index],
      pixel: [row.pixel, column.pixel],
      weight: row.weight * column.weight,
      read: row.read && column.read,
    })),
  );
}

/** The map's value at one corner in one kept channel; zero where the corner is not read. */
export function valueAt(layer, corner, input) {
  if (!corner.read) return 0;
  const [, width, kept] = layer.x.shape;
  return layer.x.data[(corner.pixel[0] * width + corner.pixel[1]) * kept + input];
}

/** x(p0 + p_n + Δp_n) in one kept channel. */
export function sample(layer, around, input) {
  return around.reduce((sum, corner) => sum + corner.weight * valueAt(layer, corner, input), 0);
}

/** Whether a kept input channel and a kept output channel are of the same feature group. */
export function connects(layer, input, output) {
  const group = (channels, channel) => Math.floor(channel / (channels / layer.featureGroups));
  return group(layer.channels, layer.inputs[input]) === group(layer.features, layer.outputs[output]);
}

/** w_n from a kept input channel to a kept output channel; 1 without a kernel, 0 between feature groups. */
export function weight(layer, n, input, output) {
  if (!connects(layer, input, output)) return 0;
  if (!layer.kernel) return 1;
  const [, , perGroup, kept] = layer.kernel.shape;
  // Of grouped kernels all rows are kept.
  const row = layer.featureGroups > 1 ? layer.inputs[input] % perGroup : input;
  return layer.kernel.data[(n * perGroup + row) * kept + output];
}

/** The offset group that reads a kept input channel. */
export const groupOf = (layer, input) => Math.floor(layer.inputs[input] / (layer.channels / layer.groups));

/** The kept input channels that an offset group reads. */
export function inputsOf(layer, g) {
  return layer.inputs.map((_, input) => input).filter((input) => groupOf(layer, input) === g);
}

/** y(p0) in one kept output channel, summed over all taps and all kept input channels. */
export function response(layer, position, output, variant = "modulated") {
  let sum = layer.bias ? layer.bias.data[output] : 0;
  for (let g = 0; g < layer.groups; g++) {
    const inputs = inputsOf(layer, g).filter((input) => connects(layer, input, output));
    for (let n = 0; n < tapCount(layer); n++) {
      const tap = tapAt(layer, position, g, n, variant);
      const around = corners(layer, tap);
      for (const input of inputs) {
        sum += weight(layer, n, input, output) * sample(layer, around, input) * tap.modulation;
      }
    }
  }
  return sum;
}

/** All numbers of one tap, for one input and one output channel. */
export function detail(layer, position, g, n, input, output, variant = "modulated") {
  const tap = tapAt(layer, position, g, n, variant);
  const around = corners(layer, tap).map((corner) => ({ ...corner, value: valueAt(layer, corner, input) }));
  const w = weight(layer, n, input, output);
  const x = sample(layer, around, input);
  return { ...tap, corners: around, weight: w, sample: x, adds: w * x * tap.modulation };
}
