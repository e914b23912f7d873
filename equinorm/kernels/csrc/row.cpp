// Kernels that normalize rows: a row's statistic is applied while the row is still in the cache.
//
// A row is summed in segments of kSegment elements which are merged in order. One thread takes whole rows; when there are few long
// rows the segments themselves are shared out, with the same borders and the same order of merging, so with the same bits.
#include <cmath>
#include <vector>

#include "moments.h"

namespace equinorm {
namespace {

constexpr int64_t kParts = 32;  // pieces of the batch over which parameter gradients are summed apart, then merged in order

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether segments rather than rows are shared out. Decides about speed only.
bool split_rows(int64_t rows, int64_t length) {
  return length >= 2 * kSegment && threads() > 1 && rows < 4 * threads();
}

// A row as pieces with contiguous parameters (s == 1: pieces of up to kSegment columns) or with one parameter each (s > 1: pieces
// of one channel).
struct Pieces {
  int64_t per_channel, size, stretch, count;
  explicit Pieces(const Rows& shape) {
    stretch = shape.s > 1 ? shape.s : shape.k;
    per_channel = divide_up(stretch, kSegment);
    size = std::min(stretch, kSegment);
    count = (shape.s > 1 ? shape.k : 1) * per_channel;
  }
  int64_t channel(int64_t piece) const { return piece / per_channel; }
  int64_t within(int64_t piece) const { return piece % per_channel * kSegment; }
  int64_t begin(int64_t piece) const { return channel(piece) * stretch + within(piece); }
  int64_t length(int64_t piece) const { return std::min(kSegment, stretch - within(piece)); }
};

struct Statistic {
  double mean, squares;
};

template <class T>
Statistic segment_statistic(const T* x, int64_t count, bool centered) {
  if (!centered) return {0, shifted_sums(x, count, 0.0, T{}).second};
  Statistic result;
  run_moments(x, count, result.mean, result.squares);
  return result;
}

void merge_statistic(const double* means, const double* squares, const Rows& shape, double eps, double& mean, double& rstd) {
  const int64_t segments = divide_up(shape.measured, kSegment);
  double total;
  if (shape.centered) {
    pool(means, squares, segments, 1,
         [&](int64_t k) { return double(std::min(kSegment, shape.measured - k * kSegment)); }, &mean, &total);
  } else {
    mean = 0, total = 0;
    for (int64_t k = 0; k < segments; ++k) total += squares[k];
  }
  rstd = 1 / std::sqrt(total / static_cast<double>(shape.measured) + eps);
}

// ---- forward ------------------------------------------------------------------------------------------------------------------

// y = (x - mean) * rstd * weight + bias for one piece; weight and bias per column.
template <bool kParameters, class T>
void normalize_columns(const T* x, T* y, int64_t count, double mean, double rstd, const double* weight, const double* bias) {
  const Doubles m = splat(mean), r = splat(rstd);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Doubles h = (load(x + i) - m) * r;
    store(y + i, kParameters ? h * load(weight + i) + load(bias + i) : h);
  }
  if (i < count) {
    const Doubles h = (load_tail(x + i, count - i, {}) - m) * r;
    store_tail(y + i, count - i, kParameters ? h * load_tail(weight + i, count - i, 0.0) + load_tail(bias + i, count - i, 0.0) : h);
  }
}

// The same with one weight and bias for the whole piece.
template <class T>
void normalize_channel(const T* x, T* y, int64_t count, double mean, double rstd, double weight, double bias) {
  const Doubles m = splat(mean), a = splat(rstd * weight), b = splat(bias);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, (load(x + i) - m) * a + b);
  if (i < count) store_tail(y + i, count - i, (load_tail(x + i, count - i, {}) - m) * a + b);
}

