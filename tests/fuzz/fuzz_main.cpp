// halfbyte_fuzz --cases FIRST COUNT      the same cases every time
// halfbyte_fuzz --seconds SECONDS        new ones every time, until the time is up
//
// Ends at the first failure with its sentence; a crash says its seed, which `--cases SEED 1` runs
// again.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>

#include "native_fuzz.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

// The undefined-behaviour sanitizer calls no one before it ends the process; this makes it abort.
extern "C" __attribute__((visibility("default"))) const char* __ubsan_default_options() {
  return "abort_on_error=1:print_stacktrace=1";
}

namespace {

uint64_t current_seed = 0;

void say_seed() {
  std::fprintf(stderr, "crash in case %llu\n", static_cast<unsigned long long>(current_seed));
}

void on_signal(int number) {
  say_seed();
  std::signal(number, SIG_DFL);
  std::raise(number);
}

// Runs the case of `seed`; false and a line on stderr when it fails.
bool passes(uint64_t seed) {
  current_seed = seed;
  std::string problem;
  try {
    problem = halfbyte::fuzz::run_case(seed);
  } catch (const std::exception& error) {
    problem = "case " + std::to_string(seed) + " threw " + error.what();
  }
  if (!problem.empty()) std::fprintf(stderr, "%s\n", problem.c_str());
  return problem.empty();
}

}  // namespace

int main(int count, char** words) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  __sanitizer_set_death_callback(say_seed);
  std::signal(SIGABRT, on_signal);
#else
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) std::signal(number, on_signal);
#endif
  if (count == 4 && std::strcmp(words[1], "--cases") == 0) {
    const uint64_t first = std::strtoull(words[2], nullptr, 10);
    const uint64_t cases = std::strtoull(words[3], nullptr, 10);
    for (uint64_t seed = first; seed < first + cases; ++seed)
      if (!passes(seed)) return 1;
    return 0;
  }
  if (count == 3 && std::strcmp(words[1], "--seconds") == 0) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(words[2]));
    uint64_t seed = std::random_device{}(), done = 0;
    for (seed <<= 24; std::chrono::steady_clock::now() < end; ++seed, ++done)
      if (!passes(seed)) return 1;
    std::printf("%llu cases, none failed\n", static_cast<unsigned long long>(done));
    return 0;
  }
  std::fprintf(stderr, "usage: %s --cases FIRST COUNT | --seconds SECONDS\n", words[0]);
  return 2;
}
