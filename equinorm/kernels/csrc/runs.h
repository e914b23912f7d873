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

#include <utility>

#include "activations.h"

namespace equinorm {

constexpr int kChain = 16;
constexpr double kLargest = 0x1p100, kSmallest = 0x1p-100;

template <class T>
constexpr bool in_float = !std::is_same_v<T, double>;

inline bool moderate(double value) { return (value == 0) | ((abs(value) >= kSmallest) & (abs(value) <= kLargest)); }

struct Sums {
  double first, second;
};

// Sums a pair of terms over `count` elements. term(get) forms the pair from vectors it gets by get(pointer to the first element).
template <class V, class Term>
EQUINORM_INLINE inline Sums run_sums(int64_t count, const Term& term) {
  constexpr int64_t L = lanes<V>;
  Doubles first{}, second{};
  int64_t i = 0;
  const auto add = [&](int64_t at, V& s, V& q) EQUINORM_INLINE {
    const auto [f, g] = term([&](const auto* p) EQUINORM_INLINE { return load<V>(p + at); });
    s += f, q += g;
  };
  while (i < count) {
    V s0{}, s1{}, s2{}, s3{}, q0{}, q1{}, q2{}, q3{};
    for (const int64_t end = std::min(count, i + kChain * 4 * L); i + 4 * L <= end; i += 4 * L)
      add(i, s0, q0), add(i + L, s1, q1), add(i + 2 * L, s2, q2), add(i + 3 * L, s3, q3);
    if (i + 4 * L > count) {
      for (; i + L <= count; i += L) add(i, s0, q0);
      if (i < count) {
        // The last vector reaches back over elements that are already in the sum; its lanes from `old` on are new.
        const int64_t old = L - (count - i);
        const auto [f, g] = count >= L ? term([&](const auto* p) EQUINORM_INLINE { return load<V>(p + count - L); })
                                       : term([&](const auto* p) EQUINORM_INLINE { return load_last<V>(p, count); });
        s1 += lanes_from(f, old), q1 += lanes_from(g, old);
        i = count;
      }
    }
    first += half_sum((s0 + s1) + (s2 + s3));
    second += half_sum((q0 + q1) + (q2 + q3));
  }
  return {sum(first), sum(second)};
}

// ---- moments ------------------------------------------------------------------------------------------------------------------

// Mean and squared deviations from sums about a shift. A NaN stays one; rounding below zero does not.
inline void from_sums(double shift, Sums sums, int64_t count, double& mean, double& squares) {
  const double step = sums.first * (1.0 / count), deviations = sums.second - sums.first * step;
  mean = shift + step;
  squares = deviations < 0 ? 0 : deviations;
}

// Whether float sums about a shift are exact enough: the shift is within two standard deviations of the mean, and squares are moderate.
// For doubles or vectors of them.
template <class D>
auto shift_held(D sum, D squares, D count) {
  return (sum * sum <= 4 * count * squares) & (squares >= kSmallest * count) & (squares <= kLargest);
}

template <class V, class T>
EQUINORM_INLINE inline Sums shifted_sums(const T* x, int64_t count, double shift) {
  const V k = splat<V>(shift);
  return run_sums<V>(count, [&](const auto& get) EQUINORM_INLINE {
    const V d = get(x) - k;
    return std::pair(d, d * d);
  });
}

template <class T>
[[gnu::noinline]] void run_moments_in_double(const T* x, int64_t count, double& mean, double& squares) {
  double shift = load_one(x);
  Sums sums = shifted_sums<Doubles>(x, count, shift);
  if constexpr (!in_float<T>) {  // no digits to spare: shift by the mean, so that nothing cancels
    shift += sums.first / count;
    sums = shifted_sums<Doubles>(x, count, shift);
  }
  from_sums(shift, sums, count, mean, squares);
}

// Mean and squared deviations of 1 <= count <= kSegment elements.
template <class T>
void run_moments(const T* x, int64_t count, double& mean, double& squares) {
  if constexpr (in_float<T>) {
    if (count >= lanes<Floats>) {
      const int64_t step = count / 4;  // elements from all over the run: neighbours are alike
      const float shift = static_cast<float>(
          0.25 * ((load_one(x + step / 2) + load_one(x + step / 2 + step)) + (load_one(x + count - 1 - step) + load_one(x + count - 1))));
      const Sums sums = shifted_sums<Floats>(x, count, shift);
      from_sums(shift, sums, count, mean, squares);
      if (shift_held<double>(sums.first, squares, count)) return;
    }
  }
  run_moments_in_double(x, count, mean, squares);
}

template <class T>
[[gnu::noinline]] double run_squares_in_double(const T* x, int64_t count) {
  return shifted_sums<Doubles>(x, count, 0).second;
}

// Sum of squares.
template <class T>
double run_squares(const T* x, int64_t count) {
  if constexpr (in_float<T>) {
    const double squares = shifted_sums<Floats>(x, count, 0).second;
    if (squares >= kSmallest * count && squares <= kLargest) return squares;
  }
  return run_squares_in_double(x, count);
}

// Pools `parts` rows of means and squared deviations, `stride` apart, `width` columns each; part p holds count(p) values.
template <class Count>
void pool(const double* means, const double* squares, int64_t parts, int64_t stride, int64_t width, const Count& count, double* mean,
          double* square) {
  for (int64_t j = 0; j < width; ++j) mean[j] = means[j], square[j] = squares[j];
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
template <class D>
auto reduction_held(D sum_dy, D sum_dy_x, D count) {
  return (abs(sum_dy_x) >= kSmallest * count) & (abs(sum_dy_x) <= kLargest) & (abs(sum_dy) <= kLargest);
}

// What the second sum lacks when float arithmetic has cut `center` to `held`; also where the sum is infinite and nothing was cut.
template <class D>
D cut_off(D held, D center, D sum_dy) {
  return held == center ? D{} : (held - center) * sum_dy;
}

template <class V, class G, class T>
EQUINORM_INLINE inline Sums reduce_about(const G* dy, const T* x, int64_t count, double center) {
  const double held = static_cast<Scalar<V>>(center);
  const V k = splat<V>(held);
  Sums sums = run_sums<V>(count, [&](const auto& get) EQUINORM_INLINE {
    const V g = get(dy);
    return std::pair(g, g * (get(x) - k));
  });
  sums.second += cut_off(held, center, sums.first);
  return sums;
}

template <class G, class T>
[[gnu::noinline]] Sums run_reduce_in_double(const G* dy, const T* x, int64_t count, double center) {
  return reduce_about<Doubles>(dy, x, count, center);
}

// Sums of dy and of dy * (x - center).
template <class G, class T>
Sums run_reduce(const G* dy, const T* x, int64_t count, double center) {
  if constexpr (in_float<T>) {
    if (count >= lanes<Floats> && abs(center) <= kLargest) {
      const Sums sums = reduce_about<Floats>(dy, x, count, center);
      if (reduction_held<double>(sums.first, sums.second, count)) return sums;
    }
  }
  return run_reduce_in_double(dy, x, count, center);
}

// ---- maps ---------------------------------------------------------------------------------------------------------------------

// y = (x - center) * scale + shift
struct AffineMap {
  static constexpr int kParameters = 3;
  static constexpr bool kGradient = false;
  static constexpr double kConstant = 8;  // a larger shift may cancel digits of the product, which only double has to spare
  template <class V>
  struct In {
    V center, scale, shift;
    template <class Get>
    explicit In(const Get& get) : center(get(0)), scale(get(1)), shift(get(2)) {}
    V operator()(V x, V) const { return (x - center) * scale + shift; }
  };
};

// dx = scale * dy + slope * (x - center) + offset
struct BackwardMap {
  static constexpr int kParameters = 4;
  static constexpr bool kGradient = true;
  static constexpr double kConstant = kLargest;
  template <class V>
  struct In {
    V center, scale, slope, offset;
    template <class Get>
    explicit In(const Get& get) : center(get(0)), scale(get(1)), slope(get(2)), offset(get(3)) {}
    V operator()(V x, V dy) const { return scale * dy + (slope * (x - center) + offset); }
  };
};

// The parameters of a map as float arithmetic takes them: the centre cut to a float, and what was cut off moved to the constant (the
// last parameter; the one before it multiplies x - center). False if they are not fit for it.
template <class Map>
EQUINORM_INLINE inline bool fit_floats(const double* p, float* out) {
  constexpr int P = Map::kParameters;
  out[0] = static_cast<float>(p[0]);
  const double cut = out[0] - p[0], constant = cut == 0 ? p[P - 1] : p[P - 1] + cut * p[P - 2];
  bool fit = abs(p[0]) <= kLargest && abs(constant) <= Map::kConstant;
  for (int m = 1; m < P - 1; ++m) {
    fit &= moderate(p[m]);
    out[m] = static_cast<float>(p[m]);
  }
  out[P - 1] = static_cast<float>(constant);
  return fit;
}

// out[i] = map(x[i], dy[i]) for the vector at i; `in` is the map with its parameters.
template <class Map, class V, To to, class T, class G, class Out>
EQUINORM_INLINE inline void apply_at(const typename Map::template In<V>& in, const T* x, const G* dy, Out* out, int64_t i) {
  V g{};
  if constexpr (Map::kGradient) g = load<V>(dy + i);
  const V y = in(load<V>(x + i), g);
  if constexpr (to == To::memory)
    stream(out + i, y);
  else
    store(out + i, y);
}

template <class Map, class V, class T, class G, class Out>
void apply_part(const typename Map::template In<V>& in, const T* x, const G* dy, Out* out, int64_t count) {
  V g{};
  if constexpr (Map::kGradient) g = load_part<V>(dy, count);
  store_part(out, in(load_part<V>(x, count), g), count);
}

// in(i) is the map at element i. The last vector of a run reaches back: the same values are stored again.
template <class Map, class V, To to, class T, class G, class Out, class In>
EQUINORM_INLINE inline void apply_vectors(const T* x, const G* dy, Out* out, int64_t count, const In& in) {
  int64_t i = 0;
  for (; i + lanes<V> <= count; i += lanes<V>) apply_at<Map, V, to>(in(i), x, dy, out, i);
  if (i < count) apply_at<Map, V, To::caches>(in(count - lanes<V>), x, dy, out, count - lanes<V>);
}

// The map with one set of parameters for the whole run.
template <class Map, class V, class T, class G, class Out>
EQUINORM_INLINE inline void apply_fixed(const T* x, const G* dy, Out* out, int64_t count, const Scalar<V>* parameters, To to) {
  const typename Map::template In<V> in([&](int m) EQUINORM_INLINE { return splat<V>(parameters[m]); });
  if (count < lanes<V>) return apply_part<Map, V>(in, x, dy, out, count);
  const auto everywhere = [&](int64_t) EQUINORM_INLINE { return in; };
  if (to == To::memory && aligned<V>(out)) return apply_vectors<Map, V, To::memory>(x, dy, out, count, everywhere);
  apply_vectors<Map, V, To::caches>(x, dy, out, count, everywhere);
}

template <class Map, class T, class G, class Out>
[[gnu::noinline]] void apply_fixed_in_double(const T* x, const G* dy, Out* out, int64_t count, const double* parameters, To to) {
  apply_fixed<Map, Doubles>(x, dy, out, count, parameters, to);
}

template <class Map, class T, class G, class Out>
void apply_run(const T* x, const G* dy, Out* out, int64_t count, const double* parameters, To to) {
  if constexpr (in_float<T>) {
    float cut[Map::kParameters];
    if (count >= lanes<Floats> && fit_floats<Map>(parameters, cut)) return apply_fixed<Map, Floats>(x, dy, out, count, cut, to);
  }
  apply_fixed_in_double<Map>(x, dy, out, count, parameters, to);
}

// The map with parameters for each column, `stride` apart in memory.
template <class Map, class V, class T, class G, class Out>
EQUINORM_INLINE inline void apply_columns(const T* x, const G* dy, Out* out, int64_t count, const Scalar<V>* parameters, int64_t stride,
                                          To to) {
  using In = typename Map::template In<V>;
  if (count < lanes<V>)
    return apply_part<Map, V>(In([&](int m) EQUINORM_INLINE { return load_part<V>(parameters + m * stride, count); }), x, dy, out, count);
  const auto in = [&](int64_t i) EQUINORM_INLINE {
    return In([&](int m) EQUINORM_INLINE { return load<V>(parameters + m * stride + i); });
  };
  if (to == To::memory && aligned<V>(out)) return apply_vectors<Map, V, To::memory>(x, dy, out, count, in);
  apply_vectors<Map, V, To::caches>(x, dy, out, count, in);
}

// ---- maps with an activation behind them --------------------------------------------------------------------------------------

// Calls body(i, count) for the parts of a run that fit a scratch.
template <class Body>
EQUINORM_INLINE inline void for_scratches(int64_t count, const Body& body) {
  for (int64_t i = 0; i < count; i += kScratch) body(i, std::min(kScratch, count - i));
}

// y = f(affine(x)) with one set of parameters.
template <class T>
void activate_run(Activation f, const T* x, T* y, int64_t count, const double* affine, To to) {
  if (!f) return apply_run<AffineMap>(x, x, y, count, affine, to);
  Scratch<Wide<T>> z;
  for_scratches(count, [&](int64_t i, int64_t n) {
    apply_run<AffineMap>(x + i, x + i, z.values, n, affine, To::caches);
    activate(f, z.values, y + i, n, to);
  });
}

// Calls body(i, count, gradient before the activation) for the parts of a run, whose gradient behind it is dy.
template <class T, class Body>
EQUINORM_INLINE inline void for_pulled(Activation f, const T* dy, const T* x, int64_t count, const double* affine, const Body& body) {
  if (!f) return body(0, count, dy);
  Scratch<Wide<T>> z;
  for_scratches(count, [&](int64_t i, int64_t n) {
    apply_run<AffineMap>(x + i, x + i, z.values, n, affine, To::caches);
    pull(f, dy + i, z.values, n);
    body(i, n, static_cast<const Wide<T>*>(z.values));
  });
}

// ---- rows: measured, and finished while they are in the cache -----------------------------------------------------------------

// Whether pieces rather than rows are shared out. Decides about speed only.
inline bool split_rows(int64_t rows, int64_t length) { return length >= 2 * kSegment && threads() > 1 && rows < 4 * threads(); }

// Runs measure(row, group, i) for all i < `measures`, then merge(row, group), then finish(row, group, i) for all i < `finishes`: one
// row after the other, each while it is in the cache. ahead(row, i) is to fetch what finish reads: while one row is written, memory
// would otherwise not be read.
template <class Measure, class Merge, class Finish, class Ahead>
void by_rows(int64_t rows, int64_t groups, int64_t length, int64_t measures, int64_t finishes, const Measure& measure,
             const Merge& merge, const Finish& finish, const Ahead& ahead) {
  if (split_rows(rows, length)) {
    const auto each = [&](int64_t count, const auto& work) {
      parallel(rows * count, length / count, [&](int64_t begin, int64_t end) {
        for_grid(begin, end, groups, count, [&](int64_t n, int64_t g, int64_t i) { work(n * groups + g, g, i); });
      });
    };
    each(measures, measure);
    for_grid(0, rows, groups, 1, [&](int64_t n, int64_t g, int64_t) { merge(n * groups + g, g); });
    each(finishes, finish);
    return;
  }
  parallel(rows, length, [&](int64_t begin, int64_t end) {
    for_grid(begin, end, groups, 1, [&](int64_t n, int64_t g, int64_t) {
      const int64_t row = n * groups + g;
      for (int64_t i = 0; i < measures; ++i) measure(row, g, i);
      merge(row, g);
      for (int64_t i = 0; i < finishes; ++i) {
        if (row + 1 < end) ahead(row + 1, i);
        finish(row, g, i);
      }
    });
  });
}

}  // namespace equinorm
