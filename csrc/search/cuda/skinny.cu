// The filter for few queries: reads the pool once, as it is stored, and bounds the norms of its rows on the way.
//
// A warp multiplies 16 rows by groups of 8 queries, 32 values at a time, from global memory straight into the fragments of
// mma.sync. Which value plays which k of the product is free as long as rows and queries agree: lane l holds values
// 8 (l % 4) … 8 (l % 4) + 7 of rows l / 4 and l / 4 + 8, and of query l / 4 of every group. Queries wait in shared memory
// as fragments.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "search/cuda/dot.h"
#include "search/cuda/filter.h"

namespace tgq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;  // of a warp
constexpr int kSlab = 32;  // values of each per step
constexpr int kLoads = 8;  // 16-byte loads that a lane has under way

// Eight values of a row as they are stored.
template <class Type>
struct Stored8 {
  static constexpr int kParts = static_cast<int>(sizeof(typename Type::Stored)) / 2;
  uint4 parts[kParts];
};

template <class Type>
__device__ inline Stored8<Type> load8(const typename Type::Stored* from, bool valid) {
  Stored8<Type> values;
#pragma unroll
  for (int i = 0; i < Stored8<Type>::kParts; ++i)
    values.parts[i] = valid ? __ldcs(reinterpret_cast<const uint4*>(from) + i) : uint4{0, 0, 0, 0};
  return values;
}

template <class To, class From>
__device__ inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__device__ inline float2 pair_value(unsigned bits, bool half) {
  return half ? __half22float2(bits_as<__half2>(bits)) : float2{bits_float(bits << 16), bits_float(bits & 0xffff0000u)};
}

// Adds what the filter multiplies, and what rounding to it loses, to the two sums of squares. `stored` is the pair before.
template <bool kRounded>
__device__ inline void add_squares(float2 stored, float2 kept, float& squares, float& errors) {
  squares = fmaf(kept.y, kept.y, fmaf(kept.x, kept.x, squares));
  if constexpr (kRounded) {
    const float x = stored.x - kept.x, y = stored.y - kept.y;
    errors = fmaf(y, y, fmaf(x, x, errors));
  }
}

// Four pairs of 16-bit values out of eight stored ones; kHalf: fp16, else bf16.
template <class Type, bool kHalf>
__device__ inline void round8(const Stored8<Type>& from, unsigned (&pairs)[4], float& squares, float& errors) {
  constexpr bool kRounded = !(kHalf || std::is_same_v<Type, BF16>);
  unsigned words[4 * Stored8<Type>::kParts];
  memcpy(words, from.parts, sizeof words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 stored{};
    if constexpr (std::is_same_v<Type, F32>) stored = {bits_float(words[2 * i]), bits_float(words[2 * i + 1])};
    else stored = pair_value(words[i], std::is_same_v<Type, F16>);
    if constexpr (kRounded) pairs[i] = bits_as<unsigned>(__floats2bfloat162_rn(stored.x, stored.y));
    else pairs[i] = words[i];
    add_squares<kRounded>(stored, kRounded ? pair_value(pairs[i], false) : stored, squares, errors);
  }
}

