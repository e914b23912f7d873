// Kernels with one statistic and one affine map per (sample, channel) or per channel.
//
// Contiguous memory is rows of s values of one channel: the lanes run along the row. channels_last memory is rows of c channels: the
// lanes run across the channels, and a channel's sum runs down the rows. A width that is no multiple of the lanes would leave a
// ragged end on every row, so narrow rows are folded: 8 rows of 3 channels are one row of 24 columns.
#include <numeric>
#include <vector>

#include "moments.h"

namespace equinorm {
namespace {

constexpr int64_t kBlock = 16384;  // elements per piece of channels_last memory: stays in the second-level cache
constexpr int64_t kFoldBelow = 256;  // from here on the ragged end is a small part of a row

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// channels_last rows are cut into blocks of the same number of rows within each sample.
struct Blocks {
  int64_t samples, rows, c, height, per_sample, fold;
  Blocks(int64_t samples, int64_t rows, int64_t c) : samples(samples), rows(rows), c(c) {
    fold = c < kFoldBelow ? kLanes / std::gcd(c, kLanes) : 1;
    height = std::clamp<int64_t>(kBlock / c / kLanes * kLanes, 32, kSegment);
    per_sample = divide_up(rows, height);
  }
  int64_t count() const { return samples * per_sample; }
  int64_t begin(int64_t unit) const { return unit % per_sample * height; }
  int64_t length(int64_t unit) const { return std::min(height, rows - begin(unit)); }
  int64_t offset(int64_t unit) const { return (unit / per_sample * rows + begin(unit)) * c; }
  int64_t elements() const { return std::min(height, rows) * c; }
};

// ---- moments ------------------------------------------------------------------------------------------------------------------

// Sums of x - shift and of its square down `height` rows, for V vectors of columns.
template <int V, class T>
void shifted_columns(const T* x, int64_t height, int64_t pitch, const Doubles* shift, Doubles* first, Doubles* second) {
  Doubles s[V]{}, q[V]{}, k[V];
  for (int v = 0; v < V; ++v) k[v] = shift[v];
  for (int64_t r = 0; r < height; ++r, x += pitch)
    for (int v = 0; v < V; ++v) {
      const Doubles d = load(x + v * kLanes) - k[v];
      s[v] += d, q[v] += d * d;
    }
  for (int v = 0; v < V; ++v) first[v] = s[v], second[v] = q[v];
}

template <int V, class T>
void column_moments_of(const T* x, int64_t height, int64_t pitch, double* mean, double* squares) {
  Doubles shift[V], first[V], second[V];
  for (int v = 0; v < V; ++v) shift[v] = load(x + v * kLanes);
  shifted_columns<V>(x, height, pitch, shift, first, second);
  const double count = static_cast<double>(height);
  if constexpr (std::is_same_v<T, double>) {
    for (int v = 0; v < V; ++v) shift[v] += first[v] / count;
    shifted_columns<V>(x, height, pitch, shift, first, second);
  }
  for (int v = 0; v < V; ++v) {
    store(mean + v * kLanes, shift[v] + first[v] / count);
    const Doubles m2 = second[v] - first[v] * (first[v] / count);
    store(squares + v * kLanes, m2 < 0 ? Doubles{} : m2);
  }
}

template <class T>
void column_moments(const T* x, int64_t height, int64_t width, double* mean, double* squares) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes) column_moments_of<4>(x + j, height, width, mean + j, squares + j);
  for (; j + kLanes <= width; j += kLanes) column_moments_of<1>(x + j, height, width, mean + j, squares + j);
  for (; j < width; ++j) {
    double shift = load_one(x + j), s = 0, q = 0;
    for (int pass = 0; pass < (std::is_same_v<T, double> ? 2 : 1); ++pass) {
      shift += s / height, s = 0, q = 0;
      for (int64_t r = 0; r < height; ++r) {
        const double d = load_one(x + j + r * width) - shift;
        s += d, q += d * d;
      }
    }
    mean[j] = shift + s / height;
    squares[j] = about_mean(q, s, height);
  }
}

// Moments of one block of rows, folded where rows are narrow.
template <class T>
void block_moments(const T* x, int64_t height, int64_t c, int64_t fold, double* mean, double* squares) {
  if (fold == 1 || height < fold) {
    column_moments(x, height, c, mean, squares);
    return;
  }
  const int64_t folded = height / fold, left = height % fold, width = c * fold;
  double means[2 * kFoldBelow * kLanes], deviations[2 * kFoldBelow * kLanes];
  column_moments(x, folded, width, means, deviations);
  if (left > 0) column_moments(x + folded * width, left, c, means + width, deviations + width);
  pool(means, deviations, fold + (left > 0), c, [=](int64_t p) { return static_cast<double>(p < fold ? folded : left); }, mean, squares);
}

