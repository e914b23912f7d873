// Kernels with one statistic and one affine map per (sample, channel) or per channel.
//
// Contiguous memory is rows of s values of one channel: vectors run along the row. channels_last memory is rows of c channels: vectors
// run across the channels, and a channel's sum runs down the rows. There memory is walked strictly in order, one row after the other,
// with the running sums of all columns in the first-level cache: walking down a few columns at a time needs fewer instructions but
// defeats the prefetching of every processor tried, and takes two to three times as long on data from main memory.
#include <numeric>
#include <vector>

#include "runs.h"

namespace equinorm {
namespace {

constexpr int64_t kPanel = 1024;  // columns whose running sums are held at a time
constexpr int64_t kFoldBelow = 64;  // narrower rows are folded: 32 rows of 3 channels are one row of 96 columns

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// channels_last rows, cut within each sample into blocks of the same height.
struct Blocks {
  int64_t rows, c, fold, height, per_sample, count;
  Blocks(int64_t samples, int64_t rows, int64_t c) : rows(rows), c(c) {
    const int64_t whole = lanes<Floats> / std::gcd(c, lanes<Floats>);  // rows until the columns fill vectors
    fold = c < kFoldBelow ? divide_up(kFoldBelow, c * whole) * whole : 1;
    const int64_t elements = std::clamp<int64_t>(rows * c / 64, 16384, 131072);
    height = divide_up(std::clamp<int64_t>(elements / c, 32, kSegment), fold) * fold;
    per_sample = divide_up(rows, height);
    count = samples * per_sample;
  }
  int64_t sample(int64_t unit) const { return unit / per_sample; }
  int64_t begin(int64_t unit) const { return unit % per_sample * height; }
  int64_t length(int64_t unit) const { return std::min(height, rows - begin(unit)); }
  int64_t offset(int64_t unit) const { return (sample(unit) * rows + begin(unit)) * c; }
  int64_t elements() const { return std::min(height, rows) * c; }
};

// A panel of columns as vectors. The last vector reaches back over columns that it shares with the one before.
template <class V>
struct Panel {
  int64_t width;
  int64_t vectors() const { return divide_up(width, lanes<V>); }
  int64_t column(int64_t v) const { return std::min(v * lanes<V>, width - lanes<V>); }
};

template <class Body>
void for_panels(int64_t width, const Body& body) {
  const int64_t panels = divide_up(width, kPanel), size = divide_up(width, panels);
  for (int64_t j = 0; j < width; j += size) body(j, std::min(size, width - j));
}

// Sums a pair of terms down `height` rows for each vector of a panel; term(row, vector) forms the pair.
template <class V, class Term>
void column_sums(int64_t height, int64_t vectors, const Term& term, double* first, double* second) {
  constexpr int64_t L = lanes<V>;
  V s[kPanel / L + 1], q[kPanel / L + 1];
  std::fill_n(first, vectors * L, 0.0);
  std::fill_n(second, vectors * L, 0.0);
  for (int64_t begin = 0; begin < height; begin += kChain) {
    std::fill_n(s, vectors, V{});
    std::fill_n(q, vectors, V{});
    for (int64_t r = begin; r < std::min(height, begin + kChain); ++r)
      for (int64_t v = 0; v < vectors; ++v) {
        const auto [f, g] = term(r, v);
        s[v] += f, q[v] += g;
      }
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t l = 0; l < L; ++l) first[v * L + l] += s[v][l], second[v * L + l] += q[v][l];
  }
}

// ---- moments ------------------------------------------------------------------------------------------------------------------

// Sums of x - shift and of its square down each column of a panel.
template <class V, class T>
void shifted_columns(const T* x, int64_t height, int64_t pitch, Panel<V> panel, const V* shift, double* first, double* second) {
  column_sums<V>(
      height, panel.vectors(),
      [&](int64_t r, int64_t v) {
        const V d = load<V>(x + r * pitch + panel.column(v)) - shift[v];
        return std::pair(d, d * d);
      },
      first, second);
}

template <class T>
void moments_in_double(const T* x, int64_t height, int64_t pitch, int64_t width, double* mean, double* squares) {
  constexpr int64_t L = lanes<Doubles>;
  const Panel<Doubles> panel{width};
  Doubles shift[kPanel / L + 1];
  double first[kPanel + L], second[kPanel + L];
  for (int64_t v = 0; v < panel.vectors(); ++v) shift[v] = load<Doubles>(x + panel.column(v));
  shifted_columns(x, height, pitch, panel, shift, first, second);
  const double count = static_cast<double>(height);
  if constexpr (!in_float<T>) {  // no digits to spare: shift by the mean, so that nothing cancels
    for (int64_t v = 0; v < panel.vectors(); ++v) shift[v] += load<Doubles>(first + v * L) / count;
    shifted_columns(x, height, pitch, panel, shift, first, second);
  }
  for (int64_t v = 0; v < panel.vectors(); ++v)
    for (int64_t l = 0; l < L; ++l) {
      const Sums sums{first[v * L + l], second[v * L + l]};
      mean[panel.column(v) + l] = shift[v][l] + sums.first / count;
      squares[panel.column(v) + l] = about_mean(sums, count);
    }
}

template <class T>
void moments_in_float(const T* x, int64_t height, int64_t pitch, int64_t width, double* mean, double* squares) {
  constexpr int64_t L = lanes<Floats>;
  const Panel<Floats> panel{width};
  Floats shift[kPanel / L + 1];
  double first[kPanel + L], second[kPanel + L];
  const int64_t step = height / 4 * pitch;
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    const T* const at = x + panel.column(v);
    shift[v] = ((load<Floats>(at) + load<Floats>(at + step)) + (load<Floats>(at + 2 * step) + load<Floats>(at + 3 * step))) * 0.25f;
  }
  shifted_columns(x, height, pitch, panel, shift, first, second);
  const double count = static_cast<double>(height);
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    bool held = true;
    for (int64_t l = 0; l < L; ++l) {
      const Sums sums{first[v * L + l], second[v * L + l]};
      const double deviations = about_mean(sums, count);
      mean[panel.column(v) + l] = shift[v][l] + sums.first / count;
      squares[panel.column(v) + l] = deviations;
      held &= shift_held(sums, deviations, count);
    }
    const int64_t j = panel.column(v);
    if (!held) moments_in_double(x + j, height, pitch, L, mean + j, squares + j);
  }
}

