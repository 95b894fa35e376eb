// The instruction sets that kernels are compiled for, narrowest first, and the widest one that may be used here.
#pragma once

namespace herd {

enum class Isa { scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx };

// What processor and operating system allow, up to the set that the environment variable HERD_ISA names; amx only when
// it is named. Throws std::invalid_argument when it names none.
Isa widest_isa();

const char* isa_name(Isa isa);

}  // namespace herd
