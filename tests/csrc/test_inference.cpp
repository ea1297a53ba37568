// Inference on the matrix unit against plain loops in double, on buffers that end where the next page must not be touched.
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "inference/inference.h"

using namespace tgq;

namespace {

std::mt19937 generator(5);

float rounded(float value) {  // to bf16, ties to even
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Memory whose end is the end of the last page that may be read: sanitizers do not see into masked vector loads.
class Bytes {
 public:
  explicit Bytes(std::size_t size) : pages_((size + kPage - 1) / kPage + 1) {
    void* at = mmap(nullptr, pages_ * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    base_ = static_cast<std::uint8_t*>(at);
    CHECK(mprotect(base_ + (pages_ - 1) * kPage, kPage, PROT_NONE) == 0);
    data_ = base_ + (pages_ - 1) * kPage - size;
  }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { munmap(base_, pages_ * kPage); }
  std::uint8_t* data() { return data_; }
  const std::uint8_t* data() const { return data_; }

 private:
  static constexpr std::size_t kPage = 4096;
  std::size_t pages_;
  std::uint8_t *base_, *data_;
};

// Values as the library reads them (bytes) and as they are.
struct Values {
  Values(std::size_t count, DType type, float scale = 1.0f) : dtype(type), exact(count), bytes(count * size()) {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < count; ++i) set(i, scale * normal(generator));
  }
  std::size_t size() const { return dtype == DType::bf16 ? 2 : 4; }
  void set(std::size_t i, float value) {
    if (dtype == DType::bf16) value = rounded(value);
    exact[i] = value;
    std::memcpy(bytes.data() + i * size(), reinterpret_cast<const char*>(&value) + (dtype == DType::bf16 ? 2 : 0), size());
  }
  double written(std::size_t i) const {
    float value = 0.0f;
    std::memcpy(reinterpret_cast<char*>(&value) + (dtype == DType::bf16 ? 2 : 0), bytes.data() + i * size(), size());
    return value;
  }
  DType dtype;
  std::vector<double> exact;
  Bytes bytes;
};

Matrix matrix(Values& values, std::int64_t rows, std::int64_t cols) {
  return {values.bytes.data(), rows, cols, cols, 1, values.dtype};
}

struct Packed {
  Packed(const PackedShape& s, const Values& weights) : shape(s) {
    const auto bytes = static_cast<std::size_t>(packed_bytes(shape));
    memory.reset(static_cast<std::uint8_t*>(std::aligned_alloc(64, bytes)));
    CHECK(pack_weights(shape, weights.bytes.data(), shape.out * shape.in, shape.in, 1, memory.get(), 2) == Status::ok);
  }
  struct Free {
    void operator()(std::uint8_t* p) const { std::free(p); }
  };
  PackedShape shape;
  std::unique_ptr<std::uint8_t, Free> memory;
};

double tolerance(DType dtype) { return dtype == DType::bf16 ? 0.01 : 2e-6; }

void expect(const Values& got, std::size_t i, double exact, double scale, const char* what) {
  CHECK_NOTE(std::fabs(got.written(i) - exact) <= tolerance(got.dtype) * scale, "%s %zu: %g, expected %g", what, i, got.written(i),
             exact);
}

double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

void test_layers(DType dtype, std::int64_t rows, std::int64_t in, std::int64_t out, int threads) {
  Values x(rows * in, dtype), w(in * out, dtype, 1.0f / std::sqrt(static_cast<float>(in))), back(in * out, dtype, 0.1f);
  Values bias(out, DType::f32), shift(in, DType::f32), weight(in, DType::f32), zeros(in, DType::f32, 0.0f), y(rows * out, dtype);
  Values z(rows * in, dtype);
  const Packed up({1, out, in, dtype}, w), down({1, in, out, dtype}, back);
  const auto floats = [](const Values& v) { return reinterpret_cast<const float*>(v.bytes.data()); };
  LinearCall first{};
  first.shape = up.shape;
  first.packed = up.memory.get();
  first.bias = floats(bias);
  first.x = matrix(x, rows, in);
  first.out = matrix(y, rows, out);
  first.gelu = true;
  first.threads = threads;
  CHECK(linear(first) == Status::ok);
  LinearCall second{};
  second.shape = down.shape;
  second.packed = down.memory.get();
  second.bias = floats(zeros);
  second.x = matrix(y, rows, out);
  second.out = matrix(z, rows, in);
  second.residual = matrix(x, rows, in);
  second.norm_weight = floats(weight);
  second.norm_shift = floats(shift);
  second.norm_eps = 1e-5f;
  second.threads = threads;
  CHECK(feed_forward(first, second) == Status::ok);
  for (std::int64_t r = 0; r < rows; ++r) {
    std::vector<double> hidden(out), total(in);
    for (std::int64_t o = 0; o < out; ++o) {
      double sum = bias.exact[o];
      for (std::int64_t i = 0; i < in; ++i) sum += x.exact[r * in + i] * w.exact[o * in + i];
      hidden[o] = gelu(sum);
      expect(y, r * out + o, hidden[o], 4.0, "linear");
      if (dtype == DType::bf16) hidden[o] = rounded(static_cast<float>(hidden[o]));
    }
    double mean = 0.0, variance = 0.0;
    for (std::int64_t i = 0; i < in; ++i) {
      total[i] = x.exact[r * in + i];
      for (std::int64_t o = 0; o < out; ++o) total[i] += hidden[o] * back.exact[i * out + o];
      mean += total[i] / static_cast<double>(in);
    }
    for (std::int64_t i = 0; i < in; ++i) variance += (total[i] - mean) * (total[i] - mean) / static_cast<double>(in);
    for (std::int64_t i = 0; i < in; ++i)
      expect(z, r * in + i, (total[i] - mean) / std::sqrt(variance + 1e-5) * weight.exact[i] + shift.exact[i], 8.0, "feed-forward");
  }
}

void test_shared_attention(DType dtype, std::int64_t batch, std::int64_t rows, std::int64_t length, std::int64_t width, int threads) {
  Values q(batch * rows * width, dtype, 0.3f), x(batch * length * width, dtype), out(batch * rows * width, dtype);
  std::vector<std::uint8_t> visible(batch * length);
  for (auto& v : visible) v = generator() % 3 != 0;
  const std::int64_t guided = rows / 2;
  const Values guide(batch * length, DType::f32), strength(guided, DType::f32);
  const auto* guide_at = reinterpret_cast<const float*>(guide.bytes.data());
  const auto* strength_at = reinterpret_cast<const float*>(strength.bytes.data());
  const SharedAttentionCall call{q.bytes.data(), x.bytes.data(), out.bytes.data(), batch, rows, length, width, rows * width,
                                 length * width, width, dtype, visible.data(), guide_at, strength_at, guided, 0.2f, threads};
  CHECK(shared_attention(call) == Status::ok);
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t r = 0; r < rows; ++r) {
      std::vector<double> weight(length), mixed(width);
      double sum = 0.0;
      for (std::int64_t l = 0; l < length; ++l) {
        double score = 0.0;
        for (std::int64_t d = 0; d < width; ++d) score += q.exact[(b * rows + r) * width + d] * x.exact[(b * length + l) * width + d];
        const double bias = r < guided ? strength.exact[r] * guide.exact[b * length + l] : 0.0;
        sum += weight[l] = visible[b * length + l] ? std::exp(0.2 * score + bias) : 0.0;
      }
      for (std::int64_t l = 0; l < length; ++l)
        for (std::int64_t d = 0; d < width; ++d)
          mixed[d] += sum == 0.0 ? 0.0 : weight[l] / sum * x.exact[(b * length + l) * width + d];
      for (std::int64_t d = 0; d < width; ++d) expect(out, (b * rows + r) * width + d, mixed[d], 2.0, "shared attention");
    }
}

// Everybody sees everybody: who sees whom is tested from Python, reading and writing within bounds here.
void test_stream_attention(DType dtype, std::int64_t anchored, std::int64_t exploratory, int threads) {
  const std::int64_t batch = 3, heads = 2, head = 32, d = heads * head, n = anchored + exploratory;
  const std::int64_t starts[] = {0, 5, 5, 24}, text_rows = starts[batch];
  Values queries(batch * n * 3 * d, dtype), text(text_rows * 3 * d, dtype), out(batch * n * d, dtype), text_out(text_rows * d, dtype);
  const StreamAttentionCall call{queries.bytes.data(), text.bytes.data(), starts, out.bytes.data(), text_out.bytes.data(), batch,
                                 anchored, exploratory, heads, head, true, true, true, true, dtype, threads};
  CHECK(stream_attention(call) == Status::ok);
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t keys = n + starts[b + 1] - starts[b];
    const auto value = [&](std::int64_t i, std::int64_t which, std::int64_t c) {
      return i < n ? queries.exact[((b * n + i) * 3 + which) * d + c] : text.exact[((starts[b] + i - n) * 3 + which) * d + c];
    };
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t i = 0; i < keys; ++i) {
        std::vector<double> weight(keys), mixed(head);
        double sum = 0.0;
        for (std::int64_t k = 0; k < keys; ++k) {
          double score = 0.0;
          for (std::int64_t c = 0; c < head; ++c) score += value(i, 0, h * head + c) * value(k, 1, h * head + c);
          sum += weight[k] = std::exp(score / std::sqrt(static_cast<double>(head)));
        }
        for (std::int64_t k = 0; k < keys; ++k)
          for (std::int64_t c = 0; c < head; ++c) mixed[c] += weight[k] / sum * value(k, 2, h * head + c);
        for (std::int64_t c = 0; c < head; ++c)
          i < n ? expect(out, (b * n + i) * d + h * head + c, mixed[c], 4.0, "stream attention")
                : expect(text_out, (starts[b] + i - n) * d + h * head + c, mixed[c], 4.0, "stream attention, text");
      }
  }
}

}  // namespace

int main() {
  if (!has_matrix_unit()) {
    std::puts("no matrix unit on this machine: nothing tested");
    return 0;
  }
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const int threads : {1, 3}) {
      test_layers(dtype, 1, 7, 5, threads);
      test_layers(dtype, 33, 40, 66, threads);
      test_layers(dtype, 70, 20, 800, threads);
      test_layers(dtype, 520, 16, 33, threads);
      test_shared_attention(dtype, 1, 1, 1, 3, threads);
      test_shared_attention(dtype, 2, 100, 37, 40, threads);
      test_shared_attention(dtype, 1, 33, 70, 800, threads);
      test_stream_attention(dtype, 3, 2, threads);
      test_stream_attention(dtype, 0, 18, threads);
    }
  LinearCall wrong{};
  wrong.shape = {1, 32, 32, DType::f16};
  wrong.threads = 1;
  CHECK(linear(wrong) == Status::bad_argument);
  std::puts("inference: all passed");
  return 0;
}
