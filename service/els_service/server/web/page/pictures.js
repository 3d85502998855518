// Pictures in and out of canvases.

export async function show(canvas, base64) {
  const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.style.aspectRatio = `${bitmap.width} / ${bitmap.height}`;
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
}

// Draws the middle of a picture file at a model's size; returns it as PNG in base64.
export async function fitted(file, canvas, { width, height }) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(bitmap.width / width, bitmap.height / height);
  const [across, down] = [width * scale, height * scale];
  canvas.width = width;
  canvas.height = height;
  canvas.style.aspectRatio = `${width} / ${height}`;
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const [left, top] = [(bitmap.width - across) / 2, (bitmap.height - down) / 2];
  context.drawImage(bitmap, left, top, across, down, 0, 0, width, height);
  bitmap.close();
  return canvas.toDataURL("image/png");
}

export function integers(base64) {
  const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
  return new Int32Array(bytes.buffer);
}

export function floats(base64) {
  const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

// A colour for each bank image, far apart for images that follow each other.
export function colour(image) {
  if (image < 0) return [128, 128, 128];
  const hue = ((image * 0.618034) % 1) * 6;
  const light = 0.45 + 0.3 * ((image * 0.381966) % 1);
  const part = (n) => {
    const k = (n + hue * 2) % 12;
    return Math.round(255 * (light - 0.55 * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [part(0), part(8), part(4)];
}

// The models that pictures can be drawn with, and the fastest of those whose sources are known.
export function drawable(models) {
  const able = [...models.values()]
    .filter((model) => [1, 3].includes(model.channels) && !model.conditioning);
  const fast = able.toSorted((a, b) => b.has_sources - a.has_sources || a.step_seconds - b.step_seconds);
  return [able, fast[0]?.name];
}

export function options(select, values, first) {
  const chosen = select.value || first;
  select.replaceChildren(...values.map(([value, text]) => new Option(text, value)));
  if (values.some(([value]) => String(value) === chosen)) select.value = chosen;
}

// Offer the labels of a model; "any" where it has one for no label, or a bank to take all of.
export function showLabels(model, row, list) {
  const count = model && !model.scales.length ? model.label_count : 0;
  const trained = ["network", "diffusers", "latent", "onnx"].includes(model?.kind);
  const any = trained && !model.label_guidance ? [] : [["", "any"]];
  const names = Array.from({ length: count }, (_, i) => [i, model.label_names[i] ?? String(i)]);
  row.hidden = !count;
  options(list, [...any, ...(count ? names : [])]);
}
