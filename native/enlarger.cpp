#include "herd/enlarger.h"

#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>

namespace herd {
namespace {

constexpr std::size_t kLarge = 2 << 20;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers do not know
constexpr int kLast = 19;      // in the order of who runs

}  // namespace

void Enlarger::start(const Memory& memory) {
#if defined(__linux__)
  if (memory.size() < kLarge || thread_.joinable()) return;
  owner_ = getpid();
  thread_ = std::thread([this, data = memory.data(), size = memory.size()] {
    setpriority(PRIO_PROCESS, 0, kLast);  // of this thread: Linux has them one by one
    madvise(data, size, MADV_HUGEPAGE);
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t first = (begin + kLarge - 1) / kLarge * kLarge;
    for (std::uintptr_t page = first; page + kLarge <= begin + size && !stop_; page += kLarge)
      if (madvise(reinterpret_cast<void*>(page), kLarge, kCollapse) != 0 && errno == EINVAL) return;
  });
#endif
}

void Enlarger::wait() {
  if (!thread_.joinable()) return;
  if (owner_ != getpid()) {  // a forked child has no such thread
    thread_.detach();
  } else {
    thread_.join();
  }
}

Enlarger::~Enlarger() {
  stop_ = true;
  wait();
}

}  // namespace herd
