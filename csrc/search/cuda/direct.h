// The exact scan: fixed-order fp32 scores of listed queries against every pool row, on ordinary cores. It is the oracle of
// the filter, the search for few queries, and where queries go that the filter could not finish.
//
// A half-warp scores 8 queries x 8 rows. Its lane j holds partial sum j (mod 16) of all 64 dots, so that one step reads
// 8 + 8 values for 64 multiply-adds; the butterfly that adds the partial sums hands every lane four finished scores.
// Every block owns the lists it appends to and compacts a list before it could be full: nothing can be dropped.
#pragma once

#include <cstdint>

#include "search/cuda/engine.h"
#include "search/cuda/thread_block.h"

namespace tgq::cuda {

constexpr int kDirectThreads = 256;
constexpr int kDirectSlab = 32;
constexpr int kSlabRows = kDirectThreads / kDirectSlab;  // rows that the threads load at once
constexpr int kDirectStride = 48;  // floats between rows of a slab: two rows lie in different halves of the banks

template <int kQueries, int kRows>
struct DirectMemory {
  float queries[kQueries * kDirectStride];
  float rows[kRows * kDirectStride];
  SelectScratch select;
  Key threshold[kQueries];
  std::uint32_t count[kQueries];
  std::uint32_t query[kQueries];
};

// One level of the tree: lanes `distance` apart add their partial sums, and each keeps one half of them.
template <int kDistance>
__device__ inline void exchange(float (&v)[64], int lane) {
  constexpr int kKeep = kDistance * 4;
  const bool upper = (lane & kDistance) != 0;
#pragma unroll
  for (int i = 0; i < kKeep; ++i) {
    const float send = upper ? v[i] : v[i + kKeep], mine = upper ? v[i + kKeep] : v[i];
    v[i] = mine + __shfl_xor_sync(0xffffffffu, send, kDistance, 16);
  }
}

// Reduces the 64 partial sums of each of 16 lanes; afterwards v[0 … 3] of lane l are the dots 4 l … 4 l + 3.
__device__ inline void reduce_scatter(float (&v)[64], int lane) {
  exchange<8>(v, lane);
  exchange<4>(v, lane);
  exchange<2>(v, lane);
  exchange<1>(v, lane);
}

// Loads this thread's part of a slab into registers: value `d` of every eighth row from `from` on, `rows` of them valid.
template <class Type, int kEach>
__device__ inline void read_slab(float (&values)[kEach], const typename Type::Stored* from, std::int64_t row_stride,
                                 int rows, bool valid) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    values[i] = valid && i * kSlabRows < rows ? Type::value(*from) : 0.0f;
    from += kSlabRows * row_stride;
  }
}

template <int kEach>
__device__ inline void write_slab(float* shared, const float (&values)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    shared[(threadIdx.x / kDirectSlab + i * kSlabRows) * kDirectStride + threadIdx.x % kDirectSlab] =
        values[i];
}

// Scores one tile and appends what exceeds the thresholds.
template <class Type, int kQueries, int kRows>
__device__ inline void scan_tile(const Job& job, DirectMemory<kQueries, kRows>& m, std::uint32_t queries, Key* lists,
                                 std::int64_t first, std::int64_t end) {
  constexpr int kEachQuery = kQueries * kDirectSlab / kDirectThreads, kEachRow = kRows * kDirectSlab / kDirectThreads;
  constexpr int kRowGroups = kRows / 8;
  const int half_warp = threadIdx.x / 16, lane = threadIdx.x % 16;
  // A half-warp's rows are kRowGroups apart, so that the two of a warp read neighbouring rows.
  const int my_query = half_warp / kRowGroups * 8, my_row = half_warp % kRowGroups;
  const std::int64_t size = job.pool.cols;
  const int load_row = threadIdx.x / kDirectSlab, load_value = threadIdx.x % kDirectSlab;
  const auto* pool = static_cast<const typename Type::Stored*>(job.pool.data) + (first + load_row) * job.pool.row_stride +
                     load_value * job.pool.col_stride;
  const int pool_rows = static_cast<int>(end - first < kRows ? end - first : kRows) - load_row;
  float sums[64] = {};
  float query_values[kEachQuery], row_values[kEachRow];
  const auto read = [&](std::int64_t at) {
    const bool valid = at + load_value < size;
#pragma unroll
    for (int i = 0; i < kEachQuery; ++i) {
      const int slot = load_row + i * kSlabRows;
      query_values[i] = valid && slot < static_cast<int>(queries) ? job.query_values[m.query[slot] * size + at + load_value] : 0.0f;
    }
    read_slab<Type>(row_values, pool + at * job.pool.col_stride, job.pool.row_stride, pool_rows, valid);
  };
  read(0);
  for (std::int64_t at = 0; at < size; at += kDirectSlab) {
    __syncthreads();  // the slab before has been used
    write_slab(m.queries, query_values);
    write_slab(m.rows, row_values);
    __syncthreads();
    if (at + kDirectSlab < size) read(at + kDirectSlab);  // travels while this slab is used
#pragma unroll
    for (int step = 0; step < kDirectSlab; step += 16) {
      float q[8], r[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        q[i] = m.queries[(my_query + i) * kDirectStride + step + lane];
        r[i] = m.rows[(my_row + i * kRowGroups) * kDirectStride + step + lane];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i * 8 + j] = fmaf(q[i], r[j], sums[i * 8 + j]);
    }
  }
  reduce_scatter(sums, lane);
  const int slot = my_query + lane / 2;
  if (slot < static_cast<int>(queries)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t row = first + my_row + (lane % 2 * 4 + i) * kRowGroups;
      if (row >= end) continue;
      const Key key = make_key(sums[i], job.first_row + static_cast<std::uint32_t>(row));
      if (!wanted(job, m.query[slot], key, m.threshold[slot])) continue;
      lists[static_cast<std::size_t>(slot) * job.owned_capacity + atomicAdd(&m.count[slot], 1u)] = key;
    }
  }
  __syncthreads();
}

