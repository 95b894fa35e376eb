// A parser makes objects of a text that are many times as large as the text, and holds Python's lock while it does. A
// server that counts first can refuse what nobody means, at the speed of reading it.
#include "herd/json_size.h"

#include <algorithm>
#include <cstring>

namespace herd {
namespace {

// The place behind the string that begins at `at`, or the end of the text.
std::size_t behind_string(std::string_view text, std::size_t at) {
  for (++at; at < text.size(); ++at) {
    // Long texts are most of a request: memchr passes over them.
    const void* quote = std::memchr(text.data() + at, '"', text.size() - at);
    if (quote == nullptr) return text.size();
    const std::size_t end = static_cast<const char*>(quote) - text.data();
    std::size_t slashes = 0;
    while (end - slashes > at && text[end - slashes - 1] == '\\') ++slashes;
    if (slashes % 2 == 0) return end + 1;
    at = end;  // an escaped one
  }
  return text.size();
}

}  // namespace

JsonSize json_size(std::string_view text) {
  JsonSize size;
  std::size_t depth = 0;
  for (std::size_t at = 0; at < text.size();) {
    switch (text[at]) {
      case '"':
        ++size.members;
        at = behind_string(text, at);
        continue;
      case '[':
      case '{':
        ++size.members;
        size.depth = std::max(size.depth, ++depth);
        break;
      case ']':
      case '}':
        if (depth > 0) --depth;
        break;
      case ',':
        ++size.elements;
        break;
      default:
        break;
    }
    ++at;
  }
  return size;
}

}  // namespace herd
