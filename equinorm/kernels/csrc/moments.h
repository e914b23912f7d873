// Mean and sum of squared deviations: of one run, of a block of columns, and of several of them pooled.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace equinorm {

// Squared deviations about a shift -> about the mean. A NaN stays one; rounding below zero does not.
inline double about_mean(double squares, double sum, double count) {
  const double result = squares - sum * (sum / count);
  return result < 0 ? 0 : result;
}

struct Sums {
  double first, second;
};

// Sums of x - shift and of its square over 1 <= count <= kSegment contiguous elements. `pad` is the shift as an element.
template <class T>
Sums shifted_sums(const T* x, int64_t count, double shift, T pad) {
  const Doubles k = splat(shift);
  Doubles s0{}, s1{}, q0{}, q1{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Doubles a = load(x + i) - k, b = load(x + i + kLanes) - k;
    s0 += a, q0 += a * a;
    s1 += b, q1 += b * b;
  }
  if (i + kLanes <= count) {
    const Doubles a = load(x + i) - k;
    s0 += a, q0 += a * a;
    i += kLanes;
  }
  if (i < count) {
    const Doubles b = load_tail(x + i, count - i, pad) - k;
    s1 += b, q1 += b * b;
  }
  return {sum(s0 + s1), sum(q0 + q1)};
}

// One pass with the first element as the shift. float64 data have no spare digits: there a second pass (the run is in the cache)
// shifts by the mean, so that nothing cancels.
template <class T>
void run_moments(const T* x, int64_t count, double& mean, double& squares) {
  double shift = load_one(x);
  Sums sums = shifted_sums(x, count, shift, x[0]);
  if constexpr (std::is_same_v<T, double>) {
    shift += sums.first / count;
    sums = shifted_sums(x, count, shift, shift);
  }
  mean = shift + sums.first / count;
  squares = about_mean(sums.second, sums.first, count);
}

// Pools `parts` rows of means and squared deviations, `width` columns each; part p holds count(p) values.
template <class Count>
void pool(const double* means, const double* squares, int64_t parts, int64_t width, const Count& count, double* mean, double* square) {
  double total = count(0);
  for (int64_t p = 1; p < parts; ++p) total += count(p);
  if (parts == 1) {
    std::copy(means, means + width, mean);
    std::copy(squares, squares + width, square);
    return;
  }
  std::fill(mean, mean + width, 0.0);
  for (int64_t p = 1; p < parts; ++p) {
    const double weight = count(p) / total;
    for (int64_t j = 0; j < width; ++j) mean[j] += weight * (means[p * width + j] - means[j]);
  }
  for (int64_t j = 0; j < width; ++j) mean[j] += means[j];
  std::fill(square, square + width, 0.0);
  for (int64_t p = 0; p < parts; ++p) {
    const double weight = count(p);
    for (int64_t j = 0; j < width; ++j) {
      const double d = means[p * width + j] - mean[j];
      square[j] += squares[p * width + j] + weight * (d * d);
    }
  }
}

}  // namespace equinorm
