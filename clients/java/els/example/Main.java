package els.example;

import els.denoise.v1.DenoiseRequest;
import els.denoise.v1.Model;
import els.denoise.v1.NoiseLevel;
import els.denoise.v1.SampleRequest;
import els.denoise.v1.SampleResponse;
import io.grpc.StatusRuntimeException;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Iterator;
import java.util.List;

/** Denoises an image, draws two and reads the details of two errors; prints one JSON object. */
final class Main {
  public static void main(String[] arguments) throws Exception {
    String model = arguments[1];
    try (Client client = new Client(arguments[0])) {
      Model described = client.describe(model, 60);
      long channels = described.getChannels();
      long height = described.getHeight();
      long width = described.getWidth();
      float[] pixels = new float[(int) (channels * height * width)];
      for (int i = 0; i < pixels.length; i++) {
        pixels[i] = (i % 17) / 8f - 1;
      }
      DenoiseRequest request =
          DenoiseRequest.newBuilder()
              .setModel(model)
              .setX(Client.tensorOf(pixels, List.of(1L, channels, height, width)))
              .setLevel(NoiseLevel.newBuilder().addSigma(0.5))
              .build();
      float[] denoised = client.denoise(request, 60);

      float[] drawn = {};
      List<Integer> steps = new ArrayList<>();
      SampleRequest drawing =
          SampleRequest.newBuilder().setModel(model).setCount(2).setSteps(4).setSeed(7).build();
      for (Iterator<SampleResponse> all = client.sample(drawing, 600); all.hasNext(); ) {
        SampleResponse step = all.next();
        steps.add(step.getIndex());
        if (step.getIndex() == step.getTotal()) {
          drawn = Client.pixelsOf(step.getX());
        }
      }

      NoiseLevel negative = NoiseLevel.newBuilder().addSigma(-1).build();
      String invalid = failure(client, request.toBuilder().setLevel(negative).build());
      String late = failure(client, request.toBuilder().setTimeoutS(1e-9).build());
      System.out.printf(
          "{\"denoised\": %s, \"steps\": %s, \"drawn\": %s, \"invalid\": %s, \"late\": %s}%n",
          Arrays.toString(denoised), steps, Arrays.toString(drawn), invalid, late);
    }
  }

  private static String failure(Client client, DenoiseRequest request) throws Exception {
    try {
      client.denoise(request, 60);
      throw new IllegalStateException("expected an error");
    } catch (StatusRuntimeException error) {
      Client.Details details = Client.detailsOf(error);
      List<String> fields = new ArrayList<>();
      details.violations().forEach(one -> fields.add('"' + one.getField() + '"'));
      double seconds = details.retryAfterSeconds();
      return String.format(
          "{\"code\": %d, \"fields\": %s, \"retryAfterS\": %s}",
          error.getStatus().getCode().value(), fields, Double.isNaN(seconds) ? "null" : seconds);
    }
  }
}