template <class T>
void column_moments(const T* x, int64_t height, int64_t pitch, double* mean, double* squares) {
  if (pitch < lanes<Doubles>) {
    for (int64_t j = 0; j < pitch; ++j) {
      double shift = load_one(x + j);
      Sums sums{0, 0};
      for (int pass = 0; pass < (in_float<T> ? 1 : 2); ++pass) {
        shift += sums.first / height, sums = {0, 0};
        for (int64_t r = 0; r < height; ++r) {
          const double d = load_one(x + j + r * pitch) - shift;
          sums.first += d, sums.second += d * d;
        }
      }
      mean[j] = shift + sums.first / height;
      squares[j] = about_mean(sums, height);
    }
    return;
  }
  for_panels(pitch, [&](int64_t j, int64_t width) {
    if constexpr (in_float<T>)
      if (height >= 4 && width >= lanes<Floats>) return moments_in_float(x + j, height, pitch, width, mean + j, squares + j);
    moments_in_double(x + j, height, pitch, width, mean + j, squares + j);
  });
}

template <class T>
void block_moments(const T* x, int64_t height, int64_t c, int64_t fold, double* mean, double* squares) {
  const int64_t folded = height / fold, left = height % fold, width = c * fold;
  if (fold == 1 || folded == 0) {
    column_moments(x, height, c, mean, squares);
    return;
  }
  std::vector<double> means(width + c), deviations(width + c);
  column_moments(x, folded, width, means.data(), deviations.data());
  if (left > 0) column_moments(x + folded * width, left, c, &means[width], &deviations[width]);
  const auto count = [=](int64_t p) { return static_cast<double>(p < fold ? folded : left); };
  pool(means.data(), deviations.data(), fold + (left > 0), c, c, count, mean, squares);
}

