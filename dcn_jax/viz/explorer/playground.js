// A layer without a network: a drawn picture, a small kernel, and offsets that are zero, waves or random.

import { resolve, tapCount } from "./geometry.js";

export const KINDS = ["zero", "sine", "random"];
export const SLIDERS = {
  kind: "sine",
  window: 3,
  dilation: 1,
  stride: 1,
  maxOffset: 1.5,
  mode: "zeros",
  groups: 1,
  seed: 0,
};

const SIZE = 24;

/** A ring, a bar and a slope: something to see at every place. `(24, 24, 1)`, in [0, 1]. */
export function drawnPicture() {
  const data = new Float32Array(SIZE * SIZE);
  const soft = (distance, width) => Math.min(Math.max(width - Math.abs(distance) + 0.5, 0), 1);
  for (let y = 0; y < SIZE; y++) {
    for (let x = 0; x < SIZE; x++) {
      const ring = soft(Math.hypot(y - 9, x - 9) - 5.5, 1.2);
      const bar = soft((y - x - 1) / Math.SQRT2, 1.1) * (y > 12 ? 1 : 0);
      data[y * SIZE + x] = Math.max(ring, bar, 0.25 * (x / SIZE));
    }
  }
  return { data, shape: [SIZE, SIZE, 1] };
}

/** A number in [0, 1) from whole numbers, the same every time. */
export function randomAt(...key) {
  let state = 0x9e3779b9;
  for (const part of key) {
    state = Math.imul(state ^ (part + 0x7f4a7c15), 0x85ebca6b);
    state ^= state >>> 13;
    state = Math.imul(state, 0xc2b2ae35);
    state ^= state >>> 16;
  }
  return (state >>> 0) / 2 ** 32;
}

const FIELDS = {
  zero: () => ({ offset: [0, 0], mask: 1 }),
  sine: (i, j, g, n) => {
    const phase = (2 * Math.PI * n) / 9 + 2 * g;
    return {
      offset: [1.6 * Math.sin(i / 3 + phase), 1.6 * Math.cos(j / 4 + phase)],
      mask: 0.5 + 0.5 * Math.sin((i + j) / 3 + phase),
    };
  },
  random: (i, j, g, n, seed) => ({
    offset: [0, 1].map((axis) => 4 * randomAt(seed, i, j, g, n, axis) - 2),
    mask: randomAt(seed, i, j, g, n, 2),
  }),
};

// Kernels that everybody knows, for a window of 3; larger windows take the mean alone.
const KERNELS = [
  ["mean", () => 1],
  ["edges across (Sobel, y)", (y, x) => y * (x === 0 ? 2 : 1)],
  ["edges along (Sobel, x)", (y, x) => x * (y === 0 ? 2 : 1)],
  ["Laplace", (y, x) => (y === 0 && x === 0 ? -4 : Math.abs(y) + Math.abs(x) === 1 ? 1 : 0)],
];

/** The layer that the sliders describe, over a picture {data, shape (H, W, channels)}. */
export function playgroundLayer(settings, picture) {
  const { kind, window, dilation, stride, maxOffset, mode, groups, seed } = settings;
  const [height, width] = picture.shape;
  const layer = {
    name: "made here",
    kind: "deformable",
    groups,
    featureGroups: 1,
    channels: groups,
    inputs: [...Array(groups).keys()],
    ...resolve({
      spatial: [height, width],
      window: [window, window],
      strides: [stride, stride],
      padding: "SAME",
      dilation: [dilation, dilation],
      modes: [mode, mode],
    }),
  };
  const kernels = window === 3 ? KERNELS : KERNELS.slice(0, 1);
  const taps = tapCount(layer);
  layer.features = kernels.length;
  layer.outputs = [...kernels.keys()];
  layer.outputNames = kernels.map(([name]) => name);

  const kernel = new Float32Array(taps * groups * kernels.length);
  kernels.forEach(([name, value], f) => {
    for (let n = 0; n < taps; n++) {
      const [row, column] = [Math.floor(n / window) - (window - 1) / 2, (n % window) - (window - 1) / 2];
      const share = name === "mean" ? 1 / taps : 1;
      for (let g = 0; g < groups; g++)
        kernel[(n * groups + g) * kernels.length + f] = (value(row, column) * share) / groups;
    }
  });

  const [outHeight, outWidth] = layer.out;
  const offset = new Float32Array(outHeight * outWidth * groups * taps * 2);
  const mask = new Float32Array(outHeight * outWidth * groups * taps);
  const bounded = (z) => (maxOffset > 0 ? maxOffset * Math.tanh(z / maxOffset) : 0);
  let at = 0;
  for (let i = 0; i < outHeight; i++) {
    for (let j = 0; j < outWidth; j++) {
      for (let g = 0; g < groups; g++) {
        for (let n = 0; n < taps; n++, at++) {
          const field = FIELDS[kind](i, j, g, n, seed);
          offset.set(field.offset.map(bounded), 2 * at);
          mask[at] = field.mask;
        }
      }
    }
  }
  return {
    ...layer,
    x: greyFor(groups, picture),
    kernel: { data: kernel, shape: [window, window, groups, kernels.length] },
    bias: null,
    offset: { data: offset, shape: [outHeight, outWidth, groups * taps * 2] },
    mask: { data: mask, shape: [outHeight, outWidth, groups * taps] },
  };
}

/** A picture in grey, once for every offset group. */
export function greyFor(groups, { data, shape: [height, width, colours] }) {
  const counted = Math.min(colours, 3); // a fourth channel is opacity
  const x = new Float32Array(height * width * groups);
  for (let pixel = 0; pixel < height * width; pixel++) {
    let sum = 0;
    for (let c = 0; c < counted; c++) sum += data[pixel * colours + c];
    x.fill(sum / counted, pixel * groups, (pixel + 1) * groups);
  }
  return { data: x, shape: [height, width, groups] };
}
