// A thread block runs the steps of an algorithm together: every step is a set of independent bodies, then all threads meet. Algorithms written against it run on a CUDA block, and in the C++ tests on one host thread that takes the
// bodies in any order.
//
//   each(n, body)   body(i) for all i < n, in any order, at once; all effects are visible when it returns
//   add(to, value)  atomic addition; returns the value before
//   lower(to, key)  atomic minimum
#pragma once

#include <cstdint>

#include "search/selection.h"

#if defined(__CUDACC__)
namespace tgq::cuda {

// The threads of one CUDA block; all of them must make the same calls.
struct ThreadBlock {
  template <class Body>
  TGQ_HD void each(std::uint32_t n, Body body) const {
#if defined(__CUDA_ARCH__)
    for (std::uint32_t i = threadIdx.x; i < n; i += blockDim.x) body(i);
    __syncthreads();
#endif
  }
  TGQ_HD std::uint32_t add(std::uint32_t* to, std::uint32_t value) const {
#if defined(__CUDA_ARCH__)
    return atomicAdd(to, value);
#else
    return *to += value, *to - value;
#endif
  }
  TGQ_HD void lower(Key* to, Key key) const {
#if defined(__CUDA_ARCH__)
    atomicMin(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(key));
#else
    if (key < *to) *to = key;
#endif
  }
};

}  // namespace tgq::cuda
#endif
