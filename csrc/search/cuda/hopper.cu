// The filter on Hopper: CUTLASS' collective mainloop (TMA and wgmma, warp-specialised, two consumer warpgroups) with the
// threshold test as its epilogue. Where the warpgroups take tiles in turn, one tests its scores while the other multiplies.
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "search/cuda/filter.h"

namespace tgq::cuda {
namespace {

// Takes the place of CUTLASS' default epilogue: tests scores in registers and writes hits; there is no matrix C or D.
class ThresholdEpilogue {
 public:
  using EpilogueSchedule = cutlass::gemm::EpilogueDefault;
  using DispatchPolicy = EpilogueSchedule;
  using ElementC = float;
  using ElementD = float;
  using ElementOutput = float;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using StrideC = cute::Stride<std::int64_t, cute::Int<1>, std::int64_t>;
  using StrideD = StrideC;
  using GmemTiledCopyC = void;
  using GmemTiledCopyD = void;
  struct ThreadEpilogueOp {
    using ElementOutput = float;
    using ElementAccumulator = float;
    using ElementCompute = float;
    using ElementScalar = float;
    using ElementD = float;
  };
  struct SharedStorage {};
  using TensorStorage = SharedStorage;
  struct Arguments {
    FilterJob job{};
  };
  using Params = Arguments;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static std::size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE
  ThresholdEpilogue(const Params& params, const SharedStorage& = SharedStorage()) : job_(params.job) {}

  template <class Shape, class TileShape, class TileCoord, class Engine, class Layout, class TiledMma, class Residue>
  CUTLASS_DEVICE void operator()(Shape, TileShape tile_shape, TileCoord tile_coord,
                                 const cute::Tensor<Engine, Layout>& scores, TiledMma tiled_mma, Residue, int thread,
                                 char*) {
    using namespace cute;
    constexpr int kColumns = get<1>(TileShape{}), kBounds = kColumns / static_cast<int>(kBoundRows);
    static_assert(kColumns == kBounds * static_cast<int>(kBoundRows), "whole bounds of the norms per tile");
    const auto m_tile = static_cast<std::uint32_t>(get<0>(tile_coord));
    const auto n_tile = static_cast<std::uint32_t>(get<1>(tile_coord));
    const std::uint32_t first_query = m_tile * static_cast<std::uint32_t>(get<0>(TileShape{}));
    const std::uint32_t first_index = n_tile * kColumns;
    if (first_query >= job_.num_queries || first_index >= job_.num_rows) return;  // a cluster's tile beyond the edge
    // Coordinates within the tile of this thread's scores, laid out as the scores: ((2, 2, N/8), M/64, 1).
    const Tensor identity = make_identity_tensor(take<0, 2>(tile_shape));
    const Tensor where = tiled_mma.get_thread_slice(thread).partition_C(identity);
    static_assert(size<0, 0>(Layout{}) == 2 && size<0, 1>(Layout{}) == 2 && size<2>(Layout{}) == 1);
    static_assert(size<0, 2>(Layout{}) * 8 == kColumns, "a quarter of a query's scores per thread");
    constexpr int kEach = static_cast<int>(kBoundRows) / 8;  // pairs of scores of a query that share a bound
    const auto first_column = static_cast<std::uint32_t>(get<1>(where(_0{})));
    CUTLASS_PRAGMA_UNROLL
    for (int m = 0; m < size<1>(Layout{}); ++m) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const auto row = static_cast<std::uint32_t>(get<0>(where(make_coord(make_coord(0, half, 0), m, 0))));
        const std::uint32_t query = first_query + row;
        CUTLASS_PRAGMA_UNROLL
        for (int bound = 0; bound < kBounds; ++bound) {
          const std::uint32_t first = first_index + bound * kBoundRows;
          if (first >= job_.num_rows) break;  // it has no bound
          const float least = tile_threshold(job_, query, n_tile * kBounds + bound);
          std::uint32_t passed = 0;
          CUTLASS_PRAGMA_UNROLL
          for (int j = 0; j < kEach; ++j) {
            CUTLASS_PRAGMA_UNROLL
            for (int c = 0; c < 2; ++c)
              if (!(scores(make_coord(make_coord(c, half, bound * kEach + j), m, 0)) < least)) passed |= 1u << (2 * j + c);
          }
          while (passed != 0) {
            const auto bit = static_cast<std::uint32_t>(__ffs(static_cast<int>(passed)) - 1);
            passed &= passed - 1;
            append_hit(job_, query, first + first_column + (bit >> 1) * 8 + (bit & 1));
          }
        }
      }
    }
    if (job_.row_threshold != nullptr)
      test_rows(scores, first_query + static_cast<std::uint32_t>(get<0>(where(_0{}))), first_index + first_column);
    __syncwarp();  // the next tile's wgmma wants all lanes together
  }