// Partial moments of `parts` pieces of each of n samples, [n][parts][c] -> per sample [n][c] -> per channel [c], as variances.
template <class Count>
void finish_moments(std::vector<double>& means, std::vector<double>& squares, int64_t n, int64_t parts, int64_t c, int64_t s,
                    const Count& count, SmallOut mean, SmallOut var) {
  const bool batch = mean.step == 0;
  std::vector<double> sample_means, sample_squares;
  if (parts > 1) {
    sample_means.resize(n * c), sample_squares.resize(n * c);
    for (int64_t i = 0; i < n; ++i)
      pool(&means[i * parts * c], &squares[i * parts * c], parts, c, count, &sample_means[i * c], &sample_squares[i * c]);
  } else {
    sample_means.swap(means), sample_squares.swap(squares);
  }
  if (batch) pool(sample_means.data(), sample_squares.data(), n, c, [=](int64_t) { return double(s); }, mean.data, var.data);
  const int64_t values = batch ? c : n * c;
  const double total = static_cast<double>(batch ? n * s : s);
  if (!batch) {
    std::copy_n(sample_means.data(), values, mean.data);
    std::copy_n(sample_squares.data(), values, var.data);
  }
  for (int64_t i = 0; i < values; ++i) var.data[i] /= total;
}

}  // namespace

template <class T>
void channel_moments(const T* x, SmallOut mean, SmallOut var, Shape shape) {
  auto [n, c, s, channels_last] = shape;
  if (channels_last) {
    if (mean.step == 0) s *= n, n = 1;
    const Blocks blocks(n, s, c);
    std::vector<double> means(blocks.count() * c), squares(blocks.count() * c);
    parallel(blocks.count(), blocks.elements(), [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u)
        block_moments(x + blocks.offset(u), blocks.length(u), c, blocks.fold, &means[u * c], &squares[u * c]);
    });
    finish_moments(means, squares, n, blocks.per_sample, c, s, [&](int64_t k) { return double(blocks.length(k)); }, mean, var);
    return;
  }
  // A long row is cut into segments, laid out as [n][segment][c] so that pooling runs across channels.
  const int64_t segments = divide_up(s, kSegment);
  std::vector<double> means(n * c * segments), squares(n * c * segments);
  const auto length = [s = s](int64_t k) { return std::min(kSegment, s - k * kSegment); };
  parallel(n * c * segments, std::min(kSegment, s), [&, c = c, s = s](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t row = u / segments, k = u % segments, at = (row / c * segments + k) * c + row % c;
      run_moments(x + row * s + k * kSegment, length(k), means[at], squares[at]);
    }
  });
  finish_moments(means, squares, n, segments, c, s, [&](int64_t k) { return double(length(k)); }, mean, var);
}

// ---- elementwise passes -------------------------------------------------------------------------------------------------------

namespace {

// One map out = f(in..., parameters...) over contiguous rows (parameters fixed) or rows of channels (parameters per column).
template <class T>
struct AffineMap {
  const T* x;
  T* out;
  static constexpr int kParameters = 3;
  Doubles operator()(Doubles x, Doubles, const Doubles* p) const { return (x - p[0]) * p[1] + p[2]; }
  static constexpr bool kGradient = false;
  const T* dy = nullptr;
};

template <class T>
struct BackwardMap {
  const T* x;
  T* out;
  static constexpr int kParameters = 4;
  Doubles operator()(Doubles x, Doubles dy, const Doubles* p) const { return p[1] * dy + (p[2] * (x - p[0]) + p[3]); }
  static constexpr bool kGradient = true;
  const T* dy;
};

template <class Map>
void apply_run(const Map& map, int64_t at, int64_t count, const double* parameters) {
  Doubles p[Map::kParameters];
  for (int m = 0; m < Map::kParameters; ++m) p[m] = splat(parameters[m]);
  int64_t i = at;
  const int64_t end = at + count;
  for (; i + kLanes <= end; i += kLanes) {
    Doubles dy{};
    if constexpr (Map::kGradient) dy = load(map.dy + i);
    store(map.out + i, map(load(map.x + i), dy, p));
  }
  if (i < end) {
    Doubles dy{};
    if constexpr (Map::kGradient) dy = load_tail(map.dy + i, end - i, {});
    store_tail(map.out + i, end - i, map(load_tail(map.x + i, end - i, {}), dy, p));
  }
}

template <class Map>
void apply_columns(const Map& map, int64_t at, int64_t height, int64_t width, const double* const* parameters) {
  constexpr int kRows = 4;  // rows that share one load of the parameters
  Doubles p[Map::kParameters];
  for (int64_t r = 0; r < height; r += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, height - r);
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes) {
      for (int m = 0; m < Map::kParameters; ++m) p[m] = load(parameters[m] + j);
      for (int64_t k = 0; k < rows; ++k) {
        const int64_t i = at + (r + k) * width + j;
        Doubles dy{};
        if constexpr (Map::kGradient) dy = load(map.dy + i);
        store(map.out + i, map(load(map.x + i), dy, p));
      }
    }
    if (j < width) {
      for (int m = 0; m < Map::kParameters; ++m) p[m] = load_tail(parameters[m] + j, width - j, 0.0);
      for (int64_t k = 0; k < rows; ++k) {
        const int64_t i = at + (r + k) * width + j;
        Doubles dy{};
        if constexpr (Map::kGradient) dy = load_tail(map.dy + i, width - j, {});
        store_tail(map.out + i, width - j, map(load_tail(map.x + i, width - j, {}), dy, p));
      }
    }
  }
}

