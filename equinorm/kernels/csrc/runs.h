// What is done to one run of contiguous elements: measure it, reduce a gradient over it, map it. And: in which arithmetic.
//
// Float arithmetic moves two to three times as many values per instruction as double arithmetic does, which shows as soon as the data
// is in a cache. It is used where it is exact enough, decided for each run by its own values; double arithmetic, which needs no
// conditions (the square of the largest float fits, and it keeps nine digits more), takes the rest: extreme magnitudes, constants, and
// sums that cancel. What makes float arithmetic exact enough:
//   - Values are centred before anything else. x - k is rounded relative to itself; what float cannot hold of a centre k is one number
//     per run, and joins the constant term in double. So the ratio of mean to spread costs no digits.
//   - A float takes part in at most kChain additions before the sum is handed to a double.
//   - A run has at least one full vector: a group of one or two elements cancels altogether in its gradient.
//   - Magnitudes stay within 2^-100 and 2^100, so that no product overflows and what underflows does not matter.
#pragma once

#include <cmath>
#include <utility>

#include "kernels.h"

namespace equinorm {

constexpr int kChain = 16;
constexpr double kLargest = 0x1p100, kSmallest = 0x1p-100;

template <class T>
constexpr bool in_float = !std::is_same_v<T, double>;

inline bool moderate(double value) { return value == 0 || (std::abs(value) >= kSmallest && std::abs(value) <= kLargest); }

struct Sums {
  double first, second;
};

// Sums a pair of terms over `count` elements. term(get) forms the pair from vectors it gets by get(pointer to the first element).
template <class V, class Term>
Sums run_sums(int64_t count, const Term& term) {
  constexpr int64_t L = lanes<V>;
  constexpr int kAccumulators = 4;
  Doubles first{}, second{};
  int64_t i = 0;
  while (i < count) {
    V s[kAccumulators]{}, q[kAccumulators]{};
    for (int link = 0; link < kChain && i + kAccumulators * L <= count; ++link, i += kAccumulators * L)
      for (int a = 0; a < kAccumulators; ++a) {
        const auto [f, g] = term([&](const auto* p) { return load<V>(p + i + a * L); });
        s[a] += f, q[a] += g;
      }
    if (i + kAccumulators * L > count) {
      for (int a = 0; a < kAccumulators - 1 && i + L <= count; ++a, i += L) {
        const auto [f, g] = term([&](const auto* p) { return load<V>(p + i); });
        s[a] += f, q[a] += g;
      }
      if (i < count) {
        // The last vector reaches back over elements that are already in the sum; its lanes from `old` on are new.
        const int64_t old = L - (count - i);
        const auto [f, g] = count >= L ? term([&](const auto* p) { return load<V>(p + count - L); })
                                       : term([&](const auto* p) { return load_last<V>(p, count); });
        s[kAccumulators - 1] += lanes_from(f, old), q[kAccumulators - 1] += lanes_from(g, old);
        i = count;
      }
    }
    first += halves((s[0] + s[1]) + (s[2] + s[3]));
    second += halves((q[0] + q[1]) + (q[2] + q[3]));
  }
  return {sum(first), sum(second)};
}

// ---- moments ------------------------------------------------------------------------------------------------------------------

// Squared deviations about a shift -> about the mean. A NaN stays one; rounding below zero does not.
inline double about_mean(Sums sums, double count) {
  const double result = sums.second - sums.first * (sums.first / count);
  return result < 0 ? 0 : result;
}

// Whether float sums about a shift are exact enough: the shift is within two standard deviations of the mean, and squares are moderate.
inline bool shift_held(Sums sums, double squares, double count) {
  return sums.first * sums.first <= 4 * count * squares && squares >= kSmallest * count && squares <= kLargest;
}

template <class V, class T>
Sums shifted_sums(const T* x, int64_t count, double shift) {
  const V k = splat<V>(shift);
  return run_sums<V>(count, [&](const auto& get) {
    const V d = get(x) - k;
    return std::pair(d, d * d);
  });
}

// Mean and squared deviations of 1 <= count <= kSegment elements.
template <class T>
void run_moments(const T* x, int64_t count, double& mean, double& squares) {
  constexpr int64_t L = lanes<Floats>;
  if constexpr (in_float<T>) {
    if (count >= L) {
      const int64_t step = count / L / 4 * L;  // vectors from all over the run: neighbours are alike
      const Floats sample = (load<Floats>(x) + load<Floats>(x + step)) + (load<Floats>(x + 2 * step) + load<Floats>(x + 3 * step));
      const double shift = sum(sample) / (4 * L);
      const Sums sums = shifted_sums<Floats>(x, count, shift);
      mean = shift + sums.first / count;
      squares = about_mean(sums, count);
      if (shift_held(sums, squares, count)) return;
    }
  }
  double shift = load_one(x);
  Sums sums = shifted_sums<Doubles>(x, count, shift);
  if constexpr (!in_float<T>) {  // no digits to spare: shift by the mean, so that nothing cancels
    shift += sums.first / count;
    sums = shifted_sums<Doubles>(x, count, shift);
  }
  mean = shift + sums.first / count;
  squares = about_mean(sums, count);
}

// Sum of squares.
template <class T>
double run_squares(const T* x, int64_t count) {
  if constexpr (in_float<T>) {
    const double squares = shifted_sums<Floats>(x, count, 0).second;
    if (squares >= kSmallest * count && squares <= kLargest) return squares;
  }
  return shifted_sums<Doubles>(x, count, 0).second;
}

// Pools `parts` rows of means and squared deviations, `stride` apart, `width` columns each; part p holds count(p) values.
template <class Count>
void pool(const double* means, const double* squares, int64_t parts, int64_t stride, int64_t width, const Count& count, double* mean,
          double* square) {
  std::copy_n(means, width, mean);
  std::copy_n(squares, width, square);
  if (parts == 1) return;
  double total = 0;
  for (int64_t p = 0; p < parts; ++p) total += count(p);
  for (int64_t p = 1; p < parts; ++p) {
    const double weight = count(p) / total;
    for (int64_t j = 0; j < width; ++j) mean[j] += weight * (means[p * stride + j] - means[j]);
  }
  for (int64_t p = 0; p < parts; ++p) {
    const double weight = count(p);
    for (int64_t j = 0; j < width; ++j) {
      const double d = means[p * stride + j] - mean[j];
      square[j] += weight * (d * d) + (p > 0 ? squares[p * stride + j] : 0);
    }
  }
}

// ---- reduction of a gradient --------------------------------------------------------------------------------------------------

// Whether float sums of dy and dy * (x - center) stand: nothing overflowed, and no product vanished that is not far below the sum.
inline bool reduction_held(Sums sums, double count) {
  return std::abs(sums.second) >= kSmallest * count && std::abs(sums.second) <= kLargest && std::abs(sums.first) <= kLargest;
}

template <class V, class T>
Sums reduce_about(const T* dy, const T* x, int64_t count, double center) {
  const double held = static_cast<Scalar<V>>(center);
  const V k = splat<V>(held);
  Sums sums = run_sums<V>(count, [&](const auto& get) {
    const V g = get(dy);
    return std::pair(g, g * (get(x) - k));
  });
  if (held != center) sums.second += (held - center) * sums.first;
  return sums;
}

// Sums of dy and of dy * (x - center).
template <class T>
Sums run_reduce(const T* dy, const T* x, int64_t count, double center) {
  if constexpr (in_float<T>) {
    if (count >= lanes<Floats> && std::abs(center) <= kLargest) {
      const Sums sums = reduce_about<Floats>(dy, x, count, center);
      if (reduction_held(sums, count)) return sums;
    }
  }
  return reduce_about<Doubles>(dy, x, count, center);
}

// ---- maps ---------------------------------------------------------------------------------------------------------------------

// y = (x - center) * scale + shift
struct AffineMap {
  static constexpr int kParameters = 3;
  static constexpr bool kGradient = false;
  static constexpr double kConstant = 8;  // a larger shift may cancel digits of the product, which only double has to spare
  template <class V>
  static V apply(V x, V, const V* p) {
    return (x - p[0]) * p[1] + p[2];
  }
};

// dx = scale * dy + slope * (x - center) + offset
struct BackwardMap {
  static constexpr int kParameters = 4;
  static constexpr bool kGradient = true;
  static constexpr double kConstant = kLargest;
  template <class V>
  static V apply(V x, V dy, const V* p) {
    return p[1] * dy + (p[2] * (x - p[0]) + p[3]);
  }
};

// The parameters of a map as float arithmetic takes them: the centre cut to a float, and what was cut off moved to the constant (the
// last parameter; the one before it multiplies x - center). False if they are not fit for it.
template <class Map>
bool to_floats(const double* p, float* out) {
  constexpr int P = Map::kParameters;
  out[0] = static_cast<float>(p[0]);
  const double constant = out[0] == p[0] ? p[P - 1] : p[P - 1] + (out[0] - p[0]) * p[P - 2];
  bool fit = std::abs(p[0]) <= kLargest && std::abs(constant) <= Map::kConstant;
  for (int m = 1; m < P - 1; ++m) {
    fit = fit && moderate(p[m]);
    out[m] = static_cast<float>(p[m]);
  }
  out[P - 1] = static_cast<float>(constant);
  return fit;
}

// out[i] = Map(x[i], dy[i]) where parameters(get) hands over the map's parameters.
template <class Map, class V, class T, class Parameters>
void apply_vectors(const T* x, const T* dy, T* out, int64_t count, const Parameters& parameters) {
  constexpr int64_t L = lanes<V>;
  const auto at = [&](int64_t i) {
    V p[Map::kParameters], g{};
    parameters(p, [&](const auto* from) { return load<V>(from + i); });
    if constexpr (Map::kGradient) g = load<V>(dy + i);
    store(out + i, Map::apply(load<V>(x + i), g, p));
  };
  if (count < L) {
    V p[Map::kParameters], g{};
    parameters(p, [&](const auto* from) { return load_part<V>(from, count); });
    if constexpr (Map::kGradient) g = load_part<V>(dy, count);
    store_part(out, Map::apply(load_part<V>(x, count), g, p), count);
    return;
  }
  int64_t i = 0;
  for (; i + L <= count; i += L) at(i);
  if (i < count) at(count - L);  // reaches back: the same values are stored again
}

// The map with one set of parameters for the whole run.
template <class Map, class T>
void apply_run(const T* x, const T* dy, T* out, int64_t count, const double* parameters) {
  constexpr int P = Map::kParameters;
  const auto run = [&]<class V>(V, const auto* from) {
    V fixed[P];
    for (int m = 0; m < P; ++m) fixed[m] = splat<V>(from[m]);
    apply_vectors<Map, V>(x, dy, out, count, [&](V* p, const auto&) { std::copy_n(fixed, P, p); });
  };
  if constexpr (in_float<T>) {
    float narrow[P];
    if (count >= lanes<Floats> && to_floats<Map>(parameters, narrow)) return run(Floats{}, narrow);
  }
  run(Doubles{}, parameters);
}

}  // namespace equinorm
