#include "herd/enlarger.h"

#include <sys/resource.h>
#include <unistd.h>

namespace herd {
namespace {

constexpr std::size_t kLarge = 2 << 20;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers do not know
constexpr int kLast = 19;      // in the order of who runs

}  // namespace

bool Enlarger::possible() {
#if defined(__linux__)
  return madvise(nullptr, 0, kCollapse) == 0;  // of nothing, as every kind of advice that is known
#else
  return false;
#endif
}

void Enlarger::start(const Memory& memory) {
#if defined(__linux__)
  if (memory.size() < kLarge || thread_.joinable() || !possible()) return;
  owner_ = getpid();
  thread_ = std::thread([this, data = memory.data(), size = memory.size()] {
    setpriority(PRIO_PROCESS, 0, kLast);  // of this thread: Linux has them one by one
    madvise(data, size, MADV_HUGEPAGE);
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t first = (begin + kLarge - 1) / kLarge * kLarge;
    for (std::uintptr_t page = first; page + kLarge <= begin + size && !stop_; page += kLarge)
      madvise(reinterpret_cast<void*>(page), kLarge, kCollapse);  // where there is no large page, the small ones stay
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

void Enlarger::stop() {
  stop_ = true;
  wait();
}

Enlarger::~Enlarger() { stop(); }

}  // namespace herd
