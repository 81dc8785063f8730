// Everything that is drawn and said about a state, computed once for all parts of the page.

import { middleThrough, tapCount } from "./geometry.js";
import { VARIANTS, detail, response, tapAt } from "./layer.js";
import { through } from "./stack.js";
import { chainOf, marginOf } from "./frame.js";

export function look(state) {
  const layer = state.layers[state.layer];
  const chain = chainOf(state);
  const groups = state.group < 0 ? [...Array(layer.groups).keys()] : [state.group];
  const { tap, input, output, position } = state;
  const variants = {};
  for (const variant of Object.keys(VARIANTS)) {
    const clouds = state.stacked ? through(chain, position, variant) : null;
    variants[variant] = {
      taps: tapsAt(layer, position, groups, variant),
      cloud: clouds,
      y: response(layer, position, output, variant),
    };
  }
  const middles = middleThrough(chain);
  return {
    state,
    layer,
    chain,
    groups,
    variants,
    base: chain[0],
    margin: marginOf(chain[0]),
    middles,
    middle: position.map((p, a) => p * middles[a][0] + middles[a][1]),
    second: state.second.map((p, a) => p * middles[a][0] + middles[a][1]),
    secondTaps: tapsAt(layer, state.second, groups, "modulated"),
    chosen: detail(layer, position, tap.g, tap.n, input, output),
    most: mostModulation(layer),
  };
}

function tapsAt(layer, position, groups, variant) {
  return groups.flatMap((g) =>
    Array.from({ length: tapCount(layer) }, (_, n) => tapAt(layer, position, g, n, variant)),
  );
}

const largest = new WeakMap();

/** The largest modulation of a layer, at least 1: what the brightest colour means. */
function mostModulation(layer) {
  if (!layer.mask) return 1;
  if (!largest.has(layer))
    largest.set(
      layer,
      layer.mask.data.reduce((most, m) => (m > most ? m : most), 1),
    );
  return largest.get(layer);
}
