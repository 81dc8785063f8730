// Regular, deformable and modulated, in step: the same position, drawn and summed three ways.

import { figure, html } from "./dom.js";
import { number } from "./format.js";
import { makeStage } from "./stage.js";

const PANELS = [
  ["regular", "Regular", "a fixed grid, Δp = 0 and Δm = 1"],
  ["deformable", "Deformable", "taps move by Δp; all count in full"],
  ["modulated", "Modulated", "taps move by Δp and count by Δm"],
];

export function makePanels(root, actions) {
  const panels = PANELS.map(([variant, title, text]) => {
    const stage = makeStage({ label: `${title}: ${text}`, name: variant, ...actions });
    const y = html("p", { class: "answer" });
    root.append(
      html(
        "figure",
        { class: "panel" },
        html("figcaption", {}, html("h3", {}, title), html("p", {}, text)),
        stage.element,
        y,
      ),
    );
    return { variant, stage, y };
  });
  return (seen) => {
    for (const { variant, stage, y } of panels) {
      const scene = seen.variants[variant];
      stage.draw(seen, scene);
      y.replaceChildren("y = ", html("b", {}, figure(`y-${variant}`, scene.y, number(scene.y))));
    }
  };
}
