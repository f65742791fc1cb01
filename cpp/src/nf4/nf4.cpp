// Checks, threading and the variant tables of quantize, double quantize and dequantize.
#include "halfbyte/nf4.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "halfbyte/dynamic8_format.h"
#include "nf4_cuda.h"
#include "nf4_impl.h"
#include "support/cpu_features.h"
#include "support/parallel.h"
#include "support/scalar.h"

namespace halfbyte {
namespace {

constexpr std::initializer_list<DType> kFloats = {DType::kFloat32, DType::kBFloat16,
                                                  DType::kFloat16};
constexpr int64_t kElementsPerTask = 1 << 16;

void check_block_size(int64_t block_size) {
  HALFBYTE_CHECK(block_size >= kMinBlockSize && block_size <= kMaxBlockSize &&
                     (block_size & (block_size - 1)) == 0,
                 "block_size: expected a power of two from 32 to 4096, got ", block_size);
}

// Memory-bound work beats nothing by splitting small tensors.
int useful_threads(int64_t count, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, count / 32768)));
}

struct QuantizeRun {
  QuantizeArgs args;
  int threads;
  int64_t* bad_block;  // out: the first non-finite block, or -1
};

template <QuantizeBlocks quantize_blocks>
void run_quantize(const QuantizeRun& run) {
  const int64_t blocks = ceil_div(run.args.count, run.args.block_size);
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / run.args.block_size);
  std::atomic<int64_t> bad{INT64_MAX};
  parallel_for(ceil_div(blocks, per_task), useful_threads(run.args.count, run.threads),
               [&](int64_t task) {
                 const int64_t begin = task * per_task;
                 const int64_t end = std::min(begin + per_task, blocks);
                 const int64_t found = quantize_blocks(run.args, begin, end);
                 int64_t seen = bad.load();
                 while (found >= 0 && found < seen && !bad.compare_exchange_weak(seen, found)) {
                 }
               });
  *run.bad_block = bad.load() == INT64_MAX ? -1 : bad.load();
}

struct DequantizeRun {
  Nf4Bits bits;
  DType dtype;
  void* out;
  int threads;
};

template <DequantizeSpan dequantize_span>
void run_dequantize(const DequantizeRun& run) {
  const int64_t size = dtype_size(run.dtype);
  parallel_for(ceil_div(run.bits.count, kElementsPerTask),
               useful_threads(run.bits.count, run.threads), [&](int64_t task) {
                 const int64_t begin = task * kElementsPerTask;
                 const int64_t count = std::min(kElementsPerTask, run.bits.count - begin);
                 dequantize_span(run.bits, begin, count, run.dtype,
                                 static_cast<char*>(run.out) + begin * size);
               });
}

const Variant<QuantizeRun> kQuantizeTable[] = {
#if defined(__x86_64__)
    {"avx512", needs_avx512, run_quantize<quantize_blocks_avx512>},
    {"avx2", needs_avx2, run_quantize<quantize_blocks_avx2>},
#endif
    {"portable", always, run_quantize<quantize_blocks_portable>},
    {"reference", always, run_quantize<quantize_blocks_reference>},
};

const Variant<DequantizeRun> kDequantizeTable[] = {
#if defined(__x86_64__)
    {"avx512", needs_avx512, run_dequantize<dequantize_span_avx512>},
    {"avx2", needs_avx2, run_dequantize<dequantize_span_avx2>},
#endif
    {"portable", always, run_dequantize<dequantize_span_portable>},
    {"reference", always, run_dequantize<dequantize_span_reference>},
};

// The signed dynamic map's code in about one compare: the top 16 bits of x pick the code of the
// smallest x that shares them, and the thresholds inside that bin, at most a few, decide the rest.
class NestedEncoder {
 public:
  NestedEncoder() : start_(1 << 16) {
    float values[256];
    dynamic8_values(DynamicMap::kSigned, values);
    dynamic8_thresholds(values, thresholds_);
    for (uint32_t bin = 0; bin < start_.size(); ++bin) {
      const bool negative = bin >> 15;  // there the largest magnitude is the smallest x
      const float smallest = float_of_bits(bin << 16 | (negative ? 0xFFFFu : 0u));
      start_[bin] = dynamic8_code(thresholds_, smallest);
    }
  }
  uint8_t operator()(float x) const {
    int code = start_[bits_of_float(x) >> 16];
    while (code < 255 && x > thresholds_[code]) ++code;
    return static_cast<uint8_t>(code);
  }

