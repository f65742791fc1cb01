// One idea of dispatch: an op is a table of variants, best first, and the last always fits.
//
//   Variant{name, why_not(params), run(params)}
//
// `why_not` returns "" or a sentence. `select` takes the first variant that fits. The environment
// variable HALFBYTE_FORCE_VARIANT forces one: "avx2" for every op that has it, or "op:name" (comma
// separated) for single ops; a forced variant that cannot run raises its sentence.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "halfbyte/check.h"

namespace halfbyte {

template <class Params>
struct Variant {
  const char* name;
  std::string (*why_not)(const Params&);
  void (*run)(const Params&);
};

// What `halfbyte info` and the tests read: one row a variant.
struct VariantStatus {
  std::string name;
  std::string why_not;  // "" when usable
  bool chosen;
};

// The variant name forced for `op` by the environment, or "".
std::string forced_variant(const char* op);
// Throws for a forced name that no op knows.
void check_forced_name(const char* op, const std::string& name);

template <class Params, size_t n>
const Variant<Params>& select_variant(const char* op, const Variant<Params> (&table)[n],
                                      const Params& params) {
  const std::string forced = forced_variant(op);
  if (!forced.empty()) {
    for (const auto& variant : table) {
      if (forced != variant.name) continue;
      const std::string reason = variant.why_not(params);
      HALFBYTE_CHECK(reason.empty(), op, ": variant '", forced, "' cannot run: ", reason);
      return variant;
    }
    check_forced_name(op, forced);
  }
  std::string reasons;
  for (const auto& variant : table) {
    const std::string reason = variant.why_not(params);
    if (reason.empty()) return variant;
    reasons += std::string(" ") + variant.name + ": " + reason + ";";
  }
  throw Error(concat(op, ": no variant fits:", reasons));
}

template <class Params, size_t n>
std::vector<VariantStatus> list_variants(const char* op, const Variant<Params> (&table)[n],
                                         const Params& params) {
  std::string chosen, reason;
  try {
    chosen = select_variant(op, table, params).name;
  } catch (const Error& error) {
    reason = error.what();  // a forced variant that cannot run: nothing is chosen
  }
  std::vector<VariantStatus> rows;
  for (const auto& variant : table)
    rows.push_back({variant.name, variant.why_not(params), chosen == variant.name});
  return rows;
}

}  // namespace halfbyte
