// Block formats, in the Python module.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "herd/quantize.h"

namespace nb = nanobind;

namespace {

using Weights = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Importance = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

bool quantize(const std::string& name, const Weights& weights, const std::optional<Importance>& importance, Bytes& out,
              int threads) {
  const auto format = herd::block_format(name);
  const auto size = herd::block_size(format);
  const std::size_t rows = weights.shape(0), columns = weights.shape(1), block = static_cast<std::size_t>(size.weights);
  if (columns % block) throw nb::value_error("rows must be whole blocks");
  if (out.size() != rows * (columns / block) * static_cast<std::size_t>(size.bytes))
    throw nb::value_error("out must have the bytes of all blocks");
  if (importance && importance->size() != columns) throw nb::value_error("importance must have one value a column");
  const float* weigh = importance ? importance->data() : nullptr;
  const nb::gil_scoped_release unlocked;
  return herd::quantize(format, weights.data(), static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns),
                        weigh, out.data(), threads);
}

}  // namespace

void bind_quantize(nb::module_& m) {
  m.def("quantize", &quantize, nb::arg("format"), nb::arg("weights"), nb::arg("importance").none(), nb::arg("out"),
        nb::arg("threads"),
        "Encodes weights [R, N] into blocks; importance [N] weighs squared errors. False when a scale does not fit.");
}
