// Where an output position of a stack of layers reads in the map of the first one.

import { VARIANTS, corners, tapAt } from "./layer.js";
import { tapCount } from "./geometry.js";

const MOST = 3000; // points that are drawn, the strongest first

/** The layers on the way to layer `index`, itself the last: each reads the result of the one before it. */
export function wayTo(layers, index) {
  const way = [];
  for (let i = index; i !== null && i !== undefined; i = layers[i].before) way.unshift(layers[i]);
  return way;
}

/**
 * The points {at, weight} that `position` of the last layer reads in the map of the first, the strongest first.
 *
 * A point's weight is the product, along its path, of modulations and of the shares of the four pixels on which a
 * fractional point of an inner map stands. Paths that meet on a pixel are added up.
 */
export function through(layers, position, variant = "modulated") {
  let reached = [{ at: position, weight: 1 }];
  for (const layer of layers.slice(1).reverse()) {
    const map = emptyMap(layer.spatial);
    for (const { at, weight } of reached) {
      for (const tap of tapsAt(layer, at, variant)) {
        for (const corner of corners(layer, tap)) {
          if (corner.read) map.add(corner.pixel, weight * tap.modulation * corner.weight);
        }
      }
    }
    reached = map.points();
  }
  const [first] = layers;
  const read = reached.flatMap(({ at, weight }) =>
    tapsAt(first, at, variant).map((tap) => ({ at: tap.at, weight: weight * tap.modulation })),
  );
  const points = first.offset && VARIANTS[variant].moved ? read : meet(read);
  points.sort((a, b) => b.weight - a.weight);
  return { points: points.slice(0, MOST), found: points.length };
}

/** Weights on the pixels of a map. */
function emptyMap([height, width]) {
  const weights = new Float64Array(height * width);
  return {
    add([row, column], weight) {
      weights[row * width + column] += weight || 0; // NaN reads nothing
    },
    points() {
      const points = [];
      weights.forEach((weight, i) => {
        if (weight) points.push({ at: [Math.floor(i / width), i % width], weight });
      });
      return points;
    },
  };
}

/** Points at whole pixels, of which several may be at the same one, as one each. */
function meet(points) {
  const places = new Map();
  for (const { at, weight } of points) {
    const key = at.join();
    const met = places.get(key);
    if (met) met.weight += weight;
    else places.set(key, { at, weight });
  }
  return [...places.values()];
}

function tapsAt(layer, position, variant) {
  const taps = [];
  for (let g = 0; g < layer.groups; g++) {
    for (let n = 0; n < tapCount(layer); n++) taps.push(tapAt(layer, position, g, n, variant));
  }
  return taps;
}
