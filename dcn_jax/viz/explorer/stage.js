// A map with what is read from it: squares of the regular grid, dots where taps read, lines for Δp.
// The large map, the three panels and the map of the question are all stages.

import { groupColour, heat } from "./colours.js";
import { svg } from "./dom.js";
import { number, pair } from "./format.js";
import { positionAt } from "./geometry.js";
import { pictureUrl } from "./picture.js";

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const finite = (point) => point.every((p) => Math.abs(p) < 2 ** 30);
let stages = 0;

/**
 * A stage. `onMove(handle, position)` moves a handle ("position" or "second"); `onDrag(dragging)` tells when a drag
 * begins and ends; with `onTap(tap)` its dots take the pointer and the keyboard.
 */
export function makeStage({ label, name, onMove, onDrag, onTap, handles = ["position"] }) {
  const id = `stage-${stages++}`;
  const takesKeys = Boolean(onTap) || handles.length > 1;
  const group = (part) => svg("g", { class: part });
  const parts = Object.fromEntries(["ground", "cloud", "lines", "squares", "pixels", "handles", "dots"].map((p) => [p, group(p)]));
  const root = svg("svg", {
    class: "stage", "data-stage": name, role: takesKeys ? "application" : "img", "aria-label": label, preserveAspectRatio: "xMidYMid meet",
  }, hatch(id), ...Object.values(parts));
  let seen = null;
  let dragged = null;

  const pointAt = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(root.getScreenCTM().inverse());
    return [at.y, at.x];
  };
  const move = (handle, event) => onMove(handle, positionAt(pointAt(event), seen.middles, seen.layer.out));
  const nearest = (event) => {
    if (handles.length === 1) return handles[0];
    const at = pointAt(event);
    const far = (point) => Math.hypot(point[0] - at[0], point[1] - at[1]);
    return far(seen.middle) <= far(seen.second) ? "position" : "second";
  };

  root.addEventListener("pointerdown", (event) => {
    // A finger on the map may be about to scroll the page; on a handle it drags.
    if (event.button || event.target.closest(".dot") || (event.pointerType === "touch" && !event.target.closest(".handle"))) return;
    dragged = event.target.closest(".handle")?.dataset.handle ?? nearest(event);
    root.setPointerCapture(event.pointerId);
    onDrag(true);
    move(dragged, event);
    event.preventDefault();
    parts.handles.querySelector(`[data-handle=${dragged}]`)?.focus({ preventScroll: true });
  });
  root.addEventListener("pointermove", (event) => {
    if (dragged) move(dragged, event);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    root.addEventListener(end, () => {
      if (!dragged) return;
      dragged = null;
      onDrag(false);
    });
  }
  // Otherwise the page would scroll with the finger, and the drag end.
  root.addEventListener("touchstart", (event) => {
    if (event.target.closest(".handle")) event.preventDefault();
  }, { passive: false });
  root.addEventListener("click", (event) => {
    if (event.pointerType === "touch" && !event.target.closest(".dot, .handle")) move(nearest(event), event);
  });
  root.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step) return;
    const handle = event.target.closest(".handle")?.dataset.handle ?? handles[0];
    onMove(handle, seen.state[handle].map((p, a) => p + step[a] * (event.shiftKey ? 5 : 1)));
    event.preventDefault();
  });

  const handleOf = Object.fromEntries(handles.map((handle) => [handle, makeHandle(handle, takesKeys)]));
  parts.handles.append(...Object.values(handleOf));

  return {
    element: root,
    draw(now, scene) {
      seen = now;
      const [top, left, height, width] = now.state.frame;
      const unit = Math.max(height, width) / 100;
      root.setAttribute("viewBox", [left, top, width, height].join(" "));
      drawGround(parts.ground, now, id, unit);
      drawCloud(parts.cloud, scene.cloud, unit);
      drawMoves(parts.lines, scene.cloud ? [] : scene.taps, now, unit);
      drawSquares(parts.squares, scene.cloud ? [] : scene.taps, now, unit);
      drawPixels(parts.pixels, scene.cloud ? null : scene.chosen, now);
      drawDots(parts.dots, scene.cloud ? [] : scene.taps, { now, unit, onTap, chosen: scene.chosen });
      for (const [handle, element] of Object.entries(handleOf)) drawHandle(element, handle, now, unit);
    },
  };
}