// Keeps the k best of a list and raises its threshold, here and for the other blocks that scan for the same query.
template <int kQueries, int kRows>
__device__ __noinline__ void compact_list(const Job& job, DirectMemory<kQueries, kRows>& m, std::uint32_t slot, Key* list) {
  ThreadBlock block;
  select_best(block, m.count[slot], job.k, [&](std::uint32_t i) { return list[i]; }, m.select);
  block.each(m.select.count, [&](std::uint32_t i) { list[i] = m.select.keys[i]; });
  block.each(1, [&](std::uint32_t) {
    m.count[slot] = m.select.count;
    if (m.select.count < job.k) return;
    // k keys are not below this one: whatever is below it is beaten, whoever finds it.
    atomicMax(reinterpret_cast<unsigned long long*>(job.threshold + m.query[slot]),
              static_cast<unsigned long long>(m.select.lowest));
  });
}

template <class Type, int kQueries, int kRows>
__device__ inline void scan_item(const Job& job, DirectMemory<kQueries, kRows>& m, const Split& split, std::uint32_t item,
                                 Key* lists, std::uint32_t* counts) {
  const std::uint32_t group = item / split.splits, part = item % split.splits;
  const std::uint32_t left = *job.num_listed - group * kQueries;
  const std::uint32_t queries = left < kQueries ? left : static_cast<std::uint32_t>(kQueries);
  const std::int64_t begin = split_begin(job.pool.rows, split.splits, part);
  const std::int64_t end = split_begin(job.pool.rows, split.splits, part + 1);
  ThreadBlock block;
  block.each(queries, [&](std::uint32_t i) {
    m.query[i] = job.listed[group * kQueries + i];
    m.count[i] = 0;
  });
  for (std::int64_t first = begin; first < end; first += kRows) {
    block.each(queries, [&](std::uint32_t i) {
      // Other blocks raise it: read past the first-level cache.
      m.threshold[i] = *static_cast<volatile Key*>(job.threshold + m.query[i]);
    });
    scan_tile<Type>(job, m, queries, lists, first, end);
    for (std::uint32_t i = 0; i < queries; ++i)
      if (m.count[i] + kRows > job.owned_capacity) compact_list(job, m, i, lists + static_cast<std::size_t>(i) * job.owned_capacity);
  }
  for (std::uint32_t i = 0; i < queries; ++i) {
    Key* list = lists + static_cast<std::size_t>(i) * job.owned_capacity;
    compact_list(job, m, i, list);
    Key* best = job.best + static_cast<std::size_t>(m.query[i]) * job.best_capacity;
    block.each(split.splits == 1 ? m.count[i] : 0, [&](std::uint32_t j) { best[j] = list[j]; });
  }
  block.each(queries, [&](std::uint32_t i) {
    if (split.splits == 1) job.kept[m.query[i]] = m.count[i];
    counts[i] = m.count[i];
  });
}

// One item per block where a query group is split (its lists are then merged from there), else items in turn.
template <int kQueries, int kRows>
__global__ void __launch_bounds__(kDirectThreads, 2) direct_scan(const __grid_constant__ Job job) {
  static_assert(kQueries * kRows == 16 * 64, "64 dots per half-warp");
  __shared__ DirectMemory<kQueries, kRows> memory;
  const Split split = split_work(*job.num_listed, kQueries, job.direct_blocks, job.pool.rows);
  Key* lists = job.owned + static_cast<std::size_t>(blockIdx.x) * kQueries * job.owned_capacity;
  std::uint32_t* counts = job.owned_count + blockIdx.x * kQueries;
  for (std::uint32_t item = blockIdx.x; item < split.items(); item += gridDim.x) {
    if (job.pool.dtype == DType::f32) scan_item<F32>(job, memory, split, item, lists, counts);
    else if (job.pool.dtype == DType::f16) scan_item<F16>(job, memory, split, item, lists, counts);
    else scan_item<BF16>(job, memory, split, item, lists, counts);
  }
}

}  // namespace tgq::cuda
