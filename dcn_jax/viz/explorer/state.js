// What the page shows: one object, and those who want to know when it changes.

import { groupOf, inputsOf } from "./layer.js";
import { middle, middleThrough, tapCount } from "./geometry.js";
import { wayTo } from "./stack.js";

const clamp = (value, size) => Math.min(Math.max(Math.round(value) || 0, 0), size - 1);
const SHOWN = 48; // pixels of a map that are shown at first

/** A store: `get`, `set` with what changes, `listen`. */
export function makeStore(initial) {
  const listeners = [];
  let state = settle(initial, {});
  return {
    get: () => state,
    set(change) {
      state = settle({ ...state, ...change }, change, state);
      for (const listener of listeners) listener(state);
    },
    listen: (listener) => listeners.push(listener),
  };
}

/** The layers that are drawn as one: the chosen one alone, or all that lead to it. */
export const chainOf = (state) =>
  state.stacked ? wayTo(state.layers, state.layer) : [state.layers[state.layer]];

/** A state that makes sense, after a change: everything within its range, channels and groups that fit. */
function settle(next, change, before) {
  const state = { ...next };
  state.layer = clamp(state.layer, state.layers.length);
  const layer = state.layers[state.layer];
  const old = before?.layers[before.layer];
  const other = old !== layer;
  for (const name of ["position", "second"]) {
    const moved =
      old && other ? state[name].map((p, a) => ((p + 0.5) * layer.out[a]) / old.out[a] - 0.5) : state[name];
    state[name] = moved.map((p, a) => clamp(p, layer.out[a]));
  }
  state.input = clamp(state.input, layer.inputs.length);
  state.output = clamp(state.output, layer.outputs.length);
  if (state.group >= layer.groups) state.group = -1;
  let { g, n } = state.tap;
  g = clamp(g, layer.groups);
  if ("input" in change) g = groupOf(layer, state.input);
  if (state.group >= 0) {
    if ("input" in change || "tap" in change) state.group = g;
    else g = state.group;
  }
  state.tap = { g, n: clamp(n, tapCount(layer)) };
  const inputs = inputsOf(layer, g);
  if (!inputs.includes(state.input) && inputs.length) {
    state.input = inputs[state.input % inputs.length];
  }
  if (!state.dragging) state.frame = frameOf(state, before);
  return state;
}

/** What part of the map is shown, [top, left, height, width] in pixels: all, or a part around the position. */
function frameOf(state, before) {
  const chain = chainOf(state);
  const margin = marginOf(chain[0]);
  const full = chain[0].spatial.map((size) => size + 2 * margin);
  const kept = before?.frame && before.base === chain[0] && before.zoom === state.zoom ? before.frame : null;
  state.base = chain[0];
  if (
    state.zoom === 0 ||
    (before && before.base !== chain[0] && before.base.spatial.join() !== chain[0].spatial.join())
  ) {
    state.zoom = Math.max(1, Math.max(...full) / SHOWN);
  }
  const size = full.map((length) => length / state.zoom);
  const point = middleThrough(chain).map(([scale, shift], a) => state.position[a] * scale + shift);
  const calm =
    kept && [0, 1].every((a) => Math.abs(point[a] - kept[a] - kept[2 + a] / 2) < 0.3 * kept[2 + a]);
  if (calm) return kept;
  const start = size.map((length, a) => {
    const [low, high] = [-margin - 0.5, chain[0].spatial[a] + margin - 0.5];
    return Math.min(Math.max(point[a] - length / 2, low), high - length);
  });
  return [...start, ...size];
}

const margins = new WeakMap();

/** How many pixels beyond the map are shown: as far as taps read, a sixth of the map at most. */
export function marginOf(layer) {
  if (!margins.has(layer)) margins.set(layer, reach(layer));
  return margins.get(layer);
}

function reach(layer) {
  const most = Math.ceil(Math.max(...layer.spatial) / 6);
  const taps = tapCount(layer);
  const middles = middle(layer);
  let far = 1;
  for (let i = 0; i < layer.out[0]; i++) {
    for (let j = 0; j < layer.out[1]; j++) {
      const at = [i, j].map((p, a) => p * middles[a][0] + middles[a][1]);
      for (let t = 0; t < layer.groups * taps; t++) {
        for (let a = 0; a < 2; a++) {
          const tap = a === 0 ? Math.floor((t % taps) / layer.window[1]) : t % layer.window[1];
          const step = (tap - (layer.window[a] - 1) / 2) * layer.dilation[a];
          const delta = layer.offset
            ? layer.offset.data[2 * ((i * layer.out[1] + j) * layer.groups * taps + t) + a]
            : 0;
          const p = at[a] + step + delta;
          const beyond = Math.max(-p, p - layer.spatial[a] + 1);
          if (beyond > far && beyond < 2 ** 30) far = beyond;
        }
      }
    }
  }
  return Math.min(Math.ceil(far), Math.max(most, 2));
}
