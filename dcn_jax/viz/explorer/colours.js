// Colours of modulation, of offset groups, and of pictures.

// Dark to bright, as matplotlib's plasma; the same in both themes.
const STOPS = [
  [62, 4, 156],
  [126, 3, 168],
  [177, 42, 144],
  [216, 87, 107],
  [241, 131, 76],
  [252, 180, 49],
  [240, 240, 40],
];

/** The colour of a share in [0, 1]. */
export function heat(share) {
  const place = Math.min(Math.max(Number.isNaN(share) ? 0 : share, 0), 1) * (STOPS.length - 1);
  const below = Math.min(Math.floor(place), STOPS.length - 2);
  const mixed = STOPS[below].map((c, i) => Math.round(c + (place - below) * (STOPS[below + 1][i] - c)));
  return `rgb(${mixed.join(", ")})`;
}

/** For numbers of both signs: blue below zero, red above, in strength of `value / most`. */
export function signedHeat(value, most) {
  const strength = most > 0 && Number.isFinite(value) ? Math.min(Math.abs(value) / most, 1) : 0;
  const colour = value < 0 ? "var(--below)" : "var(--above)";
  return `color-mix(in srgb, ${colour} ${Math.round(strength * 75)}%, transparent)`;
}

const HUES = 6; // --group-0 to --group-5 in style.css

/** The colour of a tap's line and rim: its own, else that of its offset group; null for a layer with one group. */
export const hueOf = (tap, { layer }) =>
  tap.hue ?? (layer.groups > 1 ? `var(--group-${tap.g % HUES})` : null);

/** Whether the page is dark now. */
export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// What black and white of a grey picture become, so that what is drawn over it stands out.
const TONES = {
  light: [
    [250, 249, 246],
    [104, 112, 124],
  ],
  dark: [
    [24, 27, 33],
    [158, 166, 178],
  ],
};

/** A grey share in [0, 1] as [red, green, blue]. */
export function tone(share) {
  const [low, high] = TONES[isDark() ? "dark" : "light"];
  return low.map((c, i) => c + share * (high[i] - c));
}
