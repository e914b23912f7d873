// Kernels with one statistic and one affine map per (sample, channel) or per channel.
//
// Contiguous memory is rows of s values of one channel: vectors run along the row. channels_last memory is rows of c channels: vectors
// run across the channels, and a channel's sum runs down the rows. There memory is walked strictly in order, one row after the other,
// with the running sums of all columns in the first-level cache: walking down a few columns at a time needs fewer instructions but
// defeats the prefetching of every processor tried, and takes two to three times as long on data from main memory.
#include <array>

#include "runs.h"

namespace equinorm {
namespace {

constexpr int64_t kPanel = 1024;  // columns whose running sums are held at a time
constexpr int64_t kNarrow = 256;  // narrower rows are folded: 4 rows of 64 channels are one row of 256 columns

// channels_last rows, cut within each sample into blocks of the same height.
struct Blocks {
  int64_t rows, c, fold, height, per_sample, count;
  Blocks(int64_t samples, int64_t rows, int64_t c) : rows(rows), c(c) {
    fold = divide_up(kNarrow, c);
    const int64_t elements = std::clamp<int64_t>(rows * c / 16, 32768, 131072);
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

// A vector of columns: what its values are shifted by, and two running sums.
template <class V>
struct Column {
  V shift, first, second;
};

// Sums a pair of terms down `height` rows for each vector of a panel; term(row, column, shift) forms the pair.
template <class V, class Term>
EQUINORM_INLINE inline void column_sums(int64_t height, Panel<V> panel, Column<V>* columns, const Term& term, double* first,
                                               double* second) {
  constexpr int64_t L = lanes<V>;
  const int64_t vectors = panel.vectors(), full = panel.width / L;
  std::fill_n(first, vectors * L, 0.0);
  std::fill_n(second, vectors * L, 0.0);
  for (int64_t begin = 0; begin < height; begin += kChain) {
    for (int64_t v = 0; v < vectors; ++v) columns[v].first = V{}, columns[v].second = V{};
    for (int64_t r = begin; r < std::min(height, begin + kChain); ++r)
#pragma GCC unroll 4  // the fewer instructions per load, the further ahead the processor reads
      for (int64_t v = 0; v < vectors; ++v) {
        const auto [f, g] = term(r, v < full ? v * L : panel.width - L, columns[v].shift);
        columns[v].first += f, columns[v].second += g;
      }
    for (int64_t v = 0; v < vectors; ++v) add_to(first + v * L, columns[v].first), add_to(second + v * L, columns[v].second);
  }
}

// ---- moments ------------------------------------------------------------------------------------------------------------------

// Sums of x - shift and of its square down each column of a panel.
template <class V, class T>
void shifted_columns(const T* x, int64_t height, int64_t pitch, Panel<V> panel, Column<V>* columns, double* first, double* second) {
  column_sums(
      height, panel, columns,
      [=](int64_t r, int64_t column, V shift) EQUINORM_INLINE {
        const V d = load<V>(x + r * pitch + column) - shift;
        return std::pair(d, d * d);
      },
      first, second);
}

// The same for one vector of columns; returns whether float sums were exact enough in all of them.
inline bool from_sums(Doubles shift, Doubles first, Doubles second, double count, double* mean, double* squares) {
  const Doubles step = first * splat<Doubles>(1 / count), deviations = second - first * step;
  store(mean, shift + step);
  store(squares, (Doubles)(deviations < 0 ? Doubles{} : deviations));
  return all(shift_held(first, deviations, splat<Doubles>(count)));
}

template <class T>
void moments_in_double(const T* x, int64_t height, int64_t pitch, int64_t width, double* mean, double* squares) {
  constexpr int64_t L = lanes<Doubles>;
  const Panel<Doubles> panel{width};
  Column<Doubles> columns[kPanel / L + 1];
  alignas(64) double first[kPanel + L], second[kPanel + L];
  for (int64_t v = 0; v < panel.vectors(); ++v) columns[v].shift = load<Doubles>(x + panel.column(v));
  shifted_columns(x, height, pitch, panel, columns, first, second);
  const double count = static_cast<double>(height);
  if constexpr (!in_float<T>) {  // no digits to spare: shift by the mean, so that nothing cancels
    for (int64_t v = 0; v < panel.vectors(); ++v) columns[v].shift += load<Doubles>(first + v * L) / count;
    shifted_columns(x, height, pitch, panel, columns, first, second);
  }
  for (int64_t v = 0; v < panel.vectors(); ++v)
    from_sums(columns[v].shift, load<Doubles>(first + v * L), load<Doubles>(second + v * L), count, mean + panel.column(v),
              squares + panel.column(v));
}

template <class T>
void moments_in_float(const T* x, int64_t height, int64_t pitch, int64_t width, double* mean, double* squares) {
  constexpr int64_t L = lanes<Floats>, H = lanes<Doubles>;
  const Panel<Floats> panel{width};
  Column<Floats> columns[kPanel / L + 1];
  alignas(64) double first[kPanel + L], second[kPanel + L];
  const int64_t step = height / 4 * pitch;
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    const T* const at = x + panel.column(v);
    columns[v].shift =
        ((load<Floats>(at) + load<Floats>(at + step)) + (load<Floats>(at + 2 * step) + load<Floats>(at + 3 * step))) * 0.25f;
  }
  shifted_columns(x, height, pitch, panel, columns, first, second);
  const double count = static_cast<double>(height);
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    const int64_t j = panel.column(v);
    const auto [low, high] = halves(columns[v].shift);
    const double *s = first + v * L, *q = second + v * L;
    const bool held = from_sums(to_doubles<H>(low), load<Doubles>(s), load<Doubles>(q), count, mean + j, squares + j) &
                      from_sums(to_doubles<H>(high), load<Doubles>(s + H), load<Doubles>(q + H), count, mean + j + H, squares + j + H);
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
      from_sums(shift, sums, height, mean[j], squares[j]);
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
void block_moments(const T* x, int64_t height, int64_t c, int64_t fold, Buffer<double>& scratch, double* mean, double* squares) {
  const int64_t folded = height / fold, left = height % fold, width = c * fold;
  if (fold == 1 || folded == 0) {
    column_moments(x, height, c, mean, squares);
    return;
  }
  scratch.resize(2 * (width + c));
  double *means = scratch.data(), *deviations = means + width + c;
  column_moments(x, folded, width, means, deviations);
  if (left > 0) column_moments(x + folded * width, left, c, means + width, deviations + width);
  const auto count = [=](int64_t p) { return static_cast<double>(p < fold ? folded : left); };
  pool(means, deviations, fold + (left > 0), c, c, count, mean, squares);
}

// Partial moments of `parts` pieces of each of n samples, [n][parts][c] -> per sample [n][c] -> per channel [c], as variances.
template <class Count>
void finish_moments(const Buffer<double>& means, const Buffer<double>& squares, int64_t n, int64_t parts, int64_t c, int64_t s,
                    const Count& count, SmallOut mean, SmallOut var) {
  const bool batch = mean.step == 0;
  Buffer<double> sample_means, sample_squares;
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
    Buffer<double> means(blocks.count * c), squares(blocks.count * c);
    parallel(blocks.count, blocks.elements(), [&](int64_t begin, int64_t end) {
      Buffer<double> scratch;
      for (int64_t u = begin; u < end; ++u)
        block_moments(x + blocks.offset(u), blocks.length(u), blocks.c, blocks.fold, scratch, &means[u * blocks.c],
                      &squares[u * blocks.c]);
    });
    finish_moments(means, squares, n, blocks.per_sample, c, s, [&](int64_t k) { return double(blocks.length(k)); }, mean, var);
    return;
  }
  // A long row is cut into segments, laid out as [n][segment][c] so that pooling runs across channels.
  const int64_t segments = divide_up(s, kSegment);
  Buffer<double> means(n * c * segments), squares(n * c * segments);
  const auto length = [s = s](int64_t k) { return std::min(kSegment, s - k * kSegment); };
  parallel(n * c * segments, std::min(kSegment, s), [&, c = c, s = s](int64_t begin, int64_t end) {
    for_grid(begin, end, c, segments, [&](int64_t i, int64_t j, int64_t k) {
      const int64_t at = (i * segments + k) * c + j;
      run_moments(x + (i * c + j) * s + k * kSegment, length(k), means[at], squares[at]);
    });
  });
  finish_moments(means, squares, n, segments, c, s, [&](int64_t k) { return double(length(k)); }, mean, var);
}

// ---- maps ---------------------------------------------------------------------------------------------------------------------


namespace {

// The parameters of sample i at channel j.
template <int P>
std::array<double, P> at(const Small (&small)[P], int64_t i, int64_t j) {
  std::array<double, P> values;
  for (int m = 0; m < P; ++m) values[m] = small[m].sample(i)[j];
  return values;
}

// A map's parameters for the columns of one sample, repeated for folded rows, in the arithmetic that suits them.
template <class Map, class T>
struct ColumnParameters {
  static constexpr int P = Map::kParameters;
  Buffer<float> floats;
  Buffer<double> doubles;
  bool narrow = false;
  int64_t width = 0, held = -1;

