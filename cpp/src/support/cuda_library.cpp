// dlopen of libhalfbyte_cuda.so from the folder of this very module, or from the path in the
// environment variable HALFBYTE_CUDA_LIBRARY. Opening needs no driver and initialises nothing.
#include "cuda_library.h"

#include <dlfcn.h>

#include <cstdlib>

#include "halfbyte/device.h"

namespace halfbyte {
namespace {

struct Library {
  const cuda::Api* api = nullptr;
  std::string why_not;
};

std::string library_path() {
  const char* setting = std::getenv("HALFBYTE_CUDA_LIBRARY");
  if (setting != nullptr && *setting != '\0') return setting;
  Dl_info self{};
  if (dladdr(reinterpret_cast<void*>(&library_path), &self) == 0) return "libhalfbyte_cuda.so";
  const std::string module = self.dli_fname;
  return module.substr(0, module.rfind('/') + 1) + "libhalfbyte_cuda.so";
}

Library open_library() {
  const std::string path = library_path();
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr)
    return {nullptr, concat("this build of halfbyte has no CUDA kernels (", dlerror(), ")")};
  using Entry = const cuda::Api* (*)(int);
  const auto entry = reinterpret_cast<Entry>(dlsym(handle, "halfbyte_cuda_api"));
  const cuda::Api* api = entry == nullptr ? nullptr : entry(cuda::kApiVersion);
  if (api == nullptr)
    return {nullptr, concat(path, " is of another version of halfbyte: reinstall both together")};
  return {api, ""};
}

const Library& library() {
  static const Library opened = open_library();
  return opened;
}

}  // namespace

const cuda::Api& cuda_api() {
  HALFBYTE_CHECK(library().api != nullptr, library().why_not);
  return *library().api;
}

std::string cuda_library_why_not() {
  return library().why_not;
}

void check_cuda(const char* op, const char* sentence) {
  HALFBYTE_CHECK(*sentence == '\0', op, ": ", sentence);
}

std::string cuda_why_not() {
  const std::string missing = cuda_library_why_not();
  return missing.empty() ? cuda_api().why_not() : missing;
}

std::vector<std::string> cuda_devices() {
  std::vector<std::string> lines;
  if (!cuda_why_not().empty()) return lines;
  for (int device = 0; device < cuda_api().device_count(); ++device)
    lines.push_back(cuda_api().device_description(device));
  return lines;
}

std::vector<VariantStatus> cuda_variants(const std::string& op, int device) {
  std::vector<VariantStatus> rows;
  if (!cuda_library_why_not().empty()) return rows;
  cuda::VariantRow row;
  while (cuda_api().variant(op.c_str(), static_cast<int>(rows.size()), device, &row))
    rows.push_back({row.name, row.why_not, row.chosen});
  return rows;
}

}  // namespace halfbyte
