// From a decoded picture to the numbers that the model takes: what the image processor does, in its order and in the
// precision of its numbers (resize, crop, rescale, normalise).

import { resized } from "./resample.js";

/**
 * What the model takes, and the picture as it sees it.
 *
 * @param {{width: number, height: number, data: Uint8ClampedArray}} decoded Rows of red, green, blue, alpha.
 * @param {object} images The part "images" of settings.json.
 * @returns {{values: Float32Array, seen: {width: number, height: number, data: Uint8ClampedArray}}} Values are channel by
 *   channel, as `[channels, height, width]`.
 */
export function prepared(decoded, images) {
  let picture = withoutAlpha(decoded, images.channels);
  if (images.resize) {
    const [height, width] = targetSize(picture, images.resize.size);
    picture = resized(picture, width, height, images.resize.resampling);
  }
  if (images.crop) picture = cropped(picture, images.crop.height, images.crop.width);
  return { values: numbersOf(picture, images), seen: shown(picture) };
}

/** The stored colours, without alpha as `convert("RGB")` has it; or the grey of `convert("L")`. */
function withoutAlpha({ width, height, data }, channels) {
  const count = width * height;
  const values = new Uint8Array(count * channels);
  for (let pixel = 0, from = 0; pixel < count; pixel++, from += 4) {
    if (channels === 1) {
      // in 16 bits, as Pillow has it
      values[pixel] = (data[from] * 19595 + data[from + 1] * 38470 + data[from + 2] * 7471 + 0x8000) >> 16;
    } else {
      for (let channel = 0; channel < 3; channel++) values[3 * pixel + channel] = data[from + channel];
    }
  }
  return { width, height, channels, values };
}

/** Height and width to resize to: both are fixed, or the shorter side is and the other follows. */
export function targetSize(picture, size) {
  if (size.height !== undefined) return [size.height, size.width];
  const [short, long] = [Math.min(picture.width, picture.height), Math.max(picture.width, picture.height)];
  const other = Math.trunc((size.shortest_edge * long) / short);
  return picture.width <= picture.height ? [other, size.shortest_edge] : [size.shortest_edge, other];
}

/** The middle; where the picture is smaller, black around it. */
export function cropped(picture, height, width) {
  const { channels, values } = picture;
  const out = new Uint8Array(height * width * channels);
  const top = firstPlace(picture.height, height);
  const left = firstPlace(picture.width, width);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const [y, x] = [row + top, column + left];
      if (y < 0 || x < 0 || y >= picture.height || x >= picture.width) continue;
      for (let channel = 0; channel < channels; channel++) {
        out[(row * width + column) * channels + channel] = values[(y * picture.width + x) * channels + channel];
      }
    }
  }
  return { width, height, channels, values: out };
}

/** Where the crop starts, negative in what is added; odd differences are rounded as Transformers rounds them. */
function firstPlace(length, wanted) {
  const before = Math.ceil((Math.max(wanted, length) - length) / 2);
  return Math.max(0, Math.floor((length - wanted) / 2) + before) - before;
}

function numbersOf({ width, height, channels, values }, images) {
  const area = width * height;
  const out = new Float32Array(area * channels);
  for (let channel = 0; channel < channels; channel++) {
    // in 32 bits at every step, as numpy computes it
    const mean = images.normalize ? Math.fround(images.normalize.mean[channel]) : 0;
    const std = images.normalize ? Math.fround(images.normalize.std[channel]) : 1;
    for (let pixel = 0; pixel < area; pixel++) {
      const value = Math.fround(values[pixel * channels + channel] * images.rescale_factor);
      out[channel * area + pixel] = images.normalize ? Math.fround(value - mean) / std : value;
    }
  }
  return out;
}

function shown({ width, height, channels, values }) {
  const data = new Uint8ClampedArray(width * height * 4).fill(255);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      data[4 * pixel + channel] = values[pixel * channels + (channels === 1 ? 0 : channel)];
    }
  }
  return { width, height, data };
}
