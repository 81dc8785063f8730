// How modulated deformable convolution differs from one more convolution, at two positions that one drags.

import { signedHeat } from "./colours.js";
import { figure, html } from "./dom.js";
import { number, short } from "./format.js";
import { tapCount } from "./geometry.js";
import { tapAt, weight } from "./layer.js";
import { makeStage } from "./stage.js";

export function makeQuestion(root, actions) {
  const stage = makeStage({
    label: "Two positions, A and B",
    name: "question",
    handles: ["position", "second"],
    ...actions,
  });
  stage.element.querySelector("[data-handle=position]").dataset.letter = "A";
  stage.element.querySelector("[data-handle=second]").dataset.letter = "B";
  const grids = html("div", { class: "grids" });
  const answer = html("div", { class: "prose" });
  root.append(stage.element, html("div", {}, grids, answer));

  return (seen) => {
    const { layer, state } = seen;
    const { g } = state.tap;
    const coloured = (taps, hue) => taps.filter((tap) => tap.g === g).map((tap) => ({ ...tap, hue }));
    stage.draw(seen, {
      taps: [
        ...coloured(seen.variants.modulated.taps, "var(--mark)"),
        ...coloured(seen.secondTaps, "var(--second)"),
      ],
      chosen: null,
    });
    const taps = [...Array(tapCount(layer)).keys()];
    const w = taps.map((n) => weight(layer, n, state.input, state.output));
    const [a, b] = [state.position, state.second].map((p) => taps.map((n) => tapAt(layer, p, g, n)));
    const [atA, atB] = [a, b].map((own) => own.map(({ modulation }, n) => w[n] * modulation));
    const most = Math.max(...w.map(Math.abs), ...atA.map(Math.abs), ...atB.map(Math.abs));
    grids.replaceChildren(
      grid("The kernel, wₙ", "the same at A, at B, everywhere", "w", w, layer, most),
      grid("At A, wₙ · Δmₙ", `row ${state.position[0]}, column ${state.position[1]}`, "a", atA, layer, most),
      grid("At B, wₙ · Δmₙ", `row ${state.second[0]}, column ${state.second[1]}`, "b", atB, layer, most),
    );
    answer.replaceChildren(...say({ layer, state, a, b, w, g }));
  };
}

function grid(title, text, name, values, layer, most) {
  const [rows, columns] = layer.window;
  const cells = (row) =>
    values
      .slice(row * columns, (row + 1) * columns)
      .map((value, column) =>
        html(
          "td",
          { style: `background: ${signedHeat(value, most)}`, title: number(value) },
          figure(`${name}-${row * columns + column}`, value, columns > 5 ? "" : short(value)),
        ),
      );
  return html(
    "table",
    { class: "kernel" },
    html("caption", {}, html("b", {}, title), html("small", {}, text)),
    html("tbody", {}, ...Array.from({ length: rows }, (_, row) => html("tr", {}, ...cells(row)))),
  );
}

/** The answer, with the numbers of these two positions and of the whole map. */
function say({ layer, state, a, b, w, g }) {
  const p = (...children) => html("p", {}, ...children);
  if (!layer.offset) {
    return [
      p(
        "This layer is a plain convolution: its taps stay on the grid and count the same everywhere. Choose a deformable layer to see the difference.",
      ),
    ];
  }
  const said = [
    p(
      "One more convolution multiplies by the same weights at every position, and reads at the same places around it. ",
      "Here both depend on the position: the weight of a tap is ",
      html("b", {}, "wₙ · Δmₙ"),
      ", and a network computes Δmₙ and Δpₙ from what the picture shows there.",
    ),
  ];
  const gap = (n) => Math.abs(a[n].modulation - b[n].modulation);
  const n = w.map((_, i) => i).reduce((best, i) => (gap(i) > gap(best) ? i : best), 0);
  const here = state.position.join() === state.second.join();
  if (here) {
    said.push(p("A and B stand on the same position. Drag one of them away."));
  } else if (!layer.mask) {
    said.push(
      p(
        "This layer has no modulation (DCNv1): Δmₙ = 1, and the weights at A and B agree. What differs is where they read.",
      ),
    );
  } else {
    said.push(
      p(
        `Look at tap ${n}: it counts `,
        figure("gap-a", a[n].modulation, number(a[n].modulation)),
        " at A and ",
        figure("gap-b", b[n].modulation, number(b[n].modulation)),
        " at B. A second convolution has one number for this tap. ",
        "The best single number, ",
        figure(
          "best",
          (w[n] * (a[n].modulation + b[n].modulation)) / 2,
          number((w[n] * (a[n].modulation + b[n].modulation)) / 2),
        ),
        ", is wrong by ",
        figure("wrong", (Math.abs(w[n]) * gap(n)) / 2, number((Math.abs(w[n]) * gap(n)) / 2)),
        " at both.",
      ),
    );
  }
  const moved = Math.max(
    ...a.map((tap, i) => Math.hypot(tap.delta[0] - b[i].delta[0], tap.delta[1] - b[i].delta[1])),
  );
  if (!here) {
    said.push(
      p(
        "Around A and around B the same tap reads at places that differ by up to ",
        figure("moved", moved, number(moved)),
        " pixels. A convolution cannot do that at all: its taps are equally far from p₀ everywhere.",
      ),
    );
  }
  if (layer.mask) {
    const missed = missedByOneKernel(layer, state, g);
    said.push(
      p(
        "Over the whole map, the best single kernel for this pair of channels misses ",
        html("b", {}, figure("missed", missed, `${Math.round(100 * missed)} %`)),
        " of these weights (root mean square). ",
        "Two convolutions in a row are no way out: without something nonlinear between them they are one convolution with a larger kernel, again the same everywhere.",
      ),
    );
  }
  return said;
}

/**
 * What the best fixed kernel leaves over of the weights w_n · Δm_n(p) at all positions p, as a share of them (rms).
 * The best is w_n times the mean of Δm_n, so what is left are the deviations from the mean.
 */
export function missedByOneKernel(layer, { input, output }, g) {
  const taps = tapCount(layer);
  const positions = layer.out[0] * layer.out[1];
  let [left, all] = [0, 0];
  for (let n = 0; n < taps; n++) {
    const w = weight(layer, n, input, output);
    let [sum, squares] = [0, 0];
    for (let p = 0; p < positions; p++) {
      const m = layer.mask.data[p * layer.groups * taps + g * taps + n];
      sum += m;
      squares += m * m;
    }
    left += w * w * Math.max(squares - (sum * sum) / positions, 0);
    all += w * w * squares;
  }
  return all > 0 ? Math.sqrt(left / all) : 0;
}
