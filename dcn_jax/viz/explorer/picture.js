// A picture or one channel of a map as an image for the page, with what lies beyond its border.

import { INTO_MAP } from "./border.js";
import { isDark, tone } from "./colours.js";

const made = new WeakMap(); // array -> {key: URL}

/**
 * The data URL of `array` {data, shape (H, W, C)}: of one channel, or in colour if `channel` is null.
 * With a `margin`, the map goes on for so many pixels as `modes` say, paler; zeros stay empty.
 */
export function pictureUrl(array, channel = null, margin = 0, modes = ["zeros", "zeros"]) {
  const key = [channel, margin, modes, isDark()].join();
  if (!made.has(array)) made.set(array, {});
  return (made.get(array)[key] ??= draw(array, channel, margin, modes));
}

function draw({ data, shape: [height, width, channels] }, channel, margin, modes) {
  const colour = channel === null && channels >= 3;
  const [low, high] = range(data, channels, colour ? [0, 1, 2] : [channel ?? 0]);
  const share = (pixel, c) => (data[pixel * channels + c] - low) / (high - low || 1);
  const canvas = document.createElement("canvas");
  [canvas.height, canvas.width] = [height + 2 * margin, width + 2 * margin];
  const image = new ImageData(canvas.width, canvas.height);
  for (let row = -margin; row < height + margin; row++) {
    for (let column = -margin; column < width + margin; column++) {
      const inside = row >= 0 && row < height && column >= 0 && column < width;
      const zero =
        (modes[0] === "zeros" && (row < 0 || row >= height)) ||
        (modes[1] === "zeros" && (column < 0 || column >= width));
      if (zero && !inside) continue;
      const pixel = INTO_MAP[modes[0]](row, height) * width + INTO_MAP[modes[1]](column, width);
      const rgb = colour ? [0, 1, 2].map((c) => 255 * share(pixel, c)) : tone(share(pixel, channel ?? 0));
      image.data.set([...rgb, inside ? 255 : 110], 4 * ((row + margin) * canvas.width + column + margin));
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas.toDataURL();
}

function range(data, channels, chosen) {
  let [low, high] = [Infinity, -Infinity];
  for (let pixel = 0; pixel < data.length; pixel += channels) {
    for (const c of chosen) {
      const value = data[pixel + c];
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : [0, 1];
}
