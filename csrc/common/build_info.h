// What this binary was built from and with.
#pragma once

namespace tgq {

struct BuildInfo {
  const char* version;
  const char* commit;
  const char* compiler;
  const char* build_type;
  const char* cuda_version;  // empty: built without CUDA
  const char* cuda_archs;
  const char* cuda_reason;  // why there is no CUDA; empty when there is
  const char* sanitizers;
};

const BuildInfo& build_info();

}  // namespace tgq
