// A client of els-denoise: the contract is loaded at run time, its types are generated.
import { credentials, loadPackageDefinition, type ServiceError } from "@grpc/grpc-js";
import { loadSync, type MessageTypeDefinition } from "@grpc/proto-loader";
import { fileURLToPath } from "node:url";

import type { ProtoGrpcType } from "./generated/denoise.js";
import type { DenoiseRequest } from "./generated/denoise/v1/DenoiseRequest.js";
import type { DenoiserServiceClient } from "./generated/denoise/v1/DenoiserService.js";
import type { Model__Output } from "./generated/denoise/v1/Model.js";
import type { SampleRequest } from "./generated/denoise/v1/SampleRequest.js";
import type { SampleResponse__Output } from "./generated/denoise/v1/SampleResponse.js";
import type { Tensor, Tensor__Output } from "./generated/denoise/v1/Tensor.js";
import type { Status__Output } from "./generated/google/rpc/Status.js";

const FILES = ["denoise/v1/denoise.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"];
const contract = loadSync(FILES, {
  includeDirs: [fileURLToPath(new URL("../../../proto", import.meta.url))],
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
  json: true, // reads the details of an error, which are of type Any
});
const loaded = loadPackageDefinition(contract) as unknown as ProtoGrpcType;
const statusType = contract["google.rpc.Status"] as MessageTypeDefinition<object, Status__Output>;

// grpc-js accepts answers of 4 MiB unless it is given another limit.
export function connect(target: string): DenoiserServiceClient {
  const options = { "grpc.max_receive_message_length": -1 };
  return new loaded.denoise.v1.DenoiserService(target, credentials.createInsecure(), options);
}

// Pixels [B, C, H, W] as float32, little-endian, in C order.
export function tensorOf(pixels: Float32Array, shape: number[]): Tensor {
  return { dtype: "DTYPE_F32", shape, data: Buffer.from(pixels.buffer, pixels.byteOffset, pixels.byteLength) };
}

export function pixelsOf(tensor: Tensor__Output | null): Float32Array {
  if (tensor?.dtype !== "DTYPE_F32") throw new Error(`expected float32, got ${tensor?.dtype}`);
  // A copy, because the bytes of a message may begin at any offset.
  return new Float32Array(new Uint8Array(tensor.data).buffer);
}

export function describe(client: DenoiserServiceClient, name: string): Promise<Model__Output> {
  return new Promise((resolve, reject) =>
    client.GetModel({ name }, { deadline: Date.now() + 60_000 }, (error, answer) =>
      answer?.model ? resolve(answer.model) : reject(error),
    ),
  );
}

export function denoise(
  client: DenoiserServiceClient,
  request: DenoiseRequest,
  timeoutMs = 60_000,
): Promise<Float32Array> {
  return new Promise((resolve, reject) =>
    client.Denoise(request, { deadline: Date.now() + timeoutMs }, (error, answer) =>
      error ? reject(error) : resolve(pixelsOf(answer?.denoised ?? null)),
    ),
  );
}

// Yields one message for each step, the last with the images.
export function sample(
  client: DenoiserServiceClient,
  request: SampleRequest,
  timeoutMs = 600_000,
): AsyncIterable<SampleResponse__Output> {
  return client.Sample(request, { deadline: Date.now() + timeoutMs });
}

export type Details = { violations: { field: string; description: string }[]; retryAfterS?: number };

// What a call failed with: google.rpc.Status in the trailer.
export function detailsOf(error: ServiceError): Details {
  const [bytes] = error.metadata.get("grpc-status-details-bin");
  const status = bytes instanceof Buffer ? statusType.deserialize(bytes) : undefined;
  const found: Details = { violations: [] };
  for (const detail of (status?.details ?? []) as any[]) {
    if (detail["@type"].endsWith("/google.rpc.BadRequest")) found.violations = detail.fieldViolations;
    if (detail["@type"].endsWith("/google.rpc.RetryInfo"))
      found.retryAfterS = detail.retryDelay.seconds + detail.retryDelay.nanos / 1e9;
  }
  return found;
}