 private:
  float thresholds_[255];
  std::vector<uint8_t> start_;
};

// codes[i] of absmax[i] - offset for i in [first, last); returns the block's own absmax.
float encode_nested_block(const float* absmax, float offset, int64_t first, int64_t last,
                          const NestedEncoder& encode, uint8_t* codes) {
  float largest = 0;
  for (int64_t i = first; i < last; ++i) largest = std::max(largest, std::fabs(absmax[i] - offset));
  float lift = 1;
  float inverse = largest > 0 ? 1.0f / largest : 0.0f;
  if (std::isinf(inverse)) {
    lift = 1.2676506002282294e30f;  // 2^100, exact: see quantize_blocks_reference
    inverse = 1.0f / (largest * lift);
  }
  for (int64_t i = first; i < last; ++i) codes[i] = encode((absmax[i] - offset) * lift * inverse);
  return largest;
}

const Codebook& codebook_of(CodebookId id) {
  return kCodebooks[static_cast<int>(id)];
}

const float* standard_levels(CodebookId id) {
  static const std::vector<float> levels[3] = {codebook_levels(CodebookId::kNf4),
                                               codebook_levels(CodebookId::kFp4),
                                               codebook_levels(CodebookId::kInt4)};
  return levels[static_cast<int>(id)].data();
}

const float* standard_nested_map() {
  static const std::vector<float> map = [] {
    std::vector<float> values(256);
    dynamic8_values(DynamicMap::kSigned, values.data());
    return values;
  }();
  return map.data();
}

}  // namespace

void quantize_4bit(const QuantizeParams& params) {
  check_dtype("weight", params.weight, kFloats);
  check_block_size(params.block_size);
  const int64_t count = params.weight.numel();
  check_tensor("packed", params.packed, {DType::kUInt8}, {ceil_div(count, 2)});
  check_tensor("absmax", params.absmax, {DType::kFloat32}, {ceil_div(count, params.block_size)});
  const Place& place = params.weight.place;
  check_places("weight", place, {{"packed", params.packed}, {"absmax", params.absmax}});
  if (place.is_cuda()) return quantize_4bit_cuda(params);

  QuantizeRun run{};
  const Codebook& book = codebook_of(params.codebook);
  std::memcpy(run.args.thresholds, book.thresholds, sizeof(book.thresholds));
  std::memcpy(run.args.code_of_rank, book.code_of_rank, sizeof(book.code_of_rank));
  run.args.zero_code = book.zero_code;
  run.args.weight = params.weight.data;
  run.args.dtype = params.weight.dtype;
  run.args.count = count;
  run.args.block_size = params.block_size;
  run.args.packed = params.packed.as<uint8_t>();
  run.args.absmax = params.absmax.as<float>();
  run.threads = params.threads;
  int64_t bad_block = -1;
  run.bad_block = &bad_block;
  select_variant("quantize_4bit", kQuantizeTable, run).run(run);
  if (bad_block < 0) return;

  int64_t index = bad_block * params.block_size;
  while (std::isfinite(load_element(params.weight.data, params.weight.dtype, index))) ++index;
  throw Error(concat("weight: expected finite values, got ",
                     load_element(params.weight.data, params.weight.dtype, index),
                     " at flat index ", index, " of ", describe(params.weight)));
}

