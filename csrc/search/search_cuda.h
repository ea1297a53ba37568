// The CUDA search: the same answers as search_cpu, bit for bit. docs/topk_cuda.md describes it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "search/search.h"

namespace tgq {

// What multiplies: automatic; fp32 cores in fixed order; mma.sync (sm_80 and later); TMA and wgmma (sm_90a); mma.sync for
// few queries, from the pool as it is stored (portable where its layout does not allow that).
enum class Engine : int { automatic = 0, direct = 1, portable = 2, hopper = 3, skinny = 4 };

// Queries x rows of a block of the Hopper engine: 128 x 128 and 64 x 256 have two consumers in turn, each with its own
// tile; 128 x 256, the automatic choice, has two that share one.
enum class HopperTile : int { automatic = 0, q128_n128 = 1, q64_n256 = 2, q128_n256 = 3 };

// Switches for tests and measurements; answers never depend on them. 0 or -1: chosen.
struct CudaTuning {
  Engine engine = Engine::automatic;
  HopperTile hopper_tile = HopperTile::automatic;
  std::int64_t sample_stride = -1;  // one row in so many is sampled; 0: no sample
  std::int64_t first_rows = 0;      // rows of the first filter pass, all of which are scored exactly
  std::int64_t chunk_rows = 0;      // rows of one filter pass at most
  std::int64_t tile_queries = 0;
  std::uint32_t hit_capacity = 0;   // hits that a query can have in one filter pass before it is rescanned
  std::uint32_t direct_blocks = 0;
  int self_join = -1;               // upper triangle only where CudaRequest::self_join: 1 on, 0 off, -1 where it should pay
  bool has_forced_threshold = false;    // taken instead of a sampled threshold
  float forced_threshold = 0.0f;
};

// All memory is on the current device, and all work is put on `stream` without waiting for it.
struct CudaRequest {
  Matrix queries;  // [Q, D]
  Matrix pool;     // [N, D], first_row + N < 2^32
  std::uint32_t k = 0;
  std::int64_t first_row = 0;  // what row 0 of the pool is called in results and exclusions: the pool is part of a larger one
  bool resume = false;         // scores and rows hold the answer over other parts; this part is added to it
  const std::int64_t* exclude = nullptr;  // [Q, exclude_width] dense, rows < 0 mean none
  std::int64_t exclude_width = 0;
  bool self_join = false;         // queries and pool are the same memory
  float* scores = nullptr;        // [Q, k] dense
  std::int64_t* rows = nullptr;   // [Q, k] dense
  void* stream = nullptr;         // cudaStream_t
  void* workspace = nullptr;      // cuda_workspace bytes, 256-byte aligned; free again when the stream has passed
  std::size_t workspace_bytes = 0;
  CudaTuning tuning;
};

struct CudaResult {
  Status status;
  const char* reason;  // static text; empty when the status is ok
};

// Bytes of workspace that the request needs on `device`; its workspace, stream and results need not be set.
CudaResult cuda_workspace(const CudaRequest& request, int device, std::size_t* bytes);
CudaResult search_cuda(const CudaRequest& request, int device);

// Null when `device` can be searched on; else why not. The first call starts the CUDA driver, nothing earlier does.
const char* why_no_cuda(int device);

namespace cuda {
// Whether this binary holds the Hopper engine.
bool hopper_filter_built();
}  // namespace cuda

}  // namespace tgq
