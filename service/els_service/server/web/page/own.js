// Denoises or remixes a picture that a person drops or chooses.

import { post, stream } from "./api.js";
import { drawable, fitted, options, show, showLabels } from "./pictures.js";

const at = (id) => document.getElementById(id);
let models = new Map();
let file = null;
let working = null;

export function setUpOwn(found) {
  models = found;
  const [able, first] = drawable(models);
  const before = at("own-model").value;
  options(at("own-model"), able.map((model) => [model.name, model.name]), first);
  showModel();
  if (file && at("own-model").value !== before) take(file);
}

const model = () => models.get(at("own-model").value);

function showModel() {
  showLabels(model(), at("own-label-row"), at("own-label"));
}

function labels() {
  const label = at("own-label").value;
  return label === "" || at("own-label-row").hidden ? {} : { labels: [Number(label)] };
}

function say(text, bad = false) {
  at("own-progress").textContent = text;
  at("own-progress").classList.toggle("error", bad);
}

function forgetResult() {
  const after = at("after");
  after.getContext("2d").clearRect(0, 0, after.width, after.height);
  after.setAttribute("aria-label", "Result, not yet computed");
  at("after-name").textContent = "Result";
}

// Shows a picture at the model's size; ends the computation for another picture or model.
async function take(given) {
  if (!given || !model()) return;
  working?.abort();
  working = null;
  file = given;
  forgetResult();
  try {
    await fitted(file, at("before"), model());
  } catch {
    file = null;
    at("own-result").hidden = true;
    at("denoise").disabled = at("remix").disabled = true;
    say("This file is no picture that the browser can read.", true);
    return;
  }
  at("own-result").hidden = false;
  at("denoise").disabled = at("remix").disabled = false;
  say("The picture is ready.");
}

async function work(name, run) {
  // The button of the remix is none that submits, which would check the fields.
  if (!file || !at("own-form").reportValidity()) return;
  const chosen = model();
  const mine = working = new AbortController();
  at("denoise").disabled = at("remix").disabled = true;
  say(`${name}…`);
  try {
    const image = await fitted(file, at("before"), chosen);
    const path = `/v1/models/${encodeURIComponent(chosen.name)}`;
    await run(image, path, mine.signal, async (png) => {
      if (mine === working) await show(at("after"), png);
    });
    if (mine !== working) return;
    at("after-name").textContent = `Result: ${name.toLowerCase()}`;
    at("after").setAttribute("aria-label", `Result: ${name.toLowerCase()}`);
    say("Done.");
  } catch (error) {
    if (mine === working) say(error.message, true);
  } finally {
    if (mine === working) {
      at("denoise").disabled = at("remix").disabled = false;
      working = null;
    }
  }
}

at("own-form").addEventListener("submit", (event) => {
  event.preventDefault();
  work("Denoised", async (image, path, signal, showResult) => {
    const body = {
      image, sigma: Number(at("noise").value), noise_seed: at("own-seed").value, encoding: "png",
      ...labels(),
    };
    await showResult((await post(`${path}:denoise`, body, signal)).denoised.png[0]);
  });
});
at("remix").addEventListener("click", () => work("Remixed", async (image, path, signal, showResult) => {
  const body = {
    image, strength: Number(at("strength").value), seed: at("own-seed").value,
    return_denoised: true, encoding: "png", ...labels(),
  };
  await stream(`${path}:remix`, body, signal, async (message) => {
    if (message.denoised?.png) await showResult(message.denoised.png[0]);
  });
}));
at("file").addEventListener("change", () => take(at("file").files[0]));
at("own-model").addEventListener("change", () => {
  showModel();
  if (file) take(file);
});

const drop = at("drop");
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files[0]);
});

// A file that is dropped beside the zone would otherwise replace the page.
for (const name of ["dragover", "drop"]) {
  addEventListener(name, (event) => {
    if (event.defaultPrevented || !event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "none";
  });
}
