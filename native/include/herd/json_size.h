// How much a JSON text would be once it is parsed, counted without parsing it.
#pragma once

#include <cstddef>
#include <string_view>

namespace herd {

// Of a text that is JSON. Of any other text these are numbers without a meaning; the parser will refuse it.
struct JsonSize {
  std::size_t depth = 0;     // lists and objects inside each other
  std::size_t members = 0;   // lists, objects, the names in objects, and strings
  std::size_t elements = 0;  // what commas separate
};

// One pass, no memory.
JsonSize json_size(std::string_view text);

}  // namespace herd
