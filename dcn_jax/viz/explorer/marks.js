// What takes the pointer and the keyboard on a stage: a dot for each tap, and the cross of a position.

import { heat, hueOf } from "./colours.js";
import { svg } from "./dom.js";
import { number, pair } from "./format.js";
import { finite } from "./scene.js";

/** A dot where each tap reads, as large and bright as it counts. */
export function drawDots(part, taps, { now, unit, onTap, chosen }) {
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
  return svg(
    "g",
    { class: "dot", tabindex: 0, role: "button", focus: choose, pointerenter: choose, click: choose },
    ...circles,
  );
}

function dotLabel(tap, layer) {
  const group = layer.groups > 1 ? `, offset group ${tap.g}` : "";
  return `Tap ${tap.n}${group}: reads at ${pair(tap.at)}, modulation ${number(tap.modulation)}`;
}

/** The cross of a position, which is dragged. */
export function makeHandle(handle, takesKeys) {
  return svg(
    "g",
    {
      class: "handle",
      "data-handle": handle,
      ...(takesKeys ? { tabindex: 0, role: "button", "aria-roledescription": "movable position" } : {}),
    },
    svg("circle", { class: "grip" }),
    svg("path", { class: "halo" }),
    svg("path", { class: "cross" }),
    svg("text", {}),
  );
}

/** Put a cross where its position is. */
export function drawHandle(element, handle, now, unit) {
  const [y, x] = handle === "position" ? now.middle : now.second;
  const [grip, halo, cross, text] = element.children;
  const [inner, outer] = [1.3 * unit, 3.4 * unit];
  const arms = [inner, -inner].map((start) => {
    const end = start > 0 ? outer : -outer;
    return `M${start} 0H${end}M0 ${start}V${end}`;
  });
  element.setAttribute("transform", `translate(${x} ${y})`);
  const [row, column] = now.state[handle];
  const name = handle === "position" ? "Output position" : "Second position";
  element.setAttribute("aria-label", `${name}, row ${row}, column ${column}. Arrow keys move it.`);
  grip.setAttribute("r", 5 * unit);
  for (const [path, width] of [
    [halo, 1.5],
    [cross, 0.7],
  ]) {
    path.setAttribute("d", arms.join(""));
    path.setAttribute("stroke-width", width * unit);
  }
  if (element.dataset.letter) {
    text.textContent = element.dataset.letter;
    text.setAttribute("font-size", 5 * unit);
    text.setAttribute("x", 2.2 * unit);
    text.setAttribute("y", -2.2 * unit);
  }
}
