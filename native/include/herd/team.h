// A team of threads that runs one function together, phase by phase, for the many short parallel loops of a step.
//
// Every member goes through the whole function; in each of its loops the work is handed out piece by piece, and a
// member goes on when all pieces are done. It does not wait for the other members themselves: one that the system has
// put aside holds nobody up unless it has a piece in hand, and finds the loops it missed done when it returns. Waiting
// is spinning, because the next loop comes within microseconds; between runs a member sleeps. Every model has a team of
// its own; the calling thread is a member.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace herd {

class Team {
 public:
  // What a member sees: all members call each() in the same order with the same counts.
  class Member {
   public:
    // Runs f(i) for 0 ≤ i < count, `grain` neighbours at a time by whoever is free, and returns when all are done.
    template <class Function>
    void each(std::int64_t count, std::int64_t grain, const Function& f) {
      const std::int64_t end = start_ + (count + grain - 1) / grain;
      for (std::int64_t piece; (piece = team_.take(end)) < end;) {
        if (index_ == 0) team_.look_up();
        if (!team_.stopped()) {
          const std::int64_t first = (piece - start_) * grain, last = first + grain < count ? first + grain : count;
          for (std::int64_t i = first; i < last; ++i) f(i);
        }
        team_.done_.fetch_add(1, std::memory_order_release);
      }
      start_ = end;
      team_.wait_until_done(end);
    }
    int index() const { return index_; }
    int size() const { return team_.size(); }

   private:
    friend class Team;
    Member(Team& team, int index) : team_(team), index_(index) {}
    Team& team_;
    const int index_;
    std::int64_t start_ = 0;  // number of this loop's first piece; pieces are numbered through a run
  };

  // `cpus`: processors that the members are bound to, one each; empty: the system decides.
  explicit Team(int size, std::vector<int> cpus = {});
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Every member runs `work`. `interrupted` is asked now and then on the calling thread; once it says yes, loops skip
  // what remains, and run() returns false.
  bool run(const std::function<void(Member&)>& work, const std::function<bool()>& interrupted = {});

 private:
  void start();
  void help(int index);
  void look_up();
  void wait_until_done(std::int64_t pieces) const;
  bool stopped() const { return stop_.load(std::memory_order_relaxed); }

  // The next piece's number, if it is below `end`.
  std::int64_t take(std::int64_t end) {
    std::int64_t piece = next_.load(std::memory_order_relaxed);
    while (piece < end && !next_.compare_exchange_weak(piece, piece + 1, std::memory_order_relaxed)) {
    }
    return piece;
  }

  const int size_;
  const std::vector<int> cpus_;
  std::vector<std::thread> threads_;
  int owner_ = 0;  // process that the threads live in
  const std::function<void(Member&)>* work_ = nullptr;
  const std::function<bool()>* interrupted_ = nullptr;
  std::int64_t asked_ = 0;                         // nanoseconds, when `interrupted` was last asked
  alignas(64) std::atomic<std::int64_t> next_{0};  // piece to hand out next
  alignas(64) std::atomic<std::int64_t> done_{0};  // pieces that are done
  alignas(64) std::atomic<int> inside_{kClosed};   // helpers in the run that is open, or kClosed
  alignas(64) std::atomic<std::uint32_t> job_{0};  // runs begun
  alignas(64) std::atomic<bool> stop_{false};
  std::atomic<bool> quit_{false};

  static constexpr int kClosed = -1000000;
};

}  // namespace herd
