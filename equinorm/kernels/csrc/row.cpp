// Kernels that normalize rows: a row's statistic is applied while the row is still in the cache.
//
// A row is summed in segments of kSegment elements which are merged in order. One thread takes whole rows; when there are few long
// rows their pieces are shared out, with the same borders and the same order of merging, so with the same bits.
#include <vector>

#include "runs.h"

namespace equinorm {
namespace {

constexpr int64_t kParts = 32;  // pieces of the batch over which parameter gradients are summed apart, then merged in order

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether pieces rather than rows are shared out. Decides about speed only.
bool split_rows(int64_t rows, int64_t length) { return length >= 2 * kSegment && threads() > 1 && rows < 4 * threads(); }

// A row as pieces: with parameters per column (s == 1) up to kSegment columns, with parameters per channel (s > 1) up to kSegment
// elements of one channel.
struct Pieces {
  int64_t stretch, per_channel, count, size;
  explicit Pieces(const Rows& shape) {
    stretch = shape.s > 1 ? shape.s : shape.k;
    per_channel = divide_up(stretch, kSegment);
    count = (shape.s > 1 ? shape.k : 1) * per_channel;
    size = std::min(stretch, kSegment);
  }
  int64_t channel(int64_t piece) const { return piece / per_channel; }
  int64_t within(int64_t piece) const { return piece % per_channel * kSegment; }
  int64_t begin(int64_t piece) const { return channel(piece) * stretch + within(piece); }
  int64_t length(int64_t piece) const { return std::min(kSegment, stretch - within(piece)); }
};

// Runs measure(row, piece) for all pieces, then merge(row), then finish(row, piece), a row at a time while it is in the cache.
template <class Measure, class Merge, class Finish>
void by_rows(int64_t rows, int64_t length, int64_t measured_pieces, int64_t pieces, const Measure& measure, const Merge& merge,
             const Finish& finish) {
  const bool split = split_rows(rows, length);
  const auto each = [&](int64_t count, const auto& work) {
    parallel(rows * count, length / count, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) work(u / count, u % count);
    });
  };
  if (split) {
    each(measured_pieces, measure);
    for (int64_t row = 0; row < rows; ++row) merge(row);
    each(pieces, finish);
    return;
  }
  parallel(rows, length, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t k = 0; k < measured_pieces; ++k) measure(row, k);
      merge(row);
      for (int64_t piece = 0; piece < pieces; ++piece) finish(row, piece);
    }
  });
}

// Parameters per column, in both arithmetics; floats only where all of them are moderate enough.
struct ColumnParameters {
  const double* doubles;
  std::vector<float> floats;
  ColumnParameters(const double* values, int64_t count, bool cut) : doubles(values) {
    if (!values || !cut) return;
    for (int64_t i = 0; i < count; ++i)
      if (!(std::abs(values[i]) <= kLargest)) return;
    floats.assign(values, values + count);
  }
  bool fit_floats() const { return !doubles || !floats.empty(); }
  template <class V>
  const Scalar<V>* at(int64_t i) const {
    if constexpr (std::is_same_v<V, Floats>)
      return floats.data() + i;
    else
      return doubles + i;
  }
};

// h = (x - mean) * rstd, in V.
template <class V>
struct Standard {
  V center, scale, rest;
  bool fit;
  Standard(double mean, double rstd) {
    Scalar<V> p[3];
    const double parameters[] = {mean, rstd, 0};
    if constexpr (std::is_same_v<V, Floats>) {
      fit = to_floats<AffineMap>(parameters, p);
    } else {
      std::copy_n(parameters, 3, p);
      fit = true;
    }
    center = splat<V>(p[0]), scale = splat<V>(p[1]), rest = splat<V>(p[2]);
  }
  V operator()(V x) const { return (x - center) * scale + rest; }
};

// Calls body(i, get, put) for each vector of a run, where get(pointer) and put(pointer, vector) move the elements from i on. Where the
// run is no multiple of the vector, the last ones are moved on their own: each element is visited once.
template <class V, class Body>
void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + lanes<V> <= count; i += lanes<V>)
    body([i](const auto* p) { return load<V>(p + i); }, [i](auto* p, V v) { store(p + i, v); });
  if (i < count)
    body([i, count](const auto* p) { return load_part<V>(p + i, count - i); },
         [i, count](auto* p, V v) { store_part(p + i, v, count - i); });
}

// ---- forward ------------------------------------------------------------------------------------------------------------------