function hatch(id) {
  const lines = svg("path", { d: "M0 1L1 0", class: "hatch", "vector-effect": "non-scaling-stroke" });
  return svg("defs", {}, svg("pattern", { id: `${id}-hatch`, width: 1, height: 1, patternUnits: "userSpaceOnUse" }, lines));
}

/** The map: a picture of it, what is beyond its border, and the border. */
function drawGround(part, { base, state, margin }, id, unit) {
  const [height, width] = base.spatial;
  const own = state.ground === "map" || !state.picture;
  const array = own ? base.x : state.picture;
  const continued = own || array.shape[0] === height;
  const extra = continued ? margin : 0;
  // With all layers stacked the map is that of the first layer, whose channels are others.
  const channel = own ? (state.stacked ? 0 : state.input) : array.shape[2] >= 3 ? null : 0;
  const href = pictureUrl(array, channel, extra, base.modes);
  const key = [href.length, href.slice(-60), base.spatial, margin].join();
  if (part.dataset.key === key) return;
  part.dataset.key = key;
  const box = (extra) => ({ x: -0.5 - extra, y: -0.5 - extra, width: width + 2 * extra, height: height + 2 * extra });
  part.replaceChildren(
    svg("rect", { ...box(margin), fill: `url(#${id}-hatch)` }),
    svg("image", { ...box(extra), href, preserveAspectRatio: "none", class: "pixelated" }),
    svg("rect", { ...box(0), class: "border", "stroke-width": 0.35 * unit }),
  );
}

/** Points through a stack of layers: the larger its weight, the larger and brighter a point. */
function drawCloud(part, cloud, unit) {
  const points = cloud ? cloud.points.filter(({ at }) => finite(at)) : [];
  const most = points.length ? points[0].weight : 1;
  part.replaceChildren(...points.reverse().map(({ at, weight }) => svg("circle", {
    cx: at[1], cy: at[0], r: unit * (0.35 + 1.1 * Math.sqrt(weight / most)), fill: heat(weight / most), "stroke-width": 0.1 * unit,
  })));
}

/** The colour of a tap's line and rim: of its own, or of its offset group. */
const hueOf = (tap, now) => tap.hue ?? (now.layer.groups > 1 ? groupColour(tap.g) : null);

function drawMoves(part, taps, now, unit) {
  const coloured = Map.groupBy(taps, (tap) => hueOf(tap, now));
  part.replaceChildren(...[...coloured].map(([hue, own]) => svg("path", {
    d: own.filter(({ at }) => finite(at)).map(({ regular, at }) => `M${regular[1]} ${regular[0]}L${at[1]} ${at[0]}`).join(""),
    style: `stroke: ${hue ?? "var(--move)"}`, "stroke-width": 0.4 * unit,
  })));
}

function drawSquares(part, taps, now, unit) {
  const half = Math.max(0.42, 1.1 * unit);
  const places = [...new Map(taps.map(({ regular }) => [regular.join(), regular])).values()];
  const d = places.map(([y, x]) => `M${x - half} ${y - half}h${2 * half}v${2 * half}h${-2 * half}z`).join("");
  part.replaceChildren(
    svg("path", { d, class: "halo", "stroke-width": 0.9 * unit }),
    svg("path", { d, "stroke-width": 0.4 * unit }),
  );
}

/** The four pixels around the chosen tap, each in strength of its weight. */
function drawPixels(part, chosen, now) {
  const corners = chosen && finite(chosen.at) ? chosen.corners : [];
  part.replaceChildren(...corners.flatMap(({ index, pixel, weight, read }) => {
    const cell = ([y, x], kind) => svg("rect", { x: x - 0.5, y: y - 0.5, width: 1, height: 1, class: kind, "fill-opacity": 0.75 * weight });
    const elsewhere = read && pixel.join() !== index.join();
    return elsewhere ? [cell(index, "beyond"), cell(pixel, "read")] : [cell(index, read ? "read" : "beyond")];
  }));
}

