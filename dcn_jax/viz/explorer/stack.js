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
 * fractional point of an inner map stands. Paths that meet at a place are added up there.
 */
export function through(layers, position, variant = "modulated") {
  let reached = new Map();
  add(reached, position, 1);
  for (const layer of layers.slice(1).reverse()) {
    const next = new Map();
    for (const { at, weight } of reached.values()) {
      for (const tap of tapsAt(layer, at, variant)) {
        for (const corner of corners(layer, tap)) {
          const share = weight * tap.modulation * corner.weight;
          if (corner.read && share) add(next, corner.pixel, share);
        }
      }
    }
    reached = next;
  }
  const points = new Map();
  for (const { at, weight } of reached.values()) {
    for (const tap of tapsAt(layers[0], at, variant)) add(points, tap.at, weight * tap.modulation);
  }
  const all = [...points.values()].sort((a, b) => b.weight - a.weight);
  return { points: all.slice(0, MOST), found: all.length };
}

/** Add to the weight of a place; paths that meet there add up. */
function add(places, at, weight) {
  const key = at.join();
  const met = places.get(key);
  if (met) met.weight += weight;
  else places.set(key, { at, weight });
}

function tapsAt(layer, position, variant) {
  const taps = [];
  for (let g = 0; g < layer.groups; g++) {
    for (let n = 0; n < tapCount(layer); n++) taps.push(tapAt(layer, position, g, n, variant));
  }
  return taps;
}
