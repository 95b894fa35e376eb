#include "herd/parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace herd {
namespace {

class Pool {
 public:
  void run(int count, int threads, const std::function<void(int)>& task) {
    const std::lock_guard turn(turn_);
    const int helpers = std::min(threads, count) - 1;
    while (static_cast<int>(workers_.size()) < helpers) {
      const int index = static_cast<int>(workers_.size());
      workers_.emplace_back([this, index] { work(index); });
    }
    {
      const std::lock_guard lock(mutex_);
      task_ = &task, count_ = count, next_ = 0, helpers_ = helpers, running_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    drain(task, count);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void drain(const std::function<void(int)>& task, int count) {
    for (int i = next_++; i < count; i = next_++) task(i);
  }

  void work(int index) {
    unsigned long seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= helpers_) continue;
      const auto* task = task_;
      const int count = count_;
      lock.unlock();
      drain(*task, count);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* task_ = nullptr;
  std::atomic<int> next_{0};
  int count_ = 0, helpers_ = 0, running_ = 0;
  unsigned long generation_ = 0;
};

// The pool is never destroyed: its threads sleep until the process ends. A forked child inherits no threads, so it
// gets a pool of its own.
Pool& pool() {
  static std::mutex mutex;
  static Pool* instance = nullptr;
  static pid_t owner = 0;
  const std::lock_guard lock(mutex);
  if (!instance || owner != getpid()) instance = new Pool, owner = getpid();
  return *instance;
}

// GNU OpenMP's entry point, if something in this process (torch) has loaded it. Its threads keep spinning for a while
// after each of their loops, so threads of our own would share the cores with them: attention beside torch's operators
// got 1.2 times faster on two cores that way, and 1.7 times on OpenMP's own threads (docs/lab-log.md).
// A forked child inherits the entry point but no threads, and would wait for them forever.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
const pid_t owner = getpid();
Team openmp_team() {
  return owner == getpid() ? reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel")) : nullptr;
}

struct Shared {
  const std::function<void(int)>& task;
  const int count;
  std::atomic<int> next{0};
};

void drain(void* data) {
  auto& shared = *static_cast<Shared*>(data);
  for (int i = shared.next++; i < shared.count; i = shared.next++) shared.task(i);
}

}  // namespace

void parallel_for(int count, int threads, const std::function<void(int)>& work) {
  std::exception_ptr failure;  // must not leave a thread that is not ours
  std::mutex first;
  const std::function<void(int)> task = [&](int i) {
    try {
      work(i);
    } catch (...) {
      const std::lock_guard lock(first);
      if (!failure) failure = std::current_exception();
    }
  };
  threads = std::min(threads, count);
  if (threads <= 1) {
    for (int i = 0; i < count; ++i) task(i);
  } else if (const Team team = openmp_team()) {
    Shared shared{task, count};
    team(&drain, &shared, static_cast<unsigned>(threads), 0);
  } else {
    pool().run(count, threads, task);
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace herd
