// Python bindings: the only file that knows Python.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "common/build_info.h"
#include "common/isa.h"
#include "inference/inference.h"
#include "search/search.h"
#if defined(TGQ_WITH_CUDA)
#include "bindings/search_cuda.h"
#endif

namespace py = pybind11;

namespace {

// A matrix as tgq_fast/search/topk_native.py passes it: (address, rows, cols, row stride, column stride, dtype code).
tgq::Matrix matrix(const py::tuple& fields) {
  return {reinterpret_cast<const void*>(fields[0].cast<std::uintptr_t>()), fields[1].cast<std::int64_t>(),
          fields[2].cast<std::int64_t>(), fields[3].cast<std::int64_t>(), fields[4].cast<std::int64_t>(),
          static_cast<tgq::DType>(fields[5].cast<int>())};
}

// Codes as topk_native.py passes them: (bytes, plane stride, first lines, lines, scale, rest, mean, rotation, defect, steps, norms,
// second level), the arrays by address.
tgq::Codes codes_of(const py::tuple& fields) {
  const auto values = [](const py::handle& at) { return reinterpret_cast<const float*>(at.cast<std::uintptr_t>()); };
  tgq::Codes codes;
  codes.bytes = reinterpret_cast<const std::uint8_t*>(fields[0].cast<std::uintptr_t>());
  codes.plane_stride = fields[1].cast<std::int64_t>();
  codes.first_lines = fields[2].cast<int>();
  codes.lines = fields[3].cast<int>();
  codes.scale = values(fields[4]);
  const auto steps = fields[9].cast<py::tuple>(), norms = fields[10].cast<py::tuple>();
  for (std::size_t level = 0; level < steps.size(); ++level) {
    codes.step[level] = steps[level].cast<float>();
    codes.norm[level] = norms[level].cast<float>();
  }
  codes.rest = values(fields[5]);
  codes.mean = values(fields[6]);
  codes.rotation = values(fields[7]);
  codes.defect = fields[8].cast<float>();
  codes.second = reinterpret_cast<const std::uint16_t*>(fields[11].cast<std::uintptr_t>());
  return codes;
}

tgq::Tuning tuning_of(const py::dict& options) {
  tgq::Tuning tuning;
  for (const auto& [key, value] : options) {
    const std::string name = py::str(key);
    if (name == "use_filter") tuning.use_filter = value.cast<int>();
    else if (name == "use_codes") tuning.use_codes = value.cast<int>();
    else if (name == "sample_stride") tuning.sample_stride = value.cast<int>();
    else if (name == "use_self_join") tuning.use_self_join = value.cast<int>();
    else if (name == "query_tile") tuning.query_tile = value.cast<std::int64_t>();
    else if (name == "row_chunk") tuning.row_chunk = value.cast<std::int64_t>();
    else if (name == "spare_candidates") tuning.spare_candidates = value.cast<std::int64_t>();
    else if (name == "forced_threshold") {
      tuning.forced_threshold = value.cast<float>();
      tuning.has_forced_threshold = true;
    } else {
      throw py::key_error("unknown tuning option " + name);
    }
  }
  return tuning;
}

// What a search calls now and then: checks for signals and tells the progress function; false when either raised.
std::function<bool(double)> poll_of(const py::object& progress, bool* raised) {
  return [&progress, raised](double share) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) {
      *raised = true;
    } else if (!progress.is_none()) {
      PyObject* answer = PyObject_CallFunction(progress.ptr(), "d", share);
      *raised = answer == nullptr;
      Py_XDECREF(answer);
    }
    // The exception waits in the thread state, which releasing the lock does not clear.
    return !*raised;
  };
}

// Each is (labels of rows, of queries) or (numbers of rows, of queries, reach), the arrays by address.
std::vector<tgq::Rule> rules_of(const py::tuple& from) {
  std::vector<tgq::Rule> rules;
  for (const py::handle& each : from) {
    const auto arrays = each.cast<std::vector<std::uintptr_t>>();
    tgq::Rule rule;
    if (arrays.size() == 2) {
      rule.row_labels = reinterpret_cast<const std::int64_t*>(arrays[0]);
      rule.query_labels = reinterpret_cast<const std::int64_t*>(arrays[1]);
    } else {
      rule.kind = tgq::Rule::Kind::near;
      rule.row_numbers = reinterpret_cast<const double*>(arrays.at(0));
      rule.query_numbers = reinterpret_cast<const double*>(arrays.at(1));
      rule.reach = reinterpret_cast<const double*>(arrays.at(2));
    }
    rules.push_back(rule);
  }
  return rules;
}