function drawDots(part, taps, { now, unit, onTap, chosen }) {
  while (part.childElementCount > taps.length) part.lastChild.remove();
  while (part.childElementCount < taps.length) part.append(makeDot(onTap));
  const most = Math.max(1.2 * unit, Math.min(2.5 * unit, 0.48)); // neighbouring taps do not cover one another
  taps.forEach((tap, i) => {
    const dot = part.children[i];
    const shown = finite(tap.at);
    const share = tap.modulation / now.most;
    const r = most * (0.36 + 0.64 * Math.sqrt(Math.min(Math.max(share, 0), 1) || 0));
    const isChosen = Boolean(chosen && chosen.g === tap.g && chosen.n === tap.n);
    const [grip, ring, face] = dot.children;
    dot.tap = { g: tap.g, n: tap.n };
    dot.setAttribute("transform", shown ? `translate(${tap.at[1]} ${tap.at[0]})` : "translate(-1e6 0)");
    dot.classList.toggle("chosen", isChosen);
    grip.setAttribute("r", 2.8 * unit);
    ring.setAttribute("r", r + 0.9 * unit);
    ring.setAttribute("stroke-width", 0.6 * unit);
    face.setAttribute("r", r);
    face.setAttribute("stroke-width", 0.35 * unit);
    face.setAttribute("fill", heat(share));
    face.style.stroke = hueOf(tap, now) ?? "";
    if (onTap) dot.setAttribute("aria-label", dotLabel(tap, now.layer));
  });
}

function makeDot(onTap) {
  const circles = ["grip", "ring", "face"].map((part) => svg("circle", { class: part }));
  if (!onTap) return svg("g", { class: "dot" }, ...circles);
  const choose = (event) => onTap(event.currentTarget.tap);
  return svg("g", { class: "dot", tabindex: 0, role: "button", focus: choose, pointerenter: choose, click: choose }, ...circles);
}

function dotLabel(tap, layer) {
  const group = layer.groups > 1 ? `, offset group ${tap.g}` : "";
  return `Tap ${tap.n}${group}: reads at ${pair(tap.at)}, modulation ${number(tap.modulation)}`;
}

function makeHandle(handle, takesKeys) {
  return svg("g", {
    class: "handle", "data-handle": handle, ...(takesKeys ? { tabindex: 0, role: "button", "aria-roledescription": "movable position" } : {}),
  },
  svg("circle", { class: "grip" }), svg("path", { class: "halo" }), svg("path", { class: "cross" }), svg("text", {}));
}

function drawHandle(element, handle, now, unit) {
  const [y, x] = handle === "position" ? now.middle : now.second;
  const [grip, halo, cross, text] = element.children;
  const [inner, outer] = [1.3 * unit, 3.4 * unit];
  const d = [[0, 1], [0, -1], [1, 0], [-1, 0]].map(([a, b]) => `M${a * inner} ${b * inner}L${a * outer} ${b * outer}`).join("");
  element.setAttribute("transform", `translate(${x} ${y})`);
  element.setAttribute("aria-label",
    `${handle === "position" ? "Output position" : "Second position"}, row ${now.state[handle][0]}, column ${now.state[handle][1]}. Arrow keys move it.`);
  grip.setAttribute("r", 5 * unit);
  for (const [path, width] of [[halo, 1.5], [cross, 0.7]]) {
    path.setAttribute("d", d);
    path.setAttribute("stroke-width", width * unit);
  }
  if (element.dataset.letter) {
    text.textContent = element.dataset.letter;
    text.setAttribute("font-size", 5 * unit);
    text.setAttribute("x", 2.2 * unit);
    text.setAttribute("y", -2.2 * unit);
  }
}
