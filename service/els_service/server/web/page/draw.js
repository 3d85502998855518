// Draws a sample step by step, with the mosaic of its sources.

import { stream } from "./api.js";
import { colour, drawable, floats, integers, options, show, showLabels } from "./pictures.js";
import { seconds } from "./status.js";

const EXPLAINED = 6;
const TOP = 4;
const at = (id) => document.getElementById(id);

let models = new Map();
let steps = [];
let running = null;
let cursor = { row: 0, column: 0 };

export function setUpDrawing(found) {
  models = found;
  const [able, first] = drawable(models);
  const before = at("draw-model").value;
  options(at("draw-model"), able.map((model) => [model.name, model.name]), first);
  if (before && at("draw-model").value !== before) clear();
  showModel();
}

// Removes what another model drew, and ends what it draws.
function clear() {
  running?.abort();
  running = null;
  steps = [];
  at("draw-result").hidden = at("scrub-row").hidden = true;
  showProgress("");
  forgetSource();
}

function forgetSource() {
  at("source").textContent = "None chosen.";
  at("source-list").replaceChildren();
  cursor = { row: 0, column: 0 };
}

function showProgress(text, bad = false) {
  at("draw-progress").textContent = text;
  at("draw-progress").classList.toggle("error", bad);
}

function showTime() {
  const needed = model()?.step_seconds * Number(at("draw-steps").value);
  at("draw-time").textContent = needed > 0
    ? `Predicted on this server: about ${seconds(needed)} of computation.` : "";
}

const model = () => models.get(at("draw-model").value);

function showModel() {
  showLabels(model(), at("label-row"), at("draw-label"));
  showTime();
}

function body(chosen) {
  const count = Number(at("draw-steps").value);
  const pyramid = chosen.scales.length > 0;
  const label = at("draw-label").value;
  const every = Math.max(1, Math.floor(count / EXPLAINED));
  const explained = Array.from({ length: count }, (_, i) => i + 1)
    .filter((step) => step === count || (count - step) % every === 0).slice(-EXPLAINED);
  return {
    // A string, as a number here has no integers beyond 2^53.
    seed: at("draw-seed").value,
    ...(pyramid ? { sampler: "pyramid", steps: 0 } : { steps: count }),
    ...(label === "" || pyramid ? {} : { labels: [Number(label)] }),
    ...(chosen.has_sources && !pyramid
      ? { explain_steps: explained, explain_top: TOP, explain_images: 16 } : {}),
    ...(chosen.decoded_shape.length ? { return_decoded: true } : {}),
    return_denoised: true,
    encoding: "png",
  };
}

async function onStep(message, drawing) {
  if (!message.denoised?.png || drawing !== running) return;
  const last = message.index === message.total;
  const png = (last && message.decoded?.png?.[0]) || message.denoised.png[0];
  const explanation = message.explanations[0] ?? steps.at(-1)?.explanation;
  steps.push({ index: message.index, total: message.total, png, explanation });
  at("draw-result").hidden = at("scrub-row").hidden = false;
  at("scrub").max = String(steps.length);
  at("scrub").value = String(steps.length);
  showProgress(last ? `Drawn in ${message.total} steps.` : "Drawing…");
  await showStep(steps.at(-1));
}

async function showStep(step) {
  at("step-name").textContent = `after step ${step.index} of ${step.total}`;
  at("picture").setAttribute("aria-label", `Picture after step ${step.index} of ${step.total}`);
  at("scrub").setAttribute("aria-valuetext", `step ${step.index} of ${step.total}`);
  await show(at("picture"), step.png);
  at("mosaic-figure").hidden = at("source-panel").hidden = !step.explanation;
  if (step.explanation) drawMosaic(step.explanation);
}

