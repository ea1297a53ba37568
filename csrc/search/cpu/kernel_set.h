// What a search runs with on one instruction set.
#pragma once

#include "common/isa.h"
#include "search/cpu/codes.h"
#include "search/cpu/cost.h"
#include "search/cpu/kernels.h"

namespace tgq {

struct KernelSet {
  const Kernels* kernels = nullptr;
  const Filter* filter = nullptr;  // null: none that pays
  const CodeKernels* code_kernels = nullptr;
  const Costs* costs = nullptr;
};

KernelSet kernel_set(Isa isa);

}  // namespace tgq
