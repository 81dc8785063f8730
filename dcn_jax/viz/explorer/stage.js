// A map with what is read from it: squares of the regular grid, dots where taps read, lines for Δp.
// The large map, the three panels and the map of the question are all stages.

import { svg } from "./dom.js";
import { positionAt } from "./geometry.js";
import { drawDots, drawHandle, makeHandle } from "./marks.js";
import { drawCloud, drawGround, drawMoves, drawPixels, drawSquares, hatch } from "./scene.js";

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
let stages = 0;

/**
 * A stage. `onMove(handle, position)` moves a handle ("position" or "second"); `onDrag(dragging)` tells when a drag
 * begins and ends; with `onTap(tap)` its dots take the pointer and the keyboard.
 */
export function makeStage({ label, name, onMove, onDrag, onTap, handles = ["position"] }) {
  const id = `stage-${stages++}`;
  const takesKeys = Boolean(onTap) || handles.length > 1;
  const above = onTap ? ["handles", "dots"] : ["dots", "handles"]; // what is above takes the pointer
  const group = (part) => svg("g", { class: part });
  const parts = Object.fromEntries(
    ["ground", "cloud", "lines", "squares", "pixels", ...above].map((p) => [p, group(p)]),
  );
  const root = svg(
    "svg",
    {
      class: "stage",
      "data-stage": name,
      role: takesKeys ? "application" : "img",
      "aria-label": label,
      preserveAspectRatio: "xMidYMid meet",
    },
    hatch(id),
    ...Object.values(parts),
  );
  let seen = null;
  let held = null; // what the pointer has hold of

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
    const [dot, handle] = [".dot", ".handle"].map((part) => event.target.closest(part));
    // A finger on the bare map may be about to scroll the page.
    if (event.button || (event.pointerType === "touch" && !dot && !handle)) return;
    held = {
      handle: handle?.dataset.handle ?? nearest(event),
      from: [event.clientX, event.clientY],
      still: Boolean(dot),
    };
    root.setPointerCapture(event.pointerId);
    onDrag(true);
    event.preventDefault();
    if (dot) {
      dot.focus({ preventScroll: true });
      onTap?.(dot.tap);
    } else {
      move(held.handle, event);
      handleOf[held.handle].focus({ preventScroll: true });
    }
  });
  root.addEventListener("pointermove", (event) => {
    if (!held) return;
    // A press on a dot chooses it; only from a few pixels on is it a drag.
    held.still &&= Math.hypot(event.clientX - held.from[0], event.clientY - held.from[1]) < 5;
    if (!held.still) move(held.handle, event);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    root.addEventListener(end, () => {
      if (!held) return;
      held = null;
      onDrag(false);
    });
  }
  // Otherwise the page would scroll with the finger, and the drag end.
  root.addEventListener(
    "touchstart",
    (event) => {
      if (event.target.closest(".dot, .handle")) event.preventDefault();
    },
    { passive: false },
  );
  root.addEventListener("click", (event) => {
    if (event.pointerType === "touch" && !event.target.closest(".dot, .handle")) move(nearest(event), event);
  });
  root.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step) return;
    const handle = event.target.closest(".handle")?.dataset.handle ?? handles[0];
    onMove(
      handle,
      seen.state[handle].map((p, a) => p + step[a] * (event.shiftKey ? 5 : 1)),
    );
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
