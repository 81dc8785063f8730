// What part of which map is shown.

import { middleThrough, placeOf, tapCount, tapStep } from "./geometry.js";
import { wayTo } from "./stack.js";

const SHOWN = 48; // pixels of a map that are shown at first

/** The layers that are drawn as one: the chosen one alone, or all that lead to it. */
export const chainOf = (state) =>
  state.stacked ? wayTo(state.layers, state.layer) : [state.layers[state.layer]];

/**
 * The map that is shown (`base`: the layer that reads it), how much it is enlarged (`zoom`), and which part of it is
 * in view (`frame`: [top, left, height, width] in pixels). The view stays where it is while the position is well inside.
 */
export function frameOf(state, before) {
  const chain = chainOf(state);
  const [base] = chain;
  const margin = marginOf(base);
  const full = base.spatial.map((size) => size + 2 * margin);
  const sameSize = before?.base.spatial.join() === base.spatial.join();
  const zoom = state.zoom && (sameSize || !before) ? state.zoom : Math.max(1, Math.max(...full) / SHOWN);
  const point = middleThrough(chain).map(([scale, shift], a) => state.position[a] * scale + shift);
  if (before?.base === base && before.zoom === zoom && isWellInside(point, before.frame)) {
    return { base, zoom, frame: before.frame };
  }
  const size = full.map((length) => length / zoom);
  const start = size.map((length, a) => {
    const [low, high] = [-margin - 0.5, base.spatial[a] + margin - 0.5];
    return Math.min(Math.max(point[a] - length / 2, low), high - length);
  });
  return { base, zoom, frame: [...start, ...size] };
}

const isWellInside = (point, [top, left, height, width]) =>
  Math.abs(point[0] - top - height / 2) < 0.3 * height && Math.abs(point[1] - left - width / 2) < 0.3 * width;

const margins = new WeakMap();

/** How many pixels beyond the map are shown: as far as taps read, a sixth of the map at most. */
export function marginOf(layer) {
  if (!margins.has(layer)) {
    const most = Math.max(2, Math.ceil(Math.max(...layer.spatial) / 6));
    margins.set(layer, Math.min(Math.ceil(farthest(layer)), most));
  }
  return margins.get(layer);
}

/** How far beyond the map a tap reads, of all taps at all positions; at least 1. */
function farthest(layer) {
  const taps = tapCount(layer);
  const steps = Array.from({ length: taps }, (_, n) => tapStep(layer, n));
  let far = 1;
  let at = 0;
  for (let i = 0; i < layer.out[0]; i++) {
    for (let j = 0; j < layer.out[1]; j++) {
      const origin = placeOf(layer, [i, j]);
      for (let t = 0; t < layer.groups * taps; t++) {
        for (let a = 0; a < 2; a++, at++) {
          const point = origin[a] + steps[t % taps][a] + (layer.offset ? layer.offset.data[at] : 0);
          const beyond = Math.max(-point, point - layer.spatial[a] + 1);
          if (beyond > far && beyond < 2 ** 30) far = beyond;
        }
      }
    }
  }
  return far;
}
