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

constexpr int kSpins = 2000;                        // pauses of some 10 to 40 ns before others may have the processor
constexpr std::int64_t kAwake = 200'000;            // ns that a helper waits for the next run before it sleeps
constexpr std::int64_t kBetweenLooks = 20'000'000;  // ns

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

std::int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Spins until `ready`, and lets others run when that takes long.
template <class Condition>
void spin_until(const Condition& ready) {
  for (int i = 0; !ready(); ++i) {
    if (i < kSpins) {
      relax();
    } else {
      sched_yield();
    }
  }
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
  inside_ = kClosed;
  for (int i = 1; i < size_; ++i)
    threads_.emplace_back([this, i, job = job_.load()]() mutable {
      if (static_cast<std::size_t>(i) < cpus_.size()) bind_to(cpus_[static_cast<std::size_t>(i)]);
      for (;;) {
        const std::int64_t since = nanoseconds();
        for (int spins = 0; job_.load(std::memory_order_acquire) == job; ++spins) {
          relax();
          if (spins % 256 == 255 && nanoseconds() - since > kAwake) job_.wait(job, std::memory_order_acquire);
        }
        job = job_.load(std::memory_order_acquire);
        if (quit_) return;
        help(i);
      }
    });
}

// Joins the run that is open, if there is one still.
void Team::help(int index) {
  if (inside_.fetch_add(1, std::memory_order_acq_rel) >= 0) {
    Member self(*this, index);
    (*work_)(self);
  }
  inside_.fetch_sub(1, std::memory_order_release);
}

bool Team::run(const std::function<void(Member&)>& work, const std::function<bool()>& interrupted) {
  start();
  work_ = &work, interrupted_ = interrupted ? &interrupted : nullptr;
  asked_ = nanoseconds();
  next_ = 0, done_ = 0, stop_ = false;
  inside_.fetch_sub(kClosed, std::memory_order_release);  // open
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  Member self(*this, 0);
  work(self);
  inside_.fetch_add(kClosed, std::memory_order_acq_rel);  // nobody else enters, and those inside still read `work`
  spin_until([this] { return inside_.load(std::memory_order_acquire) == kClosed; });
  return !stopped();
}

void Team::wait_until_done(std::int64_t pieces) const {
  spin_until([this, pieces] { return done_.load(std::memory_order_acquire) >= pieces; });
}

void Team::look_up() {
  if (!interrupted_) return;
  const std::int64_t now = nanoseconds();
  if (now - asked_ < kBetweenLooks) return;
  asked_ = now;
  if ((*interrupted_)()) stop_.store(true, std::memory_order_relaxed);
}

}  // namespace herd
