// Runs on the host: what the kernels assume of matrix fragments, against CUTLASS' own layouts. The epilogue of hopper.cu
// computes where a thread's scores lie from the first of them; skinny.cu fills fragments from memory and reads scores.
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include <cstdio>
#include <vector>

#include "search/cuda/fragments.h"

template <int kQueries, int kColumns, class Schedule>
bool places_are_as_the_epilogue_takes_them() {
  using namespace cute;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::bfloat16_t, cutlass::layout::RowMajor, 8,
      cutlass::bfloat16_t, cutlass::layout::ColumnMajor, 8, float, Shape<Int<kQueries>, Int<kColumns>, _64>,
      Shape<_2, _1, _1>, cutlass::gemm::collective::StageCountAutoCarveout<0>, Schedule>::CollectiveOp;
  typename Mainloop::TiledMma mma;
  const auto identity = make_identity_tensor(Shape<Int<kQueries>, Int<kColumns>>{});
  std::vector<int> seen(kQueries * kColumns);
  for (int thread = 0; thread < size(mma); ++thread) {
    const auto where = mma.get_thread_slice(thread).partition_C(identity);
    static_assert(size<0, 0>(where) == 2 && size<0, 1>(where) == 2 && size<0, 2>(where) * 8 == kColumns && size<2>(where) == 1);
    const int first_column = get<1>(where(_0{})), first_row = get<0>(where(_0{}));
    for (int m = 0; m < size<1>(where); ++m)
      for (int half = 0; half < 2; ++half)
        for (int j = 0; j < size<0, 2>(where); ++j)
          for (int c = 0; c < 2; ++c) {
            const auto place = where(make_coord(make_coord(c, half, j), m, 0));
            const auto first = where(make_coord(make_coord(0, half, 0), m, 0));
            if (get<0>(place) != get<0>(first) || get<1>(place) != first_column + j * 8 + c) return false;
            if (get<0>(place) != first_row + m * 64 + half * 8) return false;
            ++seen[get<0>(place) * kColumns + get<1>(place)];
          }
  }
  for (const int times : seen)
    if (times != 1) return false;
  return true;
}

// Rows (A) and queries (B) of skinny.cu must agree on the value that plays each k, and every score lie where it is read.
bool skinny_fragments_agree() {
  using namespace cute;
  using Traits = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  const auto a = typename Traits::ALayout{};  // (lane, value) -> row + 16 k
  const auto b = typename Traits::BLayout{};  // (lane, value) -> query + 8 k
  const auto c = typename Traits::CLayout{};  // (lane, value) -> row + 16 query
  int row_value[16][16], query_value[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    // Registers of A: the first pairs of both halves of the rows, then the second ones; of B: the two pairs.
    for (int v = 0; v < 8; ++v) {
      const int place = a(lane, v), half = v / 2 % 2, pair = v / 4;
      if (place % 16 != lane / 4 + 8 * half) return false;
      row_value[place % 16][place / 16] = lane % 4 * 8 + pair * 2 + v % 2;
    }
    for (int v = 0; v < 4; ++v) {
      const int place = b(lane, v);
      if (place % 8 != lane / 4) return false;
      query_value[place % 8][place / 8] = lane % 4 * 8 + v / 2 * 2 + v % 2;
    }
    for (int v = 0; v < 4; ++v)
      if (c(lane, v) != lane / 4 + 8 * (v / 2) + 16 * (lane % 4 * 2 + v % 2)) return false;
  }
  for (int row = 0; row < 16; ++row)
    for (int query = 0; query < 8; ++query)
      for (int k = 0; k < 16; ++k)
        if (row_value[row][k] != query_value[query][k]) return false;
  return true;
}

// What ldmatrix brings from the slabs of portable.cu must be what mma.sync takes: register i of a lane holds two values of
// the row that lane 8 i + lane / 4 named. And eight rows of one chunk must lie in different banks.
bool portable_fragments_agree() {
  using namespace cute;
  using namespace tgq::cuda;
  using Traits = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  const auto a = typename Traits::ALayout{};
  const auto b = typename Traits::BLayout{};
  std::vector<int> row_at(128 * kSlab * 2 / 16, -1), chunk_at(row_at);
  for (int row = 0; row < 128; ++row)
    for (int chunk = 0; chunk < kSlab / 8; ++chunk) {
      const int place = chunk_byte(row, chunk);
      if (place % 16 != 0 || row_at[place / 16] != -1) return false;
      row_at[place / 16] = row;
      chunk_at[place / 16] = chunk;
      for (int other = row / 8 * 8; other < row; ++other)
        if (place / 16 % 8 == chunk_byte(other, chunk) / 16 % 8) return false;
    }
  constexpr int kFirst = 48;
  for (int step = 0; step < kSlab / 16; ++step)
    for (int lane = 0; lane < 32; ++lane)
      for (int v = 0; v < 8; ++v) {
        const int source = 8 * (v / 2) + lane / 4, value = lane % 4 * 2 + v % 2;
        const int from_a = query_byte(kFirst, source, step) / 16, from_b = row_byte(kFirst, source, step) / 16;
        if (row_at[from_a] - kFirst + 16 * (chunk_at[from_a] * 8 + value - 16 * step) != a(lane, v)) return false;
        // Registers 0 and 1 are B of the first eight rows, 2 and 3 of the next.
        const int row = row_at[from_b] - kFirst - v / 4 * 8;
        if (row + 8 * (chunk_at[from_b] * 8 + value - 16 * step) != b(lane, v % 4)) return false;
      }
  return true;
}

int main() {
  using cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  const bool right = skinny_fragments_agree() && portable_fragments_agree() &&
                     places_are_as_the_epilogue_takes_them<128, 128, KernelTmaWarpSpecializedPingpong>() &&
                     places_are_as_the_epilogue_takes_them<64, 256, KernelTmaWarpSpecializedPingpong>() &&
                     places_are_as_the_epilogue_takes_them<128, 256, KernelTmaWarpSpecializedCooperative>();
  std::puts(right ? "as assumed" : "fragments lie elsewhere");
  return right ? 0 : 1;
}
