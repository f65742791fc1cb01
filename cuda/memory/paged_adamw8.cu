// The order of a paged step. Page i is a span of tensors and the span of an arena with their state.
//
//   caller's stream   check gradients | wait ready[0], update 0 | wait ready[1], update 1 | ... |
//   count fetch             page 0 .. ahead | page ahead + 1 | ...     each after gone[same slot]
//   evict                             | after update 0: page 0 back | after update 1: ...
//
// Managed: fetch and evict are prefetches, evict only on request. Pinned: they are copies between
// the arena and one of two staging buffers on the device, whose addresses the kernel gets; one page
// travels in and one out while one is updated. Pinned pages that do not ascend may share bytes
// (of tensors that another page updates): one after the other then, through one buffer. A page is
// on the device before its update starts, so that no kernel faults or reads over the bus.
//
// Invariants: nothing waits on the host. When a gradient is not finite the updates change nothing
// and what travels back is what came. The caller's stream ends after the last copy back of pinned
// pages; evictions of managed pages may go on behind it. Fetches of managed pages do not wait for
// the caller's stream: they change no value, and may overlap the backward pass.
#include "memory/paged_adamw8.h"

#include <utility>
#include <vector>

#include "adamw8/adamw8.h"
#include "device/error.h"
#include "memory/arena.h"

namespace halfbyte::cuda {
namespace {

constexpr int64_t kStagingRing = 2;
constexpr int64_t kAlignment = 256;

class PagedStep {
 public:
  PagedStep(const PagedAdamW8Launch& launch, Where where)
      : launch_(launch), where_(where), stream_(static_cast<cudaStream_t>(where.stream)) {}

  const char* run() {
    const char* problem = check();
    if (!*problem) problem = prepare();
    if (!*problem) problem = adamw8_check_gradients(launch_.step, where_);
    int64_t fetched = 0;
    for (int64_t i = 0; i < launch_.page_count && !*problem; ++i) {
      for (; fetched < launch_.page_count && fetched < i + ring_ && !*problem; ++fetched)
        problem = fetch(fetched);
      if (!*problem) problem = update(i);
      if (!*problem) problem = evict(i);
    }
    if (!*problem && pinned_) problem = join();
    if (!*problem) problem = adamw8_count_step(launch_.step, where_);
    return problem;
  }

 private:
  using Slot = SideStreams::Slot;

  // Pages must cover all tensors in order; notes the longest pinned one, and whether they ascend.
  const char* check() {
    int64_t next = 0;
    for (int64_t i = 0; i < launch_.page_count; ++i) {
      const PageRange& page = launch_.pages[i];
      if (page.first_tensor != next || page.tensor_count < 0)
        return say("page %lld: expected to start at tensor %lld, got %lld with %lld tensors",
                   static_cast<long long>(i), static_cast<long long>(next),
                   static_cast<long long>(page.first_tensor),
                   static_cast<long long>(page.tensor_count));
      next += page.tensor_count;
      if (!page.arena) continue;
      if (const char* problem = range_problem(*page.arena, page.begin, page.end, where_.device))
        return problem;
      if (!owner_) owner_ = page.arena;
      if (page.arena->kind != ArenaKind::kPinned) continue;
      pinned_ = true;
      ascending_ = ascending_ && follows(page);
      const int64_t bytes = page.end - page.begin + page.begin % kAlignment;
      longest_ = bytes > longest_ ? bytes : longest_;
    }
    if (next != launch_.step.tensor_count)
      return say("pages: expected %lld tensors in all, got %lld",
                 static_cast<long long>(launch_.step.tensor_count), static_cast<long long>(next));
    return kOk;
  }

  // Whether a pinned page lies behind the last one of its arena.
  bool follows(const PageRange& page) {
    for (auto& [arena, end] : ends_) {
      if (arena != page.arena) continue;
      const bool behind = page.begin >= end;
      end = page.end;
      return behind;
    }
    ends_.push_back({page.arena, page.end});
    return true;
  }

  const char* prepare() {
    const int64_t ahead = launch_.look_ahead < 0 ? 0 : launch_.look_ahead;
    ring_ = ahead + 1 < launch_.page_count ? ahead + 1 : launch_.page_count;
    if (pinned_) ring_ = ascending_ ? kStagingRing : 1;
    if (!owner_) return kOk;
    if (!owner_->side_streams) owner_->side_streams = std::make_unique<SideStreams>();
    side_ = owner_->side_streams.get();
    const char* problem = side_->prepare(ring_);
    if (*problem || !pinned_) return problem;
    problem = side_->reserve_staging(ring_, longest_);
    if (*problem) return problem;
    // Earlier work on the caller's stream may write the arena.
    problem = failed(cudaEventRecord(side_->start, stream_), "cudaEventRecord");
    if (!problem)
      problem = failed(cudaStreamWaitEvent(side_->fetch, side_->start, 0), "cudaStreamWaitEvent");
    return problem ? problem : kOk;
  }

  Slot& slot_of(int64_t i) { return side_->slots[static_cast<size_t>(i % ring_)]; }

