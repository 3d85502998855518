// Denoises an image, draws two and reads the details of two errors.
//
//     npm ci && npm run generate && npm run build
//     npm start -- 127.0.0.1:50051 fashion-els
import type { ServiceError } from "@grpc/grpc-js";

import { connect, denoise, describe, detailsOf, pixelsOf, sample, tensorOf } from "./client.js";

const [target = "127.0.0.1:50051", model = "fashion-els"] = process.argv.slice(2);
const client = connect(target);
const failure = (call: Promise<unknown>) =>
  call.then(
    () => Promise.reject(new Error("expected an error")),
    (error: ServiceError) => {
      const { violations, retryAfterS = null } = detailsOf(error);
      return { code: error.code, fields: violations.map((one) => one.field), retryAfterS };
    },
  );

const { channels, height, width } = await describe(client, model);
const shape = [1, channels, height, width];
const pixels = Float32Array.from({ length: channels * height * width }, (_, i) => (i % 17) / 8 - 1);
const request = { model, x: tensorOf(pixels, shape), level: { sigma: [0.5] } };
const denoised = await denoise(client, request);

let drawn = new Float32Array();
const steps: number[] = [];
for await (const step of sample(client, { model, count: 2, steps: 4, seed: 7 })) {
  steps.push(step.index);
  if (step.index === step.total) drawn = new Float32Array(pixelsOf(step.x));
}

const invalid = await failure(denoise(client, { ...request, level: { sigma: [-1] } }));
const late = await failure(denoise(client, { ...request, timeoutS: 1e-9 }));
client.close();
console.log(JSON.stringify({ denoised: [...denoised], steps, drawn: [...drawn], invalid, late }));
