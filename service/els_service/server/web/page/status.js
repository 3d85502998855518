// Numbers of the server and of its models: rates are differences of two reports.

const KEPT = 60;
const history = new Map();
const SVG = "http://www.w3.org/2000/svg";

export function seconds(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1e3).toPrecision(3)} ms`;
  return `${value.toPrecision(3)} s`;
}

function size(value) {
  if (value === undefined) return "–";
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (value < 1024 || unit === "GiB") return `${value < 10 ? value.toFixed(1) : Math.round(value)} ${unit}`;
    value /= 1024;
  }
}

const rate = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toString());

// Upper bound of the bucket in which a share of the new calls ended.
export function quantile(now, before, share) {
  const bounds = Object.keys(now).sort((a, b) => parseFloat(a) - parseFloat(b) || (a === "+Inf" ? 1 : -1));
  const finite = bounds.filter((bound) => bound !== "+Inf");
  const fresh = (bound) => (now[bound] ?? 0) - (before?.[bound] ?? 0);
  const total = fresh("+Inf");
  if (!total) return null;
  const found = finite.find((bound) => fresh(bound) >= share * total);
  return found === undefined ? Infinity : parseFloat(found);
}

function fill(list, rows) {
  for (const [name, value] of rows) {
    let row = [...list.children].find((each) => each.dataset.name === name);
    if (!row) {
      row = document.createElement("div");
      row.dataset.name = name;
      row.append(document.createElement("dt"), document.createElement("dd"));
      row.firstChild.textContent = name;
      list.append(row);
    }
    if (row.lastChild.textContent !== value) row.lastChild.textContent = value;
  }
}

export function showServer({ server }, before, now) {
  const elapsed = before ? (now - before.now) / 1000 : 0;
  const busy = before
    ? (server.device_busy_seconds - before.status.server.device_busy_seconds) / elapsed : 0;
  fill(document.getElementById("server"), [
    ["Calls in flight", String(server.calls_in_flight ?? 0)],
    ["Trajectories", String(server.trajectories ?? 0)],
    ["Devices busy", `${Math.min(100, Math.max(0, 100 * busy)).toFixed(0)} %`],
    ["Memory in flight", `${size(server.memory_in_flight_bytes)} of ${size(server.memory_in_flight_limit_bytes)}`],
    ["Event loop lag", seconds(server.event_loop_lag_seconds)],
  ]);
}

function card(model) {
  const item = document.createElement("li");
  item.dataset.model = model.name;
  const head = document.createElement("div");
  head.className = "card-head";
  const title = document.createElement("h3");
  title.textContent = model.name;
  const kind = document.createElement("span");
  const sides = `${model.channels}×${model.height}×${model.width}`;
  kind.textContent = `${[model.kind, model.machine].filter(Boolean).join(", ")}; ${sides}`;
  head.append(title, kind);
  const spark = document.createElementNS(SVG, "svg");
  spark.setAttribute("class", "spark");
  spark.setAttribute("viewBox", `0 0 ${KEPT} 20`);
  spark.setAttribute("preserveAspectRatio", "none");
  spark.setAttribute("aria-hidden", "true");
  const name = document.createElement("p");
  name.className = "spark-name";
  name.setAttribute("aria-hidden", "true");
  name.textContent = "Images a second, in the last minute";
  item.append(head, document.createElement("dl"), name, spark);
  return item;
}

function drawSpark(spark, values) {
  const most = Math.max(...values, 1e-9);
  const bars = values.map((value, i) => {
    const bar = document.createElementNS(SVG, "rect");
    const height = Math.max(0.4, (19 * value) / most);
    for (const [name, of] of Object.entries({
      x: KEPT - values.length + i, y: 20 - height, width: 0.8, height,
    })) bar.setAttribute(name, of);
    return bar;
  });
  spark.replaceChildren(...bars);
}

export function showModels(models, status, before, now) {
  const list = document.getElementById("model-list");
  const elapsed = before ? (now - before.now) / 1000 : 0;
  document.getElementById("no-models").hidden = models.size > 0;
  for (const item of [...list.children]) {
    if (!models.has(item.dataset.model)) item.remove();
  }
  for (const model of models.values()) {
    let item = [...list.children].find((each) => each.dataset.model === model.name);
    if (!item) list.append((item = card(model)));
    const found = status.models[model.name] ?? { latency: {} };
    const old = before?.status.models[model.name] ?? {};
    const more = (name) => (elapsed ? (found[name] ?? 0) - (old[name] ?? 0) : 0);
    const images = elapsed ? more("images") / elapsed : 0;
    const values = [...(history.get(model.name) ?? []), images].slice(-KEPT);
    history.set(model.name, values);
    const batches = more("batches");
    // With no call in the last second, the latency since the start.
    const since = more("ok") ? old.latency : {};
    const late = (share) => quantile(found.latency, since, share);
    const text = (value) => (value === null ? "–" : `≤ ${seconds(value)}`);
    fill(item.querySelector("dl"), [
      ["Images a second", rate(images)],
      ["Queue", `${found.queue_items ?? 0}, ${seconds(found.queue_cost_seconds ?? 0)}`],
      ["Images a batch", batches ? rate(more("images") / batches) : "–"],
      ["Batch time", batches ? seconds(more("compute_seconds") / batches) : "–"],
      ["Latency p50", text(late(0.5))],
      ["Latency p99", text(late(0.99))],
      ["Failed, dropped", `${found.failed ?? 0}, ${found.dropped ?? 0}`],
      ["Memory", size(found.memory_bytes)],
    ]);
    drawSpark(item.querySelector(".spark"), values);
  }
}
