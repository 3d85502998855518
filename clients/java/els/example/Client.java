package els.example;

import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.RetryInfo;
import els.denoise.v1.DType;
import els.denoise.v1.DenoiseRequest;
import els.denoise.v1.DenoiserServiceGrpc;
import els.denoise.v1.GetModelRequest;
import els.denoise.v1.Model;
import els.denoise.v1.SampleRequest;
import els.denoise.v1.SampleResponse;
import els.denoise.v1.Tensor;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Iterator;
import java.util.List;
import java.util.concurrent.TimeUnit;

/** A client of els-denoise over one plaintext channel; thread-safe. */
final class Client implements AutoCloseable {
  /** Invalid fields, and seconds after which to try again or NaN. */
  record Details(List<BadRequest.FieldViolation> violations, double retryAfterSeconds) {}

  private final ManagedChannel channel;

  Client(String target) {
    // Answers of 4 MiB are accepted unless another limit is given.
    channel =
        ManagedChannelBuilder.forTarget(target)
            .usePlaintext()
            .maxInboundMessageSize(Integer.MAX_VALUE)
            .build();
  }

  /** Returns the description of a model. */
  Model describe(String name, long timeoutSeconds) {
    GetModelRequest request = GetModelRequest.newBuilder().setName(name).build();
    return stub(timeoutSeconds).getModel(request).getModel();
  }

  /** Returns the expected clean images, in C order. */
  float[] denoise(DenoiseRequest request, long timeoutSeconds) {
    return pixelsOf(stub(timeoutSeconds).denoise(request).getDenoised());
  }

  /** Returns one message for each step, the last with the images. */
  Iterator<SampleResponse> sample(SampleRequest request, long timeoutSeconds) {
    return stub(timeoutSeconds).sample(request);
  }

  /** Returns the details of a failed call: google.rpc.Status in its trailer. */
  static Details detailsOf(StatusRuntimeException error) throws InvalidProtocolBufferException {
    List<BadRequest.FieldViolation> violations = List.of();
    double retryAfterSeconds = Double.NaN;
    com.google.rpc.Status status = StatusProto.fromThrowable(error);
    for (Any detail : status == null ? List.<Any>of() : status.getDetailsList()) {
      if (detail.is(BadRequest.class)) {
        violations = detail.unpack(BadRequest.class).getFieldViolationsList();
      } else if (detail.is(RetryInfo.class)) {
        var delay = detail.unpack(RetryInfo.class).getRetryDelay();
        retryAfterSeconds = delay.getSeconds() + delay.getNanos() / 1e9;
      }
    }
    return new Details(violations, retryAfterSeconds);
  }

  /** Returns pixels in C order as a tensor: float32, little-endian. */
  static Tensor tensorOf(float[] pixels, Iterable<Long> shape) {
    ByteBuffer data = ByteBuffer.allocate(4 * pixels.length).order(ByteOrder.LITTLE_ENDIAN);
    data.asFloatBuffer().put(pixels);
    return Tensor.newBuilder()
        .setDtype(DType.DTYPE_F32)
        .addAllShape(shape)
        .setData(ByteString.copyFrom(data))
        .build();
  }

  /** Returns the pixels of a float32 tensor in C order. */
  static float[] pixelsOf(Tensor tensor) {
    if (tensor.getDtype() != DType.DTYPE_F32) {
      throw new IllegalArgumentException("expected float32, got " + tensor.getDtype());
    }
    float[] pixels = new float[tensor.getData().size() / 4];
    ByteBuffer data = tensor.getData().asReadOnlyByteBuffer().order(ByteOrder.LITTLE_ENDIAN);
    data.asFloatBuffer().get(pixels);
    return pixels;
  }

  @Override
  public void close() {
    channel.shutdownNow();
  }

  private DenoiserServiceGrpc.DenoiserServiceBlockingStub stub(long timeoutSeconds) {
    return DenoiserServiceGrpc.newBlockingStub(channel)
        .withDeadlineAfter(timeoutSeconds, TimeUnit.SECONDS);
  }
}
