// Decodes pictures and runs the graph, beside the page, which stays free. It asks for the graph and for the files of
// onnxruntime-web, of its own host, and sends nothing.

import * as ort from "./ort/ort.wasm.bundle.min.js";
import { BadPicture, checkSize, checked, damaged } from "./picture_file.js";
import { prepared } from "./preparing.js";

let settings = null;
// resolved with the session when the graph is there
let opened = null;
let picture = null;
// the request that the picture came with, the newest seed, and the request that is computed; an older one ends
let pictureJob = 0;
let newestSeed = 0;
let current = null;

const REQUESTS = { open, show, mask };

addEventListener("message", async ({ data }) => {
  try {
    await REQUESTS[data.kind](data);
  } catch (error) {
    const kind = error instanceof BadPicture ? "problem" : "failure";
    postMessage({ kind, job: data.job, text: error.message || String(error) });
  }
});

/** Loads the graph. */
async function open(request) {
  settings = request.settings;
  opened = session();
  await opened;
  postMessage({ kind: "opened" });
}

async function session() {
  // a static host sends no headers that several threads need
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: new URL("./ort/ort-wasm-simd-threaded.wasm", import.meta.url).href };
  ort.env.logLevel = "error";
  return ort.InferenceSession.create(await graphFile(), { executionProviders: ["wasm"] });
}

async function graphFile() {
  const { file, bytes } = settings.graph;
  const response = await fetch(new URL(file, import.meta.url));
  if (!response.ok) throw new Error(`${file} was not sent (${response.status} ${response.statusText})`);
  const content = new Uint8Array(bytes);
  let at = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (at + part.value.length > bytes) throw new Error(`${file} is larger than settings.json says`);
    content.set(part.value, at);
    at += part.value.length;
    postMessage({ kind: "loading", fraction: at / bytes });
  }
  if (at !== bytes) throw new Error(`${file} has ${at} of ${bytes} bytes`);
  return content;
}

/** Another picture. One that cannot be used changes nothing. */
async function show({ job, file, name, seed, example }) {
  newestSeed = seed;
  const remarks = await checked(file, name);
  const decoded = await pixels(file, name);
  checkSize(decoded.width, decoded.height, name);
  const found = prepared(decoded, settings.images);
  // a newer picture was read faster
  if (job < pictureJob) return;
  pictureJob = job;
  picture = found.values;
  if (!example) remarks.push(...seenRemarks(decoded));
  postMessage({ kind: "seen", job, name, seed: newestSeed, seen: found.seen, values: found.values, remarks });
  await predictions({ job, seed: newestSeed });
}

/** The same picture under other masks. */
async function mask({ job, seed }) {
  newestSeed = seed;
  if (picture) await predictions({ job, seed });
}

/** Rows of red, green, blue, alpha as the file stores them: no colour profile, turned as EXIF says. */
async function pixels(file, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  } catch (error) {
    throw damaged(name, error.message);
  }
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

function seenRemarks({ data }) {
  let [grey, solid] = [true, true];
  for (let at = 0; at < data.length && (grey || solid); at += 4) {
    grey &&= data[at] === data[at + 1] && data[at] === data[at + 2];
    solid &&= data[at + 3] === 255;
  }
  const remarks = [];
  if (grey && settings.images.channels === 3) remarks.push("The picture is grey; the model sees it in three equal colours.");
  if (!solid) remarks.push("The picture has transparent parts; the model sees the colour stored there, or black where there is none.");
  return remarks;
}

async function predictions(request) {
  current = request;
  const graph = await opened;
  const { channels, height, width } = settings.images;
  const images = new ort.Tensor("float32", picture, [1, channels, height, width]);
  for (let number = 0; number < settings.masks; number++) {
    if (request !== current) return;
    const start = performance.now();
    // low and high word of the seed, as DropKeyONNX.monte_carlo_predict numbers its masks
    const words = new ort.Tensor("int32", Int32Array.of(request.seed, number), [2]);
    const { logits } = await graph.run({ pixel_values: images, seed: words });
    const milliseconds = performance.now() - start;
    postMessage({ kind: "masked", job: request.job, logits: Array.from(logits.data), milliseconds });
    // requests that came meanwhile are read here
    await new Promise((done) => setTimeout(done));
  }
}
