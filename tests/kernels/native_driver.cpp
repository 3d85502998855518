// Answers one call from stdin on stdout, by the best kernel: the library where Python cannot go.
// All numbers as the machine has them, in the order in which they are read below.
#include "library.cpp"

#include <cstdio>

template <class T>
std::vector<T> take(std::size_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != count) std::exit(2);
  return values;
}

int main() {
  const auto head = take<std::int64_t>(9);
  const std::int64_t images = head[0], batch = head[4];
  const int channels = int(head[1]), height = int(head[2]), width = int(head[3]);
  const std::size_t pixels = std::size_t(height) * width;
  const auto centre = take<double>(channels), a = take<double>(batch), s = take<double>(batch);
  const auto window = take<std::int64_t>(batch), ranges = take<std::int64_t>(2 * batch);
  const auto bank = take<float>(images * channels * pixels), x = take<float>(batch * channels * pixels);

  const std::size_t lanes = els_kernel_lanes(0), tiles = (images + lanes - 1) / lanes;
  const auto packed = allocate<float>(tiles * channels * pixels * lanes);
  els_pack(0, bank.data(), centre.data(), images, channels, height, width, packed.get());
  std::vector<float> mean(x.size()), log_evidence(batch * pixels);
  els::Control control = {};
  const ElsCall call = {0, int(head[5]), packed.get(), centre.data(), images, channels, height,
                        width, std::int32_t(head[6]), std::int32_t(head[7]), std::int32_t(head[8]),
                        {(images + 15) / 16 * 16, 0, 1, images},
                        1, batch, x.data(), a.data(), s.data(), window.data(), ranges.data(),
                        nullptr, nullptr, mean.data(), log_evidence.data(), &control};
  if (els_attend(&call) != 0) return 1;
  std::fwrite(mean.data(), sizeof(float), mean.size(), stdout);
  std::fwrite(log_evidence.data(), sizeof(float), log_evidence.size(), stdout);
}
