import grpc
import numpy as np

from els_proto.inference import grpc_service_pb2 as pb
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

with grpc.insecure_channel("127.0.0.1:50051") as channel:
    stub = GRPCInferenceServiceStub(channel)
    described = stub.ModelMetadata(pb.ModelMetadataRequest(name="fashion-els"), timeout=60)
    (x,) = (one for one in described.inputs if one.name == "x")
    noisy = np.zeros((1, *x.shape[1:]), np.float32)
    request = pb.ModelInferRequest(
        model_name="fashion-els",
        inputs=[
            pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=noisy.shape),
            pb.ModelInferRequest.InferInputTensor(name="sigma", datatype="FP32", shape=[1, 1]),
        ],
        raw_input_contents=[noisy.tobytes(), np.array([0.5], np.float32).tobytes()],
    )
    answer = stub.ModelInfer(request, timeout=60)
    print(answer.outputs[0].name, list(answer.outputs[0].shape))
