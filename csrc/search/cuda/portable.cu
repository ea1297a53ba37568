// The filter with mma.sync and cp.async: sm_80 and everything later.
//
// A block scores 128 queries x 128 rows. Slabs of 32 values of both go through four stages of shared memory; eight warps,
// two by four, each multiply 64 x 32. Scores never leave the registers: they are compared with their query's threshold.
#include <cuda_runtime.h>

#include "search/cuda/filter.h"
#include "search/cuda/fragments.h"

namespace tgq::cuda {
namespace {

constexpr int kTile = 128;                      // queries, and rows, of a block
constexpr int kStages = 4;
constexpr int kThreads = 256;
constexpr int kChunks = kSlab / 8;              // 16-byte chunks of a slab's row
constexpr int kSlabBytes = kTile * kSlab * 2;   // of one operand
constexpr int kSharedBytes = kStages * 2 * kSlabBytes;
static_assert(kTile == static_cast<int>(kBoundRows), "one bound of the norms per tile");

__device__ inline void copy_chunk(unsigned to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;  // the rest is filled with zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void load_matrices(unsigned (&to)[4], unsigned from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

template <bool kHalf>
__device__ inline void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (kHalf) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// One operand's slab at `depth` values: 512 chunks, two per thread.
__device__ inline void load_slab(unsigned shared, const std::uint16_t* from, std::int64_t stride, std::uint32_t first,
                                 std::uint32_t count, std::uint32_t at, std::uint32_t depth) {
#pragma unroll
  for (int i = 0; i < kTile * kChunks / kThreads; ++i) {
    const int item = static_cast<int>(threadIdx.x) + i * kThreads;
    const int row = item / kChunks, chunk = item % kChunks;
    const std::uint32_t d = at + static_cast<std::uint32_t>(chunk) * 8;
    const bool valid = first + row < count && d < depth;
    // An invalid chunk is not read; its address stays within the operand all the same.
    const std::uint16_t* source = from + (valid ? static_cast<std::int64_t>(first + row) * stride + d : 0);
    copy_chunk(shared + chunk_byte(row, chunk), source, valid);
  }
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 2) portable_filter(const __grid_constant__ FilterJob job) {
  extern __shared__ __align__(128) unsigned char memory[];
  const auto base = static_cast<unsigned>(__cvta_generic_to_shared(memory));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_query = warp / 4 * 64, warp_row = warp % 4 * 32;
  // Query tiles of the same rows run together: the rows stay in the second-level cache.
  const std::uint32_t query_tiles = (job.num_queries + kTile - 1) / kTile;
  const std::uint32_t tile = blockIdx.x / query_tiles;
  const std::uint32_t first_query = blockIdx.x % query_tiles * kTile, first_index = tile * kTile;
  const auto* queries = static_cast<const std::uint16_t*>(job.queries);
  const auto* rows = static_cast<const std::uint16_t*>(job.rows);
  const int slabs = static_cast<int>((job.depth + kSlab - 1) / kSlab);
  const auto load = [&](int slab) {
    if (slab < slabs) {
      const unsigned stage = base + slab % kStages * (2 * kSlabBytes);
      const auto at = static_cast<std::uint32_t>(slab * kSlab);
      load_slab(stage, queries, job.query_stride, first_query, job.num_queries, at, job.depth);
      load_slab(stage + kSlabBytes, rows, job.row_stride, first_index, job.num_rows, at, job.depth);
    }
    asm volatile("cp.async.commit_group;\n" ::: "memory");  // an empty group keeps the count
  };
  float sums[4][4][4] = {};  // [16 queries][8 rows][fragment]
#pragma unroll 1
  for (int slab = 0; slab < kStages - 1; ++slab) load(slab);
#pragma unroll 1
  for (int slab = 0; slab < slabs; ++slab) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kStages - 2) : "memory");
    __syncthreads();  // the slab is there for all, and the stage loaded next is free
    load(slab + kStages - 1);
    const unsigned stage = base + slab % kStages * (2 * kSlabBytes);
#pragma unroll
    for (int step = 0; step < kSlab / 16; ++step) {
      unsigned a[4][4], b[4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        load_matrices(a[m], stage + query_byte(warp_query + m * 16, lane, step));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_matrices(b, stage + kSlabBytes + row_byte(warp_row + n * 16, lane, step));
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          multiply<kHalf>(sums[m][2 * n], a[m], b[0], b[1]);
          multiply<kHalf>(sums[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t query = first_query + warp_query + m * 16 + half * 8 + lane / 4;
      const float least = tile_threshold(job, query, tile);
      std::uint32_t passed = 0;
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (!(sums[m][n][half * 2 + c] < least)) passed |= 1u << (2 * n + c);
      while (passed != 0) {
        const auto bit = static_cast<std::uint32_t>(__ffs(static_cast<int>(passed)) - 1);
        passed &= passed - 1;
        append_hit(job, query, first_index + warp_row + (bit >> 1) * 8 + lane % 4 * 2 + (bit & 1));
      }
    }
  }
  if (job.row_threshold == nullptr) return;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const std::uint32_t index = first_index + warp_row + n * 8 + lane % 4 * 2 + c;
      const float least = row_threshold(job, index, first_query);
      std::uint32_t passed = 0;
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (!(sums[m][n][half * 2 + c] < least)) passed |= 1u << (2 * m + half);
      while (passed != 0) {
        const auto bit = static_cast<std::uint32_t>(__ffs(static_cast<int>(passed)) - 1);
        passed &= passed - 1;
        append_pending(job, first_query + warp_query + bit * 8 + lane / 4, index);
      }
    }
  }
}

template <bool kHalf>
int launch(const FilterJob& job, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(portable_filter<kHalf>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return static_cast<int>(error);
  const std::uint32_t blocks = ((job.num_rows + kTile - 1) / kTile) * ((job.num_queries + kTile - 1) / kTile);
  portable_filter<kHalf><<<blocks, kThreads, kSharedBytes, stream>>>(job);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int launch_portable_filter(const FilterJob& job, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return job.code_dtype == DType::f16 ? launch<true>(job, on) : launch<false>(job, on);
}

}  // namespace tgq::cuda