template <class Map>
void apply(const Map& map, const Small* small, Shape shape) {
  constexpr int P = Map::kParameters;
  auto [n, c, s, channels_last] = shape;
  if (!channels_last) {
    const int64_t segments = divide_up(s, kSegment);
    parallel(n * c * segments, std::min(kSegment, s), [&, c = c, s = s](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t row = u / segments, k = u % segments;
        double p[P];
        for (int m = 0; m < P; ++m) p[m] = small[m].sample(row / c)[row % c];
        apply_run(map, row * s + k * kSegment, std::min(kSegment, s - k * kSegment), p);
      }
    });
    return;
  }
  if (std::all_of(small, small + P, [](const Small& t) { return t.step == 0; })) s *= n, n = 1;
  const Blocks blocks(n, s, c);
  parallel(blocks.count(), blocks.elements(), [&, c = c](int64_t begin, int64_t end) {
    std::vector<double> folded;
    int64_t held = -1;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t sample = u / blocks.per_sample, height = blocks.length(u), fold = height < 2 * blocks.fold ? 1 : blocks.fold;
      const double* p[P];
      for (int m = 0; m < P; ++m) p[m] = small[m].sample(sample);
      const int64_t wide = fold > 1 ? height / fold : 0;
      if (wide > 0) {
        if (held != sample) {
          folded.resize(P * fold * c);
          for (int m = 0; m < P; ++m)
            for (int64_t f = 0; f < fold; ++f) std::copy_n(p[m], c, &folded[(m * fold + f) * c]);
          held = sample;
        }
        const double* q[P];
        for (int m = 0; m < P; ++m) q[m] = &folded[m * fold * c];
        apply_columns(map, blocks.offset(u), wide, c * fold, q);
      }
      apply_columns(map, blocks.offset(u) + wide * fold * c, height - wide * fold, c, p);
    }
  });
}

}  // namespace

template <class T>
void channel_affine(const T* x, Small center, Small scale, Small shift, T* y, Shape shape) {
  const Small small[] = {center, scale, shift};
  apply(AffineMap<T>{x, y}, small, shape);
}

template <class T>
void channel_backward(const T* dy, const T* x, Small center, Small scale, Small slope, Small offset, T* dx, Shape shape) {
  const Small small[] = {center, scale, slope, offset};
  apply(BackwardMap<T>{x, dx, dy}, small, shape);
}

// ---- reductions of the gradient -----------------------------------------------------------------------------------------------

namespace {

template <class T>
Sums run_reduce(const T* dy, const T* x, int64_t count, double center) {
  const Doubles k = splat(center);
  Doubles s0{}, s1{}, q0{}, q1{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Doubles a = load(dy + i), b = load(dy + i + kLanes);
    s0 += a, q0 += a * (load(x + i) - k);
    s1 += b, q1 += b * (load(x + i + kLanes) - k);
  }
  if (i + kLanes <= count) {
    const Doubles a = load(dy + i);
    s0 += a, q0 += a * (load(x + i) - k);
    i += kLanes;
  }
  if (i < count) {
    const Doubles b = load_tail(dy + i, count - i, {});
    s1 += b, q1 += b * (load_tail(x + i, count - i, {}) - k);
  }
  return {sum(s0 + s1), sum(q0 + q1)};
}

template <int V, class T>
void column_reduce_of(const T* dy, const T* x, int64_t height, int64_t pitch, const double* center, double* first, double* second) {
  Doubles s[V]{}, q[V]{}, k[V];
  for (int v = 0; v < V; ++v) k[v] = load(center + v * kLanes);
  for (int64_t r = 0; r < height; ++r, dy += pitch, x += pitch)
    for (int v = 0; v < V; ++v) {
      const Doubles g = load(dy + v * kLanes);
      s[v] += g, q[v] += g * (load(x + v * kLanes) - k[v]);
    }
  for (int v = 0; v < V; ++v) store(first + v * kLanes, s[v]), store(second + v * kLanes, q[v]);
}

template <class T>
void column_reduce(const T* dy, const T* x, int64_t height, int64_t width, const double* center, double* first, double* second) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes)
    column_reduce_of<4>(dy + j, x + j, height, width, center + j, first + j, second + j);
  for (; j + kLanes <= width; j += kLanes) column_reduce_of<1>(dy + j, x + j, height, width, center + j, first + j, second + j);
  for (; j < width; ++j) {
    double s = 0, q = 0;
    for (int64_t r = 0; r < height; ++r) {
      const double g = load_one(dy + j + r * width);
      s += g, q += g * (load_one(x + j + r * width) - center[j]);
    }
    first[j] = s, second[j] = q;
  }
}

