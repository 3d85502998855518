// Operates the live page in Chromium, as a person with a mouse, a keyboard, a phone.
//
// usage: node page.mjs URL PICTURE SCREENSHOTS_FOLDER; prints one line for each check.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const [url, picture, folder] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const STEPS = 12;
const SIZES = { desktop: { width: 1200, height: 900 }, phone: { width: 375, height: 812 } };

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
});

async function opened(options) {
  // axe is injected by the test: the page itself loads nothing but its own files.
  const context = await browser.newContext({ ...options, bypassCSP: false });
  const page = await context.newPage();
  const faults = [];
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) faults.push(message.text());
  });
  page.on("pageerror", (error) => faults.push(String(error)));
  page.on("request", (request) => {
    const { protocol } = new URL(request.url());
    if (protocol !== "data:" && protocol !== "blob:" && !request.url().startsWith(url)) {
      faults.push(`foreign request: ${request.url()}`);
    }
  });
  await page.goto(url);
  await page.locator("#state", { hasText: "Serving" }).waitFor();
  await page.locator("#model-list li").first().waitFor();
  return { page, faults, context };
}

async function accessible(page, name) {
  // Evaluated over the debugging protocol, which the page's policy does not bind.
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => globalThis.axe.run(document, {
    runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
  }));
  assert.deepEqual(violations.map((one) => [one.id, one.nodes.map((node) => node.html)]), [], name);
}

async function fits(page) {
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  assert.ok(wide <= 0, `${wide} pixels wider than the screen`);
}

const isDrawn = (page, id) => page.evaluate((name) => {
  const canvas = document.getElementById(name);
  // Read from a copy: Chromium warns of a page's own canvas that is read often.
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}, id);

async function drawSample(page) {
  await page.selectOption("#draw-model", "fashion");
  await page.selectOption("#draw-label", { index: 3 });
  await page.fill("#draw-steps", String(STEPS));
  await page.fill("#draw-seed", "5");
  await page.click("#draw-start");
  await page.locator("#draw-progress", { hasText: `Drawn in ${STEPS} steps` }).waitFor();
  assert.ok(await isDrawn(page, "picture") > 10);
  assert.ok(await isDrawn(page, "mosaic") > 5);
}

async function withMouse() {
  const { page, faults, context } = await opened({ viewport: SIZES.desktop });
  await accessible(page, "as loaded");
  await drawSample(page);
  await page.hover("#mosaic", { position: { x: 150, y: 150 } });
  await page.locator("#source", { hasText: /Row \d+, column \d+: \d+ % of bank image \d+/ }).waitFor();
  assert.ok(await page.locator("#source-list li").count() >= 1);
  await page.fill("#scrub", "4");
  await page.locator("#step-name", { hasText: `after step 4 of ${STEPS}` }).waitFor();
  await page.fill("#scrub", String(STEPS));
  await page.locator("#step-name", { hasText: `after step ${STEPS} of ${STEPS}` }).waitFor();
  const transfer = await transferOf(page, picture, "image/png");
  await page.selectOption("#own-model", "fashion");
  await page.dispatchEvent("#drop", "dragover", { dataTransfer: transfer });
  await page.dispatchEvent("#drop", "drop", { dataTransfer: transfer });
  await page.locator("#own-progress", { hasText: "ready" }).waitFor();
  await page.click("#denoise");
  await page.locator("#own-progress", { hasText: "Done" }).waitFor();
  assert.ok(await isDrawn(page, "after") > 10);
  await page.click("#remix");
  await page.locator("#own-progress", { hasText: "Remixed" }).waitFor();
  await page.locator("#own-progress", { hasText: "Done" }).waitFor();
  await page.locator("#after-name", { hasText: "remixed" }).waitFor();
  await page.hover("#mosaic", { position: { x: 150, y: 150 } });
  // The batches of these are in the numbers of their model.
  const card = page.locator('#model-list li[data-model="fashion"]');
  await card.locator("dd").nth(5).filter({ hasText: /≤/ }).waitFor();
  await accessible(page, "after drawing");
  await page.evaluate(() => scrollTo(0, 0));
  await page.screenshot({ path: `${folder}/page-desktop.png`, fullPage: true });
  assert.deepEqual(faults, []);
  await context.close();
}

// A file in a drag, as from a folder of the desktop.
async function transferOf(page, file, type) {
  return page.evaluateHandle(async ([content, kind]) => {
    const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
    const dropped = new DataTransfer();
    dropped.items.add(new File([bytes], "picture.png", { type: kind }));
    return dropped;
  }, [readFileSync(file).toString("base64"), type]);
}

