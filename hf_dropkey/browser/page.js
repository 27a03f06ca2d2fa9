// The page: what is chosen goes to the worker, what comes back is shown as it comes. `hfDropkey.answer` in the console has
// the numbers.

import { certainty, order, percent, sentence, softmax, votes } from "./certainty.js";

const CLASSES_SHOWN = 3;
// pixels; what is smaller is shown as squares
const TINY = 112;
const LARGEST_SEED = 2 ** 31 - 1;
const SVG = "http://www.w3.org/2000/svg";
const one = (id) => document.getElementById(id);

let settings = null;
let worker = null;
let job = 0;
const page = { answer: null };
globalThis.hfDropkey = page;

start().catch((error) => failed(`The page cannot start: ${error.message}. Load it again.`));

async function start() {
  if (location.protocol === "file:") throw new Error("it is opened as a file, and browsers let only a web server's pages run");
  settings = await (await asked("settings.json")).json();
  document.title = `${settings.name} · hf_dropkey`;
  one("name").textContent = settings.name;
  one("about").textContent = about();
  one("origin").textContent = settings.examples_origin;
  one("runtime").textContent = settings.runtime;
  worker = newWorker();
  worker.addEventListener("message", ({ data }) => RECEIVED[data.kind](data));
  worker.addEventListener("error", (event) => failed(`The computing part of the page ended: ${event.message || "it was not loaded"}. Load the page again.`));
  worker.postMessage({ kind: "open", settings });
  listen();
  // all of them now, so that they can be chosen when the network is cut
  for (const example of settings.examples) {
    const picture = await (await asked(example.file)).blob();
    addExample(picture, example.name);
    if (job === 0) choose(picture, example.name, true);
  }
}