 private:
  // The same scores for the rows as queries of later tiles: a thread holds two of every eight columns, for the same queries.
  template <class Engine, class Layout>
  CUTLASS_DEVICE void test_rows(const cute::Tensor<Engine, Layout>& scores, std::uint32_t query, std::uint32_t index) const {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < size<0, 2>(Layout{}); ++j) {
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float least = row_threshold(job_, index + j * 8 + c, query);
        std::uint32_t passed = 0;
        CUTLASS_PRAGMA_UNROLL
        for (int m = 0; m < size<1>(Layout{}); ++m) {
          CUTLASS_PRAGMA_UNROLL
          for (int half = 0; half < 2; ++half)
            if (!(scores(make_coord(make_coord(c, half, j), m, 0)) < least)) passed |= 1u << (2 * m + half);
        }
        while (passed != 0) {
          const auto bit = static_cast<std::uint32_t>(__ffs(static_cast<int>(passed)) - 1);
          passed &= passed - 1;
          append_pending(job_, query + (bit >> 1) * 64 + (bit & 1) * 8, index + j * 8 + c);
        }
      }
    }
  }

  FilterJob job_;
};

using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;  // two query tiles share the pool's rows by multicast

template <class Element, int kQueries, int kColumns, class Schedule>
int launch(const FilterJob& job, int multiprocessors, cudaStream_t stream) {
  using TileShape = cute::Shape<cute::Int<kQueries>, cute::Int<kColumns>, cute::_64>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 8, Element,
      cutlass::layout::ColumnMajor, 8, float, TileShape, ClusterShape, cutlass::gemm::collective::StageCountAutoCarveout<0>,
      Schedule>::CollectiveOp;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<ThresholdEpilogue>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(Kernel::SharedStorageSize <= 227 * 1024, "the stages fit in a Hopper block's shared memory");
  using Strides = cute::Stride<std::int64_t, cute::Int<1>, std::int64_t>;

  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {static_cast<int>(job.num_queries), static_cast<int>(job.num_rows),
                             static_cast<int>(job.depth), 1};
  arguments.mainloop.ptr_A = static_cast<const Element*>(job.queries);
  arguments.mainloop.dA = Strides{job.query_stride, {}, 0};
  arguments.mainloop.ptr_B = static_cast<const Element*>(job.rows);
  arguments.mainloop.dB = Strides{job.row_stride, {}, 0};
  arguments.epilogue.job = job;
  arguments.hw_info.sm_count = multiprocessors;
  // Query tiles of the same rows one after the other: the rows stay in the second-level cache.
  arguments.scheduler.raster_order = decltype(arguments.scheduler.raster_order)::AlongM;
  Gemm gemm;
  if (gemm.can_implement(arguments) != cutlass::Status::kSuccess) return static_cast<int>(cudaErrorInvalidValue);
  if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess ||
      gemm.run(stream) != cutlass::Status::kSuccess) {
    const cudaError_t error = cudaGetLastError();
    return static_cast<int>(error == cudaSuccess ? cudaErrorLaunchFailure : error);
  }
  return static_cast<int>(cudaGetLastError());
}

template <class Element>
int launch(const FilterJob& job, HopperTile tile, int multiprocessors, cudaStream_t stream) {
  using cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  if (tile == HopperTile::q128_n128)
    return launch<Element, 128, 128, KernelTmaWarpSpecializedPingpong>(job, multiprocessors, stream);
  if (tile == HopperTile::q64_n256)
    return launch<Element, 64, 256, KernelTmaWarpSpecializedPingpong>(job, multiprocessors, stream);
  // The largest: the smaller ones read half as much again from the second-level cache, which is what bounds all three.
  return launch<Element, 128, 256, KernelTmaWarpSpecializedCooperative>(job, multiprocessors, stream);
}

}  // namespace

int launch_hopper_filter(const FilterJob& job, HopperTile tile, int multiprocessors, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return job.code_dtype == DType::f16 ? launch<cutlass::half_t>(job, tile, multiprocessors, on)
                                  : launch<cutlass::bfloat16_t>(job, tile, multiprocessors, on);
}

bool hopper_filter_built() { return true; }

}  // namespace tgq::cuda
