// float16 as 16 bits, without help of the processor: for scales, of which there are few.
#pragma once

#include <cstdint>
#include <cstring>

namespace herd {

inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  std::uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;  // infinity, not a number
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + 0x38000000u;  // the exponent's bias is 127 instead of 15
  } else {
    const float small = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal
    std::memcpy(&bits, &small, sizeof bits);
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Rounded to nearest, ties to even; infinite beyond 65504.
inline std::uint16_t float_to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves the value's multiple of 2^-24 in the low mantissa bits
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<std::uint16_t>(sign | (bits & 0x7ffu));
  }
  const std::uint32_t odd = bits >> 13 & 1;
  return static_cast<std::uint16_t>(sign | (bits - 0x38000000u + 0xfffu + odd) >> 13);
}

}  // namespace herd
