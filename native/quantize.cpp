// Block formats by name, and rows spread over threads.
#include "herd/quantize.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "herd/isa.h"
#include "herd/parallel.h"

namespace herd {
namespace {

struct Named {
  const char* name;
  BlockFormat format;
  BlockSize size;
};
constexpr Named kFormats[] = {
    {"q4_0", BlockFormat::q4_0, {32, 18}},   {"q4_1", BlockFormat::q4_1, {32, 20}},
    {"q5_0", BlockFormat::q5_0, {32, 22}},   {"q5_1", BlockFormat::q5_1, {32, 24}},
    {"q8_0", BlockFormat::q8_0, {32, 34}},   {"iq4_nl", BlockFormat::iq4_nl, {32, 18}},
    {"q2_k", BlockFormat::q2_k, {256, 84}},  {"q3_k", BlockFormat::q3_k, {256, 110}},
    {"q4_k", BlockFormat::q4_k, {256, 144}}, {"q5_k", BlockFormat::q5_k, {256, 176}},
    {"q6_k", BlockFormat::q6_k, {256, 210}}, {"iq4_xs", BlockFormat::iq4_xs, {256, 136}},
};

const QuantizeKernels& kernels() {
#if defined(__x86_64__)
  const Isa isa = widest_isa();
  if (isa >= Isa::avx512) return kQuantizeAvx512;
  if (isa >= Isa::avx2) return kQuantizeAvx2;
#endif
  return kQuantizeScalar;
}

}  // namespace

BlockFormat block_format(const std::string& name) {
  for (const Named& known : kFormats)
    if (name == known.name) return known.format;
  throw std::invalid_argument("no block format: " + name);
}

BlockSize block_size(BlockFormat format) {
  for (const Named& known : kFormats)
    if (format == known.format) return known.size;
  throw std::invalid_argument("no block format");
}

bool quantize(BlockFormat format, const float* weights, std::int64_t rows, std::int64_t columns,
              const float* importance, std::uint8_t* out, int threads) {
  const BlockSize size = block_size(format);
  const std::int64_t row_bytes = columns / size.weights * size.bytes;
  // Some 64k weights a task: short rows are not worth a task each.
  const std::int64_t chunk = std::max<std::int64_t>(1, 65536 / std::max<std::int64_t>(1, columns));
  const auto encode = kernels().row;
  std::atomic<bool> fits{true};
  parallel_for(static_cast<int>((rows + chunk - 1) / chunk), threads, [&](int task) {
    for (std::int64_t r = task * chunk; r < std::min(rows, (task + 1) * chunk); ++r)
      if (!encode(format, weights + r * columns, importance, columns, out + r * row_bytes)) fits = false;
  });
  return fits;
}

}  // namespace herd
