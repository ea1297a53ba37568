// Counts the rows that come before given ones in the order of a search, with the scores of a search.
#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#include "common/integers.h"
#include "common/thread_pool.h"
#include "search/cpu/buffer.h"
#include "search/cpu/kernel_set.h"
#include "search/cpu/partitioned_scan.h"
#include "search/cpu/row_reader.h"
#include "search/search.h"

namespace tgq {
namespace {

constexpr int kRows = 64, kQueries = 16;     // of one tile of scores
constexpr std::int64_t kBlock = 256;         // rows that stay in the second-level cache while the queries pass by
constexpr std::int64_t kChunk = 4096;        // rows that a thread claims at a time
constexpr std::int64_t kFewMarks = 8;        // so many of a query are compared with every score, one after another
constexpr std::int64_t kQueryBytes = 24 * 1024;

// A mark of a query with many of them, in the order of a search: the best first.
struct Mark {
  float score;
  std::int64_t row, at;  // `at`: its place in the caller's arrays
  bool before(float s, std::int64_t r) const { return score > s || (score == s && row < r); }
};

class Counter {
 public:
  Counter(const CountRequest& request, Isa isa)
      : request_(request), kernels_(*kernel_set(isa).kernels), width_(round_up(request.pool.cols, kLanes)),
        queries_(static_cast<std::size_t>(request.queries.rows * width_)) {
    const RowReader reader(request.queries, kernels_, width_);
    for (std::int64_t q = 0; q < request.queries.rows; ++q) reader.read_row(q, queries_.data() + q * width_);
    marks_.reserve(static_cast<std::size_t>(request.starts[request.queries.rows]));
    for (std::int64_t q = 0; q < request.queries.rows; ++q) {
      const auto first = static_cast<std::ptrdiff_t>(marks_.size());
      for (std::int64_t m = request.starts[q]; m < request.starts[q + 1]; ++m)
        marks_.push_back({request.scores[m], request.rows[m] - request.first_row, m});
      std::sort(marks_.begin() + first, marks_.end(), [](const Mark& a, const Mark& b) { return a.before(b.score, b.row); });
    }
    std::fill(request.before, request.before + marks_.size(), 0);
    progress_.total = std::max<std::int64_t>(1, request.pool.rows);
  }

  Status run() {
    if (marks_.empty() || request_.pool.rows == 0) return Status::ok;
    const auto parts = static_cast<int>(std::min<std::int64_t>(request_.threads, ceil_div(request_.pool.rows, kChunk)));
    return run_in_pool(parts, [&](int) { work(); }, progress_, request_.poll);
  }

