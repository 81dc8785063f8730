// Arrays as the page stores them: base64 of little-endian float32 or float16.

/** A float16, given as its 16 bits. */
export function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 25) * (1024 + fraction) : sign * 2 ** -24 * fraction;
}

/** {dtype, shape, base64} -> {data: Float32Array, shape}. */
export function decode({ dtype, shape, base64 }) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const data =
    dtype === "float16"
      ? Float32Array.from(new Uint16Array(bytes.buffer), halfToNumber)
      : new Float32Array(bytes.buffer);
  return { data, shape };
}
