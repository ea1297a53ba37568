// Eight tiles of 16 rows of 64 bytes: the only configuration of the matrix unit that is used here.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace tgq {
namespace {  // every kernel file its own copy

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void begin() {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = 16;
  }
  _tile_loadconfig(&config);
  // gcc 12 does not know that the instruction reads the configuration and may drop the stores above.
  __asm__ volatile("" : : "r"(&config) : "memory");
}

inline void end() { _tile_release(); }

}  // namespace
}  // namespace tgq