// y = h * weight + bias with a weight and a bias for each column.
template <class V, class T>
bool normalize_columns(const T* x, T* y, int64_t count, double mean, double rstd, const ColumnParameters& weight,
                       const ColumnParameters& bias, int64_t p) {
  const Standard<V> h(mean, rstd);
  if (!h.fit || !(std::is_same_v<V, Doubles> || (weight.fit_floats() && bias.fit_floats()))) return false;
  const auto *w = weight.at<V>(p), *b = bias.at<V>(p);
  for_vectors<V>(count, [&](const auto& get, const auto& put) { put(y, h(get(x)) * get(w) + get(b)); });
  return true;
}

}  // namespace

template <class T>
void row_forward(const T* x, const double* weight, const double* bias, T* y, double* mean, double* rstd, Rows shape, double eps) {
  const Pieces pieces(shape);
  const int64_t segments = divide_up(shape.measured, kSegment);
  const auto length = [&](int64_t k) { return std::min(kSegment, shape.measured - k * kSegment); };
  std::vector<double> means(shape.rows * segments), squares(shape.rows * segments);
  const bool columns = shape.s == 1 && weight;
  const ColumnParameters w(columns ? weight : nullptr, shape.parameters(), in_float<T>);
  const ColumnParameters b(columns ? bias : nullptr, shape.parameters(), in_float<T>);

  const auto measure = [&](int64_t row, int64_t k) {
    const T* const from = x + row * shape.length() + k * kSegment;
    const int64_t at = row * segments + k;
    if (shape.centered)
      run_moments(from, length(k), means[at], squares[at]);
    else
      squares[at] = run_squares(from, length(k));
  };
  const auto merge = [&](int64_t row) {
    const double *m = &means[row * segments], *q = &squares[row * segments];
    double total = 0;
    mean[row] = 0;
    if (shape.centered)
      pool(m, q, segments, 1, 1, [&](int64_t k) { return static_cast<double>(length(k)); }, &mean[row], &total);
    else
      for (int64_t k = 0; k < segments; ++k) total += q[k];
    rstd[row] = 1 / std::sqrt(total / static_cast<double>(shape.measured) + eps);
  };
  const auto finish = [&](int64_t row, int64_t piece) {
    const int64_t at = row * shape.length() + pieces.begin(piece), count = pieces.length(piece), first = row % shape.groups * shape.k;
    if (columns) {
      const int64_t p = first + pieces.within(piece);
      if constexpr (in_float<T>)
        if (normalize_columns<Floats>(x + at, y + at, count, mean[row], rstd[row], w, b, p)) return;
      normalize_columns<Doubles>(x + at, y + at, count, mean[row], rstd[row], w, b, p);
      return;
    }
    const int64_t p = first + pieces.channel(piece);
    const double parameters[] = {mean[row], weight ? rstd[row] * weight[p] : rstd[row], bias ? bias[p] : 0};
    apply_run<AffineMap>(x + at, x + at, y + at, count, parameters);
  };
  by_rows(shape.rows, shape.length(), segments, pieces.count, measure, merge, finish);
}

// ---- backward -----------------------------------------------------------------------------------------------------------------
//
// With h = (x - mean) * rstd and g = weight * dy,
//     dx = rstd * (g - (sum(g) + h * sum(g h)) / measured)
// where the part in brackets flows through the statistic, so it reaches the measured elements only, and without a mean has no sum(g).

namespace {

struct Flow {
  double constant, slope;  // what the statistic sends back: constant + slope * h
};

Flow flow(const Rows& shape, Sums sums) {
  return {shape.centered ? sums.first / shape.measured : 0, sums.second / shape.measured};
}

// Parameters per channel, or none: everything is a map of runs.
template <class T>
void backward_channels(const T* dy, const T* x, const double* weight, const double* mean, const double* rstd, T* dx, double* dweight,
                       double* dbias, const Rows& shape) {
  const Pieces pieces(shape);
  const int64_t parameters = shape.parameters(), samples = shape.rows / shape.groups;
  std::vector<Sums> sums(shape.rows * pieces.count), channels(shape.rows * shape.k);
  std::vector<Flow> flows(shape.rows);
  const auto measure = [&](int64_t row, int64_t piece) {
    const int64_t at = row * shape.length() + pieces.begin(piece);
    sums[row * pieces.count + piece] = run_reduce(dy + at, x + at, pieces.length(piece), mean[row]);
  };
  const auto merge = [&](int64_t row) {
    Sums total{0, 0};
    for (int64_t j = 0; j < pieces.count / pieces.per_channel; ++j) {
      Sums channel{0, 0};
      for (int64_t i = 0; i < pieces.per_channel; ++i) {
        const Sums& part = sums[row * pieces.count + j * pieces.per_channel + i];
        channel.first += part.first, channel.second += part.second;
      }
      channel.second *= rstd[row];
      const double w = weight ? weight[row % shape.groups * shape.k + j] : 1;
      total.first += w * channel.first, total.second += w * channel.second;
      channels[row * shape.k + j] = channel;
    }
    flows[row] = flow(shape, total);
  };
  const auto finish = [&](int64_t row, int64_t piece) {
    const int64_t begin = pieces.begin(piece), count = pieces.length(piece), at = row * shape.length() + begin;
    const int64_t measured = std::clamp<int64_t>(shape.measured - begin, 0, count);
    const double w = weight ? weight[row % shape.groups * shape.k + pieces.channel(piece)] : 1, r = rstd[row];
    const double inside[] = {mean[row], r * w, -r * r * flows[row].slope, -r * flows[row].constant}, outside[] = {0, r * w, 0, 0};
    apply_run<BackwardMap>(x + at, dy + at, dx + at, measured, inside);
    apply_run<BackwardMap>(x + at + measured, dy + at + measured, dx + at + measured, count - measured, outside);
  };
  by_rows(shape.rows, shape.length(), pieces.count, pieces.count, measure, merge, finish);
  if (!dweight) return;
  std::fill_n(dweight, parameters, 0.0), std::fill_n(dbias, parameters, 0.0);
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t p = 0; p < parameters; ++p) dweight[p] += channels[n * parameters + p].second, dbias[p] += channels[n * parameters + p].first;
}

