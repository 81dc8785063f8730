// The picture in words: a sentence that a screen reader says after each change, and a table of all taps.

import { html } from "./dom.js";
import { count, number, pair, signed } from "./format.js";
import { tapCount, tapPlace } from "./geometry.js";
import { corners, sample, weight } from "./layer.js";

const PAUSE = 350; // milliseconds without a change before it speaks

export function makeSpeech(root) {
  let waiting = 0;
  return (seen) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      root.textContent = sentence(seen);
    }, PAUSE);
  };
}

export function sentence({ layer, state, chosen, variants }) {
  const [row, column] = state.position;
  const where = `Output position row ${row}, column ${column}. `;
  if (state.stacked) {
    const { cloud } = variants.modulated;
    const cut =
      cloud.points.length < cloud.found ? `, of which the ${cloud.points.length} strongest are drawn` : "";
    return `${where}Through ${layer.name} and all layers before it, it reads ${count(cloud.found, "place")} of the first map${cut}.`;
  }
  const { g, n, delta, at, modulation, adds } = chosen;
  const group = layer.groups > 1 ? ` of offset group ${g}` : "";
  return (
    `${where}y is ${number(variants.modulated.y)}. Tap ${n} of ${tapCount(layer)}${group} is moved ${way(delta)}, ` +
    `reads at row ${number(at[0])}, column ${number(at[1])}, counts by ${number(modulation)} and adds ${number(adds)}.`
  );
}

/** An offset in words: 1.5 down and 0.25 left. */
function way([y, x]) {
  return `${number(Math.abs(y))} ${y < 0 ? "up" : "down"} and ${number(Math.abs(x))} ${x < 0 ? "left" : "right"}`;
}

/** A table of the taps of one position, drawn while it is open. */
export function makeTable(root, onTap) {
  const body = html("tbody");
  const heads = ["tap", "place", "Δp (y, x)", "reads at (y, x)", "Δm", "w", "adds to y"];
  const table = html(
    "table",
    { class: "taps" },
    html("thead", {}, html("tr", {}, ...heads.map((text) => html("th", { scope: "col" }, text)))),
    body,
  );
  root.append(
    html("summary", {}, "All taps of this position, as a table"),
    html("div", { class: "scroll" }, table),
  );
  let last = null;
  const draw = () => {
    if (root.open && last) body.replaceChildren(...rows(last, onTap));
  };
  root.addEventListener("toggle", draw);
  return (seen) => {
    last = seen;
    draw();
  };
}

function rows({ layer, state, variants, chosen }, onTap) {
  return variants.modulated.taps.map((tap) => {
    const w = weight(layer, tap.n, state.input, state.output);
    const own = Math.floor(layer.inputs[state.input] / (layer.channels / layer.groups)) === tap.g;
    const adds = own
      ? number(w * sample(layer, corners(layer, tap), state.input) * tap.modulation)
      : "other channels";
    const name = layer.groups > 1 ? `${tap.g}: ${tap.n}` : tap.n;
    const cells = [
      pair(tapPlace(layer, tap.n), String),
      pair(tap.delta, signed),
      pair(tap.at),
      number(tap.modulation),
      number(w),
      adds,
    ];
    return html(
      "tr",
      {
        class: tap.g === chosen.g && tap.n === chosen.n ? "on" : "",
        click: () => onTap({ g: tap.g, n: tap.n }),
      },
      html("th", { scope: "row" }, name),
      ...cells.map((text) => html("td", {}, text)),
    );
  });
}
