#include "herd/team.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace herd {
namespace {

constexpr int kSpins = 20000;                       // pauses of some 10 to 40 ns before a thread sleeps
constexpr std::int64_t kBetweenLooks = 20'000'000;  // ns

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Until the counter is no longer `seen`.
void wait_for_change(const std::atomic<std::uint32_t>& counter, std::uint32_t seen) {
  for (int i = 0; i < kSpins; ++i) {
    if (counter.load(std::memory_order_acquire) != seen) return;
    relax();
  }
  while (counter.load(std::memory_order_acquire) == seen) counter.wait(seen, std::memory_order_acquire);
}

std::int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void bind_to(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof set, &set);  // a processor that is not there: the thread runs where it may
}

}  // namespace

Team::Team(int size, std::vector<int> cpus) : size_(std::max(1, size)), cpus_(std::move(cpus)) {}

Team::~Team() {
  if (owner_ != getpid()) {  // a forked child has no such threads
    for (auto& thread : threads_) thread.detach();
    return;
  }
  quit_ = true;
  ++job_;
  job_.notify_all();
  for (auto& thread : threads_) thread.join();
}

// Threads are started by the first run, so that a process may load a model and fork.
void Team::start() {
  if (owner_ == getpid()) return;
  for (auto& thread : threads_) thread.detach();  // of the parent process
  threads_.clear();
  owner_ = getpid();
  arrived_ = 0;
  for (int i = 1; i < size_; ++i)
    threads_.emplace_back([this, i, seen = job_.load()] {
      if (static_cast<std::size_t>(i) < cpus_.size()) bind_to(cpus_[static_cast<std::size_t>(i)]);
      for (std::uint32_t job = seen;;) {
        wait_for_change(job_, job);
        job = job_.load(std::memory_order_acquire);
        if (quit_) return;
        member(i);
      }
    });
}

void Team::member(int index) {
  Member self(*this, index);
  (*work_)(self);
  wait_for_all();  // nobody leaves while another still reads `work`
}

bool Team::run(const std::function<void(Member&)>& work, const std::function<bool()>& interrupted) {
  start();
  work_ = &work, interrupted_ = interrupted ? &interrupted : nullptr;
  asked_ = nanoseconds();
  next_ = 0, stop_ = false;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  member(0);
  return !stopped();
}

void Team::wait_for_all() {
  const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_for_change(phase_, phase);
  }
}

void Team::look_up() {
  if (!interrupted_) return;
  const std::int64_t now = nanoseconds();
  if (now - asked_ < kBetweenLooks) return;
  asked_ = now;
  if ((*interrupted_)()) stop_.store(true, std::memory_order_relaxed);
}

}  // namespace herd
