// The operators of the `equinorm` library: argument checks, dispatch on the element type, and nothing else.
//
// Built on PyTorch's stable ABI, so one binary serves every PyTorch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <fstream>
#include <optional>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace equinorm {

int64_t threads() { return torch::stable::get_num_threads(); }

void run_parallel(int64_t count, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { task(begin, end, context); });
}

To destination(int64_t bytes, double share) {
  // Linux tells what one group of cores shares; where nobody tells, what a server of the last ten years has.
  static const int64_t last_level = [] {
    int64_t kibibytes = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kibibytes;
    return kibibytes > 0 ? kibibytes << 10 : int64_t{32} << 20;
  }();
  return bytes >= share * last_level ? To::memory : To::caches;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define REQUIRE(condition, ...) STD_TORCH_CHECK(condition, "equinorm::", op, ": ", __VA_ARGS__)

// Calls body(pointer to T) for the element type of x.
template <class Body>
void dispatch(const char* op, ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(static_cast<float*>(nullptr));
    case ScalarType::Double: return body(static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return body(static_cast<bfloat16*>(nullptr));
    case ScalarType::Half: return body(static_cast<float16*>(nullptr));
    default: REQUIRE(false, "expected float32, float64, bfloat16 or float16, got scalar type ", static_cast<int>(type));
  }
}

// Whether the elements of t, walked channel-last or in order, are adjacent in memory. Strides of dimensions of size 1 are free.
bool dense(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dims = t.dim();
  int64_t expected = 1;
  const auto step = [&](int64_t d) {
    const bool fits = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return fits;
  };
  if (channels_last && dims > 1 && !step(1)) return false;
  for (int64_t d = dims - 1; d >= 0; --d)
    if (!(channels_last && d == 1) && !step(d)) return false;
  return true;
}

void check_data(const char* op, const char* name, const Tensor& t, const Tensor& like, int64_t numel, bool channels_last) {
  REQUIRE(t.is_cpu(), name, " must be on the CPU");
  REQUIRE(t.scalar_type() == like.scalar_type(), name, " must have the element type of x");
  REQUIRE(t.numel() == numel, name, " must have ", numel, " elements (the product of the sizes given), got ", t.numel());
  REQUIRE(dense(t, channels_last), name, " must be dense in ", channels_last ? "channels_last" : "contiguous", " order");
}

void check_small(const char* op, const char* name, const Tensor& t) {
  REQUIRE(t.is_cpu() && t.scalar_type() == ScalarType::Double && t.is_contiguous(), name,
          " must be a contiguous float64 tensor on the CPU");
}

int64_t small_step(const char* op, const char* name, const Tensor& t, Shape shape) {
  check_small(op, name, t);
  REQUIRE(t.numel() == shape.c || t.numel() == shape.n * shape.c, name, " must have ", shape.c, " (per channel) or ", shape.n * shape.c,
          " (per sample and channel) elements, got ", t.numel());
  return t.numel() == shape.n * shape.c ? shape.c : 0;
}

Small small(const char* op, const char* name, const Tensor& t, Shape shape) {
  const int64_t step = small_step(op, name, t, shape);
  return {static_cast<const double*>(t.const_data_ptr()), shape.n == 1 ? 0 : step};
}

SmallOut small_out(const char* op, const char* name, const Tensor& t, Shape shape) {
  const int64_t step = small_step(op, name, t, shape);
  return {static_cast<double*>(t.mutable_data_ptr()), shape.n == 1 ? 0 : step};
}

Shape checked_shape(const char* op, int64_t n, int64_t c, int64_t s, bool channels_last) {
  REQUIRE(n > 0 && c > 0 && s > 0, "sizes must be positive, got n=", n, ", c=", c, ", s=", s);
  return {n, c, s, channels_last || s == 1};
}

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Output memory, about to be written once from end to end. A large block comes from the system unmapped, and mapping it in pages of
// 4 KiB costs more than computing what goes into it; where the system leaves the choice to the program (the `madvise` mode of
// transparent huge pages), ask for pages of 2 MiB.
template <class T>
T* out(const Tensor& t) {
  T* const data = static_cast<T*>(t.mutable_data_ptr());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kLarge = uintptr_t{4} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(data + t.numel()) & ~(kPage - 1);
  if (end > begin && end - begin >= kLarge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return data;
}

void channel_moments_op(const Tensor& x, Tensor mean, Tensor var, int64_t n, int64_t c, int64_t s, bool channels_last) {
  const char* op = "channel_moments";
  const Shape shape = checked_shape(op, n, c, s, channels_last);
  check_data(op, "x", x, x, n * c * s, channels_last);
  const SmallOut m = small_out(op, "mean", mean, shape), v = small_out(op, "var", var, shape);
  REQUIRE(m.step == v.step, "mean and var must have the same number of elements, got ", mean.numel(), " and ", var.numel());
  dispatch(op, x.scalar_type(), [&]<class T>(T*) { channel_moments(in<T>(x), m, v, shape); });
}

Activation checked_activation(const char* op, int64_t kind, double parameter) {
  REQUIRE(kind >= 0 && kind < Activation::kKinds, "unknown activation ", kind);
  return {static_cast<Activation::Kind>(kind), parameter};
}

void channel_affine_op(const Tensor& x, const Tensor& center, const Tensor& scale, const Tensor& shift, Tensor y, int64_t n, int64_t c,
                       int64_t s, bool channels_last, int64_t activation, double parameter) {
  const char* op = "channel_affine";
  const Shape shape = checked_shape(op, n, c, s, channels_last);
  check_data(op, "x", x, x, n * c * s, channels_last);
  check_data(op, "y", y, x, n * c * s, channels_last);
  const Activated map{checked_activation(op, activation, parameter), small(op, "center", center, shape), small(op, "scale", scale, shape),
                      small(op, "shift", shift, shape)};
  dispatch(op, x.scalar_type(), [&]<class T>(T*) { channel_affine(in<T>(x), map, out<T>(y), shape); });
}

// The map and the activation whose gradient is to be pulled back, if there is one.
Activated checked_map(const char* op, const OptionalTensor& center, const OptionalTensor& scale, const OptionalTensor& shift, Shape shape,
                      int64_t activation, double parameter) {
  const Activation f = checked_activation(op, activation, parameter);
  if (!f) return {};
  REQUIRE(center && scale && shift, "an activation needs the center, scale and shift of the map before it");
  return {f, small(op, "map_center", *center, shape), small(op, "map_scale", *scale, shape), small(op, "map_shift", *shift, shape)};
}

void channel_reduce_op(const Tensor& dy, const Tensor& x, const Tensor& center, Tensor sum_dy, Tensor sum_dy_x, int64_t n, int64_t c,
                       int64_t s, bool channels_last, const OptionalTensor& map_center, const OptionalTensor& map_scale,
                       const OptionalTensor& map_shift, int64_t activation, double parameter) {
  const char* op = "channel_reduce";
  const Shape shape = checked_shape(op, n, c, s, channels_last);
  check_data(op, "x", x, x, n * c * s, channels_last);
  check_data(op, "dy", dy, x, n * c * s, channels_last);
  const Small k = small(op, "center", center, shape);
  const SmallOut a = small_out(op, "sum_dy", sum_dy, shape), b = small_out(op, "sum_dy_x", sum_dy_x, shape);
  const Activated map = checked_map(op, map_center, map_scale, map_shift, shape, activation, parameter);
  dispatch(op, x.scalar_type(), [&]<class T>(T*) { channel_reduce(in<T>(dy), in<T>(x), k, map, a, b, shape); });
}

void channel_backward_op(const Tensor& dy, const Tensor& x, const Tensor& center, const Tensor& scale, const Tensor& slope,
                         const Tensor& offset, Tensor dx, int64_t n, int64_t c, int64_t s, bool channels_last,
                         const OptionalTensor& map_center, const OptionalTensor& map_scale, const OptionalTensor& map_shift,
                         int64_t activation, double parameter) {
  const char* op = "channel_backward";
  const Shape shape = checked_shape(op, n, c, s, channels_last);
  check_data(op, "x", x, x, n * c * s, channels_last);
  check_data(op, "dy", dy, x, n * c * s, channels_last);
  check_data(op, "dx", dx, x, n * c * s, channels_last);
  const Small a = small(op, "center", center, shape), b = small(op, "scale", scale, shape), d = small(op, "slope", slope, shape),
              e = small(op, "offset", offset, shape);
  const Activated map = checked_map(op, map_center, map_scale, map_shift, shape, activation, parameter);
  dispatch(op, x.scalar_type(), [&]<class T>(T*) { channel_backward(in<T>(dy), in<T>(x), a, b, d, e, map, out<T>(dx), shape); });
}

Rows checked_rows(const char* op, int64_t rows, int64_t groups, int64_t k, int64_t s, int64_t measured, bool centered,
                  bool channels_last) {
  REQUIRE(rows > 0 && groups > 0 && k > 0 && s > 0, "sizes must be positive, got rows=", rows, ", groups=", groups, ", k=", k, ", s=", s);
  REQUIRE(rows % groups == 0, "rows must be a multiple of groups, got ", rows, " and ", groups);
  REQUIRE(measured > 0 && measured <= k * s, "measured must be within 1 and the row's length ", k * s, ", got ", measured);
  REQUIRE(!channels_last || (centered && measured == k * s), "channels_last rows are centered and measured throughout");
  return {rows, groups, k, s, measured, centered, channels_last};
}

// One parameter as doubles; where it is absent, `absent` throughout.
Buffer<double> parameter_of(const char* op, const char* name, const OptionalTensor& t, int64_t count, double absent) {
  Buffer<double> values(count, absent);
  if (!t) return values;
  REQUIRE(t->is_cpu() && t->is_contiguous(), name, " must be a contiguous tensor on the CPU");
  REQUIRE(t->numel() == count, name, " must have groups * k = ", count, " elements, got ", t->numel());
  dispatch(op, t->scalar_type(), [&]<class T>(T*) {
    const T* const from = in<T>(*t);
    for (int64_t i = 0; i < count; ++i) values[i] = load_one(from + i);
  });
  return values;
}

void check_statistic(const char* op, const char* name, const Tensor& t, int64_t rows) {
  check_small(op, name, t);
  REQUIRE(t.numel() == rows, name, " must have one element per row, ", rows, ", got ", t.numel());
}

Activation checked_row_activation(const char* op, int64_t kind, double parameter, const Rows& shape, bool parameters) {
  const Activation f = checked_activation(op, kind, parameter);
  REQUIRE(!f || shape.s > 1 || shape.channels_last || !parameters, "an activation cannot follow parameters per column");
  return f;
}

void row_forward_op(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, Tensor y, Tensor mean, Tensor rstd,
                    int64_t rows, int64_t groups, int64_t k, int64_t s, int64_t measured, double eps, bool centered, int64_t activation,
                    double parameter, bool channels_last) {
  const char* op = "row_forward";
  const Rows shape = checked_rows(op, rows, groups, k, s, measured, centered, channels_last);
  const Activation f = checked_row_activation(op, activation, parameter, shape, weight || bias);
  check_data(op, "x", x, x, rows * shape.length(), channels_last);
  check_data(op, "y", y, x, rows * shape.length(), channels_last);
  check_statistic(op, "mean", mean, rows);
  check_statistic(op, "rstd", rstd, rows);
  Buffer<double> w, b;
  if (weight || bias) {
    w = parameter_of(op, "weight", weight, shape.parameters(), 1);
    b = parameter_of(op, "bias", bias, shape.parameters(), 0);
  }
  dispatch(op, x.scalar_type(), [&]<class T>(T*) {
    (channels_last ? interleaved_forward<T> : row_forward<T>)(in<T>(x), w.empty() ? nullptr : w.data(), b.empty() ? nullptr : b.data(), f,
                                                              out<T>(y), out<double>(mean), out<double>(rstd), shape, eps);
  });
}

void row_backward_op(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd, Tensor dx,
                     const OptionalTensor& dweight, const OptionalTensor& dbias, int64_t rows, int64_t groups, int64_t k, int64_t s,
                     int64_t measured, bool centered, const OptionalTensor& bias, int64_t activation, double parameter,
                     bool channels_last) {
  const char* op = "row_backward";
  const Rows shape = checked_rows(op, rows, groups, k, s, measured, centered, channels_last);
  const Activation f = checked_row_activation(op, activation, parameter, shape, weight || bias);
  check_data(op, "x", x, x, rows * shape.length(), channels_last);
  check_data(op, "dy", dy, x, rows * shape.length(), channels_last);
  check_data(op, "dx", dx, x, rows * shape.length(), channels_last);
  check_statistic(op, "mean", mean, rows);
  check_statistic(op, "rstd", rstd, rows);
  // The gradients of both parameters are summed if any is wanted, in double, and rounded once.
  Buffer<double> w, b, dw, db;
  const auto check_gradient = [&](const char* name, const OptionalTensor& t) {
    if (!t) return;
    REQUIRE(t->is_cpu() && t->is_contiguous(), name, " must be a contiguous tensor on the CPU");
    REQUIRE(t->numel() == shape.parameters(), name, " must have groups * k = ", shape.parameters(), " elements, got ", t->numel());
  };
  check_gradient("dweight", dweight), check_gradient("dbias", dbias);
  if (weight || dweight || dbias) {
    w = parameter_of(op, "weight", weight, shape.parameters(), 1);
    dw.resize(shape.parameters()), db.resize(shape.parameters());
  }
  if (f && bias) b = parameter_of(op, "bias", bias, shape.parameters(), 0);
  dispatch(op, x.scalar_type(), [&]<class T>(T*) {
    (channels_last ? interleaved_backward<T> : row_backward<T>)(
        in<T>(dy), in<T>(x), w.empty() ? nullptr : w.data(), b.empty() ? nullptr : b.data(), f, in<double>(mean), in<double>(rstd),
        out<T>(dx), w.empty() ? nullptr : dw.data(), w.empty() ? nullptr : db.data(), shape);
  });
  const auto write = [&](const OptionalTensor& t, const Buffer<double>& values) {
    if (!t) return;
    dispatch(op, t->scalar_type(), [&]<class T>(T*) {
      T* const to = static_cast<T*>(t->mutable_data_ptr());
      for (int64_t i = 0; i < shape.parameters(); ++i) store_one(to + i, values[i]);
    });
  };
  write(dweight, dw), write(dbias, db);
}

// One channel's running estimates, unless what they would become is not finite in their own type.
void running_update_op(Tensor running_mean, Tensor running_var, const Tensor& mean, const Tensor& var, double weight, double bessel) {
  const char* op = "running_update";
  const int64_t c = running_mean.numel();
  check_data(op, "running_mean", running_mean, running_mean, c, false);
  check_data(op, "running_var", running_var, running_mean, c, false);
  check_small(op, "mean", mean);
  check_small(op, "var", var);
  REQUIRE(mean.numel() == c && var.numel() == c, "mean and var must have ", c, " elements, got ", mean.numel(), " and ", var.numel());
  const double *const m = in<double>(mean), *const v = in<double>(var);
  const auto update = [&]<class T>(T* means, T* variances) {
    for (int64_t i = 0; i < c; ++i) {
      const T next_mean = static_cast<T>(means[i] + weight * (m[i] - means[i]));
      const T next_var = static_cast<T>(variances[i] + weight * (v[i] * bessel - variances[i]));
      if (std::isfinite(next_mean) && std::isfinite(next_var)) means[i] = next_mean, variances[i] = next_var;
    }
  };
  if (running_mean.scalar_type() == ScalarType::Double) {
    update(static_cast<double*>(running_mean.mutable_data_ptr()), static_cast<double*>(running_var.mutable_data_ptr()));
  } else {
    REQUIRE(running_mean.scalar_type() == ScalarType::Float, "running_mean must be float32 or float64");
    update(static_cast<float*>(running_mean.mutable_data_ptr()), static_cast<float*>(running_var.mutable_data_ptr()));
  }
}

}  // namespace
}  // namespace equinorm

