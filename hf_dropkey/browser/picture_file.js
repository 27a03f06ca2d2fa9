// A file that somebody chose: its kind and size are read from its first bytes, before a browser decodes what may fill the
// memory. What cannot be used gets a sentence.

export const LIMITS = { megabytes: 20, pixels: 50e6, leastSide: 4, stretch: 20 };

/** What is wrong with a file, as a sentence for the person who chose it. */
export class BadPicture extends Error {}

const KINDS = [
  ["PNG", [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a], ofPng],
  ["JPEG", [0xff, 0xd8, 0xff], ofJpeg],
  ["GIF", [0x47, 0x49, 0x46, 0x38], (view) => [view.getUint16(6, true), view.getUint16(8, true)]],
  ["BMP", [0x42, 0x4d], (view) => [Math.abs(view.getInt32(18, true)), Math.abs(view.getInt32(22, true))]],
  ["WebP", [0x52, 0x49, 0x46, 0x46], ofWebp],
];

/**
 * Checks a file; returns remarks on it, one sentence each.
 *
 * @param {Blob} file What was chosen.
 * @param {string} name Its name in sentences.
 * @throws {BadPicture}
 */
export async function checked(file, name) {
  if (file.size === 0) throw new BadPicture(`${name} is an empty file. Choose a PNG, JPEG or WebP file.`);
  if (file.size > LIMITS.megabytes * 1e6) {
    const size = (file.size / 1e6).toFixed(0);
    throw new BadPicture(`${name} has ${size} MB; at most ${LIMITS.megabytes} MB are read. Make the picture smaller and choose it again.`);
  }
  const bytes = new Uint8Array(await file.arrayBuffer());
  const kind = KINDS.find(([, start]) => start.every((byte, place) => bytes[place] === byte));
  if (!kind) throw new BadPicture(`${name} is not an image file that this page reads. Choose a PNG, JPEG or WebP file.`);
  const found = sizeOf(kind, new DataView(bytes.buffer), name);
  checkSize(found[0], found[1], name);
  if (kind[0] === "GIF") return [`${name} is a GIF: of an animation the first frame is used.`];
  return found[2] ? [`${name} is animated: the first frame is used.`] : [];
}

function sizeOf([kind, , read], view, name) {
  try {
    return read(view, name);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    // the file ends inside of its header
    throw damaged(name, `it ends before a ${kind} file says how large it is`);
  }
}

/** The sentence about a file that starts as a picture and is none. */
export function damaged(name, reason) {
  return new BadPicture(`${name} cannot be read as an image (${reason}). Choose a PNG, JPEG or WebP file.`);
}

export function checkSize(width, height, name) {
  const size = `${name} has ${width} x ${height} pixels`;
  const [short, long] = [Math.min(width, height), Math.max(width, height)];
  if (width * height > LIMITS.pixels) {
    throw new BadPicture(`${size}; at most ${LIMITS.pixels / 1e6} million are read. Make the picture smaller and choose it again.`);
  }
  if (short < LIMITS.leastSide) {
    throw new BadPicture(`${size}, too few to see anything; each side needs at least ${LIMITS.leastSide}.`);
  }
  if (long > LIMITS.stretch * short) throw new BadPicture(`${size}, a line rather than a picture; cut out a part of it.`);
}

function ofPng(view, name) {
  if (view.getUint8(24) > 8) {
    throw new BadPicture(`${name} has more than 8 bits per channel, which this page does not read. Convert it to 8 bits.`);
  }
  return [view.getUint32(16), view.getUint32(20)];
}

/** Walks over the segments of a JPEG file to the one with the size. */
function ofJpeg(view) {
  let at = 2;
  for (;;) {
    while (view.getUint8(at) !== 0xff) at += 1;
    while (view.getUint8(at) === 0xff) at += 1;
    const marker = view.getUint8(at);
    const frame = marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
    if (frame) return [view.getUint16(at + 6), view.getUint16(at + 4)];
    // markers without a content
    const alone = marker === 0x01 || (marker >= 0xd0 && marker <= 0xd8);
    at += alone ? 1 : 1 + view.getUint16(at + 1);
  }
}

function ofWebp(view, name) {
  const part = String.fromCharCode(...new Uint8Array(view.buffer, 12, 4));
  if (part === "VP8 ") return [view.getUint16(26, true) & 0x3fff, view.getUint16(28, true) & 0x3fff];
  if (part === "VP8L") {
    const bits = view.getUint32(21, true);
    return [(bits & 0x3fff) + 1, ((bits >> 14) & 0x3fff) + 1];
  }
  if (part === "VP8X") {
    const three = (at) => view.getUint16(at, true) + (view.getUint8(at + 2) << 16);
    return [three(24) + 1, three(27) + 1, (view.getUint8(20) & 2) !== 0];
  }
  throw new BadPicture(`${name} is not an image file that this page reads. Choose a PNG, JPEG or WebP file.`);
}
