// Vectors of one register's width, in float or double arithmetic, whatever the element type in memory.
//
// They are the compilers' own extension (GCC and Clang): AVX-512, AVX or NEON code without flags that let the compiler reorder sums.
// The order of every sum is written in this folder, so it is the same on every call.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE__)
#include <immintrin.h>
#endif
#if !defined(__F16C__)
#include <torch/headeronly/util/Half.h>
#endif

// For the bodies of hot loops, lambdas included: called rather than inlined, they would keep their vectors in memory.
#define EQUINORM_INLINE __attribute__((always_inline))

namespace equinorm {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class Scalar, int64_t count>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(count * sizeof(Scalar))));
};
template <class Scalar, int64_t count>
using Vector = typename VectorOf<Scalar, count>::type;

using Floats = Vector<float, kBytes / sizeof(float)>;
using Doubles = Vector<double, kBytes / sizeof(double)>;

template <class V>
using Scalar = std::remove_cvref_t<decltype(V{}[0])>;
template <class V>
constexpr int64_t lanes = sizeof(V) / sizeof(Scalar<V>);

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class V>
V splat(double value) {
  return V{} + static_cast<Scalar<V>>(value);
}

template <class V>
V read(const void* from) {
  V values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

template <int64_t count>
Vector<float, count> widen(const bfloat16* from) {
  const auto bits = __builtin_convertvector(read<Vector<uint16_t, count>>(from), Vector<uint32_t, count>) << 16;
  return std::bit_cast<Vector<float, count>>(bits);
}

template <int64_t count>
Vector<float, count> widen(const float16* from) {
  using Result = Vector<float, count>;
#if defined(__AVX512F__)
  if constexpr (count == 16) return (Result)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
#if defined(__F16C__)
  if constexpr (count == 8) return (Result)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  if constexpr (count == 4) return (Result)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  Result values;
  for (int64_t i = 0; i < count; ++i) values[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(from[i].bits);
  return values;
#endif
}

// Floats to doubles and back. (For AVX-512 spelled out: GCC would go by way of halves.)
template <int64_t count>
Vector<double, count> to_doubles(Vector<float, count> values) {
#if defined(__AVX512F__)
  if constexpr (count == 8) return (Vector<double, count>)_mm512_cvtps_pd((__m256)values);
#endif
  return __builtin_convertvector(values, Vector<double, count>);
}

template <int64_t count>
Vector<float, count> to_floats(Vector<double, count> values) {
#if defined(__AVX512F__)
  if constexpr (count == 8) return (Vector<float, count>)_mm512_cvtpd_ps((__m512d)values);
#endif
  return __builtin_convertvector(values, Vector<float, count>);
}

// One vector of V from memory.
template <class V, class T>
V load(const T* from) {
  if constexpr (std::is_same_v<T, Scalar<V>>) {
    return read<V>(from);
  } else if constexpr (std::is_same_v<T, float>) {
    return to_doubles<lanes<V>>(read<Vector<float, lanes<V>>>(from));
  } else if constexpr (std::is_same_v<Scalar<V>, float>) {
    return widen<lanes<V>>(from);
  } else {
    return to_doubles<lanes<V>>(widen<lanes<V>>(from));
  }
}

// bfloat16: round to nearest, ties to even, on the integer representation; a NaN stays one. (The processor's own conversion flushes
// denormals.)
template <int64_t count>
Vector<uint16_t, count> narrow(Vector<float, count> values, const bfloat16*) {
  using Words = Vector<uint32_t, count>;
  const Words bits = std::bit_cast<Words>(values);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
  return __builtin_convertvector((Words)(values == values ? rounded : nan), Vector<uint16_t, count>);
}

template <int64_t count>
Vector<uint16_t, count> narrow(Vector<float, count> values, const float16*) {
  using Result = Vector<uint16_t, count>;
#if defined(__AVX512F__)
  if constexpr (count == 16) return (Result)_mm512_cvtps_ph((__m512)values, 0);
#endif
#if defined(__F16C__)
  if constexpr (count == 8) return (Result)_mm256_cvtps_ph((__m256)values, 0);
  if constexpr (count == 4) {
    const __m128i bits = _mm_cvtps_ph((__m128)values, 0);
    return read<Result>(&bits);
  }
#else
  Result halves;
  for (int64_t i = 0; i < count; ++i) halves[i] = torch::headeronly::detail::fp16_ieee_from_fp32_value(values[i]);
  return halves;
#endif
}

// One vector rounded to T. (From double to a half type by way of float: an error of half an ulp and 2^-13 of one.)
template <class T, class V>
auto rounded(V values) {
  if constexpr (std::is_same_v<T, Scalar<V>>) {
    return values;
  } else if constexpr (std::is_same_v<T, float>) {
    return to_floats<lanes<V>>(values);
  } else if constexpr (std::is_same_v<Scalar<V>, float>) {
    return narrow<lanes<V>>(values, static_cast<const T*>(nullptr));
  } else {
    return narrow<lanes<V>>(to_floats<lanes<V>>(values), static_cast<const T*>(nullptr));
  }
}

template <class T, class V>
void store(T* to, V values) {
  const auto result = rounded<T>(values);
  std::memcpy(to, &result, sizeof result);
}

// The same past the caches, to an address that is a multiple of the bytes stored. Saves reading the line that is about to be overwritten.
template <class T, class V>
void stream(T* to, V values) {
  const auto result = rounded<T>(values);
#if defined(__AVX512F__)
  if constexpr (sizeof result == 64) return _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)result);
#endif
#if defined(__AVX__)
  if constexpr (sizeof result == 32) return _mm256_stream_ps(reinterpret_cast<float*>(to), (__m256)result);
#endif
#if defined(__SSE__)
  if constexpr (sizeof result == 16) return _mm_stream_ps(reinterpret_cast<float*>(to), (__m128)result);
#endif
  std::memcpy(to, &result, sizeof result);
}