// Returns the status; raises what a signal handler or the progress function raised.
int search_cpu(const py::tuple& queries, const py::tuple& pool, std::uint32_t k, std::uintptr_t exclude,
               std::int64_t exclude_width, std::uintptr_t scores, std::uintptr_t rows, int threads, bool self_join,
               const py::object& progress, const py::object& isa, const py::dict& tuning, const py::object& counters,
               const py::object& codes, std::uintptr_t allowed, const py::tuple& rules, std::uint32_t sampled_k) {
  tgq::Request request;
  request.queries = matrix(queries);
  request.pool = matrix(pool);
  request.k = k;
  request.exclude = reinterpret_cast<const std::int64_t*>(exclude);
  request.exclude_width = exclude_width;
  request.allowed = reinterpret_cast<const std::uint8_t*>(allowed);
  const std::vector<tgq::Rule> conditions = rules_of(rules);
  request.rules = conditions.data();
  request.num_rules = static_cast<int>(conditions.size());
  request.sampled_k = sampled_k;
  request.scores = reinterpret_cast<float*>(scores);
  request.rows = reinterpret_cast<std::int64_t*>(rows);
  request.threads = threads;
  request.self_join = self_join;
  if (!codes.is_none()) request.codes = codes_of(codes.cast<py::tuple>());
  const std::string isa_name = isa.is_none() ? std::string() : isa.cast<std::string>();
  request.isa = isa.is_none() ? nullptr : isa_name.c_str();
  request.tuning = tuning_of(tuning);
  tgq::Counters counted;
  request.counters = &counted;
  bool raised = false;
  request.poll = poll_of(progress, &raised);
  tgq::Status status;
  {
    const py::gil_scoped_release unlocked;
    status = tgq::search_cpu(request);
  }
  if (raised) throw py::error_already_set();
  if (!counters.is_none()) {
    counters["filtered"] = py::int_(counted.filtered);
    counters["direct"] = py::int_(counted.direct);
    counters["rescored"] = py::int_(counted.rescored);
    counters["rescanned"] = py::int_(counted.rescanned);
    counters["coded"] = py::int_(counted.coded);
  }
  return static_cast<int>(status);
}

// marks: (starts, scores, rows, before), the arrays by address.
int count_before(const py::tuple& queries, const py::tuple& pool, std::int64_t first_row, const py::tuple& marks, int threads,
                 const py::object& isa, const py::object& progress) {
  tgq::CountRequest request;
  request.queries = matrix(queries);
  request.pool = matrix(pool);
  request.first_row = first_row;
  request.starts = reinterpret_cast<const std::int64_t*>(marks[0].cast<std::uintptr_t>());
  request.scores = reinterpret_cast<const float*>(marks[1].cast<std::uintptr_t>());
  request.rows = reinterpret_cast<const std::int64_t*>(marks[2].cast<std::uintptr_t>());
  request.before = reinterpret_cast<std::int64_t*>(marks[3].cast<std::uintptr_t>());
  request.threads = threads;
  const std::string isa_name = isa.is_none() ? std::string() : isa.cast<std::string>();
  request.isa = isa.is_none() ? nullptr : isa_name.c_str();
  bool raised = false;
  request.poll = poll_of(progress, &raised);
  tgq::Status status;
  {
    const py::gil_scoped_release unlocked;
    status = tgq::count_before(request);
  }
  if (raised) throw py::error_already_set();
  return static_cast<int>(status);
}

int score_rows(const py::tuple& queries, const py::tuple& rows, const py::object& isa, std::uintptr_t scores) {
  const tgq::Matrix left = matrix(queries), right = matrix(rows);
  const std::string isa_name = isa.is_none() ? std::string() : isa.cast<std::string>();
  const py::gil_scoped_release unlocked;
  return static_cast<int>(tgq::score_rows(left, right, isa_name.empty() ? nullptr : isa_name.c_str(), reinterpret_cast<float*>(scores)));
}

