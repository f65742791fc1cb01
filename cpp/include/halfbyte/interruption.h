// A way out of a long operation for the thread that called it.
//
// While an `Interruptible` lives, operations called on its thread call `check` on that same thread,
// between two tasks, once about every 0.2 s. What `check` throws ends the operation: no task is
// begun any more, those that run on other threads are waited for, and the exception reaches the
// caller. Outputs are unfinished then, so an operation that updates in place (an optimizer step)
// must not be called under one. A call of less than 0.2 s never checks.
#pragma once

namespace halfbyte {

class Interruptible {
 public:
  using Check = void (*)();
  explicit Interruptible(Check check);
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;

 private:
  Check outer_;
};

}  // namespace halfbyte
