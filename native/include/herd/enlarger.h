// Exchanges the pages of a block of memory for large ones while it is in use.
#pragma once

#include <atomic>
#include <thread>

#include "herd/memory.h"

namespace herd {

// A model is ready sooner when its weights are read into pages as they come, and runs faster in large ones: so these
// are made afterwards, beside the first tokens, by a thread that gives way to all others. Before a fork it must stop:
// pages that two processes share would be copied.
class Enlarger {
 public:
  static bool possible();  // from Linux 6.1 on

  Enlarger() = default;
  ~Enlarger();
  Enlarger(const Enlarger&) = delete;
  Enlarger& operator=(const Enlarger&) = delete;

  // Begins; `memory` stays until this object is gone. Once only.
  void start(const Memory& memory);
  void wait();  // until all is done, for measurements
  void stop();

 private:
  std::thread thread_;
  std::atomic<bool> stop_{false};
  int owner_ = 0;  // process that the thread lives in
};

}  // namespace herd
