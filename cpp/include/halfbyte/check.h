// Errors with values: every failed check says what was expected and what came.
//
//   HALFBYTE_CHECK(k == 3, "k: expected 3, got ", k);
//
// The core never prints and never exits; bindings turn `Error` into a Python ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace halfbyte {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace halfbyte

#define HALFBYTE_CHECK(condition, ...)                                          \
  do {                                                                          \
    if (!(condition)) throw ::halfbyte::Error(::halfbyte::concat(__VA_ARGS__)); \
  } while (0)