STABLE_TORCH_LIBRARY(equinorm, m) {
  m.def("channel_moments(Tensor x, Tensor(a!) mean, Tensor(b!) var, int n, int c, int s, bool channels_last) -> ()");
  m.def("channel_affine(Tensor x, Tensor center, Tensor scale, Tensor shift, Tensor(a!) y, int n, int c, int s, bool channels_last,"
        " int activation=0, float parameter=0.0) -> ()");
  m.def("channel_reduce(Tensor dy, Tensor x, Tensor center, Tensor(a!) sum_dy, Tensor(b!) sum_dy_x, int n, int c, int s,"
        " bool channels_last, Tensor? map_center=None, Tensor? map_scale=None, Tensor? map_shift=None, int activation=0,"
        " float parameter=0.0) -> ()");
  m.def("channel_backward(Tensor dy, Tensor x, Tensor center, Tensor scale, Tensor slope, Tensor offset, Tensor(a!) dx, int n, int c,"
        " int s, bool channels_last, Tensor? map_center=None, Tensor? map_scale=None, Tensor? map_shift=None, int activation=0,"
        " float parameter=0.0) -> ()");
  m.def("row_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd, int rows, int groups, int k,"
        " int s, int measured, float eps, bool centered, int activation=0, float parameter=0.0, bool channels_last=False) -> ()");
  m.def("row_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor(a!) dx, Tensor(b!)? dweight,"
        " Tensor(c!)? dbias, int rows, int groups, int k, int s, int measured, bool centered, Tensor? bias=None, int activation=0,"
        " float parameter=0.0, bool channels_last=False) -> ()");
  m.def("running_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float weight, float bessel) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(equinorm, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&equinorm::channel_moments_op));
  m.impl("channel_affine", TORCH_BOX(&equinorm::channel_affine_op));
  m.impl("channel_reduce", TORCH_BOX(&equinorm::channel_reduce_op));
  m.impl("channel_backward", TORCH_BOX(&equinorm::channel_backward_op));
  m.impl("row_forward", TORCH_BOX(&equinorm::row_forward_op));
  m.impl("row_backward", TORCH_BOX(&equinorm::row_backward_op));
  m.impl("running_update", TORCH_BOX(&equinorm::running_update_op));
}