async function againstMistakes() {
  const { page, faults, context } = await opened({ viewport: SIZES.desktop });
  const posted = [];
  page.on("request", (request) => request.method() === "POST" && posted.push(request));
  // A seed beyond what a number of JavaScript holds reaches the server as it was written.
  await page.selectOption("#draw-model", "fashion");
  await page.fill("#draw-steps", "4");
  await page.fill("#draw-seed", "9007199254740993");
  await page.click("#draw-start");
  await page.locator("#draw-progress", { hasText: "Drawn in 4 steps" }).waitFor();
  assert.equal(posted.at(-1).postDataJSON().seed, "9007199254740993");
  // What is no whole number is not sent.
  const before = posted.length;
  await page.fill("#draw-seed", "-1");
  await page.click("#draw-start");
  assert.equal(posted.length, before);
  await page.fill("#draw-seed", "0");
  // The picture and its mosaic are of the model that drew them.
  assert.ok(await page.locator("#mosaic-figure").isVisible());
  await page.selectOption("#draw-model", "fashion-ideal");
  assert.ok(await page.locator("#draw-result").isHidden());
  assert.ok(await page.locator("#scrub-row").isHidden());
  assert.equal(await page.locator("#draw-progress").textContent(), "");
  // A change while a sample is drawn ends it.
  await page.fill("#draw-steps", "200");
  await page.click("#draw-start");
  await page.locator("#draw-progress", { hasText: /Drawing|Waiting/ }).waitFor();
  await page.selectOption("#draw-model", "fashion");
  await page.locator("#draw-stop:disabled").waitFor();
  await page.locator("#draw-start:enabled").waitFor();
  assert.ok(await page.locator("#draw-result").isHidden());
  // A file that is dropped beside the zone neither replaces the page nor is taken.
  const transfer = await transferOf(page, picture, "image/png");
  for (const target of ["body", "#models"]) {
    for (const name of ["dragover", "drop"]) {
      const prevented = await page.evaluate(([selector, type, dropped]) => {
        const options = { bubbles: true, cancelable: true, dataTransfer: dropped };
        return !document.querySelector(selector).dispatchEvent(new DragEvent(type, options));
      }, [target, name, transfer]);
      assert.ok(prevented, `${name} on ${target}`);
    }
  }
  assert.ok(await page.locator("#own-result").isHidden());
  // The button of the remix checks the fields, too.
  await page.dispatchEvent("#drop", "drop", { dataTransfer: transfer });
  await page.locator("#own-progress", { hasText: "ready" }).waitFor();
  const unsent = posted.length;
  await page.fill("#strength", "7");
  await page.click("#remix");
  await page.fill("#strength", "0.6");
  await page.fill("#own-seed", "1.5");
  await page.click("#remix");
  assert.equal(posted.length, unsent);
  await page.fill("#own-seed", "18446744073709551615");
  await page.click("#denoise");
  await page.locator("#own-progress", { hasText: "Done" }).waitFor();
  assert.equal(posted.at(-1).postDataJSON().noise_seed, "18446744073709551615");
  assert.ok(await isDrawn(page, "after") > 10);
  // Another model has no result yet.
  await page.selectOption("#own-model", "fashion-ideal");
  await page.locator("#own-progress", { hasText: "ready" }).waitFor();
  assert.equal(await isDrawn(page, "after"), 1);
  // What is no picture leaves none to compute with.
  const text = await transferOf(page, process.argv[1], "text/plain");
  await page.dispatchEvent("#drop", "drop", { dataTransfer: text });
  await page.locator("#own-progress", { hasText: "no picture" }).waitFor();
  assert.ok(await page.locator("#denoise").isDisabled());
  assert.deepEqual(faults, []);
  await context.close();
}

async function withKeyboard() {
  const { page, faults, context } = await opened({ viewport: SIZES.desktop, reducedMotion: "reduce" });
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.className), "skip");
  const order = [];
  for (let i = 0; i < 40; i++) {
    await page.keyboard.press("Tab");
    const id = await page.evaluate(() => document.activeElement.id);
    if (id === "draw-start") break;
    order.push(id);
  }
  assert.deepEqual(order.slice(0, 1), ["pause"]);
  assert.deepEqual(order.slice(-4), ["draw-model", "draw-label", "draw-steps", "draw-seed"]);
  await page.focus("#draw-model");
  await page.keyboard.type("fashion");
  await page.focus("#draw-steps");
  await page.keyboard.press("Control+A");
  await page.keyboard.type("4");
  await page.keyboard.press("Enter");
  await page.locator("#draw-progress", { hasText: "Drawn in 4 steps" }).waitFor();
  await page.focus("#mosaic");
  for (const key of ["ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowDown"]) {
    await page.keyboard.press(key);
  }
  await page.locator("#source", { hasText: "Row 2, column 3" }).waitFor();
  await page.focus("#scrub");
  await page.keyboard.press("ArrowLeft");
  await page.locator("#step-name", { hasText: "after step 3 of 4" }).waitFor();
  await page.focus("#pause");
  await page.keyboard.press("Space");
  await page.locator("#state", { hasText: "Paused" }).waitFor();
  await page.keyboard.press("Space");
  await page.locator("#state", { hasText: "Serving" }).waitFor();
  assert.deepEqual(faults, []);
  await context.close();
}

async function onPhone() {
  for (const colorScheme of ["dark", "light"]) {
    const { page, faults, context } = await opened({
      viewport: SIZES.phone, hasTouch: true, isMobile: true, deviceScaleFactor: 1, colorScheme,
    });
    await fits(page);
    await drawSample(page);
    await page.locator("#mosaic").tap({ position: { x: 120, y: 120 } });
    await page.locator("#source", { hasText: /Row 1[12], column 1[12]:/ }).waitFor();
    await fits(page);
    await accessible(page, `phone, ${colorScheme}`);
    if (colorScheme === "light") {
      await page.locator("#draw").screenshot({ path: `${folder}/page-phone.png` });
    }
    assert.deepEqual(faults, []);
    await context.close();
  }
}

for (const check of [withMouse, againstMistakes, withKeyboard, onPhone]) {
  await check();
  console.log(`${check.name}: ok`);
}
await browser.close();
