// Causal attention for training, in the Python module.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cmath>

#include "bindings.h"
#include "herd/attention.h"

namespace nb = nanobind;

namespace {

// Arrays come as 32-bit floats, or as the 16-bit patterns of bfloat16.
using Values = nb::ndarray<nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Firsts = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

herd::Number number_of(const Values& array) {
  if (array.dtype() == nb::dtype<float>()) return herd::Number::f32;
  if (array.dtype() == nb::dtype<std::uint16_t>()) return herd::Number::bf16;
  throw nb::type_error("attention takes float32 arrays, or bfloat16 ones viewed as uint16");
}

void require_shape(const Values& array, std::size_t b, std::size_t s, std::size_t n, std::size_t k,
                   herd::Number number) {
  if (array.ndim() != 4 || array.shape(0) != b || array.shape(1) != s || array.shape(2) != n || array.shape(3) != k ||
      number_of(array) != number)
    throw nb::value_error("attention arrays must agree: q, o [B,S,H,K] and k, v [B,S,G,K] of one number format");
}

herd::AttentionShape attention_shape(const Values& q, const Values& k, const Firsts& first, float scale) {
  if (q.ndim() != 4 || k.ndim() != 4) throw nb::value_error("attention takes arrays of four axes");
  const auto b = q.shape(0), s = q.shape(1), h = q.shape(2), g = k.shape(2), d = q.shape(3);
  if (g == 0 || h % g || d == 0 || d % 16 || d > 256)
    throw nb::value_error("attention needs heads divisible by kv heads and a head width of 16, 32, … 256");
  if (!(scale > 0) || !std::isfinite(scale)) throw nb::value_error("attention needs a finite scale above 0");
  if (first.shape(0) != b || first.shape(1) != s) throw nb::value_error("first must be [B, S]");
  for (std::size_t i = 0; i < b * s; ++i)
    if (first.data()[i] < 0 || first.data()[i] > static_cast<std::int32_t>(i % s))
      throw nb::value_error("first[b, s] must lie in 0 … s");
  return {int(b), int(s), int(h), int(g), int(d), scale, first.data()};
}

void attention_forward(const Values& q, const Values& k, const Values& v, const Firsts& first, float scale, Values& o,
                       Floats& lse, int threads) {
  const auto shape = attention_shape(q, k, first, scale);
  const auto number = number_of(q);
  require_shape(k, shape.batch, shape.positions, shape.kv_heads, shape.head_dim, number);
  require_shape(v, shape.batch, shape.positions, shape.kv_heads, shape.head_dim, number);
  require_shape(o, shape.batch, shape.positions, shape.heads, shape.head_dim, number);
  if (lse.size() != std::size_t(shape.batch) * shape.heads * shape.positions)
    throw nb::value_error("lse must be [B, H, S]");
  const nb::gil_scoped_release unlocked;
  herd::attention_forward(shape, number, q.data(), k.data(), v.data(), o.data(), lse.data(), threads);
}

void attention_backward(const Values& q, const Values& k, const Values& v, const Firsts& first, float scale,
                        const Values& o, const Values& grad_o, const Floats& lse, Values& grad_q, Values& grad_k,
                        Values& grad_v, int threads) {
  const auto shape = attention_shape(q, k, first, scale);
  const auto number = number_of(q);
  for (const Values* array : {&k, &v, static_cast<const Values*>(&grad_k), static_cast<const Values*>(&grad_v)})
    require_shape(*array, shape.batch, shape.positions, shape.kv_heads, shape.head_dim, number);
  for (const Values* array : {&o, &grad_o, static_cast<const Values*>(&grad_q)})
    require_shape(*array, shape.batch, shape.positions, shape.heads, shape.head_dim, number);
  if (lse.size() != std::size_t(shape.batch) * shape.heads * shape.positions)
    throw nb::value_error("lse must be [B, H, S]");
  const nb::gil_scoped_release unlocked;
  herd::attention_backward(shape, number, q.data(), k.data(), v.data(), o.data(), grad_o.data(), lse.data(),
                           grad_q.data(), grad_k.data(), grad_v.data(), threads);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention_forward", &attention_forward, nb::arg("q_BSHK"), nb::arg("k_BSGK"), nb::arg("v_BSGK"),
        nb::arg("first_BS"), nb::arg("scale"), nb::arg("o_BSHK"), nb::arg("lse_BHS"), nb::arg("threads"),
        "Causal attention in which query s sees keys first … s; writes the output and its log-sum-exp.");
  m.def("attention_backward", &attention_backward, nb::arg("q_BSHK"), nb::arg("k_BSGK"), nb::arg("v_BSGK"),
        nb::arg("first_BS"), nb::arg("scale"), nb::arg("o_BSHK"), nb::arg("grad_o_BSHK"), nb::arg("lse_BHS"),
        nb::arg("grad_q_BSHK"), nb::arg("grad_k_BSGK"), nb::arg("grad_v_BSGK"), nb::arg("threads"),
        "Gradients of attention_forward.");
  m.def(
      "attention_isa", [](bool bf16) { return herd::attention_isa(bf16 ? herd::Number::bf16 : herd::Number::f32); },
      nb::arg("bf16"), "Instruction set of the attention kernels in use for such inputs.");
}
