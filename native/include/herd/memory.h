// A block of memory from the system: zeros, taken page by page when first written.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace herd {

// In pages of 2 MiB from the beginning, or as the system likes: reading goes faster in large ones, but a virtual
// machine may have to get each of them from its host first.
enum class Pages { large, any };

class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t size, Pages pages = Pages::large) : size_(size) {
    if (!size) return;
    void* block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (pages == Pages::large) madvise(block, size, MADV_HUGEPAGE);
#endif
    data_ = static_cast<std::uint8_t*>(block);
  }
  Memory(Memory&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Memory& operator=(Memory&&) = delete;
  ~Memory() {
    if (data_) munmap(data_, size_);
  }

  std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace herd
