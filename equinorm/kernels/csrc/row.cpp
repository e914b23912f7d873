// Kernels that normalize rows: a row's statistic is applied while the row is still in the cache.
//
// A row is summed in segments of kSegment elements which are merged in order. One thread takes whole rows; when there are few long
// rows their pieces are shared out, with the same borders and the same order of merging, so with the same bits.
#include <numeric>

#include "runs.h"

namespace equinorm {
namespace {

constexpr int64_t kParts = 32;  // most pieces of the batch over which parameter gradients are summed apart, then merged in order

// Part of a row: up to kSegment elements with parameters per column (s == 1) or of one channel (s > 1).
struct Piece {
  int64_t begin, count, parameter;  // parameter: of the first element, counted from the group's first
};

std::vector<Piece> pieces_of(const Rows& shape) {
  std::vector<Piece> pieces;
  const bool columns = shape.s == 1;
  const int64_t stretch = columns ? shape.k : shape.s;
  for (int64_t channel = 0; channel < (columns ? 1 : shape.k); ++channel)
    for (int64_t at = 0; at < stretch; at += kSegment)
      pieces.push_back({channel * stretch + at, std::min(kSegment, stretch - at), columns ? at : channel});
  return pieces;
}

// Parameters per column, in both arithmetics; floats only where all of them are moderate enough.
struct ParameterRow {
  const double* doubles;
  Buffer<float> floats;
  ParameterRow(const double* values, int64_t count, bool cut) : doubles(values) {
    if (!values || !cut) return;
    for (int64_t i = 0; i < count; ++i)
      if (!(abs(values[i]) <= kLargest)) return;
    floats.assign(values, values + count);
  }
  bool narrow() const { return !doubles || !floats.empty(); }
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
      fit = fit_floats<AffineMap>(parameters, p);
    } else {
      std::copy_n(parameters, 3, p);
      fit = true;
    }
    center = splat<V>(p[0]), scale = splat<V>(p[1]), rest = splat<V>(p[2]);
  }
  V operator()(V x) const { return (x - center) * scale + rest; }
};

// Calls body(get, put, result) for each vector of a run, where get(pointer) and put(pointer, vector) move the elements from the vector's
// first on, and result(pointer, vector) is the put of what leaves the kernel. Where the run is no multiple of the vector, the last ones
// are moved on their own: each element is visited once.
template <class V, To to, class Body>
EQUINORM_INLINE inline void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + lanes<V> <= count; i += lanes<V>) {
    const auto put = [i](auto* p, V v) EQUINORM_INLINE { store(p + i, v); };
    const auto result = [&, i](auto* p, V v) EQUINORM_INLINE { to == To::memory ? stream(p + i, v) : put(p, v); };
    body([i](const auto* p) EQUINORM_INLINE { return load<V>(p + i); }, put, result);
  }
  if (i < count) {
    const auto put = [i, count](auto* p, V v) EQUINORM_INLINE { store_part(p + i, v, count - i); };
    body([i, count](const auto* p) EQUINORM_INLINE { return load_part<V>(p + i, count - i); }, put, put);
  }
}

// ---- forward ------------------------------------------------------------------------------------------------------------------

// y = h * weight + bias with a weight and a bias for each column.
template <class V, class T>
bool normalize_columns(const T* x, T* y, int64_t count, double mean, double rstd, const ParameterRow& weight,
                       const ParameterRow& bias, int64_t p, To to) {
  const Standard<V> h(mean, rstd);
  if (!h.fit || !(std::is_same_v<V, Doubles> || (weight.narrow() && bias.narrow()))) return false;
  const auto *w = weight.at<V>(p), *b = bias.at<V>(p);
  const auto body = [&](const auto& get, const auto&, const auto& result) EQUINORM_INLINE { result(y, h(get(x)) * get(w) + get(b)); };
  if (to == To::memory && aligned<V>(y))
    for_vectors<V, To::memory>(count, body);
  else
    for_vectors<V, To::caches>(count, body);
  return true;
}

}  // namespace

