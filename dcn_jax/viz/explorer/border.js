// What a map is beyond its border, and which pixels a fractional position reads along one axis.
// The rules of dcn_jax/sampling.py, by the names of `padding_mode`.

const FAR = 2 ** 30; // a larger offset is far: only its sign is used

const modulo = (index, period) => ((index % period) + period) % period;
const clip = (index, size) => Math.min(Math.max(index, 0), size - 1);

function reflect(index, size) {
  const period = Math.max(2 * size - 2, 1);
  const inside = modulo(index, period);
  return inside < size ? inside : period - inside;
}

function symmetric(index, size) {
  const inside = modulo(index, 2 * size);
  return inside < size ? inside : 2 * size - 1 - inside;
}

/** For an index that may lie beyond the border, the pixel of the map. With "zeros" that is not read. */
export const INTO_MAP = { zeros: clip, edge: clip, wrap: modulo, reflect, symmetric };

export const MODES = Object.keys(INTO_MAP).map((mode) => [mode, mode]); // for a select

/** The two pixels of an axis that the position `regular + offset` reads: [{index, pixel, weight, read}]. */
export function neighbours(regular, offset, size, mode) {
  const near = Math.abs(offset) < FAR; // false for NaN, whose weights then are NaN
  const kept = Math.abs(offset) >= FAR ? 0 : offset;
  const below = Math.floor(kept);
  const fraction = kept - below;
  const far = mode === "edge" && !(offset < 0) ? size : -2;
  const first = near ? regular + below : far;
  return [
    [first, 1 - fraction],
    [first + 1, fraction],
  ].map(([index, weight]) => {
    const inside = index >= 0 && index < size;
    const read = mode === "zeros" ? inside : mode === "edge" ? !Number.isNaN(offset) : near;
    return { index, pixel: INTO_MAP[mode](index, size), weight, read };
  });
}