// Partial moments of `parts` pieces of each of n samples, [n][parts][c] -> per sample [n][c] -> per channel [c], as variances.
template <class Count>
void finish_moments(const std::vector<double>& means, const std::vector<double>& squares, int64_t n, int64_t parts, int64_t c, int64_t s,
                    const Count& count, SmallOut mean, SmallOut var) {
  const bool batch = mean.step == 0;
  std::vector<double> sample_means, sample_squares;
  const double *from_means = means.data(), *from_squares = squares.data();
  if (parts > 1) {
    sample_means.resize(n * c), sample_squares.resize(n * c);
    parallel(n, 4 * parts * c, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        pool(&means[i * parts * c], &squares[i * parts * c], parts, c, c, count, &sample_means[i * c], &sample_squares[i * c]);
    });
    from_means = sample_means.data(), from_squares = sample_squares.data();
  }
  const auto whole = [=](int64_t) { return static_cast<double>(s); };
  parallel(c, 4 * n, [&](int64_t begin, int64_t end) {
    if (batch) {
      pool(from_means + begin, from_squares + begin, n, c, end - begin, whole, mean.data + begin, var.data + begin);
      for (int64_t j = begin; j < end; ++j) var.data[j] /= static_cast<double>(n * s);
      return;
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = begin; j < end; ++j) {
        mean.data[i * c + j] = from_means[i * c + j];
        var.data[i * c + j] = from_squares[i * c + j] / static_cast<double>(s);
      }
  });
}

}  // namespace

