// Large pages for a block of memory: at once where the system has them at hand, else while the block is in use.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

#include "herd/memory.h"

namespace herd {

// Weights are read faster from large pages, and taking those costs less than taking 512 small ones for each. But a
// virtual machine may have to get every page from its host first, and a system whose memory is in pieces has to move
// others' pages together. So a page is taken just before it is filled, and when that was slow too often, the rest is
// filled in small pages as they come. A thread that gives way to all others then makes large ones of all that are small
// (under a quota of processor time it takes its share of that), beside the first tokens. Before a fork it must stop:
// pages that two processes share would be copied. All this is for Linux 6.1 and later; before it, and elsewhere, pages
// are what the system makes of them.
class LargePages {
 public:
  static constexpr std::int64_t kPatience = 50'000'000;

  // `memory` stays until this object is gone; `patience`: ns that are waited for pages in all, beyond the usual.
  explicit LargePages(const Memory& memory, std::int64_t patience = kPatience);
  ~LargePages();
  LargePages(const LargePages&) = delete;
  LargePages& operator=(const LargePages&) = delete;

  // Takes the pages of `bytes` bytes from p on, and the next one, unless another thread does. They keep what they hold.
  void take(const std::uint8_t* p, std::int64_t bytes);
  // All is filled. Once only.
  void finish();
  void wait();  // until all is done, for measurements
  void stop();

 private:
  std::uint8_t* first_ = nullptr;  // of `count_` whole pages
  std::int64_t count_ = 0;
  std::unique_ptr<std::atomic<bool>[]> claimed_;
  std::atomic<std::int64_t> patience_;  // ns that may still be waited for pages
  std::atomic<bool> quick_{true};
  std::thread thread_;
  std::atomic<bool> stop_{false};
  std::mutex joining_;
  int owner_ = 0;  // process that the thread lives in
};

}  // namespace herd
