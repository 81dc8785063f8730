// Where the layers come from: the network of the page, sliders, or files of one's own. A tab for each.

import { html } from "./dom.js";
import { makeDrop } from "./drop.js";
import { makeSliders } from "./sliders.js";

/** Tabs for the sources; `show({layers, picture})` puts one on the page. */
export function makeSource(root, network, show) {
  const parts = { network: html("div"), sliders: html("div"), files: html("div") };
  const sources = {
    network: () => show(network),
    sliders: makeSliders(parts.sliders, show),
    files: makeDrop(parts.files, show, () => choose("files")),
  };
  const titles = { network: "the network", sliders: "without a network", files: "your own arrays" };
  const names = Object.keys(titles).filter((name) => name !== "network" || network);
  parts.network.append(html("p", {}, network ? network.about : ""));
  const buttons = names.map((name) =>
    html(
      "button",
      {
        type: "button",
        role: "tab",
        "data-source": name,
        id: `tab-${name}`,
        "aria-controls": `source-${name}`,
        click: () => choose(name),
        keydown: (event) => step(event, name),
      },
      titles[name],
    ),
  );
  for (const name of names) {
    const part = parts[name];
    part.id = `source-${name}`;
    part.setAttribute("role", "tabpanel");
    part.setAttribute("aria-labelledby", `tab-${name}`);
  }
  root.append(
    html("div", { class: "tabs", role: "tablist", "aria-label": "where the offsets come from" }, ...buttons),
    ...names.map((name) => parts[name]),
  );

  function step(event, name) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const next = names[(names.indexOf(name) + by + names.length) % names.length];
    choose(next);
    buttons[names.indexOf(next)].focus();
  }
  function choose(name) {
    names.forEach((one, i) => {
      parts[one].hidden = one !== name;
      buttons[i].setAttribute("aria-selected", one === name);
      buttons[i].tabIndex = one === name ? 0 : -1;
    });
    sources[name]();
  }
  return choose;
}
