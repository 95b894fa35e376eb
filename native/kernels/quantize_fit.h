// Groups of weights as scale times code: the search for the scales and codes of least squared error.
//
// x are a group's N weights, w what their squared errors weigh. For given codes q the best scale is a linear least
// squares solution, so candidates differ in their codes only: each comes from rounding x to another grid, from one that
// covers the largest weight to one that cuts it a little. Sums run in a fixed order, whatever the instruction set.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "herd/half.h"

namespace herd {
namespace {

// To the nearest whole number, ties to even, for |x| < 2^22: the sum has no bits left for a fraction.
inline float rounded(float x) { return (x + 12582912.0f) - 12582912.0f; }

inline float as_half(float x) { return half_to_float(float_to_half(x)); }

inline float inverse_of(float scale) {
  const float inverse = 1.0f / scale;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

template <int N>
inline float total(const float* v) {
  float lanes[16];
  for (int j = 0; j < 16; ++j) lanes[j] = v[j];
  for (int first = 16; first < N; first += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += v[first + j];
  for (int half = 8; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

// Codes that are whole numbers from low to high, low = -high - 1.
template <int Low>
struct Whole {
  static constexpr float low = Low;
  static float nearest(float t) { return std::min(std::max(rounded(t), low), -1.0f - low); }
  static int index(float code) { return static_cast<int>(code) - Low; }
};

constexpr float kCodebook[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Codes that lie closer together near 0.
struct Codebook {
  static constexpr float low = -127;
  static float nearest(float t) {
    float code = kCodebook[0];
    for (int i = 0; i < 15; ++i) code = t > 0.5f * (kCodebook[i] + kCodebook[i + 1]) ? kCodebook[i + 1] : code;
    return code;
  }
  static int index(float code) { return static_cast<int>(std::find(kCodebook, kCodebook + 16, code) - kCodebook); }
};

// Codes of x for the given scale; returns their squared error.
template <class Codes, int N>
inline float encode(const float* x, const float* w, float scale, float* q) {
  const float inverse = inverse_of(scale);
  float errors[N];
  for (int j = 0; j < N; ++j) {
    q[j] = Codes::nearest(x[j] * inverse);
    const float e = x[j] - scale * q[j];
    errors[j] = w[j] * e * e;
  }
  return total<N>(errors);
}

// The scale d for x ≈ d·q; the largest weight gets the lowest code, whose magnitude is the largest.
template <class Codes, int N>
inline float fit_scale(const float* x, const float* w) {
  float peak = 0;
  for (int j = 0; j < N; ++j) peak = std::fabs(x[j]) > std::fabs(peak) ? x[j] : peak;
  if (inverse_of(peak) == 0) return 0;
  float best = 0, scale = Codes::low == 0 ? 0 : peak / Codes::low;
  for (int step = -12; step <= 12; ++step) {
    const float inverse = Codes::low * (1.0f + 0.0125f * static_cast<float>(step)) / peak;
    float xq[N], qq[N];
    for (int j = 0; j < N; ++j) {
      const float q = Codes::nearest(x[j] * inverse);
      xq[j] = w[j] * x[j] * q;
      qq[j] = w[j] * q * q;
    }
    const float sxq = total<N>(xq), sqq = total<N>(qq);
    // The error is Σ w x² - sxq²/sqq.
    if (sqq > 0 && sxq * sxq > best * sqq) best = sxq * sxq / sqq, scale = sxq / sqq;
  }
  return scale;
}

struct Line {
  float scale = 0, offset = 0;
};

// Codes 0 … top of x ≈ scale·q - offset; returns their squared error.
template <int N>
inline float encode(const float* x, const float* w, Line line, float top, float* q) {
  const float inverse = inverse_of(line.scale);
  float errors[N];
  for (int j = 0; j < N; ++j) {
    q[j] = std::min(std::max(rounded((x[j] + line.offset) * inverse), 0.0f), top);
    const float e = x[j] - (line.scale * q[j] - line.offset);
    errors[j] = w[j] * e * e;
  }
  return total<N>(errors);
}

// Scale and offset of x ≈ scale·q - offset, q from 0 to top. Not Signed: the offset is never below 0.
template <bool Signed, int N>
inline Line fit_line(const float* x, const float* w, float top) {
  float low = x[0], high = x[0];
  for (int j = 1; j < N; ++j) low = std::min(low, x[j]), high = std::max(high, x[j]);
  if (!Signed) low = std::min(low, 0.0f);
  Line best{(high - low) / top, -low};
  if (inverse_of(best.scale) == 0) return {0, Signed ? -0.5f * (low + high) : -low};
  float q[N], terms[N];
  float least = encode<N>(x, w, best, top, q);
  const float sw = total<N>(w);
  for (int j = 0; j < N; ++j) terms[j] = w[j] * x[j];
  const float sx = total<N>(terms);
  for (int step = -12; step <= 8; ++step) {
    const float inverse = top * (1.0f + 0.5f * static_cast<float>(step) / (8.0f + top)) / (high - low);
    float wq[N], qq[N], xq[N];
    for (int j = 0; j < N; ++j) {
      const float code = std::min(std::max(rounded((x[j] - low) * inverse), 0.0f), top);
      wq[j] = w[j] * code;
      qq[j] = wq[j] * code;
      xq[j] = wq[j] * x[j];
    }
    const float sq = total<N>(wq), sqq = total<N>(qq), sxq = total<N>(xq);
    const float determinant = sw * sqq - sq * sq;
    Line line;
    if (determinant > 0) {
      line = {(sw * sxq - sx * sq) / determinant, (sq * sxq - sqq * sx) / determinant};
    }
    if (!Signed && (determinant <= 0 || line.offset < 0)) line = {sqq > 0 ? sxq / sqq : 0.0f, 0};
    if (!(line.scale > 0)) continue;
    const float error = encode<N>(x, w, line, top, q);
    if (error < least) least = error, best = line;
  }
  return best;
}

}  // namespace
}  // namespace herd