  bool travels(const PageRange& page) const { return page.arena && page.begin < page.end; }

  // Where byte `begin` of a pinned page lies in its staging buffer; alignment stays.
  char* staged(int64_t i) { return slot_of(i).staging + launch_.pages[i].begin % kAlignment; }

  const char* copy(int64_t i, cudaMemcpyKind kind, cudaStream_t stream) {
    const PageRange& page = launch_.pages[i];
    char* host = page.arena->base + page.begin;
    const bool in = kind == cudaMemcpyHostToDevice;
    return failed(cudaMemcpyAsync(in ? staged(i) : host, in ? host : staged(i),
                                  static_cast<size_t>(page.end - page.begin), kind, stream),
                  "cudaMemcpyAsync");
  }

  const char* prefetch(const PageRange& page, bool to_device, cudaStream_t stream) {
    const Where beside{where_.device, stream};
    const char* problem = arena_prefetch(page.arena, page.begin, page.end, to_device, beside);
    return *problem ? problem : nullptr;
  }

  // Page i sets out for the device, once the page before it in its slot is gone.
  const char* fetch(int64_t i) {
    const PageRange& page = launch_.pages[i];
    if (!travels(page)) return kOk;
    Slot& slot = slot_of(i);
    const char* problem =
        failed(cudaStreamWaitEvent(side_->fetch, slot.gone, 0), "cudaStreamWaitEvent");
    if (!problem)
      problem = page.arena->kind == ArenaKind::kPinned
                    ? copy(i, cudaMemcpyHostToDevice, side_->fetch)
                    : prefetch(page, true, side_->fetch);
    if (!problem) problem = failed(cudaEventRecord(slot.ready, side_->fetch), "cudaEventRecord");
    return problem ? problem : kOk;
  }

  const char* update(int64_t i) {
    const PageRange& page = launch_.pages[i];
    const AdamW8Tensor* tensors = launch_.step.tensors + page.first_tensor;
    if (!travels(page)) return adamw8_update(launch_.step, tensors, page.tensor_count, where_);
    if (const char* problem =
            failed(cudaStreamWaitEvent(stream_, slot_of(i).ready, 0), "cudaStreamWaitEvent"))
      return problem;
    if (page.arena->kind == ArenaKind::kPinned) tensors = at_staging(i);
    return adamw8_update(launch_.step, tensors, page.tensor_count, where_);
  }

  // The page's tensors with every address in the page moved to the staging buffer.
  const AdamW8Tensor* at_staging(int64_t i) {
    const PageRange& page = launch_.pages[i];
    const AdamW8Tensor* first = launch_.step.tensors + page.first_tensor;
    moved_.assign(first, first + page.tensor_count);
    const char* from = page.arena->base + page.begin;
    const auto move = [&](auto*& address) {
      const char* at = reinterpret_cast<const char*>(address);
      if (at < from || at >= page.arena->base + page.end) return;
      address =
          reinterpret_cast<std::remove_reference_t<decltype(address)>>(staged(i) + (at - from));
    };
    for (AdamW8Tensor& t : moved_) {
      move(t.exp_avg);
      move(t.exp_avg_sq);
      move(t.exp_avg_absmax);
      move(t.exp_avg_sq_absmax);
    }
    return moved_.data();
  }

  // Page i sets out for the host after its update.
  const char* evict(int64_t i) {
    const PageRange& page = launch_.pages[i];
    if (!travels(page)) return kOk;
    const bool pinned = page.arena->kind == ArenaKind::kPinned;
    if (!pinned && !launch_.evict) return kOk;
    const char* problem = failed(cudaEventRecord(side_->updated, stream_), "cudaEventRecord");
    if (!problem)
      problem = failed(cudaStreamWaitEvent(side_->evict, side_->updated, 0), "cudaStreamWaitEvent");
    if (!problem)
      problem = pinned ? copy(i, cudaMemcpyDeviceToHost, side_->evict)
                       : prefetch(page, false, side_->evict);
    if (!problem)
      problem = failed(cudaEventRecord(slot_of(i).gone, side_->evict), "cudaEventRecord");
    return problem ? problem : kOk;
  }

  const char* join() {
    for (int64_t slot = 0; slot < ring_; ++slot)
      if (const char* problem =
              failed(cudaStreamWaitEvent(stream_, slot_of(slot).gone, 0), "cudaStreamWaitEvent"))
        return problem;
    return kOk;
  }

  const PagedAdamW8Launch& launch_;
  const Where where_;
  const cudaStream_t stream_;
  Arena* owner_ = nullptr;  // of the side streams: the first page's arena
  SideStreams* side_ = nullptr;
  int64_t ring_ = 1;
  bool pinned_ = false;
  bool ascending_ = true;
  int64_t longest_ = 0;
  std::vector<std::pair<const Arena*, int64_t>> ends_;  // of the last pinned page, by arena
  std::vector<AdamW8Tensor> moved_;
};

}  // namespace

const char* adamw8_paged_step(const PagedAdamW8Launch& launch, Where where) {
  return PagedStep(launch, where).run();
}

}  // namespace halfbyte::cuda