async function asked(file) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file} was not sent (${response.status} ${response.statusText})`);
  return response;
}

/** A worker under the rules of this page, which let it ask no other host; one from its own address would have none. */
function newWorker() {
  const address = JSON.stringify(new URL("worker.js", import.meta.url).href);
  const source = new Blob([`import ${address};`], { type: "text/javascript" });
  return new Worker(URL.createObjectURL(source), { type: "module" });
}

function about() {
  const { ratio, pattern, trained } = settings.dropkey;
  const how = trained ? `trained with DropKey at the ratio ${ratio}` : `trained without DropKey; the ratio here is ${ratio}`;
  return `An image classifier, ${how}, pattern ${pattern}.`;
}

// --- what is chosen -------------------------------------------------------------------------------------------------

function listen() {
  one("file").addEventListener("change", () => {
    if (one("file").files.length) choose(one("file").files[0], one("file").files[0].name);
    // the same file can be chosen again
    one("file").value = "";
  });
  one("seed").addEventListener("change", otherMasks);
  one("next").addEventListener("click", () => {
    one("seed").value = (Number(one("seed").value) + 1) % (LARGEST_SEED + 1) || 0;
    otherMasks();
  });
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) choose(file, file.name || "the pasted picture");
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) choose(file, file.name);
    else remark("That is not a file. Save the picture first: this page loads nothing from elsewhere.", true);
  });
}

function addExample(picture, name) {
  const button = document.createElement("button");
  const image = document.createElement("img");
  image.src = URL.createObjectURL(picture);
  image.alt = name;
  image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth < TINY));
  button.type = "button";
  button.append(image);
  button.addEventListener("click", () => choose(picture, name, true));
  one("examples").append(button);
}

function choose(file, name, example = false) {
  const seed = chosenSeed();
  if (seed === null) return;
  job += 1;
  worker.postMessage({ kind: "show", job, file, name, seed, example });
}

function otherMasks() {
  const seed = chosenSeed();
  if (seed === null || !page.answer) return;
  job += 1;
  begin({ ...page.answer, job, seed });
  remark("");
  worker.postMessage({ kind: "mask", job, seed });
}

/** The seed, or null after a sentence. */
function chosenSeed() {
  const text = one("seed").value.trim();
  const seed = Number(text);
  if (text !== "" && Number.isInteger(seed) && seed >= 0 && seed <= LARGEST_SEED) return seed;
  remark(`The seed of the masks must be a whole number from 0 to ${LARGEST_SEED}. Write one such as 0.`, true);
  return null;
}

// --- what the worker sends ------------------------------------------------------------------------------------------

const RECEIVED = {
  loading({ fraction }) {
    const size = (settings.graph.bytes / 1e6).toFixed(settings.graph.bytes < 1e7 ? 1 : 0);
    if (!page.answer?.logits.length) one("sentence").textContent = `Loading the model, ${(100 * fraction).toFixed(0)} % of ${size} MB`;
  },
  opened() {},
  seen({ job: number, name, seed, seen, values, remarks }) {
    begin({ name, job: number, seed, seen, pixelValues: values });
    drawSeen(seen, name);
    remark(remarks.join(" "));
  },
  masked({ job: number, logits, milliseconds }) {
    if (number !== page.answer.job) return;
    page.answer.logits.push(logits);
    page.answer.milliseconds.push(milliseconds);
    drawAnswer();
  },
  problem({ text }) {
    remark(text, true);
  },
  failure({ text }) {
    failed(`This browser could not compute it: ${text}. Load the page again, or try another browser.`);
  },
};

function begin(answer) {
  page.answer = { ...answer, logits: [], milliseconds: [], done: false, sentence: "" };
  one("answer").setAttribute("aria-busy", "true");
}

function remark(text, problem = false) {
  one("remark").textContent = text;
  one("remark").className = problem ? "problem" : "";
}

function failed(text) {
  one("sentence").textContent = "No answer";
  remark(text, true);
}

// --- drawing --------------------------------------------------------------------------------------------------------

function drawSeen({ width, height, data }, name) {
  const canvas = one("seen");
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
  canvas.setAttribute("aria-label", name);
  canvas.classList.toggle("tiny", Math.max(width, height) < TINY);
}

function drawAnswer() {
  const { answer } = page;
  const byMask = answer.logits.map(softmax);
  const found = certainty(byMask);
  const count = byMask.length;
  answer.done = count === settings.masks;
  Object.assign(answer, found, { sentence: sentence(found, count, settings) });
  one("progress").value = count / settings.masks;
  one("votes").textContent = votes(byMask, settings.classes);
  const each = answer.milliseconds.reduce((sum, time) => sum + time, 0) / count / 1000;
  one("numbers").textContent =
    `The masks disagree by ${found.mutualInformation.toFixed(3)} nats, the mutual information of prediction and mask. ` +
    `${each.toPrecision(2)} s for each mask, in this browser.`;
  one("dots").replaceChildren(dots(found, byMask));
  // the sentence is read aloud where it changes: once, at the end
  if (answer.done || count === 1) one("sentence").textContent = answer.done ? answer.sentence : `${answer.sentence.split(",")[0]} …`;
  if (answer.done) one("answer").setAttribute("aria-busy", "false");
}

/** A dot for the probability under each mask, a row for each of the likeliest classes. */
function dots({ probabilities, std }, byMask) {
  const [row, left, right] = [58, 20, 340];
  const shown = order(probabilities).slice(0, CLASSES_SHOWN);
  const height = 28 + row * shown.length;
  const names = shown.map((number) => settings.classes[number]).join(", ");
  const drawing = shape("svg", { viewBox: `0 0 360 ${height}`, role: "img", "aria-label": `probabilities of ${names} under ${byMask.length} masks` });
  shown.forEach((number, place) => {
    const line = 44 + row * place;
    const name = settings.classes[number];
    drawing.append(
      words(name.length > 34 ? `${name.slice(0, 33)}…` : name, { x: left, y: line - 19, "font-size": 13, "font-weight": 600 }),
      words(`${percent(probabilities[number])} ± ${(100 * std[number]).toFixed(0)}`, { x: right, y: line - 19, "font-size": 12.5, "text-anchor": "end" }),
      shape("line", { x1: left, x2: right, y1: line, y2: line, class: "axis" }),
    );
    byMask.forEach((masked, mask) => {
      // three levels, so that equal values do not hide each other
      const [cx, cy] = [left + (right - left) * masked[number], line - 7 + 7 * (mask % 3)];
      drawing.append(shape("circle", { cx: cx.toFixed(1), cy, r: 3.8, class: place === 0 ? "best" : "other" }));
    });
  });
  for (const part of [0, 25, 50, 75, 100]) {
    const x = left + ((right - left) * part) / 100;
    drawing.append(words(`${part} %`, { x, y: height - 6, "font-size": 12, "text-anchor": "middle" }));
  }
  return drawing;
}

function shape(kind, attributes) {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function words(text, attributes) {
  const made = shape("text", attributes);
  made.textContent = text;
  return made;
}
