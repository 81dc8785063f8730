// The formula with its numbers, for the chosen tap, input channel and output channel.

import { figure, html } from "./dom.js";
import { number, pair, signed, whole } from "./format.js";
import { tapCount, tapPlace } from "./geometry.js";
import { connects } from "./layer.js";

const sub = (text) => html("sub", {}, text);
const symbol = (text, index) => html("i", { class: "symbol" }, text, ...(index ? [sub(index)] : []));

export function makeFormula(root) {
  return ({ chosen, layer, state, variants }) => {
    root.replaceChildren(
      html(
        "p",
        {
          class: "formula",
          role: "math",
          "aria-label":
            "y of p0 is the sum over n of w n, times x at p0 plus p n plus delta p n, times delta m n",
        },
        symbol("y"),
        "(",
        symbol("p", "0"),
        ") = ",
        html("span", { class: "sum" }, "Σ", sub("n")),
        " ",
        symbol("w", "n"),
        " · ",
        symbol("x"),
        "(",
        symbol("p", "0"),
        " + ",
        symbol("p", "n"),
        " + Δ",
        symbol("p", "n"),
        ") · Δ",
        symbol("m", "n"),
        ...(layer.bias ? [" + ", symbol("b")] : []),
      ),
      heading(chosen, layer),
      places(chosen, layer),
      pixels(chosen),
      product(chosen, state, layer),
      total(variants, layer, state),
    );
  };
}

function heading({ g, n }, layer) {
  const [row, column] = tapPlace(layer, n);
  const group = layer.groups > 1 ? `, offset group ${g}` : "";
  return html(
    "h3",
    {},
    `Tap ${n} of ${tapCount(layer)} (row ${row}, column ${column} of the window)${group}`,
  );
}

const term = (label, name, values, each = number) =>
  html(
    "div",
    { class: "term" },
    html("dt", {}, ...label),
    html(
      "dd",
      {},
      "(",
      figure(`${name}-y`, values[0], each(values[0])),
      ", ",
      figure(`${name}-x`, values[1], each(values[1])),
      ")",
    ),
  );

function places({ origin, step, delta, at, modulation, weight }, layer) {
  const one = (label, name, value) =>
    html(
      "div",
      { class: "term" },
      html("dt", {}, ...label),
      html("dd", {}, figure(name, value, number(value))),
    );
  return html(
    "dl",
    { class: "terms" },
    term([symbol("p", "0")], "origin", origin, whole),
    term([symbol("p", "n")], "step", step, whole),
    term(["Δ", symbol("p", "n")], "delta", delta, signed),
    term(["reads at"], "at", at),
    one(["Δ", symbol("m", "n")], "modulation", modulation),
    one([symbol("w", "n"), layer.kernel ? "" : " (no kernel given)"], "weight", weight),
  );
}

/** The four pixels, their weights and what is read there. */
function pixels({ corners, sample }) {
  const head = ["pixel (y, x)", "weight", "x there", "product"];
  const rows = corners.map(({ index, pixel, weight, read, value }, i) =>
    html(
      "tr",
      { class: read ? "" : "unread" },
      html(
        "th",
        { scope: "row" },
        html("span", { class: "swatch", style: `opacity: ${Number.isNaN(weight) ? 0 : weight}` }),
        pair(index, whole),
        where(index, pixel, read),
      ),
      html("td", {}, figure(`corner-${i}-weight`, weight, number(weight))),
      html("td", {}, figure(`corner-${i}-value`, value, number(value))),
      html("td", {}, number(weight * value)),
    ),
  );
  return html(
    "table",
    { class: "pixels" },
    html("caption", {}, "The four pixels around the point"),
    html("thead", {}, html("tr", {}, ...head.map((text) => html("th", { scope: "col" }, text)))),
    html("tbody", {}, ...rows),
    html(
      "tfoot",
      {},
      html(
        "tr",
        {},
        html(
          "th",
          { scope: "row", colspan: 3 },
          symbol("x"),
          "(",
          symbol("p", "0"),
          " + ",
          symbol("p", "n"),
          " + Δ",
          symbol("p", "n"),
          ")",
        ),
        html("td", {}, figure("sample", sample, number(sample))),
      ),
    ),
  );
}

function where(index, pixel, read) {
  if (!read) return html("small", {}, " outside: 0");
  return pixel.join() === index.join() ? "" : html("small", {}, ` is ${pair(pixel, whole)}`);
}

function product({ weight, sample, modulation, adds }, { input, output }, layer) {
  const apart = connects(layer, input, output)
    ? ""
    : " They are of different feature groups, so the weight is 0.";
  return html(
    "p",
    { class: "product" },
    "adds  ",
    number(weight),
    " · ",
    number(sample),
    " · ",
    number(modulation),
    " = ",
    html("b", {}, figure("adds", adds, number(adds))),
    html(
      "small",
      {},
      `from input channel ${layer.inputs[input]} to output channel ${layer.outputs[output]}.${apart}`,
    ),
  );
}

function total({ modulated }, layer, { output }) {
  const kept =
    layer.inputs.length < layer.channels
      ? ` over the ${layer.inputs.length} of ${layer.channels} input channels in this page`
      : " over all taps and input channels";
  const projects = layer.projects
    ? " What this layer does to the channels before it reads them and after is left out here."
    : "";
  return html(
    "p",
    { class: "product" },
    symbol("y"),
    "(",
    symbol("p", "0"),
    ") = ",
    html("b", {}, figure("y", modulated.y, number(modulated.y))),
    html(
      "small",
      {},
      `output channel ${layer.outputs[output]}, summed${kept}${layer.bias ? ", and the bias" : ""}.${projects}`,
    ),
  );
}