void double_quantize(const DoubleQuantizeParams& params) {
  check_dtype("absmax", params.absmax, {DType::kFloat32});
  const int64_t blocks = params.absmax.numel();
  check_tensor("offset", params.offset, {DType::kFloat32}, {1});
  check_tensor("codes", params.codes, {DType::kUInt8}, {blocks});
  check_tensor("nested_absmax", params.nested_absmax, {DType::kFloat32},
               {ceil_div(blocks, kDynamic8Block)});
  const Place& place = params.absmax.place;
  check_places("absmax", place,
               {{"offset", params.offset},
                {"codes", params.codes},
                {"nested_absmax", params.nested_absmax}});
  if (place.is_cuda()) return double_quantize_cuda(params);
  static const NestedEncoder encode;

  const float* absmax = params.absmax.as<float>();
  const float offset = *params.offset.as<float>();
  parallel_for(ceil_div(blocks, kDynamic8Block), useful_threads(blocks, params.threads),
               [&](int64_t nested) {
                 const int64_t first = nested * kDynamic8Block;
                 const int64_t last = std::min<int64_t>(first + kDynamic8Block, blocks);
                 params.nested_absmax.as<float>()[nested] = encode_nested_block(
                     absmax, offset, first, last, encode, params.codes.as<uint8_t>());
               });
}

Nf4Bits checked_bits(const QuantizedView& weight, int64_t count, const char* first,
                     const Place& place) {
  check_block_size(weight.block_size);
  const int64_t blocks = ceil_div(count, weight.block_size);
  check_dtype("packed", weight.packed, {DType::kUInt8});
  HALFBYTE_CHECK(weight.packed.numel() == ceil_div(count, 2), "packed: expected ",
                 ceil_div(count, 2), " bytes for ", count, " elements, got ",
                 describe(weight.packed));
  check_tensor("absmax", weight.absmax, {DType::kFloat32, DType::kUInt8}, {blocks});
  if (weight.levels.given) check_tensor("levels", weight.levels, {DType::kFloat32}, {16});
  check_places(first, place,
               {{"packed", weight.packed},
                {"absmax", weight.absmax},
                {"nested_absmax", weight.nested_absmax},
                {"offset", weight.offset},
                {"levels", weight.levels},
                {"nested_map", weight.nested_map}});

  Nf4Bits bits{};
  bits.packed = weight.packed.as<uint8_t>();
  bits.levels = weight.levels.as<float>();
  if (bits.levels == nullptr && !place.is_cuda()) bits.levels = standard_levels(weight.codebook);
  bits.count = count;
  while ((int64_t{1} << bits.block_shift) < weight.block_size) ++bits.block_shift;
  if (weight.absmax.dtype == DType::kFloat32) {
    bits.absmax = weight.absmax.as<float>();
    return bits;
  }
  check_tensor("nested_absmax", weight.nested_absmax, {DType::kFloat32},
               {ceil_div(blocks, kDynamic8Block)});
  if (weight.nested_map.given)
    check_tensor("nested_map", weight.nested_map, {DType::kFloat32}, {256});
  check_tensor("offset", weight.offset, {DType::kFloat32}, {1});
  bits.absmax_codes = weight.absmax.as<uint8_t>();
  bits.nested_absmax = weight.nested_absmax.as<float>();
  bits.nested_map = weight.nested_map.as<float>();
  if (bits.nested_map == nullptr && !place.is_cuda()) bits.nested_map = standard_nested_map();
  bits.offset = weight.offset.as<float>();
  return bits;
}

void dequantize_4bit(const DequantizeParams& params) {
  check_dtype("out", params.out, kFloats);
  const Place& place = params.out.place;
  const Nf4Bits bits = checked_bits(params.weight, params.out.numel(), "out", place);
  if (place.is_cuda()) return dequantize_4bit_cuda(params, bits);
  const DequantizeRun run{bits, params.out.dtype, params.out.data, params.threads};
  select_variant("dequantize_4bit", kDequantizeTable, run).run(run);
}

std::vector<float> codebook_levels(CodebookId codebook) {
  std::vector<float> levels(16);
  std::memcpy(levels.data(), codebook_of(codebook).levels, 16 * sizeof(float));
  return levels;
}

CodebookId codebook_by_name(const std::string& name) {
  for (int i = 0; i < 3; ++i)
    if (name == kCodebooks[i].name) return static_cast<CodebookId>(i);
  throw Error(concat("codebook: expected nf4, fp4 or int4, got '", name, "'"));
}

std::vector<VariantStatus> quantize_variants() {
  return list_variants("quantize_4bit", kQuantizeTable, QuantizeRun{});
}

std::vector<VariantStatus> dequantize_variants() {
  return list_variants("dequantize_4bit", kDequantizeTable, DequantizeRun{});
}

}  // namespace halfbyte