  void set(const Small (&small)[P], const Blocks& blocks, int64_t unit) {
    const int64_t sample = blocks.sample(unit), c = blocks.c, fold = std::min(blocks.fold, blocks.rows);
    if (sample == held) return;
    held = sample;
    width = c * fold;
    narrow = in_float<T> && blocks.rows >= 4;  // for a few rows it is not worth while
    if (narrow) {
      floats.resize(P * width);
      for (int64_t j = 0; j < c; ++j) {
        float cut[P];
        narrow = narrow && fit_floats<Map>(at(small, sample, j).data(), cut);
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

  // Maps `columns` columns from column `first` on.
  template <class G, class Out>
  void apply(const T* x, const G* dy, Out* out, int64_t first, int64_t columns, To to) const {
    if constexpr (in_float<T>)
      if (narrow) return apply_columns<Map, Floats>(x, dy, out, columns, floats.data() + first, width, to);
    apply_columns<Map, Doubles>(x, dy, out, columns, doubles.data() + first, width, to);
  }
};

// Calls run(unit's first element, count, sample, channel) for runs of one channel.
template <class Run>
void for_runs(Shape shape, int64_t reads, const Run& run) {
  const int64_t segments = divide_up(shape.s, kSegment);
  parallel(shape.n * shape.c * segments, reads * std::min(kSegment, shape.s), [&](int64_t begin, int64_t end) {
    for_grid(begin, end, shape.c, segments, [&](int64_t i, int64_t j, int64_t k) {
      run((i * shape.c + j) * shape.s + k * kSegment, std::min(kSegment, shape.s - k * kSegment), i, j);
    });
  });
}

// Calls row(first element, first column, columns) for the rows of one block, in pieces of up to `most` columns.
template <class Row>
void for_rows(const Blocks& blocks, int64_t unit, int64_t width, int64_t most, const Row& row) {
  const int64_t last = blocks.offset(unit) + blocks.length(unit) * blocks.c;
  for (int64_t at = blocks.offset(unit); at < last; at += width)
    for (int64_t j = 0; j < std::min(width, last - at); j += most) row(at + j, j, std::min({most, width - j, last - at - j}));
}

// y = f(map(x)) for one block.
template <class T>
void map_block(const ColumnParameters<AffineMap, T>& map, Activation f, const T* x, T* y, const Blocks& blocks, int64_t unit, To to) {
  Scratch<Wide<T>> z;
  for_rows(blocks, unit, map.width, f ? kScratch : map.width, [&](int64_t from, int64_t column, int64_t columns) {
    if (!f) return map.apply(x + from, x + from, y + from, column, columns, to);
    map.apply(x + from, x + from, z.values, column, columns, To::caches);
    activate(f, z.values, y + from, columns, to);
  });
}

// dx for one block, where an activation `f` follows the map `before`.
template <class T>
void pull_block(const ColumnParameters<BackwardMap, T>& map, const ColumnParameters<AffineMap, T>* before, Activation f, const T* dy,
                const T* x, T* dx, const Blocks& blocks, int64_t unit, To to) {
  Scratch<Wide<T>> z;
  for_rows(blocks, unit, map.width, f ? kScratch : map.width, [&](int64_t from, int64_t column, int64_t columns) {
    if (!f) return map.apply(x + from, dy + from, dx + from, column, columns, to);
    before->apply(x + from, x + from, z.values, column, columns, To::caches);
    pull(f, dy + from, z.values, columns);
    map.apply(x + from, z.values, dx + from, column, columns, to);
  });
}

// Calls body(gradient before the activation) for one block.
template <class T, class Body>
void with_pulled(const ColumnParameters<AffineMap, T>* before, Activation f, const T* dy, const T* x, const Blocks& blocks, int64_t unit,
                 const Body& body) {
  const int64_t from = blocks.offset(unit);
  if (!f) return body(dy + from);
  Buffer<Wide<T>> z(blocks.length(unit) * blocks.c);
  for_rows(blocks, unit, before->width, before->width, [&](int64_t at, int64_t column, int64_t columns) {
    before->apply(x + at, x + at, &z[at - from], column, columns, To::caches);
  });
  pull(f, dy + from, z.data(), blocks.length(unit) * blocks.c);
  body(static_cast<const Wide<T>*>(z.data()));
}

// The same parameters for all samples: then the samples are one.
template <int P>
bool one_for_all(const Small (&small)[P]) {
  return std::all_of(small, small + P, [](const Small& t) { return t.step == 0; });
}

// The parameters of runs of one channel. Those that serve many runs are narrowed once: on short runs that costs as much as the map.
template <class Map, class T>
class RunParameters {
 public:
  RunParameters(const Small (&small)[Map::kParameters], Shape shape) : small_(small) {
    if (!in_float<T> || shape.n == 1 || !one_for_all(small)) return;
    narrowed_.resize(shape.c);
    for (int64_t j = 0; j < shape.c; ++j) narrowed_[j].fit = fit_floats<Map>(at(small, 0, j).data(), narrowed_[j].cut);
  }

  void apply(const T* x, const T* dy, T* out, int64_t count, int64_t i, int64_t j, To to) const {
    if constexpr (in_float<T>)
      if (!narrowed_.empty() && narrowed_[j].fit && count >= lanes<Floats>)
        return apply_fixed<Map, Floats>(x, dy, out, count, narrowed_[j].cut, to);
    apply_run<Map>(x, dy, out, count, at(small_, i, j).data(), to);
  }

 private:
  struct Narrowed {
    float cut[Map::kParameters];
    bool fit;
  };
  const Small (&small_)[Map::kParameters];
  std::vector<Narrowed> narrowed_;
};

}  // namespace

template <class T>
void channel_affine(const T* x, Activated map, T* y, Shape shape) {
  const Small small[] = {map.center, map.scale, map.shift};
  const To to = destination(shape.n * shape.c * shape.s * sizeof(T), kMapAlone);
  if (!shape.channels_last) {
    const RunParameters<AffineMap, T> parameters(small, shape);
    return for_runs(shape, 1, [&](int64_t from, int64_t count, int64_t i, int64_t j) {
      if (map.f) return activate_run(map.f, x + from, y + from, count, at(small, i, j).data(), to);
      parameters.apply(x + from, x + from, y + from, count, i, j, to);
    });
  }
  if (one_for_all(small)) shape.s *= shape.n, shape.n = 1;
  const Blocks blocks(shape.n, shape.s, shape.c);
  parallel(blocks.count, blocks.elements(), [&](int64_t begin, int64_t end) {
    ColumnParameters<AffineMap, T> parameters;
    for (int64_t u = begin; u < end; ++u) {
      parameters.set(small, blocks, u);
      map_block(parameters, map.f, x, y, blocks, u, to);
    }
  });
}

template <class T>
void channel_backward(const T* dy, const T* x, Small center, Small scale, Small slope, Small offset, Activated map, T* dx, Shape shape) {
  const Small small[] = {center, scale, slope, offset}, affine[] = {map.center, map.scale, map.shift};
  const To to = destination(shape.n * shape.c * shape.s * sizeof(T), kAlternating);
  if (!shape.channels_last) {
    const RunParameters<BackwardMap, T> parameters(small, shape);
    return for_runs(shape, 2, [&](int64_t from, int64_t count, int64_t i, int64_t j) {
      if (!map.f) return parameters.apply(x + from, dy + from, dx + from, count, i, j, to);
      const auto before = at(affine, i, j);
      for_pulled(map.f, dy + from, x + from, count, before.data(), [&](int64_t k, int64_t n, const auto* g) {
        apply_run<BackwardMap>(x + from + k, g, dx + from + k, n, at(small, i, j).data(), to);
      });
    });
  }
  if (one_for_all(small) && (!map.f || one_for_all(affine))) shape.s *= shape.n, shape.n = 1;
  const Blocks blocks(shape.n, shape.s, shape.c);
  parallel(blocks.count, 2 * blocks.elements(), [&](int64_t begin, int64_t end) {
    ColumnParameters<BackwardMap, T> parameters;
    ColumnParameters<AffineMap, T> before;
    for (int64_t u = begin; u < end; ++u) {
      parameters.set(small, blocks, u);
      if (map.f) before.set(affine, blocks, u);
      pull_block(parameters, map.f ? &before : nullptr, map.f, dy, x, dx, blocks, u, to);
    }
  });
}

// ---- reductions of the gradient -----------------------------------------------------------------------------------------------

namespace {

template <class V, class G, class T>
void reduce_in(const G* dy, const T* x, int64_t height, int64_t pitch, int64_t width, const double* center, double* sum_dy,
               double* sum_dy_x) {
  constexpr int64_t L = lanes<V>;
  const Panel<V> panel{width};
  Column<V> columns[kPanel / L + 1];
  alignas(64) double first[kPanel + L], second[kPanel + L];
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    Scalar<V> shift[L];
    std::copy_n(center + panel.column(v), L, shift);
    columns[v].shift = load<V>(shift);
  }
  column_sums(
      height, panel, columns,
      [=](int64_t r, int64_t column, V shift) EQUINORM_INLINE {
        const V g = load<V>(dy + r * pitch + column);
        return std::pair(g, g * (load<V>(x + r * pitch + column) - shift));
      },
      first, second);
  const Doubles count = splat<Doubles>(static_cast<double>(height));
  for (int64_t v = 0; v < panel.vectors(); ++v) {
    const int64_t j = panel.column(v);
    Scalar<V> shift[L];
    store(shift, columns[v].shift);
    bool held = true;
    for (int64_t l = 0; l < L; l += lanes<Doubles>) {
      const Doubles exact = load<Doubles>(center + j + l), s = load<Doubles>(first + v * L + l);
      const Doubles q = load<Doubles>(second + v * L + l) + cut_off(load<Doubles>(shift + l), exact, s);
      store(sum_dy + j + l, s), store(sum_dy_x + j + l, q);
      held &= all((abs(exact) <= kLargest) & reduction_held(s, q, count));
    }
    if constexpr (std::is_same_v<V, Floats>)
      if (!held) reduce_in<Doubles>(dy + j, x + j, height, pitch, L, center + j, sum_dy + j, sum_dy_x + j);
  }
}

template <class G, class T>
void column_reduce(const G* dy, const T* x, int64_t height, int64_t pitch, const double* center, double* sum_dy, double* sum_dy_x) {
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

template <class G, class T>
void block_reduce(const G* dy, const T* x, int64_t height, int64_t c, int64_t fold, const double* center, Buffer<double>& scratch,
                  double* first, double* second) {
  const int64_t folded = height / fold, left = height % fold, width = c * fold;
  if (fold == 1 || folded == 0) {
    column_reduce(dy, x, height, c, center, first, second);
    return;
  }
  column_reduce(dy + folded * width, x + folded * width, left, c, center, first, second);
  scratch.resize(3 * width);
  double *centers = scratch.data(), *s = centers + width, *q = s + width;
  for (int64_t f = 0; f < fold; ++f) std::copy_n(center, c, centers + f * c);
  column_reduce(dy, x, folded, width, centers, s, q);
  for (int64_t f = 0; f < fold; ++f)
    for (int64_t j = 0; j < c; ++j) first[j] += s[f * c + j], second[j] += q[f * c + j];
}

// Sums of `parts` pieces of each of n samples, [n][parts][c], in order.
void finish_sums(const Buffer<double>& partial, int64_t n, int64_t parts, int64_t c, SmallOut out) {
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
void channel_reduce(const T* dy, const T* x, Small center, Activated map, SmallOut sum_dy, SmallOut sum_dy_x, Shape shape) {
  const Small affine[] = {map.center, map.scale, map.shift};
  if (shape.channels_last) {
    if (center.step == 0 && sum_dy.step == 0 && sum_dy_x.step == 0 && (!map.f || one_for_all(affine))) shape.s *= shape.n, shape.n = 1;
    const Blocks blocks(shape.n, shape.s, shape.c);
    Buffer<double> first(blocks.count * blocks.c), second(blocks.count * blocks.c);
    parallel(blocks.count, 2 * blocks.elements(), [&](int64_t begin, int64_t end) {
      Buffer<double> scratch;
      ColumnParameters<AffineMap, T> before;
      for (int64_t u = begin; u < end; ++u) {
        if (map.f) before.set(affine, blocks, u);
        with_pulled(map.f ? &before : nullptr, map.f, dy, x, blocks, u, [&](const auto* g) {
          block_reduce(g, x + blocks.offset(u), blocks.length(u), blocks.c, blocks.fold, center.sample(blocks.sample(u)), scratch,
                       &first[u * blocks.c], &second[u * blocks.c]);
        });
      }
    });
    finish_sums(first, shape.n, blocks.per_sample, shape.c, sum_dy);
    finish_sums(second, shape.n, blocks.per_sample, shape.c, sum_dy_x);
    return;
  }
  const int64_t c = shape.c, s = shape.s, segments = divide_up(s, kSegment);
  Buffer<double> first(shape.n * c * segments), second(shape.n * c * segments);
  for_runs(shape, 2, [&](int64_t from, int64_t count, int64_t i, int64_t j) {
    const auto before = map.f ? at(affine, i, j) : std::array<double, 3>{};
    Sums sums{0, 0};
    for_pulled(map.f, dy + from, x + from, count, before.data(), [&](int64_t k, int64_t n, const auto* g) {
      const Sums part = run_reduce(g, x + from + k, n, center.sample(i)[j]);
      sums.first += part.first, sums.second += part.second;
    });
    const int64_t segment = from % s / kSegment, slot = (i * segments + segment) * c + j;
    first[slot] = sums.first, second[slot] = sums.second;
  });
  finish_sums(first, shape.n, segments, c, sum_dy);
  finish_sums(second, shape.n, segments, c, sum_dy_x);
}

// ---- rules local to a group of a sample ---------------------------------------------------------------------------------------

// Samples are measured and finished one after the other, while they are in the cache; see by_rows.
template <class T>
void interleaved_forward(const T* x, const double* weight, const double* bias, Activation f, T* y, double* mean, double* rstd, Rows shape,
                         double eps) {
  const int64_t k = shape.k, c = shape.groups * k, n = shape.rows / shape.groups, s = shape.s;
  const Blocks blocks(n, s, c);
  const To to = destination(n * s * c * sizeof(T), kAlternating);
  Buffer<double> means(blocks.count * c), squares(blocks.count * c), center(n * c), scale(n * c), shift(n * c);
  const Small small[] = {{center.data(), c}, {scale.data(), c}, {shift.data(), c}};
  std::vector<ColumnParameters<AffineMap, T>> parameters(n);

  const auto measure = [&](int64_t i, int64_t, int64_t block) {
    const int64_t u = i * blocks.per_sample + block;
    Buffer<double> scratch;
    block_moments(x + blocks.offset(u), blocks.length(u), c, blocks.fold, scratch, &means[u * c], &squares[u * c]);
  };
  const auto merge = [&](int64_t i, int64_t) {
    const int64_t first = i * blocks.per_sample;
    double *const m = &center[i * c], *const q = &scale[i * c];  // hold the channels' moments until their places are needed
    pool(&means[first * c], &squares[first * c], blocks.per_sample, c, c, [&](int64_t b) { return double(blocks.length(b)); }, m, q);
    for (int64_t g = 0; g < shape.groups; ++g) {
      const int64_t row = i * shape.groups + g;
      double middle, total;
      pool(m + g * k, q + g * k, k, 1, 1, [&](int64_t) { return double(s); }, &middle, &total);
      mean[row] = middle;
      rstd[row] = 1 / std::sqrt(total * (1.0 / shape.length()) + eps);
      for (int64_t j = g * k; j < (g + 1) * k; ++j) {
        m[j] = middle;
        q[j] = weight ? rstd[row] * weight[j] : rstd[row];
        shift[i * c + j] = bias ? bias[j] : 0;
      }
    }
    parameters[i].set(small, blocks, first);
  };
  const auto finish = [&](int64_t i, int64_t, int64_t block) {
    map_block(parameters[i], f, x, y, blocks, i * blocks.per_sample + block, to);
  };
  by_rows(n, 1, s * c, blocks.per_sample, blocks.per_sample, measure, merge, finish, [](int64_t, int64_t) {});
}

template <class T>
void interleaved_backward(const T* dy, const T* x, const double* weight, const double* bias, Activation f, const double* mean,
                          const double* rstd, T* dx, double* dweight, double* dbias, Rows shape) {
  const int64_t k = shape.k, c = shape.groups * k, n = shape.rows / shape.groups, s = shape.s;
  const Blocks blocks(n, s, c);
  const To to = destination(n * s * c * sizeof(T), kAlternating);
  Buffer<double> first(blocks.count * c), second(blocks.count * c), sum_dy(n * c), sum_dy_h(n * c);
  Buffer<double> center(n * c), scale(n * c), shift(n * c), slope(n * c), offset(n * c);
  const Small affine[] = {{center.data(), c}, {scale.data(), c}, {shift.data(), c}};
  const Small small[] = {affine[0], affine[1], {slope.data(), c}, {offset.data(), c}};
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < c; ++j) {
      const int64_t row = i * shape.groups + j / k;
      center[i * c + j] = mean[row], scale[i * c + j] = weight ? rstd[row] * weight[j] : rstd[row], shift[i * c + j] = bias ? bias[j] : 0;
    }
  std::vector<ColumnParameters<BackwardMap, T>> parameters(n);
  std::vector<ColumnParameters<AffineMap, T>> before(f ? n : 0);
  for (int64_t i = 0; i < static_cast<int64_t>(before.size()); ++i) before[i].set(affine, blocks, i * blocks.per_sample);

  const auto measure = [&](int64_t i, int64_t, int64_t block) {
    const int64_t u = i * blocks.per_sample + block;
    Buffer<double> scratch;
    with_pulled(f ? &before[i] : nullptr, f, dy, x, blocks, u, [&](const auto* g) {
      block_reduce(g, x + blocks.offset(u), blocks.length(u), c, blocks.fold, &center[i * c], scratch, &first[u * c], &second[u * c]);
    });
  };
  const auto merge = [&](int64_t i, int64_t) {
    double *const a = &sum_dy[i * c], *const b = &sum_dy_h[i * c];
    std::fill_n(a, c, 0.0), std::fill_n(b, c, 0.0);
    for (int64_t u = i * blocks.per_sample; u < (i + 1) * blocks.per_sample; ++u)
      for (int64_t j = 0; j < c; ++j) a[j] += first[u * c + j], b[j] += second[u * c + j];
    for (int64_t g = 0; g < shape.groups; ++g) {
      const double r = rstd[i * shape.groups + g];
      double constant = 0, through = 0;
      for (int64_t j = g * k; j < (g + 1) * k; ++j) {
        b[j] *= r;
        const double w = weight ? weight[j] : 1;
        constant += w * a[j], through += w * b[j];
      }
      std::fill_n(&slope[i * c + g * k], k, -r * r * through / shape.length());
      std::fill_n(&offset[i * c + g * k], k, -r * constant / shape.length());
    }
    parameters[i].set(small, blocks, i * blocks.per_sample);
  };
  const auto finish = [&](int64_t i, int64_t, int64_t block) {
    pull_block(parameters[i], f ? &before[i] : nullptr, f, dy, x, dx, blocks, i * blocks.per_sample + block, to);
  };
  by_rows(n, 1, s * c, blocks.per_sample, blocks.per_sample, measure, merge, finish, [](int64_t, int64_t) {});
  if (!dweight) return;
  std::fill_n(dweight, c, 0.0), std::fill_n(dbias, c, 0.0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < c; ++j) dweight[j] += sum_dy_h[i * c + j], dbias[j] += sum_dy[i * c + j];
}

#define EQUINORM_INSTANTIATE(T)                                                                                              \
  template void channel_moments(const T*, SmallOut, SmallOut, Shape);                                                        \
  template void channel_affine(const T*, Activated, T*, Shape);                                                              \
  template void channel_reduce(const T*, const T*, Small, Activated, SmallOut, SmallOut, Shape);                             \
  template void channel_backward(const T*, const T*, Small, Small, Small, Small, Activated, T*, Shape);                      \
  template void interleaved_forward(const T*, const double*, const double*, Activation, T*, double*, double*, Rows, double); \
  template void interleaved_backward(const T*, const T*, const double*, const double*, Activation, const double*,            \
                                     const double*, T*, double*, double*, Rows);
EQUINORM_INSTANTIATE(double)
EQUINORM_INSTANTIATE(float)
EQUINORM_INSTANTIATE(bfloat16)
EQUINORM_INSTANTIATE(float16)

}  // namespace equinorm
