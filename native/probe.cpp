#include "herd/probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "herd/engine_kernels.h"
#include "herd/memory.h"
#include "herd/team.h"

namespace herd {
namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

double read_bandwidth(std::int64_t bytes, int threads, int rounds) {
  const Memory block(static_cast<std::size_t>(bytes));
  std::fill(block.data(), block.data() + bytes, std::uint8_t{1});
  Team team(threads);
  constexpr std::int64_t kChunk = 1 << 20;
  std::atomic<std::uint64_t> total{0};
  double best = 0;
  for (int round = 0; round < rounds; ++round) {
    const double start = seconds();
    team.run([&](Team::Member& m) {
      m.each(bytes / kChunk, 1,
             [&](std::int64_t i) { total += engine_kernels().read(block.data() + i * kChunk, kChunk); });
    });
    best = std::max(best, static_cast<double>(bytes / kChunk * kChunk) / (seconds() - start));
  }
  return best;
}

ProductPeak product_peak(int threads) {
  Team team(threads);
  std::atomic<std::int64_t> used{0};
  const auto measure = [&](std::int64_t (*products)(std::int64_t)) {
    double best = 0;
    for (int round = 0; round < 5; ++round) {
      std::atomic<std::int64_t> operations{0};
      const double start = seconds();
      team.run([&](Team::Member& m) { m.each(m.size(), 1, [&](std::int64_t) { operations += products(1 << 21); }); });
      best = std::max(best, static_cast<double>(operations.load()) / (seconds() - start));
      used += operations;
    }
    return best;
  };
  return {measure(engine_kernels().int8_products), measure(engine_kernels().f32_products),
          measure(engine_kernels().bf16_products)};
}

}  // namespace herd
