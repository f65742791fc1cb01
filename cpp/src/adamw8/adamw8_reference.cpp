// The contract of adamw8_format.h as plain scalar loops, one block at a time. It never gets faster.
#include <math.h>

#include "adamw8_impl.h"
#include "support/scalar.h"

namespace halfbyte {

static float largest_magnitude(const float* values, int count) {
  float largest = 0;
  for (int i = 0; i < count; ++i)
    if (fabsf(values[i]) > largest) largest = fabsf(values[i]);
  return largest;
}

static float block_scale(const float* values, int count, float cap) {
  const float largest = largest_magnitude(values, count);
  if (largest == 0) return 0;
  if (largest < kSmallestScale) return kSmallestScale;
  return largest > cap ? cap : largest;
}

static float encode_signed(const AdamW8Tables& tables, const float* values, int count,
                           uint8_t* codes) {
  const float scale = block_scale(values, count, kLargestFloat);
  const float inverse = scale == 0 ? 0 : 1.0f / scale;
  for (int i = 0; i < count; ++i)
    codes[i] = dynamic8_code(tables.signed_map.thresholds, values[i] * inverse);
  return scale;
}

static float encode_unsigned(const AdamW8Tables& tables, const float* values, int count, float cap,
                             uint8_t* codes) {
  const float scale = block_scale(values, count, cap);
  const float inverse = scale == 0 ? 0 : 1.0f / scale;
  for (int i = 0; i < count; ++i) {
    const uint8_t code = dynamic8_code(tables.unsigned_map.thresholds, values[i] * inverse);
    codes[i] = values[i] == 0 ? 0 : code == 0 ? 1 : code;
  }
  return scale;
}

// One block's moments in fp32.
struct BlockMoments {
  float m[kAdamW8Block], v[kAdamW8Block];
};

static void decode_block(const AdamW8Span& span, int64_t block, int64_t begin, int count,
                         BlockMoments& moments) {
  const AdamW8Tensor& t = *span.tensor;
  if (t.state == AdamW8State::kFloat32) {
    for (int i = 0; i < count; ++i) {
      moments.m[i] = static_cast<const float*>(t.exp_avg)[begin + i];
      moments.v[i] = static_cast<const float*>(t.exp_avg_sq)[begin + i];
    }
    return;
  }
  const uint8_t* m_codes = static_cast<const uint8_t*>(t.exp_avg) + begin;
  const uint8_t* v_codes = static_cast<const uint8_t*>(t.exp_avg_sq) + begin;
  for (int i = 0; i < count; ++i) {
    const float m = span.tables->signed_map.values[m_codes[i]] * t.exp_avg_absmax[block];
    const float v = span.tables->unsigned_map.values[v_codes[i]] * t.exp_avg_sq_absmax[block];
    const bool ratio = t.state == AdamW8State::kRatio;
    moments.m[i] = ratio ? m * v : m;
    moments.v[i] = ratio ? v * v : v;
  }
}

static void update_elements(const AdamW8Span& span, int64_t begin, int count,
                            BlockMoments& moments) {
  const AdamW8Tensor& t = *span.tensor;
  const AdamW8Scalars& k = *span.scalars;
  for (int i = 0; i < count; ++i) {
    const float p = load_element(t.param, t.param_dtype, begin + i);
    const float g = load_element(t.grad, t.grad_dtype, begin + i);
    const float m = k.b1 * moments.m[i] + k.c1 * g;
    const float v = k.b2 * moments.v[i] + (k.c2 * g) * g;
    const float d = sqrtf(v) * k.root + k.eps;
    const float q = d == 0 ? 0 : m / d;
    store_element(t.param, t.param_dtype, begin + i, p * k.decay - k.size * q);
    moments.m[i] = m;
    moments.v[i] = v;
  }
}

static void encode_block(const AdamW8Span& span, int64_t block, int64_t begin, int count,
                         BlockMoments& moments) {
  const AdamW8Tensor& t = *span.tensor;
  if (t.state == AdamW8State::kFloat32) {
    for (int i = 0; i < count; ++i) {
      static_cast<float*>(t.exp_avg)[begin + i] = moments.m[i];
      static_cast<float*>(t.exp_avg_sq)[begin + i] = moments.v[i];
    }
    return;
  }
  uint8_t* m_codes = static_cast<uint8_t*>(t.exp_avg) + begin;
  uint8_t* v_codes = static_cast<uint8_t*>(t.exp_avg_sq) + begin;
  for (int i = 0; i < count; ++i)
    if (moments.v[i] > kLargestFloat) moments.m[i] = 0;
  if (t.state == AdamW8State::kMoments) {
    t.exp_avg_absmax[block] = encode_signed(*span.tables, moments.m, count, m_codes);
    t.exp_avg_sq_absmax[block] =
        encode_unsigned(*span.tables, moments.v, count, kLargestFloat, v_codes);
    return;
  }
  float root[kAdamW8Block], ratio[kAdamW8Block];
  for (int i = 0; i < count; ++i) {
    root[i] = sqrtf(moments.v[i]);
    ratio[i] = root[i] == 0 ? 0 : moments.m[i] / root[i];
  }
  t.exp_avg_sq_absmax[block] = encode_unsigned(*span.tables, root, count, kLargestRoot, v_codes);
  t.exp_avg_absmax[block] = encode_signed(*span.tables, ratio, count, m_codes);
}

void adamw8_update_reference(const AdamW8Span& span) {
  for (int64_t block = span.first; block < span.last; ++block) {
    const int64_t begin = block * kAdamW8Block;
    const int64_t left = span.tensor->count - begin;
    const int count = static_cast<int>(left < kAdamW8Block ? left : kAdamW8Block);
    BlockMoments moments;
    decode_block(span, block, begin, count, moments);
    update_elements(span, begin, count, moments);
    encode_block(span, block, begin, count, moments);
  }
}

bool adamw8_finite_reference(const void* data, DType dtype, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = load_element(data, dtype, i);
    if (!(fabsf(value) <= kLargestFloat)) return false;
  }
  return true;
}

}  // namespace halfbyte
