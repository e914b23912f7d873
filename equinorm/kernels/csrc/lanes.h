// Eight doubles at a time, whatever the element type in memory.
//
// Every value is converted to double when it is loaded and rounded once when it is stored. So float32 data may have any mean, any
// spread and any count without a special case: squares of the largest float32 fit a double, and a double keeps nine digits more.
// The vectors are the compilers' own extension (GCC and Clang): they become AVX-512, AVX2 or NEON code without reassociation flags,
// and the order of every sum is written here, so that it is the same on every call.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif
#if !defined(__F16C__)
#include <torch/headeronly/util/Half.h>
#endif

namespace equinorm {

constexpr int64_t kLanes = 8;

using Doubles = double __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(32)));
using Shorts = uint16_t __attribute__((vector_size(16)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline Doubles splat(double value) { return Doubles{} + value; }

inline Doubles load(const double* from) {
  Doubles values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Doubles load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return __builtin_convertvector(values, Doubles);
}

inline Doubles load(const bfloat16* from) {
  Shorts values;
  std::memcpy(&values, from, sizeof values);
  return __builtin_convertvector(std::bit_cast<Floats>(__builtin_convertvector(values, Words) << 16), Doubles);
}

inline Doubles load(const float16* from) {
  Floats values;
#if defined(__F16C__)
  values = (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  for (int64_t i = 0; i < kLanes; ++i) values[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(from[i].bits);
#endif
  return __builtin_convertvector(values, Doubles);
}

inline void store(double* to, Doubles values) { std::memcpy(to, &values, sizeof values); }

inline void store(float* to, Doubles values) {
  const Floats rounded = __builtin_convertvector(values, Floats);
  std::memcpy(to, &rounded, sizeof rounded);
}

// Round to nearest, ties to even, on the integer representation; a NaN keeps its sign and stays a NaN. (The processor's own bf16
// conversion flushes denormals.)
inline void store(bfloat16* to, Doubles values) {
  const Floats floats = __builtin_convertvector(values, Floats);
  const Words bits = std::bit_cast<Words>(floats);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words nan = (bits >> 16) | 0x40;
  const Shorts result = __builtin_convertvector(floats == floats ? rounded : nan, Shorts);
  std::memcpy(to, &result, sizeof result);
}

inline void store(float16* to, Doubles values) {
  const Floats floats = __builtin_convertvector(values, Floats);
#if defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)floats, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int64_t i = 0; i < kLanes; ++i) to[i].bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(floats[i]);
#endif
}

// The last `count` < 8 elements, filled up with `pad`: the sums below choose it so that the extra lanes add nothing.
template <class T>
Doubles load_tail(const T* from, int64_t count, T pad) {
  T buffer[kLanes];
  std::fill(buffer, buffer + kLanes, pad);
  std::memcpy(buffer, from, count * sizeof(T));
  return load(buffer);
}

template <class T>
void store_tail(T* to, int64_t count, Doubles values) {
  T buffer[kLanes];
  store(buffer, values);
  std::memcpy(to, buffer, count * sizeof(T));
}

template <class T>
double load_one(const T* from) {
  return load_tail(from, 1, T{})[0];
}
inline double load_one(const float* from) { return *from; }
inline double load_one(const double* from) { return *from; }

inline double sum(Doubles v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

}  // namespace equinorm
