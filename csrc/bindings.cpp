// Python bindings: the only file that knows Python.
#include <pybind11/pybind11.h>

#include "tgq/build_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Exact top-k search core of tgq_fast.";
  module.def("build_info", [] {
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
    return facts;
  });
}