template <class T>
void block_reduce(const T* dy, const T* x, int64_t height, int64_t c, int64_t fold, const double* center, double* first,
                  double* second) {
  if (fold == 1 || height < fold) {
    column_reduce(dy, x, height, c, center, first, second);
    return;
  }
  const int64_t folded = height / fold, left = height % fold, width = c * fold;
  double centers[kFoldBelow * kLanes], s[kFoldBelow * kLanes], q[kFoldBelow * kLanes];
  for (int64_t f = 0; f < fold; ++f) std::copy_n(center, c, centers + f * c);
  column_reduce(dy + folded * width, x + folded * width, left, c, center, first, second);
  column_reduce(dy, x, folded, width, centers, s, q);
  for (int64_t f = 0; f < fold; ++f)
    for (int64_t j = 0; j < c; ++j) first[j] += s[f * c + j], second[j] += q[f * c + j];
}

// Sums of `parts` pieces of each of n samples, [n][parts][c], in order.
void finish_sums(const std::vector<double>& partial, int64_t n, int64_t parts, int64_t c, SmallOut out) {
  std::fill_n(out.data, out.step == 0 ? c : n * c, 0.0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < parts; ++k)
      for (int64_t j = 0; j < c; ++j) out.data[i * out.step + j] += partial[(i * parts + k) * c + j];
}

}  // namespace

template <class T>
void channel_reduce(const T* dy, const T* x, Small center, SmallOut sum_dy, SmallOut sum_dy_x, Shape shape) {
  auto [n, c, s, channels_last] = shape;
  if (channels_last) {
    if (center.step == 0 && sum_dy.step == 0 && sum_dy_x.step == 0) s *= n, n = 1;
    const Blocks blocks(n, s, c);
    std::vector<double> first(blocks.count() * c), second(blocks.count() * c);
    parallel(blocks.count(), 2 * blocks.elements(), [&, c = c](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u)
        block_reduce(dy + blocks.offset(u), x + blocks.offset(u), blocks.length(u), c, blocks.fold,
                     center.sample(u / blocks.per_sample), &first[u * c], &second[u * c]);
    });
    finish_sums(first, n, blocks.per_sample, c, sum_dy);
    finish_sums(second, n, blocks.per_sample, c, sum_dy_x);
    return;
  }
  const int64_t segments = divide_up(s, kSegment);
  std::vector<double> first(n * c * segments), second(n * c * segments);
  parallel(n * c * segments, 2 * std::min(kSegment, s), [&, c = c, s = s](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t row = u / segments, k = u % segments, at = (row / c * segments + k) * c + row % c, from = row * s + k * kSegment;
      const Sums sums = run_reduce(dy + from, x + from, std::min(kSegment, s - k * kSegment), center.sample(row / c)[row % c]);
      first[at] = sums.first, second[at] = sums.second;
    }
  });
  finish_sums(first, n, segments, c, sum_dy);
  finish_sums(second, n, segments, c, sum_dy_x);
}

#define EQUINORM_INSTANTIATE(T)                                                               \
  template void channel_moments(const T*, SmallOut, SmallOut, Shape);                         \
  template void channel_affine(const T*, Small, Small, Small, T*, Shape);                     \
  template void channel_reduce(const T*, const T*, Small, SmallOut, SmallOut, Shape);         \
  template void channel_backward(const T*, const T*, Small, Small, Small, Small, T*, Shape);
EQUINORM_INSTANTIATE(double)
EQUINORM_INSTANTIATE(float)
EQUINORM_INSTANTIATE(bfloat16)
EQUINORM_INSTANTIATE(float16)

}  // namespace equinorm
