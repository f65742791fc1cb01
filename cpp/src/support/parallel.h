// Dynamic hand-out of independent tasks, and per-thread scratch that outlives a call.
//
// Tasks must not depend on each other's order; every task computes its outputs in a fixed order, so
// results are the same for any thread count. The only OpenMP in the tree is in parallel.cpp. No
// task's scratch is alive between two tasks of a thread: whoever looks up there (interruption.h)
// may call operations itself.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfbyte {

// A caller's number of threads within what is sensible: 1 .. 1024.
int usable_threads(int64_t threads);

using TaskFunction = void (*)(void* context, int64_t task);

// Runs task 0 .. count-1 on up to `threads` threads; returns when all are done. The first exception
// thrown by a task is rethrown here.
void run_tasks(int64_t count, int threads, TaskFunction function, void* context);

template <class Body>
void parallel_for(int64_t count, int threads, Body&& body) {
  run_tasks(
      count, threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// 64-byte aligned memory of this thread, at least `bytes` long, kept for the thread's next call.
// `slot` separates buffers that are alive at the same time.
enum class ScratchSlot { kPanel, kSecondPanel, kStage, kTile, kRows, kCount };
void* thread_scratch(ScratchSlot slot, size_t bytes);

// 64-byte aligned memory for one call.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t bytes);
  ~AlignedBuffer();
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

}  // namespace halfbyte
