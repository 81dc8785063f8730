// Which channel is which: an index of an array of offsets, in any known order, and what it stands for.

import { choice, fill, html } from "./dom.js";
import { ORDERS, channelAt, channelCount, channelsOf, indexOf } from "./orders.js";

const KINDS = [
  ["offsets", "offsets"],
  ["masks", "masks"],
  ["both", "offsets, then masks"],
];

export function makeDecoder(root) {
  const ask = { order: "torchvision", kind: "offsets", groups: 1, window: [3, 3], index: 0 };
  const size = (label, value, change) => {
    const input = html("input", {
      type: "number",
      min: 1,
      max: 32,
      value,
      "aria-label": label,
      input: (event) => {
        change(Math.min(Math.max(Math.round(event.target.valueAsNumber) || 1, 1), 32));
        draw();
      },
    });
    return html("label", { class: "field" }, html("span", {}, label), input);
  };
  const index = html("input", {
    type: "number",
    min: 0,
    value: 0,
    "data-name": "decoder-index",
    input: () => {
      ask.index = index.valueAsNumber;
      draw();
    },
  });
  const slider = html("input", {
    type: "range",
    min: 0,
    value: 0,
    "aria-label": "channel",
    input: () => {
      ask.index = slider.valueAsNumber;
      draw();
    },
  });
  const meaning = html("p", { class: "answer", "data-name": "decoder-meaning", "aria-live": "polite" });
  const grid = html("div", { class: "decoder-grid" });
  const back = {
    group: html("select", { "data-name": "decoder-group", change: encode }),
    tap: html("select", { "data-name": "decoder-tap", change: encode }),
    axis: html("select", { "data-name": "decoder-axis", change: encode }),
  };
  root.append(
    html(
      "div",
      { class: "fields" },
      choice(
        "order of",
        Object.entries(ORDERS),
        ask.order,
        (value) => {
          ask.order = value;
          draw();
        },
        { "data-name": "decoder-order" },
      ),
      choice(
        "the array holds",
        KINDS,
        ask.kind,
        (value) => {
          ask.kind = value;
          draw();
        },
        { "data-name": "decoder-kind" },
      ),
      size("offset groups", 1, (value) => {
        ask.groups = value;
      }),
      size("window, rows", 3, (value) => {
        ask.window = [value, ask.window[1]];
      }),
      size("columns", 3, (value) => {
        ask.window = [ask.window[0], value];
      }),
    ),
    html(
      "div",
      { class: "fields" },
      html("label", { class: "field" }, html("span", {}, "channel"), index),
      html("div", { class: "wide" }, slider),
    ),
    meaning,
    html(
      "div",
      { class: "fields" },
      ...[
        ["of offset group", back.group],
        ["tap (row, column)", back.tap],
        ["value", back.axis],
      ].map(([label, select]) => html("label", { class: "field" }, html("span", {}, label), select)),
    ),
    grid,
  );

  function encode() {
    const [row, column] = back.tap.value.split(",").map(Number);
    const mask = back.axis.value === "mask";
    ask.index = indexOf(ask.order, ask.kind, ask, {
      kind: mask ? "mask" : "offset",
      group: Number(back.group.value),
      tap: [row, column],
      axis: mask ? 0 : Number(back.axis.value),
    });
    draw();
  }

  function draw() {
    const count = channelCount(ask.order, ask.kind, ask);
    slider.max = index.max = count - 1;
    if (!(ask.index >= 0 && ask.index < count && Number.isInteger(ask.index))) {
      meaning.textContent = `Channels run from 0 to ${count - 1}.`;
      grid.replaceChildren();
      return;
    }
    index.value = slider.value = ask.index;
    const channel = channelAt(ask.order, ask.kind, ask, ask.index);
    meaning.textContent = channel
      ? sentence(ask, channel)
      : `Channel ${ask.index} of ${count} is padding: DCNv4 fills up to a multiple of 8.`;
    const taps = Array.from({ length: ask.window[0] * ask.window[1] }, (_, n) => [
      Math.floor(n / ask.window[1]),
      n % ask.window[1],
    ]);
    const values = [
      ["0", "Δy (down)"],
      ["1", "Δx (right)"],
      ["mask", "mask"],
    ].filter(([value]) => ask.kind === "both" || (value === "mask") === (ask.kind === "masks"));
    fill(
      back.group,
      Array.from({ length: ask.groups }, (_, g) => [g, g]),
      channel?.group ?? 0,
    );
    fill(
      back.tap,
      taps.map((tap) => [tap.join(), `(${tap.join(", ")})`]),
      (channel?.tap ?? [0, 0]).join(),
    );
    fill(back.axis, values, channel?.kind === "mask" ? "mask" : (channel?.axis ?? 0));
    drawWindow(channel);
  }

  /** The window, with the index of each tap's channels in this order. */
  function drawWindow(channel) {
    if (!channel || ask.window[0] * ask.window[1] > 81) {
      grid.replaceChildren();
      return;
    }
    grid.style.gridTemplateColumns = `repeat(${ask.window[1]}, auto)`;
    const own = channelsOf(ask.kind, ask).filter(({ group }) => group === channel.group);
    const cells = Map.groupBy(own, ({ tap }) => tap.join());
    grid.replaceChildren(
      ...[...cells.values()].map((channels) =>
        html(
          "button",
          {
            type: "button",
            class: channels[0].tap.join() === channel.tap.join() ? "on" : "",
            "aria-label": `tap (${channels[0].tap.join(", ")})`,
            click: () => {
              ask.index = indexOf(ask.order, ask.kind, ask, channels[0]);
              draw();
            },
          },
          ...channels.map((one) =>
            html(
              "span",
              { class: one.kind === channel.kind && one.axis === channel.axis ? "on" : "" },
              `${one.kind === "mask" ? "m" : "yx"[one.axis]} ${indexOf(ask.order, ask.kind, ask, one)}`,
            ),
          ),
        ),
      ),
    );
  }
  draw();
}

function sentence({ index, order, kind, ...shape }, channel) {
  const place = `tap (${channel.tap.join(", ")}) of offset group ${channel.group}`;
  const what = channel.kind === "mask" ? `the mask of ${place}` : `Δ${"yx"[channel.axis]} of ${place}`;
  const ours = indexOf("torchvision", kind, shape, channel);
  return (
    `Channel ${index} is ${what}.` +
    (order === "torchvision" ? "" : ` In dcn_jax's own order that is channel ${ours}.`)
  );
}
