// Tasks over OpenMP: torch ships the same runtime, so its pool and ours are one.
//
// A fork takes the caller's thread alone along, but the runtime goes on counting on its pool: a
// parallel region in the child would wait for threads that are not there. So a forked child starts
// threads of its own for each call. So does a build for the thread sanitizer, which cannot see the
// synchronisation inside the runtime.
#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <functional>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "halfbyte/interruption.h"

namespace halfbyte {
namespace {

constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kCheckNanoseconds = 200'000'000;

#if defined(__SANITIZE_THREAD__)
bool without_openmp = true;
#else
bool without_openmp = false;
#endif
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { without_openmp = true; });

int64_t nanoseconds() {
#if defined(CLOCK_MONOTONIC_COARSE)
  constexpr clockid_t kClock = CLOCK_MONOTONIC_COARSE;  // good to 4 ms, for a quarter of the price
#else
  constexpr clockid_t kClock = CLOCK_MONOTONIC;
#endif
  std::timespec now{};
  clock_gettime(kClock, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

// The check of this thread's caller, and when it is due. None on threads that only help.
thread_local Interruptible::Check caller_check = nullptr;
thread_local int64_t check_due = 0;

void check_caller() {
  if (caller_check == nullptr) return;
  const int64_t now = nanoseconds();
  if (now < check_due) return;
  check_due = now + kCheckNanoseconds;
  caller_check();
}

// Runs `work`, which never throws, on this thread and up to `threads` - 1 new ones.
template <class Work>
void run_on_new_threads(int threads, Work& work) {
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(threads - 1));
  try {
    while (helpers.size() + 1 < static_cast<size_t>(threads)) helpers.emplace_back(std::ref(work));
  } catch (const std::system_error&) {  // no more threads to be had: those that are there do it
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

Interruptible::Interruptible(Check check) : outer_(caller_check) {
  caller_check = check;
  check_due = nanoseconds() + kCheckNanoseconds;
}

Interruptible::~Interruptible() {
  caller_check = outer_;
}

int usable_threads(int64_t threads) {
  return static_cast<int>(std::clamp<int64_t>(threads, 1, kMaxThreads));
}

void run_tasks(int64_t count, int threads, TaskFunction function, void* context) {
  threads = usable_threads(std::min<int64_t>(threads, count));
  if (threads == 1) {
    for (int64_t task = 0; task < count; ++task) {
      check_caller();
      function(context, task);
    }
    return;
  }
  std::exception_ptr failure;
  std::atomic<bool> failed{false};
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task = next.fetch_add(1); task < count && !failed; task = next.fetch_add(1)) {
      try {
        check_caller();
        function(context, task);
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    }
  };
  if (without_openmp) {
    run_on_new_threads(threads, work);
  } else {
#pragma omp parallel num_threads(threads)
    work();
  }
  if (failure) std::rethrow_exception(failure);
}

static void* allocate(size_t bytes) {
  const size_t rounded = (bytes + 63) / 64 * 64;
  void* data = std::aligned_alloc(64, rounded ? rounded : 64);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

namespace {
struct ThreadScratch {
  void* data[static_cast<int>(ScratchSlot::kCount)] = {};
  size_t size[static_cast<int>(ScratchSlot::kCount)] = {};
  ~ThreadScratch() {
    for (void* block : data) std::free(block);
  }
};
}  // namespace

void* thread_scratch(ScratchSlot slot, size_t bytes) {
  thread_local ThreadScratch scratch;
  const int i = static_cast<int>(slot);
  if (scratch.size[i] < bytes) {
    std::free(scratch.data[i]);
    scratch.data[i] = nullptr;
    scratch.size[i] = 0;
    scratch.data[i] = allocate(bytes);
    scratch.size[i] = bytes;
  }
  return scratch.data[i];
}

AlignedBuffer::AlignedBuffer(size_t bytes) : data_(allocate(bytes)) {}
AlignedBuffer::~AlignedBuffer() {
  std::free(data_);
}

}  // namespace halfbyte
