import { ApiError, get, setToken } from "./api.js";
import { setUpDrawing } from "./draw.js";
import { setUpOwn } from "./own.js";
import { showModels, showServer } from "./status.js";

const PERIOD_MS = 1000;
const at = (id) => document.getElementById(id);

let models = null;
let paused = false;
let before = null;

function say(text, bad = false) {
  // Only changes, as a screen reader speaks them.
  if (at("state").textContent !== text) at("state").textContent = text;
  at("state").classList.toggle("bad", bad);
}

async function describeModels(names) {
  const known = models && names.every((name) => models.has(name)) && models.size === names.length;
  if (known) return;
  const listed = (await get("/v1/models")).models;
  models = new Map(listed.map((model) => [model.name, model]));
  setUpDrawing(models);
  setUpOwn(models);
}

async function update() {
  const status = await get("/v1/status");
  const now = performance.now();
  at("token-form").hidden = true;
  // The models are listed again when one has come or gone.
  const served = Object.entries(status.models)
    .filter(([, model]) => model.memory_bytes !== undefined || model.queue_items !== undefined)
    .map(([name]) => name);
  await describeModels(served.length ? served : ["none"]);
  const { server } = status;
  const state = server.draining_seconds > 0 ? "Draining" : server.serving ? "Serving" : "Not ready";
  say(state, state !== "Serving");
  at("version").textContent = `Version ${status.version}`;
  const canDraw = status.page === "draw" && models.size > 0;
  at("draw").hidden = at("own").hidden = !canDraw;
  at("read-only").hidden = status.page === "draw";
  showServer(status, before, now);
  showModels(models, status, before, now);
  before = { status, now };
}

async function turn() {
  if (!paused && !document.hidden) {
    try {
      await update();
    } catch (error) {
      const denied = error instanceof ApiError && error.status === 401;
      at("token-form").hidden = !denied;
      say(denied ? "Needs a token" : "Connection lost", true);
      before = null;
    }
  }
  setTimeout(turn, PERIOD_MS);
}

at("pause").addEventListener("click", () => {
  paused = !paused;
  at("pause").setAttribute("aria-pressed", String(paused));
  say(paused ? "Paused" : "Connecting…");
});

at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    setToken(at("token").value);
  } catch (error) {
    say(error.message, true);
  }
  at("token").value = "";
});

turn();