function drawMosaic(explanation, marked = false) {
  const canvas = at("mosaic");
  explanation.parsed ??= {
    sources: integers(explanation.sources),
    weights: floats(explanation.weights.data),
    images: integers(explanation.share_images),
    shape: explanation.weights.shape,
  };
  const { sources, shape: [, height, width, top] } = explanation.parsed;
  canvas.width = width;
  canvas.height = height;
  canvas.style.aspectRatio = `${width} / ${height}`;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    pixels.data.set([...colour(sources[i * top * 3]), 255], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
  if (marked) {
    context.fillStyle = "white";
    context.fillRect(cursor.column, cursor.row, 1, 1);
  }
  cursor = { row: Math.min(cursor.row, height - 1), column: Math.min(cursor.column, width - 1) };
}

const shown = () => steps[Number(at("scrub").value) - 1];

function showSource() {
  const explanation = shown()?.explanation;
  if (!explanation?.parsed) return;
  const { sources, weights, images, shape: [, , width, top] } = explanation.parsed;
  drawMosaic(explanation, true);
  const { row, column } = cursor;
  const start = (row * width + column) * top;
  const found = Array.from({ length: top }, (_, i) => start + i)
    .map((i) => ({ image: sources[3 * i], row: sources[3 * i + 1], column: sources[3 * i + 2], weight: weights[i] }))
    .filter((source) => source.image >= 0 && source.weight > 0.001);
  const pixel = `Row ${row + 1}, column ${column + 1}`;
  const [first] = found;
  at("source").textContent = first
    ? `${pixel}: ${Math.round(100 * first.weight)} % of bank image ${first.image}, row ${first.row + 1}, column ${first.column + 1}.`
    : `${pixel}: no source.`;
  at("source-list").replaceChildren(...found.map((source) => entry(explanation, images, source)));
}

function entry(explanation, images, { image, row, column, weight }) {
  const item = document.createElement("li");
  const position = images.indexOf(image);
  const png = explanation.images?.png?.[position];
  const swatch = document.createElement("canvas");
  swatch.className = "swatch";
  swatch.width = swatch.height = 1;
  const context = swatch.getContext("2d");
  context.fillStyle = `rgb(${colour(image).join(" ")})`;
  context.fillRect(0, 0, 1, 1);
  item.append(swatch);
  if (png) {
    const picture = new Image();
    picture.src = `data:image/png;base64,${png}`;
    picture.alt = "";
    item.append(picture);
  }
  const name = explanation.file_names?.[position];
  const place = `row ${row + 1}, column ${column + 1}`;
  const of = `Image ${image}${name ? ` (${name})` : ""}, ${place}`;
  item.append(`${of}: ${(100 * weight).toFixed(0)} %`);
  return item;
}

async function draw() {
  const chosen = model();
  const drawing = running = new AbortController();
  steps = [];
  at("draw-start").disabled = true;
  at("draw-stop").disabled = false;
  showProgress("Waiting for the first step…");
  forgetSource();
  const path = `/v1/models/${encodeURIComponent(chosen.name)}:sample`;
  try {
    await stream(path, body(chosen), drawing.signal, (message) => onStep(message, drawing));
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (drawing === running) showProgress(stopped ? "Stopped." : error.message, !stopped);
  } finally {
    if (drawing === running || !running) {
      at("draw-start").disabled = false;
      at("draw-stop").disabled = true;
      running = null;
    }
  }
}

at("draw-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) draw();
});
at("draw-stop").addEventListener("click", () => running?.abort());
at("draw-model").addEventListener("change", () => {
  clear();
  showModel();
});
at("draw-steps").addEventListener("input", showTime);
at("scrub").addEventListener("input", () => shown() && showStep(shown()));

const mosaic = at("mosaic");
function point(event) {
  const box = mosaic.getBoundingClientRect();
  const part = (value, of) => Math.max(0, Math.min(of - 1, Math.floor(value * of)));
  cursor = {
    column: part((event.clientX - box.left) / box.width, mosaic.width),
    row: part((event.clientY - box.top) / box.height, mosaic.height),
  };
  showSource();
}

// A finger that taps does not move.
mosaic.addEventListener("pointermove", point);
mosaic.addEventListener("pointerdown", point);
mosaic.addEventListener("keydown", (event) => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  cursor = {
    row: Math.max(0, Math.min(mosaic.height - 1, cursor.row + move[0])),
    column: Math.max(0, Math.min(mosaic.width - 1, cursor.column + move[1])),
  };
  showSource();
});
mosaic.addEventListener("focus", showSource);
