// Exchanges the pages of a block of memory for large ones while it is in use.
#pragma once

#include <atomic>
#include <thread>

#include "herd/memory.h"

namespace herd {

// A model is ready sooner when its weights are read into pages as they come, and runs faster in large ones: so these
// are made afterwards, beside the first tokens, by a thread that gives way to all others. Where the system cannot do
// that (before Linux 6.1), pages stay as they are.
class Enlarger {
 public:
  Enlarger() = default;
  ~Enlarger();
  Enlarger(const Enlarger&) = delete;
  Enlarger& operator=(const Enlarger&) = delete;

  // Begins; `memory` stays until this object is gone. Once only.
  void start(const Memory& memory);
  // Returns when all is done, for measurements.
  void wait();

 private:
  std::thread thread_;
  std::atomic<bool> stop_{false};
  int owner_ = 0;  // process that the thread lives in
};

}  // namespace herd
