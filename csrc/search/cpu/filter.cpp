#include "search/cpu/filter.h"

#include <cstring>

namespace tgq {

MarginConstants margin_constants(const Filter& filter, std::int64_t dimensions) {
  const auto relative = [](double roundings) { return roundings * 0x1p-24 / (1.0 - roundings * 0x1p-24) * 1.01; };
  MarginConstants c;
  // Sums of byte codes are exact: what rounds is their conversion and the two scales.
  c.filter_error = static_cast<float>(relative(filter.code_bytes == 1 ? 4.0 : 2.0 * dimensions + 64));
  c.exact_error = static_cast<float>(relative(dimensions / 16.0 + 8));
  c.absolute = static_cast<float>((8.0 * dimensions + 512) * 0x1p-126);
  return c;
}

void pack_panel(const std::uint8_t* codes, std::int64_t row_bytes, std::uint32_t* panel) {
  for (std::int64_t line = 0; line < row_bytes; line += kCodeLine)
    for (int half = 0; half < 2; ++half)
      for (int word = 0; word < 16; ++word)
        for (int q = 0; q < 16; ++q)
          std::memcpy(panel++, codes + (16 * half + q) * row_bytes + line + 4 * word, sizeof *panel);
}

}  // namespace tgq