 private:
  void work() {
    const RowReader reader(request_.pool, kernels_, width_);
    Buffer<float> scratch(static_cast<std::size_t>(kBlock * width_)), scores(kQueries * kRows);
    std::vector<std::int64_t> counts(marks_.size());
    while (!progress_.stop) {
      const std::int64_t first = next_.fetch_add(kChunk), last = std::min(first + kChunk, request_.pool.rows);
      if (first >= last) break;
      for (std::int64_t r = first; r < last && !progress_.stop; r += kBlock) {
        const std::int64_t rows = std::min(kBlock, last - r);
        std::int64_t stride = 0;
        const float* at = reader.read(r, rows, scratch.data(), &stride);
        score(at, stride, r, rows, scores.data(), counts.data());
        progress_.done += rows;
        progress_.tick();
      }
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    for (std::int64_t q = 0; q < request_.queries.rows; ++q) {
      std::int64_t sum = 0;
      for (std::int64_t m = request_.starts[q]; m < request_.starts[q + 1]; ++m) {
        const auto i = static_cast<std::size_t>(m);
        // Of few marks each has its own count; of many, the rows between it and the one before.
        sum = many(q) ? sum + counts[i] : counts[i];
        request_.before[marks_[i].at] += sum;
      }
    }
  }

  bool many(std::int64_t q) const { return request_.starts[q + 1] - request_.starts[q] > kFewMarks; }

  void score(const float* at, std::int64_t stride, std::int64_t first, std::int64_t rows, float* scores, std::int64_t* counts) {
    const auto fit = static_cast<std::int64_t>(kQueryBytes / (width_ * static_cast<std::int64_t>(sizeof(float)) + 1));
    const std::int64_t group = std::clamp<std::int64_t>(fit / 4 * 4, 4, kQueries);
    for (std::int64_t q = 0; q < request_.queries.rows; q += group) {
      const auto queries = static_cast<int>(std::min(group, request_.queries.rows - q));
      for (std::int64_t r = 0; r < rows; r += kRows) {
        const auto part = static_cast<int>(std::min<std::int64_t>(kRows, rows - r));
        kernels_.score_tile(queries_.data() + q * width_, width_, queries, at + r * stride, stride, part, width_, scores, kRows);
        for (int i = 0; i < queries; ++i) {
          if (many(q + i)) {
            count_many(q + i, scores + i * kRows, first + r, part, counts);
          } else {
            count_few(q + i, scores + i * kRows, first + r, part, counts);
          }
        }
      }
    }
  }

  void count_few(std::int64_t q, const float* scores, std::int64_t first, int rows, std::int64_t* counts) const {
    for (std::int64_t m = request_.starts[q]; m < request_.starts[q + 1]; ++m) {
      const Mark& mark = marks_[static_cast<std::size_t>(m)];
      const auto lower = static_cast<int>(std::clamp<std::int64_t>(mark.row - first, 0, rows));  // rows that win a tie
      int found = 0;
      for (int r = 0; r < lower; ++r) found += scores[r] >= mark.score;
      for (int r = lower; r < rows; ++r) found += scores[r] > mark.score;
      counts[m] += found;
    }
  }

  void count_many(std::int64_t q, const float* scores, std::int64_t first, int rows, std::int64_t* counts) const {
    std::uint32_t positions[kRows];
    const Mark *begin = marks_.data() + request_.starts[q], *end = marks_.data() + request_.starts[q + 1];
    const int hits = kernels_.collect(scores, rows, (end - 1)->score, nullptr, positions);
    for (int h = 0; h < hits; ++h) {
      const float s = scores[positions[h]];
      const std::int64_t row = first + positions[h];
      // The first mark that does not come before this row; a row is not before itself.
      const Mark* at = std::partition_point(begin, end, [&](const Mark& m) { return m.before(s, row) || (m.score == s && m.row == row); });
      if (at != end) ++counts[at - marks_.data()];
    }
  }

  const CountRequest& request_;
  const Kernels& kernels_;
  const std::int64_t width_;
  Buffer<float> queries_;    // [Q, width]
  std::vector<Mark> marks_;  // query after query
  std::atomic<std::int64_t> next_{0};
  std::mutex mutex_;
  Progress progress_;
};

}  // namespace

Status count_before(const CountRequest& request) {
  if (!valid(request.queries) || !valid(request.pool) || request.queries.cols != request.pool.cols || request.threads < 1 ||
      request.starts == nullptr || (request.starts[request.queries.rows] > 0 &&
                                    (request.scores == nullptr || request.rows == nullptr || request.before == nullptr)))
    return Status::bad_argument;
  if (request.starts[0] != 0 || !std::is_sorted(request.starts, request.starts + request.queries.rows + 1)) return Status::bad_argument;
  Isa isa;
  if (!find_isa(request.isa, &isa)) return Status::unsupported;
  try {
    return Counter(request, isa).run();
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
}

Status score_rows(const Matrix& queries, const Matrix& rows, const char* isa_name, float* scores) {
  if (!valid(queries) || !valid(rows) || queries.cols != rows.cols || queries.rows != rows.rows) return Status::bad_argument;
  Isa isa;
  if (!find_isa(isa_name, &isa)) return Status::unsupported;
  try {
    const Kernels& kernels = *kernel_set(isa).kernels;
    const std::int64_t width = round_up(rows.cols, kLanes);
    const RowReader left(queries, kernels, width), right(rows, kernels, width);
    Buffer<float> pair(static_cast<std::size_t>(2 * width));
    const float *a = pair.data(), *b = pair.data() + width;
    for (std::int64_t i = 0; i < rows.rows; ++i) {
      left.read_row(i, pair.data());
      right.read_row(i, pair.data() + width);
      kernels.score_pairs(&a, &b, 1, width, scores + i);
    }
    return Status::ok;
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
}

}  // namespace tgq
