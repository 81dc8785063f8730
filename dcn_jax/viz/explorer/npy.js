// NumPy's files: .npy, and .npz, which is a zip archive of them.

import { halfToNumber } from "./arrays.js";

const READERS = {
  f2: [2, (view, at, little) => halfToNumber(view.getUint16(at, little))],
  f4: [4, (view, at, little) => view.getFloat32(at, little)],
  f8: [8, (view, at, little) => view.getFloat64(at, little)],
  i1: [1, (view, at) => view.getInt8(at)],
  i2: [2, (view, at, little) => view.getInt16(at, little)],
  i4: [4, (view, at, little) => view.getInt32(at, little)],
  i8: [8, (view, at, little) => Number(view.getBigInt64(at, little))],
  u1: [1, (view, at) => view.getUint8(at)],
  u2: [2, (view, at, little) => view.getUint16(at, little)],
  u4: [4, (view, at, little) => view.getUint32(at, little)],
  u8: [8, (view, at, little) => Number(view.getBigUint64(at, little))],
  b1: [1, (view, at) => view.getUint8(at)],
};

/** The array in the bytes of an .npy file: {data: Float32Array, shape, dtype}, rows first. */
export function readNpy(buffer) {
  const bytes = new Uint8Array(buffer);
  if (bytes.length < 12 || String.fromCharCode(...bytes.slice(1, 6)) !== "NUMPY") {
    throw new Error("this is no .npy file: it does not begin with NumPy's mark; write it with numpy.save");
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const wide = bytes[6] > 1;
  const start = wide ? 12 : 10;
  const length = wide ? view.getUint32(8, true) : view.getUint16(8, true);
  const header = new TextDecoder().decode(bytes.slice(start, start + length));
  const dtype = /'descr':\s*'([^']*)'/.exec(header)?.[1] ?? "of several fields";
  const shape = (/'shape':\s*\(([^)]*)\)/.exec(header)?.[1] ?? "")
    .split(",")
    .filter((n) => n.trim())
    .map(Number);
  const reader = READERS[dtype.slice(1)];
  if (!reader) throw new Error(`its dtype is ${dtype}; wanted floats or ints: array.astype("float32")`);
  const [size, read] = reader;
  const count = shape.reduce((a, b) => a * b, 1);
  if (start + length + count * size > bytes.length) {
    throw new Error(`it ends early: its header promises the shape (${shape.join(", ")})`);
  }
  const data = new Float32Array(count);
  for (let i = 0; i < count; i++) data[i] = read(view, start + length + i * size, dtype[0] !== ">");
  const columnsFirst = /'fortran_order':\s*True/.test(header);
  return { data: columnsFirst ? rowsFirst(data, shape) : data, shape, dtype };
}

function rowsFirst(data, shape) {
  const strides = shape.map((_, a) => shape.slice(0, a).reduce((x, y) => x * y, 1));
  const result = new Float32Array(data.length);
  for (let i = 0; i < data.length; i++) {
    let rest = i;
    let from = 0;
    for (let a = shape.length - 1; a >= 0; a--) {
      from += (rest % shape[a]) * strides[a];
      rest = Math.floor(rest / shape[a]);
    }
    result[i] = data[from];
  }
  return result;
}

/** The arrays of an .npz file, by name. */
export async function readNpz(buffer) {
  const view = new DataView(buffer);
  let end = buffer.byteLength - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("this is no .npz file: it has no list of contents; write it with numpy.savez");
  const arrays = {};
  let at = view.getUint32(end + 16, true);
  for (let i = view.getUint16(end + 10, true); i > 0; i--) {
    const [method, packed, nameLength, extra, comment, local] = [
      view.getUint16(at + 10, true),
      view.getUint32(at + 20, true),
      view.getUint16(at + 28, true),
      view.getUint16(at + 30, true),
      view.getUint16(at + 32, true),
      view.getUint32(at + 42, true),
    ];
    const name = new TextDecoder().decode(new Uint8Array(buffer, at + 46, nameLength)).replace(/\.npy$/, "");
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const bytes = new Uint8Array(buffer, start, packed);
    arrays[name] = readNpy(method === 0 ? bytes.slice().buffer : await inflate(bytes));
    at += 46 + nameLength + extra + comment;
  }
  return arrays;
}

function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Response(stream).arrayBuffer();
}