template <class T>
void normalize_piece(const T* x, T* y, const double* weight, const double* bias, const Rows& shape, const Pieces& pieces, int64_t row,
                     int64_t piece, double mean, double rstd) {
  const int64_t at = row * shape.length() + pieces.begin(piece), count = pieces.length(piece);
  const int64_t p = row % shape.groups * shape.k + (shape.s > 1 ? pieces.channel(piece) : pieces.within(piece));
  if (shape.s > 1)
    normalize_channel(x + at, y + at, count, mean, rstd, weight ? weight[p] : 1, bias ? bias[p] : 0);
  else if (weight)
    normalize_columns<true>(x + at, y + at, count, mean, rstd, weight + p, bias + p);
  else
    normalize_columns<false, T>(x + at, y + at, count, mean, rstd, nullptr, nullptr);
}

}  // namespace

template <class T>
void row_forward(const T* x, const double* weight, const double* bias, T* y, double* mean, double* rstd, Rows shape, double eps) {
  const Pieces pieces(shape);
  const int64_t segments = divide_up(shape.measured, kSegment);
  const auto statistic = [&](int64_t row, int64_t k, double* means, double* squares) {
    const int64_t at = k * kSegment;
    const Statistic found = segment_statistic(x + row * shape.length() + at, std::min(kSegment, shape.measured - at), shape.centered);
    means[k] = found.mean, squares[k] = found.squares;
  };
  if (split_rows(shape.rows, shape.length())) {
    std::vector<double> means(shape.rows * segments), squares(shape.rows * segments);
    parallel(shape.rows * segments, kSegment, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t row = u / segments;
        statistic(row, u % segments, &means[row * segments], &squares[row * segments]);
      }
    });
    for (int64_t row = 0; row < shape.rows; ++row)
      merge_statistic(&means[row * segments], &squares[row * segments], shape, eps, mean[row], rstd[row]);
    parallel(shape.rows * pieces.count, pieces.size, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t row = u / pieces.count;
        normalize_piece(x, y, weight, bias, shape, pieces, row, u % pieces.count, mean[row], rstd[row]);
      }
    });
    return;
  }
  parallel(shape.rows, shape.length(), [&](int64_t begin, int64_t end) {
    std::vector<double> means(segments), squares(segments);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t k = 0; k < segments; ++k) statistic(row, k, means.data(), squares.data());
      merge_statistic(means.data(), squares.data(), shape, eps, mean[row], rstd[row]);
      for (int64_t piece = 0; piece < pieces.count; ++piece)
        normalize_piece(x, y, weight, bias, shape, pieces, row, piece, mean[row], rstd[row]);
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------------------

namespace {

// Sums of g and g * h over one piece, where g = weight * dy and h = (x - mean) * rstd. kParameters: also adds dy * h and dy to the
// columns' running sums.
template <bool kParameters, class T>
Sums reduce_columns(const T* dy, const T* x, int64_t count, double mean, double rstd, const double* weight, double* dweight,
                    double* dbias) {
  const Doubles m = splat(mean), r = splat(rstd);
  Doubles s{}, q{};
  const auto step = [&](Doubles d, Doubles h, Doubles w) {
    const Doubles g = kParameters ? d * w : d;
    s += g, q += g * h;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Doubles d = load(dy + i), h = (load(x + i) - m) * r;
    step(d, h, kParameters ? load(weight + i) : d);
    if constexpr (kParameters) {
      store(dweight + i, load(dweight + i) + d * h);
      store(dbias + i, load(dbias + i) + d);
    }
  }
  if (i < count) {
    const int64_t left = count - i;
    const Doubles d = load_tail(dy + i, left, {}), h = (load_tail(x + i, left, {}) - m) * r;
    step(d, h, kParameters ? load_tail(weight + i, left, 0.0) : d);
    if constexpr (kParameters) {
      store_tail(dweight + i, left, load_tail(dweight + i, left, 0.0) + d * h);
      store_tail(dbias + i, left, load_tail(dbias + i, left, 0.0) + d);
    }
  }
  return {sum(s), sum(q)};
}

// Sums of dy and dy * h over a piece of one channel.
template <class T>
Sums reduce_channel(const T* dy, const T* x, int64_t count, double mean, double rstd) {
  const Doubles m = splat(mean), r = splat(rstd);
  Doubles s0{}, s1{}, q0{}, q1{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Doubles a = load(dy + i), b = load(dy + i + kLanes);
    s0 += a, q0 += a * ((load(x + i) - m) * r);
    s1 += b, q1 += b * ((load(x + i + kLanes) - m) * r);
  }
  for (; i < count; i += kLanes) {
    const int64_t left = std::min(kLanes, count - i);
    const Doubles a = load_tail(dy + i, left, {});
    s0 += a, q0 += a * ((load_tail(x + i, left, {}) - m) * r);
  }
  return {sum(s0 + s1), sum(q0 + q1)};
}

// dx = rstd * (weight * dy - (a + h * b)), where the bracket is the part that flows through the statistic: it reaches the measured
// elements only.
template <bool kColumns, class T>
void input_gradient(const T* dy, const T* x, T* dx, int64_t count, double mean, double rstd, const double* weight, double a, double b) {
  const Doubles m = splat(mean), r = splat(rstd), one = splat(kColumns ? 1 : *weight), va = splat(a), vb = splat(b);
  const auto result = [&](Doubles d, Doubles x, Doubles w) { return r * (d * w - (va + (x - m) * r * vb)); };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(dx + i, result(load(dy + i), load(x + i), kColumns ? load(weight + i) : one));
  if (i < count) {
    const int64_t left = count - i;
    const Doubles w = kColumns ? load_tail(weight + i, left, 0.0) : one;
    store_tail(dx + i, left, result(load_tail(dy + i, left, {}), load_tail(x + i, left, {}), w));
  }
}

template <class T>
struct Backward {
  const T* dy;
  const T* x;
  const double* weight;
  const double* mean;
  const double* rstd;
  T* dx;
  Rows shape;
  Pieces pieces;

  bool per_channel() const { return shape.s > 1; }

  // Sums of one piece. dweight, dbias: s == 1: running sums of this part of the batch, of all parameters; s > 1: unused.
  Sums reduce(int64_t row, int64_t piece, double* dweight, double* dbias) const {
    const int64_t at = row * shape.length() + pieces.begin(piece), count = pieces.length(piece);
    if (per_channel()) return reduce_channel(dy + at, x + at, count, mean[row], rstd[row]);
    const int64_t p = row % shape.groups * shape.k + pieces.within(piece);
    if (dweight) return reduce_columns<true>(dy + at, x + at, count, mean[row], rstd[row], weight + p, dweight + p, dbias + p);
    return reduce_columns<false, T>(dy + at, x + at, count, mean[row], rstd[row], nullptr, nullptr, nullptr);
  }

  // Merges the sums of a row's pieces. s > 1: also hands the channels' sums to the row's slots of dweight and dbias.
  Sums merge(int64_t row, const Sums* sums, double* dweight, double* dbias) const {
    Sums total{0, 0};
    if (!per_channel()) {
      for (int64_t piece = 0; piece < pieces.count; ++piece) total.first += sums[piece].first, total.second += sums[piece].second;
      return total;
    }
    for (int64_t j = 0; j < shape.k; ++j) {
      Sums channel{0, 0};
      for (int64_t i = 0; i < pieces.per_channel; ++i) {
        const Sums& part = sums[j * pieces.per_channel + i];
        channel.first += part.first, channel.second += part.second;
      }
      const double w = weight ? weight[row % shape.groups * shape.k + j] : 1;
      total.first += w * channel.first, total.second += w * channel.second;
      if (dweight) dweight[row * shape.k + j] = channel.second, dbias[row * shape.k + j] = channel.first;
    }
    return total;
  }

  void finish(int64_t row, int64_t piece, Sums total) const {
    const double a = shape.centered ? total.first / shape.measured : 0, b = total.second / shape.measured;
    const int64_t begin = pieces.begin(piece), count = pieces.length(piece);
    const int64_t measured = std::clamp<int64_t>(shape.measured - begin, 0, count);
    const int64_t p = row % shape.groups * shape.k + (per_channel() ? pieces.channel(piece) : pieces.within(piece));
    gradient(row, begin, measured, p, 0, a, b);
    if (measured < count) gradient(row, begin + measured, count - measured, p, measured, 0, 0);
  }

  void gradient(int64_t row, int64_t begin, int64_t count, int64_t p, int64_t skipped, double a, double b) const {
    const int64_t at = row * shape.length() + begin;
    const double one = 1;
    if (!per_channel() && weight)
      input_gradient<true>(dy + at, x + at, dx + at, count, mean[row], rstd[row], weight + p + skipped, a, b);
    else
      input_gradient<false>(dy + at, x + at, dx + at, count, mean[row], rstd[row], weight ? weight + p : &one, a, b);
  }
};

}  // namespace

template <class T>
void row_backward(const T* dy, const T* x, const double* weight, const double* mean, const double* rstd, T* dx, double* dweight,
                  double* dbias, Rows shape) {
  const Backward<T> job{dy, x, weight, mean, rstd, dx, shape, Pieces(shape)};
  const int64_t pieces = job.pieces.count, samples = shape.rows / shape.groups, parameters = shape.parameters();
  // Sums for the parameters. s > 1: one slot per sample and channel. s == 1: one slot per part of the batch and parameter.
  const bool slots = dweight != nullptr, by_part = slots && shape.s == 1;
  const int64_t height = by_part ? divide_up(samples, kParts) : 1, parts = divide_up(samples, height);
  std::vector<double> sums_weight(slots ? parts * parameters : 0), sums_bias(slots ? parts * parameters : 0);
  double* const dw = slots ? sums_weight.data() : nullptr;
  double* const db = slots ? sums_bias.data() : nullptr;
  const auto slot = [&](double* base, int64_t row) { return by_part ? base + row / shape.groups / height * parameters : base; };

  if (split_rows(shape.rows, shape.length())) {
    std::vector<Sums> sums(shape.rows * pieces), totals(shape.rows);
    const int64_t rows_per_part = by_part ? height * shape.groups : 1, units = divide_up(shape.rows, rows_per_part);
    parallel(units * pieces, 2 * rows_per_part * job.pieces.size, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t first = u / pieces * rows_per_part, piece = u % pieces;
        for (int64_t row = first; row < std::min(shape.rows, first + rows_per_part); ++row)
          sums[row * pieces + piece] = job.reduce(row, piece, slot(dw, row), slot(db, row));
      }
    });
    for (int64_t row = 0; row < shape.rows; ++row) totals[row] = job.merge(row, &sums[row * pieces], dw, db);
    parallel(shape.rows * pieces, 2 * job.pieces.size, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) job.finish(u / pieces, u % pieces, totals[u / pieces]);
    });
  } else {
    const int64_t rows_per_unit = by_part ? height * shape.groups : 1, units = divide_up(shape.rows, rows_per_unit);
    parallel(units, 2 * rows_per_unit * shape.length(), [&](int64_t begin, int64_t end) {
      std::vector<Sums> sums(pieces);
      for (int64_t row = begin * rows_per_unit; row < std::min(shape.rows, end * rows_per_unit); ++row) {
        for (int64_t piece = 0; piece < pieces; ++piece) sums[piece] = job.reduce(row, piece, slot(dw, row), slot(db, row));
        const Sums total = job.merge(row, sums.data(), dw, db);
        for (int64_t piece = 0; piece < pieces; ++piece) job.finish(row, piece, total);
      }
    });
  }
  if (!slots) return;
  std::fill_n(dweight, parameters, 0.0), std::fill_n(dbias, parameters, 0.0);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t j = 0; j < parameters; ++j) {
      dweight[j] += sums_weight[part * parameters + j];
      dbias[j] += sums_bias[part * parameters + j];
    }
}

#define EQUINORM_INSTANTIATE(T)                                                                                    \
  template void row_forward(const T*, const double*, const double*, T*, double*, double*, Rows, double);           \
  template void row_backward(const T*, const T*, const double*, const double*, const double*, T*, double*, double*, Rows);
EQUINORM_INSTANTIATE(double)
EQUINORM_INSTANTIATE(float)
EQUINORM_INSTANTIATE(bfloat16)
EQUINORM_INSTANTIATE(float16)

}  // namespace equinorm
