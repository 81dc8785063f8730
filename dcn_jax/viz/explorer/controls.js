// What one chooses: layer, groups, channels, background, position, zoom.

import { choice, fill, html } from "./dom.js";
import { wayTo } from "./stack.js";

export function makeControls(root, store) {
  const { set } = store;
  const number = (label, axis) => {
    const input = html("input", {
      type: "number",
      min: 0,
      "data-name": `position-${axis}`,
      change: () => {
        set({ position: store.get().position.map((p, a) => (a === axis ? input.valueAsNumber : p)) });
      },
    });
    return { input, label: html("label", { class: "field short" }, html("span", {}, label), input) };
  };
  const pick = (label, name, change) => {
    const field = choice(label, [], "", (value) => set(change(value)), { "data-name": name });
    return { field, select: field.querySelector("select") };
  };
  const layer = pick("layer", "layer", (value) => ({ layer: Number(value) }));
  const group = pick("offset group", "group", (value) => ({ group: Number(value) }));
  const input = pick("input channel", "input", (value) => ({ input: Number(value) }));
  const output = pick("output channel", "output", (value) => ({ output: Number(value) }));
  const ground = pick("background", "ground", (value) => ({ ground: value }));
  const rows = number("row", 0);
  const columns = number("column", 1);
  const stacked = html("input", {
    type: "checkbox",
    "data-name": "stacked",
    change: () => set({ stacked: stacked.checked }),
  });
  const stackedField = html(
    "label",
    { class: "check" },
    stacked,
    html("span", {}, "through all layers before it, into the first map"),
  );
  const zoom = (factor) => () => {
    const { base, zoom } = store.get();
    set({ zoom: Math.min(Math.max(zoom * factor, 1), Math.max(1, Math.max(...base.spatial) / 6)) });
  };
  root.append(
    layer.field,
    stackedField,
    group.field,
    input.field,
    output.field,
    ground.field,
    html(
      "div",
      { class: "field pair", role: "group", "aria-label": "output position" },
      rows.label,
      columns.label,
    ),
    html(
      "div",
      { class: "field" },
      html("span", {}, "zoom"),
      html(
        "div",
        { class: "buttons" },
        html(
          "button",
          { type: "button", "aria-label": "zoom out", "data-name": "zoom-out", click: zoom(1 / 1.5) },
          "−",
        ),
        html(
          "button",
          { type: "button", "aria-label": "zoom in", "data-name": "zoom-in", click: zoom(1.5) },
          "+",
        ),
      ),
    ),
  );

  return ({ state, layer: current }) => {
    fill(
      layer.select,
      state.layers.map(({ name, kind, channels, features }, i) => [
        i,
        `${name} · ${kind}, ${channels} → ${features}`,
      ]),
      state.layer,
    );
    layer.field.hidden = state.layers.length === 1;
    const chain = wayTo(state.layers, state.layer).length;
    stacked.checked = state.stacked;
    stackedField.hidden = chain === 1 && !state.stacked;
    fill(
      group.select,
      [[-1, `all ${current.groups}`], ...Array.from({ length: current.groups }, (_, g) => [g, g])],
      state.group,
    );
    group.field.hidden = current.groups === 1;
    fill(
      input.select,
      current.inputs.map((channel, i) => [i, channel]),
      state.input,
    );
    fill(
      output.select,
      current.outputs.map((channel, i) => [i, current.outputNames?.[i] ?? channel]),
      state.output,
    );
    fill(
      ground.select,
      [
        ["picture", "the picture"],
        ["map", "the layer's input channel"],
      ],
      state.ground,
    );
    ground.field.hidden = !state.picture;
    [rows, columns].forEach(({ input }, axis) => {
      input.max = current.out[axis] - 1;
      input.value = state.position[axis];
    });
  };
}
