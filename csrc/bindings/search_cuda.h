// Python bindings of the CUDA search; bindings.cpp includes them where CUDA is built.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "search/search_cuda.h"

namespace tgq::cuda {

inline bool same_memory(const Matrix& a, const Matrix& b) {
  return a.data == b.data && a.rows == b.rows && a.cols == b.cols && a.row_stride == b.row_stride &&
         a.col_stride == b.col_stride && a.dtype == b.dtype;
}

// A request as tgq_fast/search/topk_cuda.py passes it. Memory passes by address.
inline CudaRequest cuda_request(const Matrix& queries, const Matrix& pool, std::uint32_t k, std::uintptr_t exclude,
                                std::int64_t exclude_width, std::int64_t first_row, bool resume,
                                const pybind11::dict& options) {
  CudaRequest request;
  request.queries = queries;
  request.pool = pool;
  request.k = k;
  request.exclude = reinterpret_cast<const std::int64_t*>(exclude);
  request.exclude_width = exclude_width;
  request.first_row = first_row;
  request.resume = resume;
  request.self_join = same_memory(queries, pool);
  CudaTuning& tuning = request.tuning;
  for (const auto& [key, value] : options) {
    const std::string name = pybind11::str(key);
    if (name == "engine") tuning.engine = static_cast<Engine>(value.cast<int>());
    else if (name == "hopper_tile") tuning.hopper_tile = static_cast<HopperTile>(value.cast<int>());
    else if (name == "sample_stride") tuning.sample_stride = value.cast<std::int64_t>();
    else if (name == "first_rows") tuning.first_rows = value.cast<std::int64_t>();
    else if (name == "chunk_rows") tuning.chunk_rows = value.cast<std::int64_t>();
    else if (name == "tile_queries") tuning.tile_queries = value.cast<std::int64_t>();
    else if (name == "hit_capacity") tuning.hit_capacity = value.cast<std::uint32_t>();
    else if (name == "direct_blocks") tuning.direct_blocks = value.cast<std::uint32_t>();
    else if (name == "self_join") tuning.self_join = value.cast<int>();
    else if (name == "forced_threshold") {
      tuning.forced_threshold = value.cast<float>();
      tuning.has_forced_threshold = true;
    } else {
      throw pybind11::key_error("unknown tuning option " + name);
    }
  }
  return request;
}

inline void bind(pybind11::module_& module, Matrix (*matrix)(const pybind11::tuple&)) {
  namespace py = pybind11;
  module.attr("cuda_hopper") = hopper_filter_built();
  // Why the device cannot be searched on; None when it can.
  module.def("why_no_cuda", [](int device) -> py::object {
    const char* reason = why_no_cuda(device);
    return reason == nullptr ? py::object(py::none()) : py::object(py::str(reason));
  });
  // (status, reason, bytes)
  module.def(
      "cuda_workspace",
      [matrix](const py::tuple& queries, const py::tuple& pool, std::uint32_t k, std::uintptr_t exclude,
               std::int64_t exclude_width, std::int64_t first_row, bool resume, int device, const py::dict& tuning) {
        const CudaRequest request =
            cuda_request(matrix(queries), matrix(pool), k, exclude, exclude_width, first_row, resume, tuning);
        std::size_t bytes = 0;
        const CudaResult result = cuda_workspace(request, device, &bytes);
        return py::make_tuple(static_cast<int>(result.status), result.reason, bytes);
      },
      py::arg("queries"), py::arg("pool"), py::arg("k"), py::arg("exclude"), py::arg("exclude_width"),
      py::arg("first_row"), py::arg("resume"), py::arg("device"), py::arg("tuning"));
  // (status, reason)
  module.def(
      "search_cuda",
      [matrix](const py::tuple& queries, const py::tuple& pool, std::uint32_t k, std::uintptr_t exclude,
               std::int64_t exclude_width, std::int64_t first_row, bool resume, std::uintptr_t scores, std::uintptr_t rows,
               std::uintptr_t stream, std::uintptr_t workspace, std::size_t workspace_bytes, int device,
               const py::dict& tuning) {
        CudaRequest request =
            cuda_request(matrix(queries), matrix(pool), k, exclude, exclude_width, first_row, resume, tuning);
        request.scores = reinterpret_cast<float*>(scores);
        request.rows = reinterpret_cast<std::int64_t*>(rows);
        request.stream = reinterpret_cast<void*>(stream);
        request.workspace = reinterpret_cast<void*>(workspace);
        request.workspace_bytes = workspace_bytes;
        CudaResult result{};
        {
          const py::gil_scoped_release unlocked;
          result = search_cuda(request, device);
        }
        return py::make_tuple(static_cast<int>(result.status), result.reason);
      },
      py::arg("queries"), py::arg("pool"), py::arg("k"), py::arg("exclude"), py::arg("exclude_width"),
      py::arg("first_row"), py::arg("resume"), py::arg("scores"), py::arg("rows"), py::arg("stream"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"),
      py::arg("tuning"));
}

}  // namespace tgq::cuda