template <bool kHalf>
__device__ inline void multiply(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  if constexpr (kHalf) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// Sum over the four lanes that share a row.
__device__ inline float add_quad(float sum) {
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

template <class Type, bool kHalf, int kGroups>
__global__ void __launch_bounds__(kThreads, 2) skinny_filter(const __grid_constant__ FilterJob job) {
  extern __shared__ uint4 fragments[];  // [slab][group][lane]
  __shared__ float thresholds[kGroups * 8], slopes[kGroups * 8], lifts[kGroups * 8];
  constexpr int kUnroll = kLoads / (2 * Stored8<Type>::kParts);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int slabs = static_cast<int>((job.depth + kSlab - 1) / kSlab);
  const auto* queries = static_cast<const std::uint16_t*>(job.queries);
  for (int i = threadIdx.x; i < slabs * kGroups * 32; i += kThreads) {
    const std::uint32_t query = i / 32 % kGroups * 8 + i % 32 / 4, at = i / (32 * kGroups) * kSlab + i % 4 * 8;
    const bool valid = query < job.num_queries && at < job.depth;
    fragments[i] = valid ? *reinterpret_cast<const uint4*>(queries + query * job.query_stride + at) : uint4{0, 0, 0, 0};
  }
  if (threadIdx.x < kGroups * 8) {
    const bool valid = threadIdx.x < job.num_queries;
    thresholds[threadIdx.x] = valid ? job.threshold_score[threadIdx.x] : bits_float(0x7f800000u);
    slopes[threadIdx.x] = valid ? job.slope[threadIdx.x] : 0.0f;
    lifts[threadIdx.x] = valid ? job.lift[threadIdx.x] : 0.0f;
  }
  __syncthreads();
  const auto* rows = static_cast<const typename Type::Stored*>(job.rows);
  const std::uint32_t tiles = (job.num_rows + kRows - 1) / kRows;
#pragma unroll 1
  for (std::uint32_t tile = blockIdx.x * kWarps + warp; tile < tiles; tile += gridDim.x * kWarps) {
    const std::uint32_t first = tile * kRows + lane / 4;
    const typename Type::Stored* from[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A row beyond the last is read as the last one; append_hit turns its scores away.
      const std::uint32_t row = first + half * 8 < job.num_rows ? first + half * 8 : job.num_rows - 1;
      from[half] = rows + static_cast<std::int64_t>(row) * job.row_stride + lane % 4 * 8;
    }
    float sums[kGroups][4] = {}, squares[2] = {}, errors[2] = {};
#pragma unroll 1
    for (int begin = 0; begin < slabs; begin += kUnroll) {
      Stored8<Type> stored[kUnroll][2];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int at = (begin + i) * kSlab;
        const bool valid = at + lane % 4 * 8 < static_cast<int>(job.depth);
#pragma unroll
        for (int half = 0; half < 2; ++half) stored[i][half] = load8<Type>(from[half] + at, valid);
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (begin + i >= slabs) break;
        unsigned a[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) round8<Type, kHalf>(stored[i][half], a[half], squares[half], errors[half]);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const uint4 b = fragments[((begin + i) * kGroups + g) * 32 + lane];
          multiply<kHalf>(sums[g], a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
          multiply<kHalf>(sums[g], a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float norm = norm_bound(add_quad(squares[half])), error = norm_bound(add_quad(errors[half]));
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int query = g * 8 + lane % 4 * 2 + c;
          const float least = filter_threshold(thresholds[query], slopes[query], lifts[query], job.absolute, norm, error);
          if (!(sums[g][half * 2 + c] < least)) append_hit(job, static_cast<std::uint32_t>(query), first + half * 8);
        }
      }
    }
    __syncwarp();  // the next rows' products want all lanes together
  }
}

template <class Type, bool kHalf, int kGroups>
int launch(const FilterJob& job, int multiprocessors, cudaStream_t stream) {
  const auto kernel = skinny_filter<Type, kHalf, kGroups>;
  const int bytes = static_cast<int>((job.depth + kSlab - 1) / kSlab) * kGroups * 32 * static_cast<int>(sizeof(uint4));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return static_cast<int>(error);
  const std::uint32_t all = (job.num_rows + kRows * kWarps - 1) / (kRows * kWarps);
  const auto most = static_cast<std::uint32_t>(2 * multiprocessors);
  kernel<<<all < most ? all : most, kThreads, bytes, stream>>>(job);
  return static_cast<int>(cudaGetLastError());
}

template <class Type, bool kHalf>
int launch(const FilterJob& job, int multiprocessors, cudaStream_t stream) {
  static_assert(kSkinnyQueries == 8 * 8);
  if (job.num_queries <= 16) return launch<Type, kHalf, 2>(job, multiprocessors, stream);
  if (job.num_queries <= 32) return launch<Type, kHalf, 4>(job, multiprocessors, stream);
  return launch<Type, kHalf, 8>(job, multiprocessors, stream);
}

}  // namespace

int launch_skinny_filter(const FilterJob& job, int multiprocessors, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (job.code_dtype == DType::f16) return launch<F16, true>(job, multiprocessors, on);
  if (job.dtype == DType::f32) return launch<F32, false>(job, multiprocessors, on);
  if (job.dtype == DType::f16) return launch<F16, false>(job, multiprocessors, on);
  return launch<BF16, false>(job, multiprocessors, on);
}

}  // namespace tgq::cuda
