// Arrays of one's own, dropped onto the page or chosen, and how to read them.

import { MODES } from "./border.js";
import { choice, html } from "./dom.js";
import { SETTINGS, layerOfFiles, roleOf } from "./files.js";
import { count } from "./format.js";
import { readNpy, readNpz } from "./npy.js";
import { ORDERS } from "./orders.js";

/** Put the chooser into `root`; returns the function that shows the layer of the files, if there are any. */
export function makeDrop(root, show, choose) {
  const settings = { ...SETTINGS };
  let arrays = {};
  let about = [];
  const message = html("p", { class: "message", role: "status", "data-name": "files-message" });
  const list = html("ul", { class: "arrays" });
  const say = (text, wrong) => {
    message.textContent = text;
    message.classList.toggle("wrong", wrong);
  };

  function apply() {
    list.replaceChildren(...about.map((text) => html("li", {}, text)));
    if (!about.length) return;
    try {
      const { layer, picture } = layerOfFiles(arrays, settings);
      say(
        `Shown: ${count(layer.groups, "offset group")}, ${layer.mask ? "with" : "without"} modulation, ${layer.out.join(" × ")} output positions.`,
        false,
      );
      show({ layers: [layer], picture });
    } catch (error) {
      say(error.message, true);
    }
  }

  async function read(files) {
    const named = {};
    for (const file of files) {
      try {
        const buffer = await file.arrayBuffer();
        const name = file.name.replace(/\.\w+$/, "");
        if (/\.npz$/i.test(file.name)) Object.assign(named, await readNpz(buffer));
        else if (/\.npy$/i.test(file.name)) named[name] = readNpy(buffer);
        else if (file.type.startsWith("image/")) named.picture = await readImage(file);
        else throw new Error("wanted .npy, .npz or a picture");
      } catch (error) {
        say(`${file.name}: ${error.message}`, true);
        return;
      }
    }
    const kept = Object.entries(named).map(([name, array]) => [roleOf(name, array.shape), name, array]);
    if (kept.some(([role]) => role === "offset")) [arrays, about] = [{}, []];
    for (const [role, name, array] of kept) {
      arrays[role] = array;
      about.push(`${name}, (${array.shape.join(", ")}): the ${role}`);
    }
    choose();
  }

  const chooser = html("input", {
    type: "file",
    multiple: true,
    accept: ".npy,.npz,image/*",
    "data-name": "files",
    change: () => read(chooser.files),
  });
  const per = (label, name, axis, min) =>
    html(
      "label",
      { class: "field short" },
      html("span", {}, label),
      html("input", {
        type: "number",
        min,
        value: settings[name][axis],
        "data-name": `files-${name}-${axis}`,
        change: (event) => {
          settings[name] = settings[name].map((old, a) =>
            a === axis ? Math.max(min, Math.round(event.target.valueAsNumber) || min) : old,
          );
          apply();
        },
      }),
    );
  const both = (label, name) =>
    html(
      "div",
      { class: "field pair", role: "group", "aria-label": label },
      per(`${label} y`, name, 0, 1),
      per("x", name, 1, 1),
    );
  const pick = (label, name, options, convert = (v) => v) =>
    choice(
      label,
      options,
      settings[name],
      (value) => {
        settings[name] = convert(value);
        apply();
      },
      { "data-name": `files-${name}` },
    );
  root.append(
    html(
      "label",
      { class: "drop" },
      chooser,
      html(
        "span",
        {},
        html("b", {}, "Drop .npy or .npz files here"),
        " or choose them: ",
        html("code", {}, "offset"),
        ", and if you like ",
        html("code", {}, "mask"),
        ", ",
        html("code", {}, "kernel"),
        " and ",
        html("code", {}, "x"),
        " (the picture or map that the layer reads). Channels first or last. Nothing leaves this page.",
      ),
    ),
    html(
      "div",
      { class: "fields" },
      pick("offset holds", "kind", [
        ["offsets", "offsets"],
        ["both", "offsets and masks"],
      ]),
      pick("order of", "order", Object.entries(ORDERS)),
      both("window", "window"),
      both("strides", "strides"),
      both("dilation", "dilation"),
      pick(
        "padding",
        "padding",
        [["SAME", "SAME"], ["VALID", "VALID"], ...[0, 1, 2, 3, 4].map((n) => [n, n])],
        (v) => (/\d/.test(v) ? Number(v) : v),
      ),
      pick("border", "mode", MODES),
    ),
    list,
    message,
  );

  for (const kind of ["dragover", "drop"]) {
    document.addEventListener(kind, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      document.body.classList.toggle("dropping", kind === "dragover");
      if (kind === "drop") read(event.dataTransfer.files);
    });
  }
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  return apply;
}

/** A PNG or JPEG as an array (height, width, 3) in [0, 1]. */
async function readImage(file) {
  const bitmap = await createImageBitmap(file);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  return {
    data: Float32Array.from(
      { length: (data.length / 4) * 3 },
      (_, i) => data[Math.floor(i / 3) * 4 + (i % 3)] / 255,
    ),
    shape: [bitmap.height, bitmap.width, 3],
    dtype: "picture",
  };
}