// Rows as tgq_fast/search/codes.py passes them. Returns (step, norm, energy in the first level, energy).
py::tuple encode_codes(std::uintptr_t turned, std::uintptr_t coded, std::int64_t count, std::int64_t first_row, const py::tuple& lines,
                       double spread, const py::tuple& arrays) {
  tgq::EncodeRequest request{};
  request.turned = reinterpret_cast<const double*>(turned);
  request.coded = reinterpret_cast<const std::uint8_t*>(coded);
  request.count = count;
  request.first_row = first_row;
  request.first_lines = lines[0].cast<int>();
  request.lines = lines[1].cast<int>();
  request.bytes = reinterpret_cast<std::uint8_t*>(arrays[0].cast<std::uintptr_t>());
  request.plane_stride = arrays[1].cast<std::int64_t>();
  request.scale = reinterpret_cast<float*>(arrays[2].cast<std::uintptr_t>());
  request.rest = reinterpret_cast<float*>(arrays[3].cast<std::uintptr_t>());
  request.spread = spread;
  tgq::EncodedFacts facts;
  {
    const py::gil_scoped_release unlocked;
    tgq::encode_codes(request, facts);
  }
  return py::make_tuple(facts.step, facts.norm, facts.inside, facts.energy);
}

// ---- inference: called by tgq_fast/ops/matrix_unit.py, which checks shapes -------------------------------------------------

