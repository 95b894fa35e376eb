// A team of threads that runs one function together, phase by phase, for the many short parallel loops of a step.
//
// Between phases threads wait by spinning, because the next one comes within microseconds; a thread that waits longer
// sleeps. Every model has a team of its own; the calling thread is a member.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
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
      const std::int64_t chunks = (count + grain - 1) / grain;
      for (std::int64_t chunk; (chunk = team_.next_.fetch_add(1, std::memory_order_relaxed) - start_) < chunks;) {
        if (index_ == 0) team_.look_up();
        if (team_.stopped()) continue;
        const std::int64_t end = (chunk + 1) * grain < count ? (chunk + 1) * grain : count;
        for (std::int64_t i = chunk * grain; i < end; ++i) f(i);
      }
      start_ += chunks + team_.size();  // every member has asked once in vain
      team_.wait_for_all();
    }
    int index() const { return index_; }
    int size() const { return team_.size(); }

   private:
    friend class Team;
    Member(Team& team, int index) : team_(team), index_(index) {}
    Team& team_;
    const int index_;
    std::int64_t start_ = 0;  // of this phase among the numbers handed out
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
  void member(int index);
  void wait_for_all();
  void look_up();
  bool stopped() const { return stop_.load(std::memory_order_relaxed); }

  const int size_;
  const std::vector<int> cpus_;
  std::vector<std::thread> threads_;
  int owner_ = 0;  // process that the threads live in
  const std::function<void(Member&)>* work_ = nullptr;
  const std::function<bool()>* interrupted_ = nullptr;
  std::int64_t asked_ = 0;  // nanoseconds, when `interrupted` was last asked
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};  // barriers passed
  alignas(64) std::atomic<std::uint32_t> job_{0};    // runs begun
  alignas(64) std::atomic<bool> stop_{false};
  std::atomic<bool> quit_{false};
};

}  // namespace herd
