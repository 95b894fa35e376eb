// Detection of instruction sets. A set counts only when the processor has it AND the operating system saves its
// registers (XCR0), because a virtual machine can offer one without the other.
#include "herd/cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace herd {

#if defined(__x86_64__)
namespace {

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// State components enabled by the operating system (XGETBV with ECX = 0); 0 when XSAVE is not in use.
std::uint64_t enabled_state() {
  if (!(cpuid(1).ecx >> 27 & 1)) return 0;
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

constexpr std::uint64_t kAvxState = 0x6;       // SSE and AVX registers
constexpr std::uint64_t kAvx512State = 0xe6;   // and mask and upper ZMM registers
constexpr std::uint64_t kTileState = 0x60000;  // tile configuration and data

}  // namespace

std::vector<std::pair<std::string, bool>> cpu_features() {
  const std::uint64_t state = enabled_state();
  const auto has_state = [state](std::uint64_t mask) { return (state & mask) == mask; };
  const auto bit = [](std::uint32_t reg, int index) { return (reg >> index & 1) != 0; };
  const Registers basic = cpuid(1), seven = cpuid(7), seven_one = cpuid(7, 1);
  const bool avx = has_state(kAvxState), avx512 = has_state(kAvx512State), tile = has_state(kTileState);
  return {
      {"avx2", avx && bit(seven.ebx, 5)},
      {"fma", avx && bit(basic.ecx, 12)},
      {"f16c", avx && bit(basic.ecx, 29)},
      {"avx512f", avx512 && bit(seven.ebx, 16)},
      {"avx512bw", avx512 && bit(seven.ebx, 30)},
      {"avx512vl", avx512 && bit(seven.ebx, 31)},
      {"avx512_vnni", avx512 && bit(seven.ecx, 11)},
      {"avx512_bf16", avx512 && bit(seven_one.eax, 5)},
      {"avx512_fp16", avx512 && bit(seven.edx, 23)},
      {"amx_tile", tile && bit(seven.edx, 24)},
      {"amx_int8", tile && bit(seven.edx, 25)},
      {"amx_bf16", tile && bit(seven.edx, 22)},
  };
}

std::string cpu_maker() {
  const Registers r = cpuid(0);
  char text[13] = {};
  std::memcpy(text, &r.ebx, 4);
  std::memcpy(text + 4, &r.edx, 4);
  std::memcpy(text + 8, &r.ecx, 4);
  return text;
}

std::string cpu_name() {
  if (cpuid(0x80000000).eax < 0x80000004) return "";
  char text[49] = {};
  for (std::uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002 + i);
    std::memcpy(text + 16 * i, &r, 16);
  }
  std::string name(text);
  name.erase(0, std::min(name.find_first_not_of(' '), name.size()));
  const auto last = name.find_last_not_of(' ');
  name.erase(last == std::string::npos ? 0 : last + 1);
  return name;
}
#else
std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(__ARM_NEON)
  return {{"neon", true}};
#else
  return {};
#endif
}

std::string cpu_name() { return ""; }

std::string cpu_maker() { return ""; }
#endif

}  // namespace herd
