// Memory of kernels.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace tgq {

// 64-byte aligned array without initial values.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t size)
      : memory_(static_cast<T*>(::operator new[](size * sizeof(T) + sizeof(T), std::align_val_t{64}))) {}
  T* data() const { return memory_.get(); }
  T& operator[](std::size_t i) const { return memory_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete[](static_cast<void*>(p), std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> memory_;
};

}  // namespace tgq
