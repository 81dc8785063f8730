// Sliders that make the offsets, without a network.

import { choice, html } from "./dom.js";
import { MODES } from "./border.js";
import { KINDS, SLIDERS, drawnPicture, playgroundLayer } from "./playground.js";

/** Put the sliders into `root`; returns the function that shows the layer that they describe. */
export function makeSliders(root, show) {
  const settings = { ...SLIDERS };
  const picture = drawnPicture();
  const apply = () => show({ layers: [playgroundLayer(settings, picture)], picture, keep: true });
  const slide = (label, name, min, max, step = 1) => {
    const shown = html("output", {}, settings[name]);
    return html(
      "label",
      { class: "field" },
      html("span", {}, label, " ", shown),
      html("input", {
        type: "range",
        min,
        max,
        step,
        value: settings[name],
        "data-name": `slider-${name}`,
        input: (event) => {
          settings[name] = event.target.valueAsNumber;
          shown.textContent = settings[name];
          apply();
        },
      }),
    );
  };
  const pick = (label, name, options) =>
    choice(
      label,
      options,
      settings[name],
      (value) => {
        settings[name] = value;
        apply();
      },
      { "data-name": `slider-${name}` },
    );
  root.append(
    html(
      "div",
      { class: "fields" },
      pick(
        "offsets",
        "kind",
        KINDS.map((kind) => [kind, kind]),
      ),
      pick("border", "mode", MODES),
      slide("max_offset", "maxOffset", 0, 6, 0.25),
      slide("dilation", "dilation", 1, 4),
      slide("stride", "stride", 1, 4),
      slide("window", "window", 1, 7, 2),
      slide("offset groups", "groups", 1, 4),
      slide("seed", "seed", 0, 20),
    ),
  );
  return apply;
}
