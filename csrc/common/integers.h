// Division of sizes into whole units. Not for files compiled for one instruction set: an inline function of theirs may be
// the copy that the linker keeps for all.
#pragma once

#include <cstdint>

namespace tgq {

inline std::int64_t ceil_div(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit; }
inline std::int64_t round_up(std::int64_t value, std::int64_t unit) { return ceil_div(value, unit) * unit; }

}  // namespace tgq
