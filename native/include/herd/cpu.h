// What the processor and the operating system together allow: the instruction sets kernels may be chosen from.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace herd {

// Name of each instruction set Herd has a use for, and whether this process may execute it.
std::vector<std::pair<std::string, bool>> cpu_features();

// Brand string of the processor, empty where it has none.
std::string cpu_name();

// Who made it, as it says itself: "GenuineIntel", "AuthenticAMD"; empty where it does not say.
std::string cpu_maker();

}  // namespace herd
