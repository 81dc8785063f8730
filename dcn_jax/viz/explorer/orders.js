// Orders of the channels of offsets and masks, by the names of `dcn_jax.interop.reorder_offsets`.
//
// A channel is {kind: "offset" or "mask", group, tap: [row, column], axis: 0 (y) or 1 (x)}.

export const ORDERS = {
  torchvision: "torchvision, mmcv, detectron2, Paddle, ONNX, dcn_jax",
  all_y_all_x: "pytorch-deform-conv-v2: all y, then all x",
  all_x_all_y: "MindSpore, Ascend: all x, then all y",
  dcnv3: "DCNv3: (x, y), column by column",
  dcnv4: "DCNv4: as DCNv3, packed by group",
};

/** How many channels an array of "offsets", "masks" or "both" has in an order. */
export function channelCount(order, kind, { window, groups }) {
  const masks = groups * window[0] * window[1];
  if (kind === "masks") return masks;
  if (kind === "offsets") return 2 * masks;
  return order === "dcnv4" ? Math.ceil((3 * masks) / 8) * 8 : 3 * masks;
}

/** The index of a channel in an order; `kind` says what the array holds. */
export function indexOf(order, kind, { window, groups }, channel) {
  const [kh, kw] = window;
  const taps = kh * kw;
  const { group, axis } = channel;
  const [row, column] = channel.tap;
  const columnwise = order === "dcnv3" || order === "dcnv4";
  const tap = columnwise ? column * kh + row : row * kw + column;
  const packed = order === "dcnv4" && kind === "both";
  if (channel.kind === "mask") {
    if (packed) return group * 3 * taps + 2 * taps + tap;
    return (kind === "both" ? 2 * groups * taps : 0) + group * taps + tap;
  }
  const first = packed ? group * 3 * taps : group * 2 * taps;
  switch (order) {
    case "torchvision":
      return first + 2 * tap + axis;
    case "all_y_all_x":
      return axis * groups * taps + group * taps + tap;
    case "all_x_all_y":
      return (1 - axis) * groups * taps + group * taps + tap;
    default:
      return first + 2 * tap + (1 - axis);
  }
}

/** Every channel of an array, in our own order. */
export function channelsOf(kind, { window, groups }) {
  const all = [];
  for (const part of kind === "both" ? ["offset", "mask"] : [kind.slice(0, -1)]) {
    for (let group = 0; group < groups; group++) {
      for (let row = 0; row < window[0]; row++) {
        for (let column = 0; column < window[1]; column++) {
          for (let axis = 0; axis < (part === "mask" ? 1 : 2); axis++) {
            all.push({ kind: part, group, tap: [row, column], axis });
          }
        }
      }
    }
  }
  return all;
}

/** The channel at an index of an order; null for the padding at the end of DCNv4's. */
export function channelAt(order, kind, shape, index) {
  return channelsOf(kind, shape).find((channel) => indexOf(order, kind, shape, channel) === index) ?? null;
}

/** Rows of channels (…, channels) in our order, from another one. */
export function reorder(data, order, kind, shape) {
  const theirs = channelsOf(kind, shape).map((channel) => indexOf(order, kind, shape, channel));
  const count = channelCount(order, kind, shape);
  const rows = data.length / count;
  const ours = new Float32Array(rows * theirs.length);
  for (let row = 0; row < rows; row++) {
    theirs.forEach((from, to) => {
      ours[row * theirs.length + to] = data[row * count + from];
    });
  }
  return ours;
}