// Sums of g and g * h over some columns, in V; false if V is not exact enough.
template <class V, class T>
bool reduce_columns(const T* dy, const T* x, int64_t count, double mean, double rstd, const ColumnParameters& weight, int64_t p, Sums& out) {
  const Standard<V> h(mean, rstd);
  if (!h.fit || !(std::is_same_v<V, Doubles> || weight.fit_floats())) return false;
  const auto* w = weight.at<V>(p);
  out = run_sums<V>(count, [&](const auto& get) {
    const V g = get(dy) * get(w);
    return std::pair(g, g * h(get(x)));
  });
  return std::is_same_v<V, Doubles> || reduction_held(out, count);
}

// dx of some columns; adds dy * h and dy to their running sums.
template <class V, class T, class Running>
void finish_columns(const T* dy, const T* x, T* dx, int64_t count, double mean, double rstd, const ColumnParameters& weight, int64_t p,
                    Flow flow, Running* dweight, Running* dbias) {
  const Standard<V> standard(mean, rstd);
  const V constant = splat<V>(flow.constant), slope = splat<V>(flow.slope), scale = splat<V>(rstd);
  const auto* w = weight.at<V>(p);
  for_vectors<V>(count, [&](const auto& get, const auto& put) {
    const V d = get(dy), h = standard(get(x));
    put(dx, scale * (d * get(w) - (constant + h * slope)));
    put(dweight, get(dweight) + d * h);
    put(dbias, get(dbias) + d);
  });
}

