// Numbers as people read them.

/** A number with some four digits, and a true minus sign. */
export function number(value) {
  if (Number.isNaN(value)) return "NaN";
  const size = Math.abs(value);
  if (size === Infinity) return value < 0 ? "−∞" : "∞";
  let text;
  if (value !== 0 && (size < 5e-4 || size >= 1e6))
    text = size.toExponential(1).replace("e-", "e−").replace("e+", "e");
  else text = size.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3);
  return (value < 0 && !/^[0.]*$/.test(text) ? "−" : "") + text;
}

/** A number in little room: two decimals. */
export const short = (value) =>
  Math.abs(value) < 0.005 ? "0.00" : `${value < 0 ? "−" : ""}${Math.abs(value).toFixed(2)}`;

/** With a plus sign where it is positive. */
export const signed = (value) => (value > 0 ? "+" : "") + number(value);

/** A whole number with a true minus sign. */
export const whole = (value) => String(value).replace("-", "−");

/** (y, x) */
export const pair = (values, each = number) => `(${values.map((value) => each(value)).join(", ")})`;

/** 1 tap, 2 taps */
export const count = (n, thing) => `${n.toLocaleString("en")} ${thing}${n === 1 ? "" : "s"}`;