template <class T>
void row_forward(const T* x, const double* weight, const double* bias, Activation f, T* y, double* mean, double* rstd, Rows shape,
                 double eps) {
  const std::vector<Piece> pieces = pieces_of(shape);
  const int64_t segments = divide_up(shape.measured, kSegment);
  const auto length = [&](int64_t k) { return std::min(kSegment, shape.measured - k * kSegment); };
  Buffer<double> means(shape.rows * segments), squares(shape.rows * segments);
  const bool columns = shape.s == 1 && weight;
  const To to = destination(shape.rows * shape.length() * sizeof(T), kAlternating);
  const ParameterRow w(columns ? weight : nullptr, shape.parameters(), in_float<T>);
  const ParameterRow b(columns ? bias : nullptr, shape.parameters(), in_float<T>);

  const auto measure = [&](int64_t row, int64_t, int64_t k) {
    const T* const from = x + row * shape.length() + k * kSegment;
    const int64_t at = row * segments + k;
    if (shape.centered)
      run_moments(from, length(k), means[at], squares[at]);
    else
      squares[at] = run_squares(from, length(k));
  };
  const auto merge = [&](int64_t row, int64_t) {
    const double *m = &means[row * segments], *q = &squares[row * segments];
    double center = m[0], total = q[0];
    if (segments > 1 && shape.centered) pool(m, q, segments, 1, 1, [&](int64_t k) { return double(length(k)); }, &center, &total);
    if (segments > 1 && !shape.centered) total = std::accumulate(q, q + segments, 0.0);
    mean[row] = center;
    rstd[row] = 1 / std::sqrt(total * (1.0 / shape.measured) + eps);
  };
  const auto finish = [&](int64_t row, int64_t group, int64_t i) {
    const auto [begin, count, parameter] = pieces[i];
    const int64_t at = row * shape.length() + begin, p = group * shape.k + parameter;
    if (columns) {
      if constexpr (in_float<T>)
        if (normalize_columns<Floats>(x + at, y + at, count, mean[row], rstd[row], w, b, p, to)) return;
      normalize_columns<Doubles>(x + at, y + at, count, mean[row], rstd[row], w, b, p, to);
      return;
    }
    const double parameters[] = {mean[row], weight ? rstd[row] * weight[p] : rstd[row], bias ? bias[p] : 0};
    activate_run(f, x + at, y + at, count, parameters, to);
  };
  const auto ahead = [&](int64_t row, int64_t i) { prefetch(x + row * shape.length() + pieces[i].begin, pieces[i].count * sizeof(T)); };
  by_rows(shape.rows, shape.groups, shape.length(), segments, static_cast<int64_t>(pieces.size()), measure, merge, finish, ahead);
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
void backward_channels(const T* dy, const T* x, const double* weight, const double* bias, Activation f, const double* mean,
                       const double* rstd, T* dx, double* dweight, double* dbias, const Rows& shape) {
  const std::vector<Piece> pieces = pieces_of(shape);
  const int64_t parameters = shape.parameters(), count = static_cast<int64_t>(pieces.size());
  std::vector<Sums> sums(shape.rows * count), channels(dweight ? shape.rows * shape.k : 0);
  std::vector<Flow> flows(shape.rows);
  const To to = destination(shape.rows * shape.length() * sizeof(T), kAlternating);
  // Calls body(i, count, gradient before the activation) for parts of a piece.
  const auto pulled = [&](int64_t row, int64_t group, const Piece& piece, const auto& body) {
    const int64_t at = row * shape.length() + piece.begin, p = group * shape.k + piece.parameter;
    const double affine[] = {mean[row], weight ? rstd[row] * weight[p] : rstd[row], bias ? bias[p] : 0};
    for_pulled(f, dy + at, x + at, piece.count, affine, body);
  };
  const auto measure = [&](int64_t row, int64_t group, int64_t i) {
    const int64_t at = row * shape.length() + pieces[i].begin;
    Sums total{0, 0};
    pulled(row, group, pieces[i], [&](int64_t k, int64_t n, const auto* g) {
      const Sums part = run_reduce(g, x + at + k, n, mean[row]);
      total.first += part.first, total.second += part.second;
    });
    sums[row * count + i] = total;
  };
  const auto merge = [&](int64_t row, int64_t group) {
    Sums total{0, 0};
    for (int64_t i = 0; i < count; ++i) {
      const Sums part{sums[row * count + i].first, sums[row * count + i].second * rstd[row]};
      const double w = weight ? weight[group * shape.k + pieces[i].parameter] : 1;
      total.first += w * part.first, total.second += w * part.second;
      if (!dweight) continue;
      Sums& channel = channels[row * shape.k + pieces[i].parameter];
      channel.first += part.first, channel.second += part.second;
    }
    flows[row] = flow(shape, total);
  };
  const auto finish = [&](int64_t row, int64_t group, int64_t i) {
    const auto [begin, count, parameter] = pieces[i];
    const int64_t at = row * shape.length() + begin, measured = std::clamp<int64_t>(shape.measured - begin, 0, count);
    const double r = rstd[row], w = weight ? weight[group * shape.k + parameter] : 1;
    const double inside[] = {mean[row], r * w, -r * r * flows[row].slope, -r * flows[row].constant}, outside[] = {0, r * w, 0, 0};
    pulled(row, group, pieces[i], [&](int64_t k, int64_t n, const auto* g) {
      const int64_t from = at + k, m = std::clamp<int64_t>(measured - k, 0, n);
      if (m > 0) apply_run<BackwardMap>(x + from, g, dx + from, m, inside, to);
      if (m < n) apply_run<BackwardMap>(x + from + m, g + m, dx + from + m, n - m, outside, to);
    });
  };
  const auto ahead = [&](int64_t row, int64_t i) {
    const int64_t at = row * shape.length() + pieces[i].begin;
    prefetch(x + at, pieces[i].count * sizeof(T));
    prefetch(dy + at, pieces[i].count * sizeof(T));
  };
  by_rows(shape.rows, shape.groups, shape.length(), count, count, measure, merge, finish, ahead);
  if (!dweight) return;
  std::fill_n(dweight, parameters, 0.0), std::fill_n(dbias, parameters, 0.0);
  for (int64_t row = 0; row < shape.rows; row += shape.groups)
    for (int64_t p = 0; p < parameters; ++p) {
      const Sums& channel = channels[row * shape.k + p];
      dweight[p] += channel.second, dbias[p] += channel.first;
    }
}

// Sums of g and g * h over some columns, in V; false if V is not exact enough.
template <class V, class T>
bool reduce_columns(const T* dy, const T* x, int64_t count, double mean, double rstd, const ParameterRow& weight, int64_t p, Sums& out) {
  const Standard<V> h(mean, rstd);
  if (!h.fit || !(std::is_same_v<V, Doubles> || weight.narrow())) return false;
  const auto* w = weight.at<V>(p);
  out = run_sums<V>(count, [&](const auto& get) EQUINORM_INLINE {
    const V g = get(dy) * get(w);
    return std::pair(g, g * h(get(x)));
  });
  return std::is_same_v<V, Doubles> || reduction_held<double>(out.first, out.second, count);
}

// dx of some columns; adds dy * h and dy to their running sums.
template <class V, class T, class Running>
void finish_columns(const T* dy, const T* x, T* dx, int64_t count, double mean, double rstd, const ParameterRow& weight, int64_t p,
                    Flow flow, Running* dweight, Running* dbias, To to) {
  const Standard<V> standard(mean, rstd);
  const V constant = splat<V>(flow.constant), slope = splat<V>(flow.slope), scale = splat<V>(rstd);
  const auto* w = weight.at<V>(p);
  const auto body = [&](const auto& get, const auto& put, const auto& result) EQUINORM_INLINE {
    const V d = get(dy), h = standard(get(x));
    result(dx, scale * (d * get(w) - (constant + h * slope)));
    put(dweight, get(dweight) + d * h);
    put(dbias, get(dbias) + d);
  };
  if (to == To::memory && aligned<V>(dx))
    for_vectors<V, To::memory>(count, body);
  else
    for_vectors<V, To::caches>(count, body);
}

// Sums down the rows for the gradients of some columns' parameters: in float for a few samples, then handed over to doubles.
struct Running {
  Buffer<float> weight, bias;
  explicit Running(int64_t count) : weight(count), bias(count) {}
  void hand_over(double* dweight, double* dbias, int64_t count) {
    const auto move = [count](float* from, double* to) {
      int64_t i = 0;
      for (; i + lanes<Floats> <= count; i += lanes<Floats>) add_to(to + i, load<Floats>(from + i)), store(from + i, Floats{});
      for (; i < count; ++i) to[i] += from[i], from[i] = 0;
    };
    move(weight.data(), dweight), move(bias.data(), dbias);
  }
};

// Parameters per column. Their gradients are summed over each part of the batch apart, and then over the parts in order.
template <class T>
void backward_columns(const T* dy, const T* x, const double* weight, const double* mean, const double* rstd, T* dx, double* dweight,
                      double* dbias, const Rows& shape) {
  const std::vector<Piece> pieces = pieces_of(shape);
  const ParameterRow w(weight, shape.parameters(), in_float<T>);
  const int64_t parameters = shape.parameters(), samples = shape.rows / shape.groups, count = static_cast<int64_t>(pieces.size());
  const int64_t height = std::max<int64_t>(kChain, divide_up(samples, kParts)), parts = divide_up(samples, height);
  Buffer<double> sums_weight(parts * parameters), sums_bias(parts * parameters);
  std::vector<Sums> sums(shape.rows * count);
  std::vector<char> narrow(shape.rows * count);
  const To to = destination(shape.rows * shape.length() * sizeof(T), kAlternating);

  const auto measure = [&](int64_t row, int64_t group, int64_t i) {
    const int64_t at = row * shape.length() + pieces[i].begin, p = group * shape.k + pieces[i].parameter, slot = row * count + i;
    if constexpr (in_float<T>)
      narrow[slot] = pieces[i].count >= lanes<Floats> &&
                     reduce_columns<Floats>(dy + at, x + at, pieces[i].count, mean[row], rstd[row], w, p, sums[slot]);
    if (!narrow[slot]) reduce_columns<Doubles>(dy + at, x + at, pieces[i].count, mean[row], rstd[row], w, p, sums[slot]);
  };
  const auto merge = [&](int64_t row) {
    Sums total{0, 0};
    for (int64_t i = 0; i < count; ++i) total.first += sums[row * count + i].first, total.second += sums[row * count + i].second;
    return flow(shape, total);
  };
  // `running` holds the sums of the parameters from `origin` on.
  const auto finish = [&](int64_t n, int64_t group, int64_t i, Flow sent, Running& running, int64_t origin) {
    const int64_t row = n * shape.groups + group, measured = std::clamp<int64_t>(shape.measured - pieces[i].begin, 0, pieces[i].count);
    const auto stretch = [&](int64_t skip, int64_t length, Flow sent) {
      const int64_t at = row * shape.length() + pieces[i].begin + skip, p = group * shape.k + pieces[i].parameter + skip;
      if constexpr (in_float<T>)
        if (narrow[row * count + i] && abs(sent.constant) <= kLargest && abs(sent.slope) <= kLargest)
          return finish_columns<Floats>(dy + at, x + at, dx + at, length, mean[row], rstd[row], w, p, sent, &running.weight[p - origin],
                                        &running.bias[p - origin], to);
      const int64_t slot = n / height * parameters + p;
      finish_columns<Doubles>(dy + at, x + at, dx + at, length, mean[row], rstd[row], w, p, sent, &sums_weight[slot], &sums_bias[slot], to);
    };
    if (measured > 0) stretch(0, measured, sent);
    if (measured < pieces[i].count) stretch(measured, pieces[i].count - measured, {0, 0});
  };
  const auto chain_ends = [&](int64_t n) { return n % height % kChain == kChain - 1 || n % height == height - 1 || n == samples - 1; };

  if (split_rows(shape.rows, shape.length())) {
    std::vector<Flow> flows(shape.rows);
    parallel(shape.rows * count, 2 * kSegment, [&](int64_t begin, int64_t end) {
      for_grid(begin, end, shape.groups, count, [&](int64_t n, int64_t g, int64_t i) { measure(n * shape.groups + g, g, i); });
    });
    for (int64_t row = 0; row < shape.rows; ++row) flows[row] = merge(row);
    // One unit is one piece of one group in all samples of a part.
    parallel(parts * shape.groups * count, 2 * height * kSegment, [&](int64_t begin, int64_t end) {
      Running running(kSegment);
      for_grid(begin, end, shape.groups, count, [&](int64_t part, int64_t group, int64_t i) {
        const int64_t p = group * shape.k + pieces[i].parameter, slot = part * parameters + p;
        for (int64_t n = part * height; n < std::min(samples, (part + 1) * height); ++n) {
          finish(n, group, i, flows[n * shape.groups + group], running, p);
          if (chain_ends(n)) running.hand_over(&sums_weight[slot], &sums_bias[slot], pieces[i].count);
        }
      });
    });
  } else {
    parallel(parts, 2 * height * parameters, [&](int64_t begin, int64_t end) {
      Running running(parameters);
      for (int64_t n = begin * height; n < std::min(samples, end * height); ++n) {
        for (int64_t group = 0; group < shape.groups; ++group) {
          const int64_t row = n * shape.groups + group;
          for (int64_t i = 0; i < count; ++i) measure(row, group, i);
          const Flow sent = merge(row);
          for (int64_t i = 0; i < count; ++i) finish(n, group, i, sent, running, 0);
        }
        const int64_t slot = n / height * parameters;
        if (chain_ends(n)) running.hand_over(&sums_weight[slot], &sums_bias[slot], parameters);
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
void row_backward(const T* dy, const T* x, const double* weight, const double* bias, Activation f, const double* mean,
                  const double* rstd, T* dx, double* dweight, double* dbias, Rows shape) {
  if (shape.s == 1 && weight)
    backward_columns(dy, x, weight, mean, rstd, dx, dweight, dbias, shape);
  else
    backward_channels(dy, x, weight, bias, f, mean, rstd, dx, dweight, dbias, shape);
}

#define EQUINORM_INSTANTIATE(T)                                                                                    \
  template void row_forward(const T*, const double*, const double*, Activation, T*, double*, double*, Rows, double); \
  template void row_backward(const T*, const T*, const double*, const double*, Activation, const double*, const double*, T*, double*, \
                             double*, Rows);
EQUINORM_INSTANTIATE(double)
EQUINORM_INSTANTIATE(float)
EQUINORM_INSTANTIATE(bfloat16)
EQUINORM_INSTANTIATE(float16)

}  // namespace equinorm
