// Pictures made smaller or larger as Pillow does it, to the last bit: weights in 22 bits, one pass over rows and one over
// columns, whole grey levels between them. A canvas would resize differently in each browser.
// Source of the arithmetic: Pillow's src/libImaging/Resample.c (MIT-CMU).

const PRECISION = 2 ** 22;

// half the width of each filter in pixels of the smaller picture, and the filter
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, hamming],
  bicubic: [2, bicubic],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

function hamming(x) {
  const at = Math.abs(x);
  if (at >= 1) return 0;
  return at === 0 ? 1 : (Math.sin(at * Math.PI) / (at * Math.PI)) * (0.54 + 0.46 * Math.cos(at * Math.PI));
}

function bicubic(x) {
  const a = -0.5;
  const at = Math.abs(x);
  if (at < 1) return ((a + 2) * at - (a + 3)) * at * at + 1;
  return at < 2 ? (((at - 5) * at + 8) * at - 4) * a : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

export const RESAMPLINGS = ["nearest", ...Object.keys(FILTERS)];

/**
 * A picture in another size.
 *
 * @param {{width: number, height: number, channels: number, values: Uint8Array}} picture Rows of pixels of channels.
 * @param {number} width In pixels.
 * @param {number} height In pixels.
 * @param {string} resampling One of RESAMPLINGS.
 * @returns {{width: number, height: number, channels: number, values: Uint8Array}}
 */
export function resized(picture, width, height, resampling) {
  if (picture.width === width && picture.height === height) return picture;
  if (resampling === "nearest") return nearest(picture, width, height);
  const across = picture.width === width ? picture : alongRows(picture, width, resampling);
  return across.height === height ? across : alongColumns(across, height, resampling);
}

function nearest(picture, width, height) {
  const { channels, values } = picture;
  const out = new Uint8Array(width * height * channels);
  const columns = nearestPlaces(picture.width, width);
  const rows = nearestPlaces(picture.height, height);
  let at = 0;
  for (const row of rows) {
    for (const column of columns) {
      const from = (row * picture.width + column) * channels;
      for (let channel = 0; channel < channels; channel++) out[at++] = values[from + channel];
    }
  }
  return { width, height, channels, values: out };
}

function nearestPlaces(from, to) {
  const step = from / to;
  const places = new Array(to);
  // added up as Pillow does, because the sum is rounded at other places than a product
  let place = step * 0.5;
  for (let number = 0; number < to; number++, place += step) places[number] = Math.min(from - 1, Math.trunc(place));
  return places;
}

/** For each new pixel the first old one that it sees, and the weights of that and the following ones. */
function weightsOf(from, to, resampling) {
  const [half, filter] = FILTERS[resampling];
  const scale = from / to;
  const stretch = Math.max(1, scale);
  const support = half * stretch;
  const found = new Array(to);
  for (let number = 0; number < to; number++) {
    const centre = (number + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const weights = new Float64Array(Math.max(0, end - first));
    let sum = 0;
    for (let place = 0; place < weights.length; place++) {
      weights[place] = filter((place + first - centre + 0.5) * (1 / stretch));
      sum += weights[place];
    }
    for (let place = 0; place < weights.length; place++) {
      const weight = sum === 0 ? weights[place] : weights[place] / sum;
      weights[place] = Math.trunc(weight * PRECISION + (weight < 0 ? -0.5 : 0.5));
    }
    found[number] = { first, weights };
  }
  return found;
}

function level(sum) {
  return Math.min(255, Math.max(0, Math.floor(sum / PRECISION)));
}

function alongRows(picture, width, resampling) {
  const { height, channels, values } = picture;
  const out = new Uint8Array(width * height * channels);
  const wanted = weightsOf(picture.width, width, resampling);
  for (let row = 0; row < height; row++) {
    const start = row * picture.width * channels;
    let at = row * width * channels;
    for (const { first, weights } of wanted) {
      for (let channel = 0; channel < channels; channel++) {
        let sum = PRECISION / 2;
        let from = start + first * channels + channel;
        for (let place = 0; place < weights.length; place++, from += channels) sum += values[from] * weights[place];
        out[at++] = level(sum);
      }
    }
  }
  return { width, height, channels, values: out };
}

function alongColumns(picture, height, resampling) {
  const { width, channels, values } = picture;
  const line = width * channels;
  const out = new Uint8Array(line * height);
  const sums = new Float64Array(line);
  weightsOf(picture.height, height, resampling).forEach(({ first, weights }, row) => {
    sums.fill(PRECISION / 2);
    weights.forEach((weight, place) => {
      const from = (first + place) * line;
      for (let column = 0; column < line; column++) sums[column] += values[from + column] * weight;
    });
    for (let column = 0; column < line; column++) out[row * line + column] = level(sums[column]);
  });
  return { width, height, channels, values: out };
}
