// The parts of the Python module herd._native.
#pragma once

#include <nanobind/nanobind.h>

void bind_attention(nanobind::module_& m);
void bind_quantize(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