// Parameters per column. Their gradients are sums down the rows: over each part of the batch apart, in float for up to kChain samples
// and then in double, and over the parts in order.
template <class T>
void backward_columns(const T* dy, const T* x, const double* weight, const double* mean, const double* rstd, T* dx, double* dweight,
                      double* dbias, const Rows& shape) {
  const Pieces pieces(shape);
  const ColumnParameters w(weight, shape.parameters(), in_float<T>);
  const int64_t parameters = shape.parameters(), samples = shape.rows / shape.groups;
  const int64_t height = divide_up(samples, kParts), parts = divide_up(samples, height);
  std::vector<double> sums_weight(parts * parameters), sums_bias(parts * parameters);
  std::vector<Sums> sums(shape.rows * pieces.count);
  std::vector<char> narrow(shape.rows * pieces.count);

  const auto measure = [&](int64_t row, int64_t piece) {
    const int64_t at = row * shape.length() + pieces.begin(piece), p = row % shape.groups * shape.k + pieces.within(piece);
    const int64_t slot = row * pieces.count + piece, count = pieces.length(piece);
    if constexpr (in_float<T>)
      narrow[slot] = count >= lanes<Floats> && reduce_columns<Floats>(dy + at, x + at, count, mean[row], rstd[row], w, p, sums[slot]);
    if (!narrow[slot]) reduce_columns<Doubles>(dy + at, x + at, count, mean[row], rstd[row], w, p, sums[slot]);
  };
  const auto merge = [&](int64_t row) {
    Sums total{0, 0};
    for (int64_t i = 0; i < pieces.count; ++i)
      total.first += sums[row * pieces.count + i].first, total.second += sums[row * pieces.count + i].second;
    return flow(shape, total);
  };
  // running: float sums for dweight, then for dbias, of the parameters from `origin` on.
  const auto finish = [&](int64_t row, int64_t piece, Flow sent, float* running_weight, float* running_bias, int64_t origin) {
    const int64_t part = row / shape.groups / height, first = row % shape.groups * shape.k;
    const int64_t measured = std::clamp<int64_t>(shape.measured - pieces.begin(piece), 0, pieces.length(piece));
    const auto stretch = [&](int64_t skip, int64_t count, Flow sent) {
      const int64_t at = row * shape.length() + pieces.begin(piece) + skip, p = first + pieces.within(piece) + skip;
      if constexpr (in_float<T>)
        if (narrow[row * pieces.count + piece] && std::abs(sent.constant) <= kLargest && std::abs(sent.slope) <= kLargest)
          return finish_columns<Floats>(dy + at, x + at, dx + at, count, mean[row], rstd[row], w, p, sent, running_weight + p - origin,
                                        running_bias + p - origin);
      finish_columns<Doubles>(dy + at, x + at, dx + at, count, mean[row], rstd[row], w, p, sent, &sums_weight[part * parameters + p],
                              &sums_bias[part * parameters + p]);
    };
    stretch(0, measured, sent);
    stretch(measured, pieces.length(piece) - measured, {0, 0});
  };
  const auto hand_over = [&](float* running, double* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += running[i];
    std::fill_n(running, count, 0.0f);
  };
  const auto last_of_chain = [&](int64_t sample) { return sample % height % kChain == kChain - 1 || sample % height == height - 1 || sample == samples - 1; };

  if (split_rows(shape.rows, shape.length())) {
    std::vector<Flow> flows(shape.rows);
    parallel(shape.rows * pieces.count, 2 * pieces.size, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) measure(u / pieces.count, u % pieces.count);
    });
    for (int64_t row = 0; row < shape.rows; ++row) flows[row] = merge(row);
    // One unit is one piece of one group in all samples of a part.
    const int64_t strips = shape.groups * pieces.count;
    parallel(parts * strips, 2 * height * pieces.size, [&](int64_t begin, int64_t end) {
      std::vector<float> running_weight(pieces.size), running_bias(pieces.size);
      for (int64_t u = begin; u < end; ++u) {
        const int64_t part = u / strips, group = u % strips / pieces.count, piece = u % pieces.count;
        const int64_t p = group * shape.k + pieces.within(piece), count = pieces.length(piece);
        for (int64_t n = part * height; n < std::min(samples, (part + 1) * height); ++n) {
          const int64_t row = n * shape.groups + group;
          finish(row, piece, flows[row], running_weight.data(), running_bias.data(), p);
          if (!last_of_chain(n)) continue;
          hand_over(running_weight.data(), &sums_weight[part * parameters + p], count);
          hand_over(running_bias.data(), &sums_bias[part * parameters + p], count);
        }
      }
    });
  } else {
    parallel(parts, 2 * height * parameters, [&](int64_t begin, int64_t end) {
      std::vector<float> running_weight(parameters), running_bias(parameters);
      for (int64_t n = begin * height; n < std::min(samples, end * height); ++n) {
        for (int64_t row = n * shape.groups; row < (n + 1) * shape.groups; ++row) {
          for (int64_t piece = 0; piece < pieces.count; ++piece) measure(row, piece);
          const Flow sent = merge(row);
          for (int64_t piece = 0; piece < pieces.count; ++piece) finish(row, piece, sent, running_weight.data(), running_bias.data(), 0);
        }
        if (!last_of_chain(n)) continue;
        hand_over(running_weight.data(), &sums_weight[n / height * parameters], parameters);
        hand_over(running_bias.data(), &sums_bias[n / height * parameters], parameters);
      }
    });
  }
  std::fill_n(dweight, parameters, 0.0), std::fill_n(dbias, parameters, 0.0);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t p = 0; p < parameters; ++p) {
      dweight[p] += sums_weight[part * parameters + p];
      dbias[p] += sums_bias[part * parameters + p];
    }
}

}  // namespace

template <class T>
void row_backward(const T* dy, const T* x, const double* weight, const double* mean, const double* rstd, T* dx, double* dweight,
                  double* dbias, Rows shape) {
  if (shape.s == 1 && weight)
    backward_columns(dy, x, weight, mean, rstd, dx, dweight, dbias, shape);
  else
    backward_channels(dy, x, weight, mean, rstd, dx, dweight, dbias, shape);
}

#define EQUINORM_INSTANTIATE(T)                                                                                    \
  template void row_forward(const T*, const double*, const double*, T*, double*, double*, Rows, double);           \
  template void row_backward(const T*, const T*, const double*, const double*, const double*, T*, double*, double*, Rows);
EQUINORM_INSTANTIATE(double)
EQUINORM_INSTANTIATE(float)
EQUINORM_INSTANTIATE(bfloat16)
EQUINORM_INSTANTIATE(float16)

}  // namespace equinorm
