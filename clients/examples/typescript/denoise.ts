// Denoises one image and draws two: a client in TypeScript, from the contract alone.
//
//     npm install && npm run generate && npm run build
//     npm start -- http://127.0.0.1:50051 fashion-els

import { createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

import { DenoiserService, DType, Sampler, type Tensor } from "./generated/denoise/v1/denoise_pb.js";

// Pixels are float32, little-endian, in C order.
function numbers(tensor: Tensor | undefined): Float32Array {
  if (!tensor || tensor.dtype !== DType.DTYPE_F32) throw new Error("expected a float32 tensor");
  return new Float32Array(tensor.data.slice().buffer);
}

const [baseUrl = "http://127.0.0.1:50051", model = "fashion-els"] = process.argv.slice(2);
const client = createClient(DenoiserService, createGrpcTransport({ baseUrl }));

const { model: described } = await client.getModel({ name: model });
if (!described) throw new Error(`no description of ${model}`);
const shape = [1n, described.channels, described.height, described.width];
const pixels = Float32Array.from({ length: Number(shape.reduce((a, b) => a * b)) }, (_, i) =>
  Math.sin(i),
);

const { denoised } = await client.denoise(
  {
    model,
    x: { dtype: DType.DTYPE_F32, shape, data: new Uint8Array(pixels.buffer) },
    level: { sigma: [0.5] },
  },
  { timeoutMs: 60_000 },
);

let drawn = new Float32Array();
const request = { model, count: 2n, steps: 4n, seed: 7n, sampler: Sampler.DDIM };
for await (const step of client.sample(request, { timeoutMs: 600_000 })) {
  console.error(`step ${step.index} of ${step.total}`);
  if (step.index === step.total) drawn = new Float32Array(numbers(step.x));
}
console.log(JSON.stringify({ denoised: [...numbers(denoised)], drawn: [...drawn] }));
