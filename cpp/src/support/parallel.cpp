// Tasks over OpenMP: torch ships the same runtime, so its pool and ours are one.
#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>

namespace halfbyte {

void run_tasks(int64_t count, int threads, TaskFunction function, void* context) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t task = 0; task < count; ++task) function(context, task);
    return;
  }
  std::exception_ptr failure;
  std::atomic<bool> failed{false};
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    for (int64_t task = next.fetch_add(1); task < count && !failed; task = next.fetch_add(1)) {
      try {
        function(context, task);
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    }
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
