// Making elements, of HTML and of SVG.

const SVG = "http://www.w3.org/2000/svg";

/** Set attributes: a function becomes a listener, false or null takes the attribute away. */
export function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === false || value === null || value === undefined) element.removeAttribute(name);
    else element.setAttribute(name, value === true ? "" : value);
  }
  return element;
}

function make(element, attributes, children) {
  set(element, attributes);
  element.append(...children);
  return element;
}

export const html = (tag, attributes = {}, ...children) =>
  make(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  make(document.createElementNS(SVG, tag), attributes, children);

/** A number that is shown rounded and kept whole in data-value, where tests and other programs read it. */
export const figure = (name, value, text) =>
  html("span", { class: "number", "data-name": name, "data-value": value }, text);

/** A select with a label; `options` are [value, text]. */
export function choice(label, options, value, onchange, attributes = {}) {
  const select = html("select", { ...attributes, change: (event) => onchange(event.target.value) });
  fill(select, options, value);
  const long = options.some(([, text]) => String(text).length > 20);
  return html("label", { class: long ? "field wide" : "field" }, html("span", {}, label), select);
}

/** Give a select other options, unless it has them. */
export function fill(select, options, value) {
  const key = JSON.stringify(options);
  if (select.dataset.options !== key) {
    select.dataset.options = key;
    select.replaceChildren(...options.map(([v, text]) => html("option", { value: v }, text)));
  }
  select.value = String(value);
}
