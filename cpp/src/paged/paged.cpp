// Arenas and the paged step, handed to the CUDA library.
#include "halfbyte/paged.h"

#include "support/cuda_library.h"

namespace halfbyte {
namespace {

cuda::ArenaKind kind_by_name(const std::string& name) {
  if (name == "auto") return cuda::ArenaKind::kAuto;
  if (name == "managed") return cuda::ArenaKind::kManaged;
  HALFBYTE_CHECK(name == "pinned", "kind: expected auto, managed or pinned, got '", name, "'");
  return cuda::ArenaKind::kPinned;
}

std::vector<cuda::PageRange> ranges_of(const std::vector<Page>& pages) {
  std::vector<cuda::PageRange> ranges;
  ranges.reserve(pages.size());
  for (const Page& page : pages)
    ranges.push_back({page.arena ? page.arena->handle() : nullptr, page.begin, page.end,
                      page.first_tensor, page.tensor_count});
  return ranges;
}

std::vector<cuda::AdamW8GroupLaunch> groups_of(const std::vector<AdamW8Group>& groups) {
  std::vector<cuda::AdamW8GroupLaunch> launches;
  launches.reserve(groups.size());
  for (const AdamW8Group& g : groups)
    launches.push_back({g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, g.maximize});
  return launches;
}

}  // namespace

Arena::Arena(int64_t bytes, int device, const std::string& kind) : bytes_(bytes), device_(device) {
  cuda::Arena* made = nullptr;
  check_cuda("paged memory", cuda_api().arena_create(bytes, device, kind_by_name(kind), &made));
  handle_.reset(made);
}

void Arena::Destroy::operator()(cuda::Arena* arena) const {
  cuda_api().arena_destroy(arena);
}

void* Arena::data() const {
  return cuda_api().arena_address(handle());
}

std::string Arena::kind() const {
  return cuda_api().arena_kind(handle()) == cuda::ArenaKind::kManaged ? "managed" : "pinned";
}

void adamw8_paged_step(const PagedAdamW8Params& params) {
  const AdamW8Params& step = params.step;
  HALFBYTE_CHECK(step.place.is_cuda(), "place: expected a CUDA device, got the CPU");
  check_adamw8(step);
  check_tensor("bad", step.bad, {DType::kInt64}, {1});
  const std::vector<cuda::AdamW8GroupLaunch> groups = groups_of(step.groups);
  const std::vector<cuda::PageRange> pages = ranges_of(params.pages);
  cuda::PagedAdamW8Launch launch{};
  launch.step.tensors = step.tensors.data();
  launch.step.tensor_count = static_cast<int64_t>(step.tensors.size());
  launch.step.groups = groups.data();
  launch.step.group_count = static_cast<int64_t>(groups.size());
  launch.step.bad = step.bad.as<int64_t>();
  launch.pages = pages.data();
  launch.page_count = static_cast<int64_t>(pages.size());
  launch.look_ahead = params.look_ahead;
  launch.evict = params.evict;
  check_cuda("adamw8", cuda_api().adamw8_paged_step(launch, {step.place.index, step.stream}));
}

}  // namespace halfbyte
