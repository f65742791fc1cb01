#include "halfbyte/variant.h"

#include <cstdlib>
#include <cstring>

namespace halfbyte {

// Every variant name in the tree: a plain forced name that one op lacks is fine for that op when
// another op has it (quantization has no bf16 arithmetic of its own, for one).
static const char* const kKnownNames[] = {"reference", "portable",   "avx2",
                                          "avx512",    "avx512bf16", "amx"};

std::string forced_variant(const char* op) {
  const char* setting = std::getenv("HALFBYTE_FORCE_VARIANT");
  if (setting == nullptr || *setting == '\0') return "";
  std::string plain;
  std::istringstream items{std::string(setting)};
  for (std::string item; std::getline(items, item, ',');) {
    const size_t colon = item.find(':');
    if (colon == std::string::npos) {
      plain = item;
    } else if (item.compare(0, colon, op) == 0) {
      return item.substr(colon + 1);
    }
  }
  return plain;
}

void check_forced_name(const char* op, const std::string& name) {
  // Rows of the tables in the CUDA library.
  if (name == "sm80" || name.compare(0, 5, "cuda_") == 0) return;
  std::string known;
  for (const char* candidate : kKnownNames) {
    if (name == candidate) return;
    known += std::string(" ") + candidate;
  }
  throw Error(
      concat("HALFBYTE_FORCE_VARIANT: expected one of", known, ", got '", name, "' for ", op));
}

}  // namespace halfbyte
