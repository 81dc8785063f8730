// Windows over maps: padding, sizes, and where each tap lands without an offset. As dcn_jax/geometry.py.

/** (low, high) of one axis for "SAME", "VALID", or a number. */
export function pads(padding, size, window, stride, dilation) {
  if (typeof padding === "number") return [padding, padding];
  if (padding === "VALID") return [0, 0];
  const extent = (window - 1) * dilation + 1;
  const total = Math.max(0, (Math.ceil(size / stride) - 1) * stride + extent - size);
  return [Math.floor(total / 2), total - Math.floor(total / 2)];
}

/** How many outputs a window has along one axis. */
export function outputs(size, window, stride, dilation, [low, high]) {
  return Math.floor((size + low + high - ((window - 1) * dilation + 1)) / stride) + 1;
}

/** A window over a map of size `spatial`, every option written per axis. */
export function resolve({ spatial, window, strides, padding, dilation, modes }) {
  const pairs = [0, 1].map((a) => pads(padding, spatial[a], window[a], strides[a], dilation[a]));
  const out = [0, 1].map((a) => outputs(spatial[a], window[a], strides[a], dilation[a], pairs[a]));
  return { spatial, window, strides, dilation, modes, pads: pairs, out };
}

/** K, the number of taps. */
export const tapCount = (layer) => layer.window[0] * layer.window[1];

/** The place (row, column) of tap n in the window. */
export const tapPlace = (layer, n) => [Math.floor(n / layer.window[1]), n % layer.window[1]];

/** The window's middle tap, from which p_n is counted; of an even window the upper left of the two. */
const middleTap = (layer) => layer.window.map((size, a) => Math.floor((size - 1) / 2) * layer.dilation[a]);

/** p0: where an output position stands in the map, which is where its middle tap reads without an offset. */
export const placeOf = (layer, position) =>
  middleTap(layer).map((middle, a) => position[a] * layer.strides[a] - layer.pads[a][0] + middle);

/** p_n: how far tap n is from the middle tap. */
export const tapStep = (layer, n) =>
  tapPlace(layer, n).map((place, a) => place * layer.dilation[a] - middleTap(layer)[a]);

/** The middle of an output position's window in the map: [scale, shift] for each axis. */
export function middle(layer) {
  return [0, 1].map((a) => [
    layer.strides[a],
    ((layer.window[a] - 1) * layer.dilation[a]) / 2 - layer.pads[a][0],
  ]);
}

/** `middle` through several layers, into the map of the first. */
export function middleThrough(layers) {
  return layers.map(middle).reduce((outer, inner) =>
    outer.map(([scale, shift], a) => {
      const [s, b] = inner[a];
      return [scale * s, scale * b + shift];
    }),
  );
}

/** The output position whose window has its middle nearest to a point of the map. */
export function positionAt(point, middles, out) {
  return point.map((p, a) => {
    const index = Math.round((p - middles[a][1]) / middles[a][0]);
    return Math.min(Math.max(index, 0), out[a] - 1);
  });
}
