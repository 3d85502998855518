// Denoises or remixes a picture that a person drops or chooses.

import { post, stream } from "./api.js";
import { drawable, fitted, options, show, showLabels } from "./pictures.js";

const at = (id) => document.getElementById(id);
let models = new Map();
let file = null;

export function setUpOwn(found) {
  models = found;
  const [able, first] = drawable(models);
  options(at("own-model"), able.map((model) => [model.name, model.name]), first);
  showModel();
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

async function take(given) {
  if (!given) return;
  file = given;
  try {
    await fitted(file, at("before"), model());
  } catch {
    file = null;
    say("This file is no picture that the browser can read.", true);
    return;
  }
  at("own-result").hidden = false;
  at("denoise").disabled = at("remix").disabled = false;
  say("The picture is ready.");
}

async function work(name, run) {
  if (!file) return;
  at("denoise").disabled = at("remix").disabled = true;
  say(`${name}…`);
  try {
    const image = await fitted(file, at("before"), model());
    await run(image, `/v1/models/${encodeURIComponent(model().name)}`);
    at("after-name").textContent = `Result: ${name.toLowerCase()}`;
    at("after").setAttribute("aria-label", `Result: ${name.toLowerCase()}`);
    say("Done.");
  } catch (error) {
    say(error.message, true);
  } finally {
    at("denoise").disabled = at("remix").disabled = false;
  }
}

at("own-form").addEventListener("submit", (event) => {
  event.preventDefault();
  work("Denoised", async (image, path) => {
    const found = await post(`${path}:denoise`, {
      image, sigma: Number(at("noise").value), noise_seed: Number(at("own-seed").value), encoding: "png",
      ...labels(),
    });
    await show(at("after"), found.denoised.png[0]);
  });
});
at("remix").addEventListener("click", () => work("Remixed", async (image, path) => {
  const body = {
    image, strength: Number(at("strength").value), seed: Number(at("own-seed").value),
    return_denoised: true, encoding: "png", ...labels(),
  };
  await stream(`${path}:remix`, body, undefined, async (message) => {
    if (message.denoised?.png) await show(at("after"), message.denoised.png[0]);
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
