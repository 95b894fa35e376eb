// A small persistent thread pool: one loop at a time, tasks handed out one by one.
#pragma once

#include <functional>

namespace herd {

// Runs task(0) … task(count - 1) on up to `threads` threads, the caller among them, and returns when all are done.
// Calls from several threads at once take turns.
void parallel_for(int count, int threads, const std::function<void(int)>& task);

}  // namespace herd
