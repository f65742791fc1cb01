// One idea of dispatch, as on the CPU: an op is a table of variants, best first, the last always
// fits.
//
//   Variant{name, why_not(launch), run(launch, where)}
//
// HALFBYTE_FORCE_VARIANT forces one: "op:name" for this op, or a plain "name" where the op has it
// (a plain name of another op's, a CPU's say, leaves this op alone).
#pragma once

#include <stdlib.h>
#include <string.h>

#include "device/error.h"
#include "halfbyte/cuda/api.h"

namespace halfbyte::cuda {

template <class Launch>
struct Variant {
  const char* name;
  const char* (*why_not)(const Launch&);  // "" or a sentence
  const char* (*run)(const Launch&, Where);
};

template <class Launch>
const char* always(const Launch&) {
  return kOk;
}

struct Name {
  const char* text;
  size_t size;
  bool is(const char* other) const {
    return strlen(other) == size && strncmp(text, other, size) == 0;
  }
};

// The name forced for `op`, and whether it was forced for it alone; size 0: none.
inline Name forced_variant(const char* op, bool* for_this_op) {
  Name plain{"", 0};
  const char* item = getenv("HALFBYTE_FORCE_VARIANT");
  *for_this_op = false;
  while (item && *item) {
    const size_t size = strcspn(item, ",");
    const char* colon = static_cast<const char*>(memchr(item, ':', size));
    if (!colon) {
      plain = {item, size};
    } else if (Name{item, static_cast<size_t>(colon - item)}.is(op)) {
      *for_this_op = true;
      return {colon + 1, static_cast<size_t>(item + size - colon - 1)};
    }
    item += size + (item[size] == ',');
  }
  return plain;
}

// The row to run, or null with `problem` a sentence.
template <class Launch, size_t n>
const Variant<Launch>* select(const char* op, const Variant<Launch> (&table)[n],
                              const Launch& launch, const char** problem) {
  bool for_this_op = false;
  const Name forced = forced_variant(op, &for_this_op);
  for (const auto& row : table) {
    if (!forced.size || !forced.is(row.name)) continue;
    const char* reason = row.why_not(launch);
    if (!*reason) return &row;
    *problem = say("variant '%s' cannot run: %s", row.name, reason);
    return nullptr;
  }
  if (for_this_op) {
    *problem = say("HALFBYTE_FORCE_VARIANT: %s has no CUDA variant '%.*s'", op,
                   static_cast<int>(forced.size), forced.text);
    return nullptr;
  }
  for (const auto& row : table)
    if (!*row.why_not(launch)) return &row;
  *problem = table[n - 1].why_not(launch);
  return nullptr;
}

template <class Launch, size_t n>
const char* run_selected(const char* op, const Variant<Launch> (&table)[n], const Launch& launch,
                         Where where) {
  const char* problem = kOk;
  const Variant<Launch>* row = select(op, table, launch, &problem);
  return row ? row->run(launch, where) : problem;
}

// Row `row` of the table as it stands for `launch`; false past the end.
template <class Launch, size_t n>
bool list_row(const char* op, const Variant<Launch> (&table)[n], const Launch& launch, int row,
              VariantRow* out) {
  if (row < 0 || row >= static_cast<int>(n)) return false;
  const char* problem = kOk;
  const Variant<Launch>* chosen = select(op, table, launch, &problem);
  *out = {table[row].name, table[row].why_not(launch), chosen == &table[row]};
  return true;
}

}  // namespace halfbyte::cuda
