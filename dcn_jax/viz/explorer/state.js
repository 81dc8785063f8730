// What the page shows: one object, and those who want to know when it changes.

import { groupOf, inputsOf } from "./layer.js";
import { frameOf } from "./frame.js";
import { tapCount } from "./geometry.js";

const clamp = (value, size) => Math.min(Math.max(Math.round(value) || 0, 0), size - 1);

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

/** A state that makes sense, after a change: everything within its range, channels and groups that fit. */
function settle(next, change, before) {
  const layer = next.layers[clamp(next.layer, next.layers.length)];
  const state = {
    ...next,
    layer: next.layers.indexOf(layer),
    output: clamp(next.output, layer.outputs.length),
    ...positions(next, layer, before?.layers[before.layer] ?? layer),
    ...groupsAndInput(next, layer, change),
  };
  return state.dragging ? state : { ...state, ...frameOf(state, before) };
}

/** The two positions within the output of a layer; after a change of layer at the same place as in the old one. */
function positions({ position, second }, layer, old) {
  const place = (p, a) => (layer === old ? p : ((p + 0.5) * layer.out[a]) / old.out[a] - 0.5);
  const [here, there] = [position, second].map((at) => at.map((p, a) => clamp(place(p, a), layer.out[a])));
  return { position: here, second: there };
}

/**
 * The offset groups that are shown, the chosen tap and the input channel. A tap of one group reads the channels of
 * that group alone, so what has changed last pulls the others along.
 */
function groupsAndInput(next, layer, change) {
  const input = clamp(next.input, layer.inputs.length);
  const shown = next.group < layer.groups ? next.group : -1; // -1: all
  let g = clamp(next.tap.g, layer.groups);
  if ("input" in change) g = groupOf(layer, input);
  else if (shown >= 0 && !("tap" in change)) g = shown;
  const inputs = inputsOf(layer, g);
  return {
    group: shown < 0 ? shown : g,
    tap: { g, n: clamp(next.tap.n, tapCount(layer)) },
    input: inputs.includes(input) || !inputs.length ? input : inputs[input % inputs.length],
  };
}