template <typename T>
T* address(std::uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// (groups, out, in, dtype code)
tgq::PackedShape packed_shape(const py::tuple& fields) {
  return {fields[0].cast<std::int64_t>(), fields[1].cast<std::int64_t>(), fields[2].cast<std::int64_t>(),
          static_cast<tgq::DType>(fields[3].cast<int>())};
}

int pack_weights(const py::tuple& shape, std::uintptr_t weights, std::int64_t group_stride, std::int64_t out_stride,
                 std::int64_t in_stride, std::uintptr_t packed, int threads) {
  const tgq::PackedShape described = packed_shape(shape);
  const py::gil_scoped_release unlocked;
  return static_cast<int>(tgq::pack_weights(described, address<const void>(weights), group_stride, out_stride, in_stride,
                                            address<std::uint8_t>(packed), threads));
}

// layer: (shape, packed, bias); norm: None, or (residual, weight, shift, eps), weight and shift 0 without a LayerNorm.
tgq::LinearCall linear_call(const py::tuple& layer, const tgq::Matrix& x, const tgq::Matrix& out, bool gelu, const py::object& norm,
                            int threads) {
  tgq::LinearCall call{};
  call.shape = packed_shape(layer[0].cast<py::tuple>());
  call.packed = address<const std::uint8_t>(layer[1].cast<std::uintptr_t>());
  call.bias = address<const float>(layer[2].cast<std::uintptr_t>());
  call.x = x;
  call.out = out;
  call.gelu = gelu;
  if (!norm.is_none()) {
    const auto fields = norm.cast<py::tuple>();
    call.residual = matrix(fields[0].cast<py::tuple>());
    call.norm_weight = address<const float>(fields[1].cast<std::uintptr_t>());
    call.norm_shift = address<const float>(fields[2].cast<std::uintptr_t>());
    call.norm_eps = fields[3].cast<float>();
  }
  call.threads = threads;
  return call;
}

int linear(const py::tuple& layer, const py::tuple& x, const py::tuple& out, std::int64_t first_column, bool gelu,
           const py::object& norm, int threads) {
  tgq::LinearCall call = linear_call(layer, matrix(x), matrix(out), gelu, norm, threads);
  call.first_column = first_column;
  const py::gil_scoped_release unlocked;
  return static_cast<int>(tgq::linear(call));
}

int feed_forward(const py::tuple& up, const py::tuple& down, const py::tuple& x, const py::tuple& out, const py::object& norm,
                 int threads) {
  const tgq::Matrix from = matrix(x), to = matrix(out);
  const tgq::PackedShape shape = packed_shape(up[0].cast<py::tuple>());
  const tgq::Matrix hidden{nullptr, from.rows, shape.out, shape.out, 1, shape.dtype};
  const tgq::LinearCall first = linear_call(up, from, hidden, true, py::none(), threads);
  const tgq::LinearCall second = linear_call(down, hidden, to, false, norm, threads);
  const py::gil_scoped_release unlocked;
  return static_cast<int>(tgq::feed_forward(first, second));
}

// sizes: (B, rows, length, width); strides: of q's items, of x' items and tokens; guide: addresses of the guide and of its
// strengths, and how many there are.
int shared_attention(std::uintptr_t q, std::uintptr_t x, std::uintptr_t out, const std::array<std::int64_t, 4>& sizes,
                     const std::array<std::int64_t, 3>& strides, int dtype, std::uintptr_t visible,
                     const std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t>& guide, float scale, int threads) {
  const tgq::SharedAttentionCall call{address<const void>(q),
                                      address<const void>(x),
                                      address<void>(out),
                                      sizes[0],
                                      sizes[1],
                                      sizes[2],
                                      sizes[3],
                                      strides[0],
                                      strides[1],
                                      strides[2],
                                      static_cast<tgq::DType>(dtype),
                                      address<const std::uint8_t>(visible),
                                      address<const float>(std::get<0>(guide)),
                                      address<const float>(std::get<1>(guide)),
                                      std::get<2>(guide),
                                      scale,
                                      threads};
  const py::gil_scoped_release unlocked;
  return static_cast<int>(tgq::shared_attention(call));
}

// sizes: (B, Na, Ne, H, dh); sees: anchored → exploratory, exploratory → anchored, exploratory → text, text → queries.
int stream_attention(std::uintptr_t queries, std::uintptr_t text, std::uintptr_t text_starts, std::uintptr_t out,
                     std::uintptr_t text_out, const std::array<std::int64_t, 5>& sizes, const std::array<bool, 4>& sees, int dtype,
                     int threads) {
  const tgq::StreamAttentionCall call{address<const void>(queries),
                                      address<const void>(text),
                                      address<const std::int64_t>(text_starts),
                                      address<void>(out),
                                      address<void>(text_out),
                                      sizes[0],
                                      sizes[1],
                                      sizes[2],
                                      sizes[3],
                                      sizes[4],
                                      sees[0],
                                      sees[1],
                                      sees[2],
                                      sees[3],
                                      static_cast<tgq::DType>(dtype),
                                      threads};
  const py::gil_scoped_release unlocked;
  return static_cast<int>(tgq::stream_attention(call));
}

py::dict build_info() {
  const tgq::BuildInfo& info = tgq::build_info();
  py::dict facts;
  facts["version"] = info.version;
  facts["commit"] = info.commit;
  facts["compiler"] = info.compiler;
  facts["build_type"] = info.build_type;
  facts["cuda_version"] = info.cuda_version;
  facts["cuda_archs"] = info.cuda_archs;
  facts["cuda_reason"] = info.cuda_reason;
  facts["sanitizers"] = info.sanitizers;
  py::list isas;
  for (const char* const* isa = tgq::available_isas(); *isa != nullptr; ++isa) isas.append(*isa);
  facts["isas"] = isas;
  const char* isa = tgq::resolve_isa(nullptr);
  facts["isa"] = isa == nullptr ? "unknown" : isa;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ core of tgq_fast: exact search and inference. Internal: call tgq_fast.topk and tgq_fast.ops.";
  module.def("build_info", &build_info);
  module.def("resolve_isa", [](const std::string& name) -> py::object {
    const char* found = tgq::resolve_isa(name.c_str());
    return found == nullptr ? py::object(py::none()) : py::object(py::str(found));
  });
  module.def("search_cpu", &search_cpu, py::arg("queries"), py::arg("pool"), py::arg("k"), py::kw_only(), py::arg("exclude") = 0,
             py::arg("exclude_width") = 0, py::arg("scores"), py::arg("rows"), py::arg("threads"), py::arg("self_join") = false,
             py::arg("progress") = py::none(), py::arg("isa") = py::none(), py::arg("tuning") = py::dict(), py::arg("counters") = py::none(),
             py::arg("codes") = py::none(), py::arg("allowed") = 0, py::arg("rules") = py::tuple(), py::arg("sampled_k") = 0);
  module.def("count_before", &count_before);
  module.def("score_rows", &score_rows);
  module.def("encode_codes", &encode_codes);
  module.def("has_matrix_unit", &tgq::has_matrix_unit);
  module.def("packed_bytes", [](const py::tuple& shape) { return tgq::packed_bytes(packed_shape(shape)); });
  module.def("pack_weights", &pack_weights);
  module.def("linear", &linear);
  module.def("feed_forward", &feed_forward);
  module.def("shared_attention", &shared_attention);
  module.def("stream_attention", &stream_attention);
#if defined(TGQ_WITH_CUDA)
  tgq::cuda::bind(module, &matrix);
#endif
}
