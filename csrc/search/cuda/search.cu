// The CUDA search: kernels around the steps of engine.h, their launches, and what the caller sees.
#include <cuda_runtime.h>

#include <mutex>

#include "search/cuda/direct.h"
#include "search/cuda/run.h"
#include "search/cuda/thread_block.h"

namespace tgq::cuda {
namespace {

__global__ void __launch_bounds__(kQueryParts, 8) prepare_queries_kernel(const __grid_constant__ Job job) {
  __shared__ PrepareScratch scratch;
  ThreadBlock block;
  prepare_query(block, job, blockIdx.x, scratch);
}

__global__ void __launch_bounds__(256, 4) prepare_rows_kernel(const __grid_constant__ Job job, const Phase phase) {
  __shared__ PrepareScratch scratch;
  ThreadBlock block;
  prepare_rows(block, job, phase, blockIdx.x, scratch);
}

// Replaces the rows of hits by their exact keys. A half-warp takes a hit; blocks of one query lie along x.
__global__ void __launch_bounds__(256) rescore_kernel(const __grid_constant__ Job job) {
  const std::uint32_t q = blockIdx.y;
  const std::uint32_t found = job.hit_count[q];
  if (found > job.hit_capacity) return;  // to be rescanned
  Key* hits = job.hits + static_cast<std::size_t>(q) * job.hit_capacity;
  const std::int64_t size = job.pool.cols;
  const float* query = job.query_values + q * size;
  const std::uint32_t lane = threadIdx.x % kLanes, stride = gridDim.x * (256 / kLanes);
  // Both halves of a warp take the same number of turns: the shuffles need all lanes.
  for (std::uint32_t turn = blockIdx.x * (256 / kLanes) + threadIdx.x / 32 * 2; turn < found; turn += stride) {
    const std::uint32_t i = turn + threadIdx.x % 32 / kLanes;
    const auto row = static_cast<std::uint32_t>(i < found ? hits[i] : 0);
    float sum = 0.0f;
    with_type(job.pool.dtype, [&](auto type) {
      using Type = decltype(type);
      const auto* from = static_cast<const typename Type::Stored*>(job.pool.data) + row * job.pool.row_stride;
      sum = job.pool.col_stride == 1 ? lane_sum<Type>(query, from, 1, size, lane)
                                     : lane_sum<Type>(query, from, job.pool.col_stride, size, lane);
    });
    const float score = add_lanes(sum);
    if (lane == 0 && i < found) hits[i] = make_key(score, job.first_row + row);
  }
}

__global__ void __launch_bounds__(256) merge_hits_kernel(const __grid_constant__ Job job, const Phase phase) {
  __shared__ SelectScratch scratch;
  ThreadBlock block;
  merge_hits(block, job, phase, blockIdx.x, scratch);
}

__global__ void __launch_bounds__(256) list_kernel(const __grid_constant__ Job job) {
  const std::uint32_t q = blockIdx.x * 256 + threadIdx.x;
  if (q >= job.num_queries || !needs_scan(job, q)) return;
  start_scan(job, q);
  job.listed[atomicAdd(job.num_listed, 1u)] = q;
}

// A few queries can have hundreds of lists each: many threads.
__global__ void __launch_bounds__(1024) merge_scan_kernel(const __grid_constant__ Job job) {
  __shared__ SelectScratch scratch;
  ThreadBlock block;
  merge_scan(block, job, blockIdx.x, scratch);
}

__global__ void __launch_bounds__(256) finish_kernel(const __grid_constant__ Job job) {
  __shared__ SelectScratch scratch;
  ThreadBlock block;
  finish(block, job, blockIdx.x, scratch);
}

int launched() { return static_cast<int>(cudaGetLastError()); }

// The steps as launches on one stream.
class Stream {
 public:
  Stream(Engine engine, HopperTile tile, int multiprocessors, cudaStream_t stream)
      : engine_(engine), tile_(tile), multiprocessors_(multiprocessors), stream_(stream) {}

  int prepare_queries(const Job& job) {
    prepare_queries_kernel<<<job.num_queries, kQueryParts, 0, stream_>>>(job);
    return launched();
  }
  int prepare_rows(const Job& job, const Phase& phase) {
    const auto tiles = static_cast<unsigned>((phase.rows + kBoundRows - 1) / kBoundRows);
    prepare_rows_kernel<<<tiles, 256, 0, stream_>>>(job, phase);
    return launched();
  }
  int filter(const FilterJob& job) {
    if (engine_ == Engine::skinny) return launch_skinny_filter(job, multiprocessors_, stream_);
    return engine_ == Engine::hopper ? launch_hopper_filter(job, tile_, multiprocessors_, stream_)
                                     : launch_portable_filter(job, stream_);
  }
  int rescore(const Job& job) {
    const unsigned slices = job.num_queries >= 2048 ? 1 : 2048 / job.num_queries < 64 ? 2048 / job.num_queries : 64;
    rescore_kernel<<<dim3(slices, job.num_queries), 256, 0, stream_>>>(job);
    return launched();
  }
  int merge(const Job& job, const Phase& phase) {
    merge_hits_kernel<<<job.num_queries, 256, 0, stream_>>>(job, phase);
    return launched();
  }
  // The number of listed queries stays on the device: where there is none the kernels end at once.
  int scan(const Job& job) {
    list_kernel<<<(job.num_queries + 255) / 256, 256, 0, stream_>>>(job);
    if (const int error = launched()) return error;
    if (job.direct_queries == 8) direct_scan<8, 128><<<job.direct_blocks, kDirectThreads, 0, stream_>>>(job);
    else direct_scan<32, 32><<<job.direct_blocks, kDirectThreads, 0, stream_>>>(job);
    if (const int error = launched()) return error;
    merge_scan_kernel<<<job.num_queries, 1024, 0, stream_>>>(job);
    return launched();
  }
  int finish(const Job& job) {
    finish_kernel<<<job.num_queries, 256, 0, stream_>>>(job);
    return launched();
  }

