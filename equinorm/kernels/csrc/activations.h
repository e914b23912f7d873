// Activations behind a map, on a scratch of values that is in the first-level cache: z -> f(z), and z -> f'(z).
//
// They run on scratch rather than inside the maps, so that there is one loop per activation and not one per activation, map and element
// type; the scratch costs a load and a store in the first-level cache, which the memory behind it hides.
#pragma once

#include "kernels.h"

namespace equinorm {

constexpr int64_t kScratch = 1024;  // values at a time

template <class V>
V clamp(V z, double low, double high) {
  z = z < splat<V>(low) ? splat<V>(low) : z;
  return z > splat<V>(high) ? splat<V>(high) : z;  // a NaN stays one
}

// exp(z) = power * (1 + rest), power = 2^n: |rest| <= sqrt(2) - 1 keeps its digits where 1 + rest would lose them.
template <class V>
struct Exponential {
  V power, rest;
  V value() const { return power + power * rest; }
  V less_one() const { return power * rest + (power - splat<V>(1)); }
};

inline Exponential<Floats> exponential(Floats z) {
  using Words = Vector<uint32_t, lanes<Floats>>;
  constexpr float kRound = 0x1.8p23f;  // what is added to it is rounded to an integer, in its lowest bits
  z = clamp(z, -87, 88);
  const Floats shifted = z * 0x1.715476p0f + kRound, n = shifted - kRound;
  const Floats r = (z - n * 0x1.62e4p-1f) - n * 0x1.7f7d1c0000000p-20f;  // n ln 2 in two parts, the first of them exact
  Floats p = splat<Floats>(1.0 / 5040);
  for (double term : {1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0}) p = p * r + splat<Floats>(term);
  const Words bits = (std::bit_cast<Words>(shifted) + 127) << 23;
  return {std::bit_cast<Floats>(bits), p * r};
}

// One double at a time where the arithmetic is in double: there is no hurry on that path.
inline Exponential<Doubles> exponential(Doubles z) {
  Doubles rest = clamp(z, -740, 700);  // finite, as above
  for (int64_t i = 0; i < lanes<Doubles>; ++i) rest[i] = std::expm1(rest[i]);
  return {splat<Doubles>(1), rest};
}

// Calls body(value, slope): functions of a vector that give f and f'.
template <class V, class Body>
EQUINORM_INLINE inline void with_activation(Activation f, const Body& body) {
  const V zero{}, one = splat<V>(1), a = splat<V>(f.parameter);
  switch (f.kind) {
    case Activation::kNone:
      return body([](V z) { return z; }, [=](V) { return one; });
    case Activation::kRelu:
      return body([=](V z) { return z < zero ? zero : z; }, [=](V z) { return z <= zero ? zero : one; });
    case Activation::kLeakyRelu:
      return body([=](V z) { return z > zero ? z : z * a; }, [=](V z) { return z > zero ? one : a; });
    case Activation::kRelu6:
      return body([=](V z) { return clamp(z, 0, 6); }, [=](V z) { return (z <= zero) | (z >= splat<V>(6)) ? zero : one; });
    case Activation::kElu:
      return body([=](V z) { return z > zero ? z : a * exponential(z).less_one(); },
                  [=](V z) { return z > zero ? one : a * exponential(z).value(); });
    case Activation::kSilu:
      return body([=](V z) { return z / (one + exponential(V{} - z).value()); },
                  [=](V z) {
                    const V e = exponential(V{} - z).value(), s = one / (one + e);
                    return s * (one + z * (e * s));  // e s is 1 - s, with its digits
                  });
    case Activation::kHardswish:
      return body([=](V z) { return z * clamp(z + splat<V>(3), 0, 6) * splat<V>(1.0 / 6); },
                  [=](V z) {
                    const V inside = z * splat<V>(1.0 / 3) + splat<V>(0.5);
                    return z <= splat<V>(-3) ? zero : (z < splat<V>(3) ? inside : one);
                  });
  }
}

// A scratch of whole vectors.
template <class S>
struct Scratch {
  alignas(64) S values[kScratch];
};

template <class S>
using VectorFor = std::conditional_t<std::is_same_v<S, double>, Doubles, Floats>;

// The arithmetic, and so the type of scratch, for elements of type T.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// out = f(z).
template <class S, class T>
void activate(Activation f, const S* z, T* out, int64_t count, To to) {
  using V = VectorFor<S>;
  const bool past = to == To::memory && aligned<V>(out);
  with_activation<V>(f, [&](const auto& value, const auto&) EQUINORM_INLINE {
    int64_t i = 0;
    if (past)
      for (; i + lanes<V> <= count; i += lanes<V>) stream(out + i, value(load<V>(z + i)));
    else
      for (; i + lanes<V> <= count; i += lanes<V>) store(out + i, value(load<V>(z + i)));
    if (i < count) store_part(out + i, value(load_part<V>(z + i, count - i)), count - i);
  });
}

// z = dy * f'(z).
template <class S, class T>
void pull(Activation f, const T* dy, S* z, int64_t count) {
  using V = VectorFor<S>;
  with_activation<V>(f, [&](const auto&, const auto& slope) EQUINORM_INLINE {
    int64_t i = 0;
    for (; i + lanes<V> <= count; i += lanes<V>) store(z + i, load<V>(dy + i) * slope(load<V>(z + i)));
    if (i < count) store_part(z + i, load_part<V>(dy + i, count - i) * slope(load_part<V>(z + i, count - i)), count - i);
  });
}

}  // namespace equinorm
