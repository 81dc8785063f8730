// Where an output position of a stack of layers reads in the map of the first one.

import { corners, tapAt } from "./layer.js";
import { tapCount } from "./geometry.js";

const MOST = 3000; // points that are drawn, the strongest first

/** The layers on the way to layer `index`, itself the last: each reads the result of the one before it. */
export function wayTo(layers, index) {
  const way = [];
  for (let i = index; i !== null && i !== undefined; i = layers[i].before) way.unshift(layers[i]);
  return way;
}

/**
 * The points {at, weight} that `position` of the last layer reads in the map of the first.
 *
 * A point's weight is the product, along its path, of modulations and of the shares of the four pixels on which a
 * fractional point of an inner map stands. Paths that meet on a pixel are added up there.
 */
export function through(layers, position, variant = "modulated") {
  let reached = new Map([[position.join(), { position, weight: 1 }]]);
  for (const layer of layers.slice(1).reverse()) {
    const next = new Map();
    for (const { position, weight } of reached.values()) {
      for (const tap of tapsAt(layer, position, variant)) {
        for (const corner of corners(layer, tap)) {
          const share = weight * tap.modulation * corner.weight;
          if (!corner.read || !share) continue;
          const key = corner.pixel.join();
          const met = next.get(key);
          if (met) met.weight += share;
          else next.set(key, { position: corner.pixel, weight: share });
        }
      }
    }
    reached = next;
  }
  const points = [];
  for (const { position, weight } of reached.values()) {
    for (const tap of tapsAt(layers[0], position, variant)) {
      points.push({ at: tap.at, weight: weight * tap.modulation });
    }
  }
  points.sort((a, b) => b.weight - a.weight);
  return { points: points.slice(0, MOST), found: points.length };
}

function tapsAt(layer, position, variant) {
  const taps = [];
  for (let g = 0; g < layer.groups; g++) {
    for (let n = 0; n < tapCount(layer); n++) taps.push(tapAt(layer, position, g, n, variant));
  }
  return taps;
}