 private:
  Engine engine_;
  HopperTile tile_;
  int multiprocessors_;
  cudaStream_t stream_;
};

// Makes a device current for this thread, and the one before again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess && before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

struct Probe {
  const char* reason;  // null: usable
  DeviceFacts facts;
  int major;
};

// Facts of a device, asked once. Nothing CUDA happens before the first call.
Probe probe(int device) {
  constexpr int kMost = 64;
  static std::mutex mutex;
  static Probe known[kMost];
  static bool asked[kMost];
  if (device < 0 || device >= kMost) return {"no such CUDA device", {}, 0};
  const std::lock_guard<std::mutex> lock(mutex);
  if (asked[device]) return known[device];
  Probe found{nullptr, {0, false}, 0};
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    int driver = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return {"no CUDA driver is installed", {}, 0};
    return {cudaGetErrorString(error), {}, 0};
  }
  if (device >= count) return {"no such CUDA device", {}, 0};
  int minor = 0;
  if (cudaDeviceGetAttribute(&found.facts.multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return {"the CUDA device does not answer", {}, 0};
  if (found.major < 8) found.reason = "the device is older than compute capability 8.0";
  found.facts.hopper = hopper_filter_built() && found.major == 9 && minor == 0;
  if (found.reason == nullptr) {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes{};
    if (guard.error() != cudaSuccess || cudaFuncGetAttributes(&attributes, finish_kernel) != cudaSuccess) {
      cudaGetLastError();
      found.reason = "this binary holds no code for the device's architecture (TGQ_CUDA_ARCHS at build time)";
    }
  }
  known[device] = found;
  asked[device] = true;
  return found;
}

bool valid(const Matrix& m) {
  const int dtype = static_cast<int>(m.dtype);
  return m.rows >= 0 && m.cols >= 0 && dtype >= 0 && dtype <= 2 && (m.data != nullptr || m.rows * m.cols == 0);
}

CudaResult check(const CudaRequest& request, int device, Probe* found) {
  const Matrix &queries = request.queries, &pool = request.pool;
  if (!valid(queries) || !valid(pool) || queries.cols != pool.cols || request.k < 1 || request.k > kMaxK ||
      request.first_row < 0 || request.first_row > 0xffffffffLL || pool.rows > 0xffffffffLL - request.first_row ||
      request.exclude_width < 0 ||
      (request.self_join && (queries.data != pool.data || queries.rows != pool.rows || queries.dtype != pool.dtype ||
                             queries.row_stride != pool.row_stride || queries.col_stride != pool.col_stride)))
    return {Status::bad_argument, "shapes, types or k"};
  *found = probe(device);
  if (found->reason != nullptr) return {Status::unsupported, found->reason};
  if (request.tuning.engine == Engine::hopper && !found->facts.hopper)
    return {Status::unsupported, "the Hopper engine needs compute capability 9.0 and a binary built for 90a"};
  return {Status::ok, ""};
}

}  // namespace

#if !defined(TGQ_WITH_HOPPER)
int launch_hopper_filter(const FilterJob&, HopperTile, int, void*) { return static_cast<int>(cudaErrorNotSupported); }
bool hopper_filter_built() { return false; }
#endif

}  // namespace tgq::cuda

namespace tgq {

const char* why_no_cuda(int device) { return cuda::probe(device).reason; }

CudaResult cuda_workspace(const CudaRequest& request, int device, std::size_t* bytes) {
  cuda::Probe found{};
  const CudaResult result = cuda::check(request, device, &found);
  if (result.status == Status::ok) *bytes = request.queries.rows == 0 ? 0 : cuda::make_plan(request, found.facts).workspace_bytes;
  return result;
}

CudaResult search_cuda(const CudaRequest& request, int device) {
  cuda::Probe found{};
  const CudaResult result = cuda::check(request, device, &found);
  if (result.status != Status::ok || request.queries.rows == 0) return result;
  const cuda::Plan plan = cuda::make_plan(request, found.facts);
  if (request.scores == nullptr || request.rows == nullptr || request.workspace == nullptr ||
      request.workspace_bytes < plan.workspace_bytes)
    return {Status::bad_argument, "results or workspace"};
  const cuda::DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return {Status::unsupported, cudaGetErrorString(guard.error())};
  cuda::Stream stream(plan.engine, request.tuning.hopper_tile, found.facts.multiprocessors,
                      static_cast<cudaStream_t>(request.stream));
  if (const int error = cuda::run(stream, plan, request))
    return {static_cast<cudaError_t>(error) == cudaErrorMemoryAllocation ? Status::out_of_memory : Status::unsupported,
            cudaGetErrorString(static_cast<cudaError_t>(error))};
  return result;
}

}  // namespace tgq
