// Saving the large map as SVG or PNG.

const LOOKS = [
  "fill",
  "fill-opacity",
  "stroke",
  "stroke-width",
  "opacity",
  "display",
  "font-family",
  "font-weight",
  "image-rendering",
  "paint-order",
];
const PIXELS = 1600; // the longer side of a PNG

/** An SVG that needs no style sheet: what the page's styles say is written into each element. */
export function svgText(element) {
  const copy = element.cloneNode(true);
  const [from, to] = [element, copy].map((root) => [root, ...root.querySelectorAll("*")]);
  from.forEach((old, i) => {
    const style = getComputedStyle(old);
    to[i].setAttribute("style", LOOKS.map((name) => `${name}: ${style.getPropertyValue(name)}`).join("; "));
    for (const name of ["tabindex", "role", "class"]) to[i].removeAttribute(name);
  });
  const [, , width, height] = element.getAttribute("viewBox").split(" ").map(Number);
  const scale = PIXELS / Math.max(width, height);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", Math.round(width * scale));
  copy.setAttribute("height", Math.round(height * scale));
  copy.setAttribute("style", `background: ${getComputedStyle(document.body).backgroundColor}`);
  return new XMLSerializer().serializeToString(copy);
}

export function saveSvg(element) {
  download(new Blob([svgText(element)], { type: "image/svg+xml" }), "sampling.svg");
}

export async function savePng(element) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgText(element))}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width, image.height];
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(document.body).backgroundColor;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  canvas.toBlob((blob) => download(blob, "sampling.png"), "image/png");
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