// Makes what was streamed visible to other threads, in the order of the program.
inline void fence() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// Asks for memory that will be read soon to come into the second-level cache.
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

// The elements of a run shorter than a vector, in the last lanes; the others are 0.
template <class V, class T>
V load_last(const T* from, int64_t count) {
  T buffer[lanes<V>] = {};
  std::copy_n(from, count, buffer + lanes<V> - count);
  return load<V>(buffer);
}

// The same in the first lanes.
template <class V, class T>
V load_part(const T* from, int64_t count) {
  T buffer[lanes<V>] = {};
  std::copy_n(from, count, buffer);
  return load<V>(buffer);
}

template <class T, class V>
void store_part(T* to, V values, int64_t count) {
  T buffer[lanes<V>];
  store(buffer, values);
  std::copy_n(buffer, count, to);
}

inline double load_one(const double* from) { return *from; }
inline double load_one(const float* from) { return *from; }
inline double load_one(const bfloat16* from) { return std::bit_cast<float>(static_cast<uint32_t>(from->bits) << 16); }
inline double load_one(const float16* from) {
#if defined(__F16C__)
  return _cvtsh_ss(from->bits);
#else
  return torch::headeronly::detail::fp16_ieee_to_fp32_value(from->bits);
#endif
}

inline void store_one(double* to, double value) { *to = value; }
inline void store_one(float* to, double value) { *to = static_cast<float>(value); }
template <class T>
void store_one(T* to, double value) {
  store_part(to, splat<Doubles>(value), 1);
}

// The lanes from `first` on; the others are 0.
template <class V>
V lanes_from(V values, int64_t first) {
  using Index = Vector<std::conditional_t<sizeof(Scalar<V>) == 4, int32_t, int64_t>, lanes<V>>;
  Index index;
  for (int64_t i = 0; i < lanes<V>; ++i) index[i] = i;
  return index >= static_cast<Scalar<Index>>(first) ? values : V{};
}

template <class V>
struct Halves {
  using Half = Vector<Scalar<V>, lanes<V> / 2>;
  Half low, high;
};

template <class V>
Halves<V> halves(V v) {
#if __has_builtin(__builtin_shufflevector)
  if constexpr (lanes<V> == 16)
    return {__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7), __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)};
  if constexpr (lanes<V> == 8) return {__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)};
  if constexpr (lanes<V> == 4) return {__builtin_shufflevector(v, v, 0, 1), __builtin_shufflevector(v, v, 2, 3)};
#endif
  return std::bit_cast<Halves<V>>(v);
}

inline double abs(double value) { return std::fabs(value); }
inline Doubles abs(Doubles v) { return v < 0 ? -v : v; }

// Sum of the lanes, as a tree.
template <class V>
Scalar<V> sum(V v) {
  if constexpr (lanes<V> == 2) {
    return v[0] + v[1];
  } else {
    const auto [low, high] = halves(v);
    return sum(low + high);
  }
}

// Whether a comparison holds in all lanes.
inline bool all(Vector<int64_t, lanes<Doubles>> holds) {
  return sum((Doubles)(holds ? splat<Doubles>(1) : Doubles{})) == lanes<Doubles>;
}

// The sum of the two halves, in double.
inline Doubles half_sum(Floats v) {
  const auto [low, high] = halves(v);
  return to_doubles<lanes<Doubles>>(low) + to_doubles<lanes<Doubles>>(high);
}
inline Doubles half_sum(Doubles v) { return v; }

// Adds a vector to as many doubles in memory.
inline void add_to(double* to, Doubles v) { store(to, load<Doubles>(to) + v); }
inline void add_to(double* to, Floats v) {
  const auto [low, high] = halves(v);
  add_to(to, to_doubles<lanes<Doubles>>(low));
  add_to(to + lanes<Doubles>, to_doubles<lanes<Doubles>>(high));
}

}  // namespace equinorm
