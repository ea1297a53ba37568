// What the certified filter needs beside its kernels.
#pragma once

#include <cstdint>

#include "search/cpu/kernels.h"

namespace tgq {

// Constants of the margin; docs/topk.md proves them.
struct MarginConstants {
  float filter_error;  // of the filter's accumulation, relative to the product of the norms
  float exact_error;   // of the fixed-order dot, likewise
  float absolute;      // underflow, both
};
MarginConstants margin_constants(const Filter& filter, std::int64_t dimensions);

// Packs kPanel queries' codes, row_bytes apart, for the filters: FilterPanel::codes.
void pack_panel(const std::uint8_t* codes, std::int64_t row_bytes, std::uint32_t* panel);

}  // namespace tgq