template <class T>
void channel_moments(const T* x, SmallOut mean, SmallOut var, Shape shape) {
  auto [n, c, s, channels_last] = shape;
  if (channels_last) {
    if (mean.step == 0) s *= n, n = 1;
    const Blocks blocks(n, s, c);
    std::vector<double> means(blocks.count * c), squares(blocks.count * c);
    parallel(blocks.count, blocks.elements(), [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u)
        block_moments(x + blocks.offset(u), blocks.length(u), blocks.c, blocks.fold, &means[u * blocks.c], &squares[u * blocks.c]);
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

// ---- maps ---------------------------------------------------------------------------------------------------------------------

namespace {

// A map's parameters for the columns of one sample, repeated for folded rows, in the arithmetic that suits them.
template <class Map, class T>
struct ColumnParameters {
  static constexpr int P = Map::kParameters;
  std::vector<float> floats;
  std::vector<double> doubles;
  bool narrow = false;
  int64_t width = 0;

  // `rows` rows will use them: for a few it is not worth while to narrow them.
  void set(const Small* small, int64_t sample, int64_t c, int64_t fold, int64_t rows) {
    width = c * fold;
    narrow = in_float<T> && rows >= 4;
    if (narrow) {
      floats.resize(P * width);
      for (int64_t j = 0; j < c; ++j) {
        double wide[P];
        float cut[P];
        for (int m = 0; m < P; ++m) wide[m] = small[m].sample(sample)[j];
        narrow = narrow && to_floats<Map>(wide, cut);
        for (int m = 0; m < P; ++m) floats[m * width + j] = cut[m];
      }
      for (int m = 0; m < P; ++m)
        for (int64_t f = 1; f < fold; ++f) std::copy_n(&floats[m * width], c, &floats[m * width + f * c]);
    }
    if (narrow) return;
    doubles.resize(P * width);
    for (int m = 0; m < P; ++m)
      for (int64_t f = 0; f < fold; ++f) std::copy_n(small[m].sample(sample), c, &doubles[m * width + f * c]);
  }

  void apply(const T* x, const T* dy, T* out, int64_t columns) const {
    const auto row = [&]<class V>(V, const auto* from) {
      apply_vectors<Map, V>(x, dy, out, columns, [&](V* p, const auto& get) {
        for (int m = 0; m < P; ++m) p[m] = get(from + m * width);
      });
    };
    if constexpr (in_float<T>)
      if (narrow) return row(Floats{}, floats.data());
    row(Doubles{}, doubles.data());
  }
};

template <class Map, class T>
void apply(const T* x, const T* dy, T* out, const Small* small, Shape shape) {
  constexpr int P = Map::kParameters;
  auto [n, c, s, channels_last] = shape;
  if (!channels_last) {
    const int64_t segments = divide_up(s, kSegment);
    parallel(n * c * segments, std::min(kSegment, s), [&, c = c, s = s](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t row = u / segments, at = row * s + u % segments * kSegment;
        double parameters[P];
        for (int m = 0; m < P; ++m) parameters[m] = small[m].sample(row / c)[row % c];
        apply_run<Map>(x + at, dy + at, out + at, std::min(kSegment, (row + 1) * s - at), parameters);
      }
    });
    return;
  }
  if (std::all_of(small, small + P, [](const Small& t) { return t.step == 0; })) s *= n, n = 1;
  const Blocks blocks(n, s, c);
  parallel(blocks.count, blocks.elements(), [&](int64_t begin, int64_t end) {
    ColumnParameters<Map, T> parameters;
    int64_t held = -1;
    for (int64_t u = begin; u < end; ++u) {
      if (blocks.sample(u) != held) parameters.set(small, held = blocks.sample(u), blocks.c, std::min(blocks.fold, blocks.rows), blocks.rows);
      const int64_t last = blocks.offset(u) + blocks.length(u) * blocks.c;
      for (int64_t at = blocks.offset(u); at < last; at += parameters.width)
        parameters.apply(x + at, dy + at, out + at, std::min(parameters.width, last - at));
    }
  });
}

}  // namespace

template <class T>
void channel_affine(const T* x, Small center, Small scale, Small shift, T* y, Shape shape) {
  const Small small[] = {center, scale, shift};
  apply<AffineMap>(x, x, y, small, shape);
}

template <class T>
void channel_backward(const T* dy, const T* x, Small center, Small scale, Small slope, Small offset, T* dx, Shape shape) {
  const Small small[] = {center, scale, slope, offset};
  apply<BackwardMap>(x, dy, dx, small, shape);
}

// ---- reductions of the gradient -----------------------------------------------------------------------------------------------

namespace {

template <class V, class T>
void reduce_in(const T* dy, const T* x, int64_t height, int64_t pitch, int64_t width, const double* center, double* sum_dy,
               double* sum_dy_x) {
  constexpr int64_t L = lanes<V>;
  const Panel<V> panel{width};
  V shift[kPanel / L + 1];
  double first[kPanel + L], second[kPanel + L];
  for (int64_t v = 0; v < panel.vectors(); ++v)
    for (int64_t l = 0; l < L; ++l) shift[v][l] = static_cast<Scalar<V>>(center[panel.column(v) + l]);
  column_sums<V>(
      height, panel.vectors(),
      [&](int64_t r, int64_t v) {
        const int64_t at = r * pitch + panel.column(v);
        const V g = load<V>(dy + at);
        return std::pair(g, g * (load<V>(x + at) - shift[v]));
      },
      first, second);
  const double count = static_cast<double>(height);
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    const int64_t j = panel.column(v);
    bool held = true;
    for (int64_t l = 0; l < L; ++l) {
      Sums sums{first[v * L + l], second[v * L + l]};
      if (shift[v][l] != center[j + l]) sums.second += (shift[v][l] - center[j + l]) * sums.first;
      sum_dy[j + l] = sums.first, sum_dy_x[j + l] = sums.second;
      held &= std::abs(center[j + l]) <= kLargest && reduction_held(sums, count);
    }
    if constexpr (std::is_same_v<V, Floats>)
      if (!held) reduce_in<Doubles>(dy + j, x + j, height, pitch, L, center + j, sum_dy + j, sum_dy_x + j);
  }
}

template <class T>
void column_reduce(const T* dy, const T* x, int64_t height, int64_t pitch, const double* center, double* sum_dy, double* sum_dy_x) {
  if (pitch < lanes<Doubles>) {
    for (int64_t j = 0; j < pitch; ++j) {
      sum_dy[j] = 0, sum_dy_x[j] = 0;
      for (int64_t r = 0; r < height; ++r) {
        const double g = load_one(dy + j + r * pitch);
        sum_dy[j] += g, sum_dy_x[j] += g * (load_one(x + j + r * pitch) - center[j]);
      }
    }
    return;
  }
  for_panels(pitch, [&](int64_t j, int64_t width) {
    if constexpr (in_float<T>)
      if (width >= lanes<Floats>) return reduce_in<Floats>(dy + j, x + j, height, pitch, width, center + j, sum_dy + j, sum_dy_x + j);
    reduce_in<Doubles>(dy + j, x + j, height, pitch, width, center + j, sum_dy + j, sum_dy_x + j);
  });
}

template <class T>
void block_reduce(const T* dy, const T* x, int64_t height, int64_t c, int64_t fold, const double* center, double* first,
                  double* second) {
  const int64_t folded = height / fold, left = height % fold, width = c * fold;
  if (fold == 1 || folded == 0) {
    column_reduce(dy, x, height, c, center, first, second);
    return;
  }
  column_reduce(dy + folded * width, x + folded * width, left, c, center, first, second);
  std::vector<double> centers(width), s(width), q(width);
  for (int64_t f = 0; f < fold; ++f) std::copy_n(center, c, &centers[f * c]);
  column_reduce(dy, x, folded, width, centers.data(), s.data(), q.data());
  for (int64_t f = 0; f < fold; ++f)
    for (int64_t j = 0; j < c; ++j) first[j] += s[f * c + j], second[j] += q[f * c + j];
}

// Sums of `parts` pieces of each of n samples, [n][parts][c], in order.
void finish_sums(const std::vector<double>& partial, int64_t n, int64_t parts, int64_t c, SmallOut out) {
  parallel(c, 2 * n * parts, [&](int64_t begin, int64_t end) {
    const int64_t results = out.step == 0 ? 1 : n;
    for (int64_t i = 0; i < results; ++i) std::fill(out.data + i * c + begin, out.data + i * c + end, 0.0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < parts; ++k)
        for (int64_t j = begin; j < end; ++j) out.data[i * out.step + j] += partial[(i * parts + k) * c + j];
  });
}

}  // namespace

template <class T>
void channel_reduce(const T* dy, const T* x, Small center, SmallOut sum_dy, SmallOut sum_dy_x, Shape shape) {
  auto [n, c, s, channels_last] = shape;
  if (channels_last) {
    if (center.step == 0 && sum_dy.step == 0 && sum_dy_x.step == 0) s *= n, n = 1;
    const Blocks blocks(n, s, c);
    std::vector<double> first(blocks.count * c), second(blocks.count * c);
    parallel(blocks.count, 2 * blocks.elements(), [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u)
        block_reduce(dy + blocks.offset(u), x + blocks.offset(u), blocks.length(u), blocks.c, blocks.fold,
                     center.sample(blocks.sample(u)), &first[u * blocks.c], &second[u * blocks.c]);
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
      const Sums sums = run_reduce(dy + from, x + from, std::min(kSegment, (row + 1) * s - from), center.sample(row / c)[row % c]);
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
