// Loops over tasks on several threads: on those of an OpenMP runtime that is in the process already, else on a small
// persistent pool of our own. Tasks are handed out one by one.
#pragma once

#include <functional>

namespace herd {

// Runs task(0) … task(count - 1) on up to `threads` threads, the caller among them, and returns when all are done.
void parallel_for(int count, int threads, const std::function<void(int)>& task);

}  // namespace herd
