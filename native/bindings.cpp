// The Python module herd._native.
#include "bindings.h"

#include <nanobind/stl/string.h>

#include "herd/cpu.h"
#include "herd/isa.h"
#include "herd/json_size.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.doc() = "Compiled part of Herd.";
  m.def(
      "cpu_features",
      [] {
        nb::dict features;
        for (const auto& [name, present] : herd::cpu_features()) features[name.c_str()] = present;
        return features;
      },
      "Instruction sets by name, and whether this process may use them.");
  m.def("cpu_name", &herd::cpu_name, "Brand string of the processor; empty where it has none.");
  m.def(
      "isa", [] { return herd::isa_name(herd::widest_isa()); },
      "The widest instruction set that kernels may use here: what the processor has, up to HERD_ISA.");
  m.def(
      "json_size",
      [](nb::bytes text) {
        herd::JsonSize size;
        {
          nb::gil_scoped_release others_run;
          size = herd::json_size({text.c_str(), text.size()});
        }
        return nb::make_tuple(size.depth, size.members, size.elements);
      },
      "Of a text that is JSON, without parsing it: the depth, how many lists, objects, names and strings there are, and "
      "how many elements commas separate.");
  bind_attention(m);
  bind_quantize(m);
  bind_engine(m);
}
