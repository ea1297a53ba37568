// Where the portable filter keeps a slab of 32 values of 128 rows (or queries) in shared memory, and from where each lane of
// a warp loads its fragments of mma.sync. tests/cuda/layouts.cu holds it against CUTLASS' layouts.
#pragma once

#include "search/selection.h"

namespace tgq::cuda {

constexpr int kSlab = 32;  // values of each operand per stage

// Byte of a 16-byte chunk within a slab. Rows are 64 bytes; the exclusive or spreads eight rows of one chunk over all banks.
TGQ_HD constexpr int chunk_byte(int row, int chunk) { return row * (kSlab * 2) + ((chunk ^ ((row >> 1) & 3)) << 4); }

// Byte whose row of eight values `lane` names to ldmatrix: for 16 queries (operand A), and for 16 pool rows (B, two blocks of
// eight), at values 16 `step` on.
TGQ_HD constexpr int query_byte(int first, int lane, int step) { return chunk_byte(first + lane % 16, step * 2 + lane / 16); }
TGQ_HD constexpr int row_byte(int first, int lane, int step) {
  return chunk_byte(first + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2);
}

}  // namespace tgq::cuda
