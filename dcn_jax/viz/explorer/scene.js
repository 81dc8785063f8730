// What a stage shows that does not take the pointer: the map, the points, lines, squares and pixels.

import { heat, hueOf } from "./colours.js";
import { svg } from "./dom.js";
import { pictureUrl } from "./picture.js";

/** Whether a point can be drawn; offsets may be infinite or NaN. */
export const finite = (point) => point.every((p) => Math.abs(p) < 2 ** 30);

/** The pattern of what is not read: the inside of a `defs`. */
export function hatch(id) {
  const lines = svg("path", { d: "M0 1L1 0", class: "hatch", "vector-effect": "non-scaling-stroke" });
  return svg(
    "defs",
    {},
    svg("pattern", { id: `${id}-hatch`, width: 1, height: 1, patternUnits: "userSpaceOnUse" }, lines),
  );
}

/** The map: a picture of it, what is beyond its border, and the border. */
export function drawGround(part, { base, state, margin }, id, unit) {
  const [height, width] = base.spatial;
  const own = state.ground === "map" || !state.picture;
  const array = own ? base.x : state.picture;
  const continued = own || array.shape[0] === height;
  const extra = continued ? margin : 0;
  // With all layers stacked the map is that of the first layer, whose channels are others.
  const channel = own ? (state.stacked ? 0 : state.input) : array.shape[2] >= 3 ? null : 0;
  const href = pictureUrl(array, channel, extra, base.modes);
  const key = [href, base, unit];
  if (key.every((value, i) => value === part.drawn?.[i])) return;
  part.drawn = key;
  const box = (extra) => ({
    x: -0.5 - extra,
    y: -0.5 - extra,
    width: width + 2 * extra,
    height: height + 2 * extra,
  });
  part.replaceChildren(
    svg("rect", { ...box(margin), fill: `url(#${id}-hatch)` }),
    svg("image", { ...box(extra), href, preserveAspectRatio: "none", class: "pixelated" }),
    svg("rect", { ...box(0), class: "border", "stroke-width": 0.35 * unit }),
  );
}

/** Points through a stack of layers: the larger its weight, the larger and brighter a point. */
export function drawCloud(part, cloud, unit) {
  const points = cloud ? cloud.points.filter(({ at }) => finite(at)) : [];
  const most = points.length ? points[0].weight : 1;
  part.replaceChildren(
    ...points.reverse().map(({ at, weight }) =>
      svg("circle", {
        cx: at[1],
        cy: at[0],
        r: unit * (0.35 + 1.1 * Math.sqrt(weight / most)),
        fill: heat(weight / most),
        "stroke-width": 0.1 * unit,
      }),
    ),
  );
}

/** A line from the regular place of each tap to where it reads. */
export function drawMoves(part, taps, now, unit) {
  const coloured = Map.groupBy(taps, (tap) => hueOf(tap, now));
  part.replaceChildren(
    ...[...coloured].map(([hue, own]) =>
      svg("path", {
        d: own
          .filter(({ at }) => finite(at))
          .map(({ regular, at }) => `M${regular[1]} ${regular[0]}L${at[1]} ${at[0]}`)
          .join(""),
        style: `stroke: ${hue ?? "var(--move)"}`,
        "stroke-width": 0.4 * unit,
      }),
    ),
  );
}

/** A square at the regular place of each tap. */
export function drawSquares(part, taps, now, unit) {
  const half = Math.max(0.42, 1.1 * unit);
  const places = [...new Map(taps.map(({ regular }) => [regular.join(), regular])).values()];
  const d = places.map(([y, x]) => `M${x - half} ${y - half}h${2 * half}v${2 * half}h${-2 * half}z`).join("");
  part.replaceChildren(
    svg("path", { d, class: "halo", "stroke-width": 0.9 * unit }),
    svg("path", { d, "stroke-width": 0.4 * unit }),
  );
}

/** The four pixels around the chosen tap, each in strength of its weight. */
export function drawPixels(part, chosen, now) {
  const corners = chosen && finite(chosen.at) ? chosen.corners : [];
  part.replaceChildren(
    ...corners.flatMap(({ index, pixel, weight, read }) => {
      const cell = ([y, x], kind) =>
        svg("rect", {
          x: x - 0.5,
          y: y - 0.5,
          width: 1,
          height: 1,
          class: kind,
          "fill-opacity": 0.75 * weight,
        });
      const elsewhere = read && pixel.join() !== index.join();
      return elsewhere
        ? [cell(index, "beyond"), cell(pixel, "read")]
        : [cell(index, read ? "read" : "beyond")];
    }),
  );
}
