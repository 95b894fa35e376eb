#include "herd/isa.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>

#include "herd/cpu.h"

namespace herd {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};

// Each set includes those before it, as on every processor that was ever made.
Isa present_isa() {
#if defined(__x86_64__)
  std::map<std::string, bool> has;
  for (const auto& [name, present] : cpu_features()) has[name] = present;
  if (!has["avx2"] || !has["fma"] || !has["f16c"]) return Isa::scalar;
  if (!has["avx512f"] || !has["avx512bw"] || !has["avx512vl"]) return Isa::avx2;
  if (!has["avx512_vnni"]) return Isa::avx512;
  return has["avx512_bf16"] ? Isa::avx512_bf16 : Isa::avx512_vnni;
#else
  return Isa::scalar;
#endif
}

// Whether this process may use tiles: processor and system have them, and Linux gives their state to those that ask.
bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  std::map<std::string, bool> has;
  for (const auto& [name, present] : cpu_features()) has[name] = present;
  return has["amx_tile"] && has["amx_int8"] && has["amx_bf16"] &&
         syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
#else
  return false;
#endif
}

// What is used unless another one is asked for. Intel's products of bfloat16 outside of tiles are slower than those of
// 32 bits: prompts at 1B width in bfloat16 ran at 317 tokens a second with them, at 360 to 500 without.
Isa fastest_isa() {
  const Isa isa = present_isa();
  return isa == Isa::avx512_bf16 && cpu_maker() == "GenuineIntel" ? Isa::avx512_vnni : isa;
}

Isa allowed_isa() {
  const char* limit = std::getenv("HERD_ISA");
  if (!limit || !*limit) return fastest_isa();
  const auto named = std::find(std::begin(kNames), std::end(kNames), std::string(limit));
  if (named == std::end(kNames)) {
    std::string known;
    for (const char* name : kNames) known += std::string(known.empty() ? "" : ", ") + name;
    throw std::invalid_argument("HERD_ISA=" + std::string(limit) + " is no instruction set; allowed: " + known);
  }
  const auto asked = static_cast<Isa>(named - std::begin(kNames));
  const Isa widest = std::min(present_isa(), asked);
  // Only on request: the tile kernels are tested with emulated instructions, and their speed was never measured.
  return asked == Isa::amx && widest == Isa::avx512_bf16 && tiles_granted() ? Isa::amx : widest;
}

}  // namespace

Isa widest_isa() {
  static const Isa isa = allowed_isa();
  return isa;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace herd
