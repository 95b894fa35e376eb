#include "herd/large_pages.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <system_error>

namespace herd {
namespace {

constexpr std::int64_t kLarge = 2 << 20;
constexpr int kPopulate = 23, kCollapse = 25;  // MADV_POPULATE_WRITE and MADV_COLLAPSE: older headers lack them
constexpr int kLast = 19;                      // in the order of who runs
// Clearing a page takes 50 to 200 us. A wait of more than kMost is counted as that: the thread itself was put aside.
constexpr std::int64_t kUsual = 400'000, kMost = 5'000'000;  // ns

std::int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

LargePages::LargePages(const Memory& memory, std::int64_t patience) : patience_(patience) {
#if defined(__linux__)
  if (madvise(nullptr, 0, kCollapse) != 0) return;  // of nothing, as every kind of advice that is known
  const auto begin = reinterpret_cast<std::uintptr_t>(memory.data());
  const std::uintptr_t first = (begin + kLarge - 1) / kLarge * kLarge, end = (begin + memory.size()) / kLarge * kLarge;
  if (first >= end) return;
  first_ = reinterpret_cast<std::uint8_t*>(first);
  count_ = static_cast<std::int64_t>((end - first) / kLarge);
  claimed_ = std::make_unique<std::atomic<bool>[]>(static_cast<std::size_t>(count_));
#endif
}

void LargePages::take([[maybe_unused]] const std::uint8_t* p, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__)
  const std::int64_t offset = p - first_;
  const std::int64_t last = std::min((offset + bytes - 1) / kLarge + 1, count_ - 1);
  for (std::int64_t page = std::max<std::int64_t>(0, offset / kLarge); page <= last && quick_; ++page) {
    if (claimed_[page].exchange(true)) continue;
    const std::int64_t since = nanoseconds();
    madvise(first_ + page * kLarge, kLarge, kPopulate);
    const std::int64_t waited = std::min(nanoseconds() - since - kUsual, kMost);
    if (waited > 0 && (patience_ -= waited) < 0 && quick_.exchange(false))
      madvise(first_, static_cast<std::size_t>(count_ * kLarge), MADV_NOHUGEPAGE);
  }
#endif
}

void LargePages::finish() {
#if defined(__linux__)
  if (!count_ || thread_.joinable()) return;
  owner_ = getpid();
  try {
    thread_ = std::thread([this] {
      setpriority(PRIO_PROCESS, 0, kLast);  // of this thread: Linux has them one by one
      madvise(first_, static_cast<std::size_t>(count_ * kLarge), MADV_HUGEPAGE);
      // A page that came quickly may be 512 small ones all the same. Where it is large, or there is none to be had,
      // nothing changes.
      for (std::int64_t page = 0; page < count_ && !stop_; ++page) madvise(first_ + page * kLarge, kLarge, kCollapse);
    });
  } catch (const std::system_error&) {  // no thread to be had: pages stay as they are
  }
#endif
}

void LargePages::wait() {
  if (owner_ != getpid()) {  // a forked child has no such thread, and nobody who could hold the lock
    if (thread_.joinable()) thread_.detach();
    return;
  }
  const std::lock_guard lock(joining_);
  if (thread_.joinable()) thread_.join();
}

void LargePages::stop() {
  stop_ = true;
  wait();
}

LargePages::~LargePages() { stop(); }

}  // namespace herd
