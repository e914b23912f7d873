// What the kernels compute, free of PyTorch: pointers, sizes and one way to run in parallel.
//
// Two promises hold throughout. The bits of a result depend on the shape and the values only: work is cut into pieces whose borders
// come from the shape, never from the number of threads, and partial results are merged in a fixed order. And a number per sample is
// the same whatever other samples are in the batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "lanes.h"

namespace equinorm {

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

// Longest run that is summed with one shift. 4096 floats stay in the first-level cache; and since the shift is one of the values,
// (shift - mean)^2 <= count * variance, so at most 12 of a double's 53 bits cancel.
constexpr int64_t kSegment = 4096;

// Memory that begins on a cache line, so that no vector lies across two.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
};
template <class T>
using Buffer = std::vector<T, LineAllocator<T>>;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t threads();
void run_parallel(int64_t count, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context);

// Calls work(begin, end) on pieces of [0, count); `size` is the number of elements behind one unit of work.
template <class Work>
void parallel(int64_t count, int64_t size, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size));
  if (count <= grain) {
    work(0, count);
    fence();
    return;
  }
  run_parallel(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Work*>(context))(begin, end);
        fence();
      },
      const_cast<void*>(static_cast<const void*>(&work)));
}

// Calls work(i, j, k) for the units begin <= u < end of a grid, where u = (i * width + j) * depth + k.
template <class Work>
void for_grid(int64_t begin, int64_t end, int64_t width, int64_t depth, const Work& work) {
  int64_t k = begin % depth, j = begin / depth % width, i = begin / depth / width;
  for (int64_t u = begin; u < end; ++u) {
    work(i, j, k);
    if (++k == depth) {
      k = 0;
      if (++j == width) j = 0, ++i;
    }
  }
}

// Where results go: to the caches, for whoever reads them next, or past them.
enum class To { caches, memory };

// Past them goes what would take more than `share` of the last level: what it is computed from needs the rest, and the line that is about
// to be overwritten need not be read first. A map alone reads and writes at once, which the caches do faster for as long as both fit.
// Where reading and writing alternate, or two tensors are read, writing past them pays earlier. Decides about speed only.
constexpr double kMapAlone = 0.75, kAlternating = 0.5;
To destination(int64_t bytes, double share);

// Whether vectors of V can be streamed there.
template <class V, class T>
bool aligned(const T* to) {
  return reinterpret_cast<uintptr_t>(to) % (lanes<V> * sizeof(T)) == 0;
}

// What follows a map at once. The numbers are those that the operators take.
struct Activation {
  enum Kind : int64_t { kNone, kRelu, kLeakyRelu, kRelu6, kElu, kSilu, kHardswish };
  static constexpr int64_t kKinds = 7;
  Kind kind = kNone;
  double parameter = 0;  // slope of leaky_relu, alpha of elu
  explicit operator bool() const { return kind != kNone; }
};

// x: (n, c, s) in memory, or (n, s, c) when channels_last.
struct Shape {
  int64_t n, c, s;
  bool channels_last;
};

// A small tensor, (n, c) or (1, c): the step from one sample to the next is c or 0.
struct Small {
  const double* data;
  int64_t step;
  const double* sample(int64_t i) const { return data + i * step; }
};
struct SmallOut {
  double* data;
  int64_t step;
};

// An affine map of x and the activation that follows it.
struct Activated {
  Activation f;
  Small center, scale, shift;
};

template <class T>
void channel_moments(const T* x, SmallOut mean, SmallOut var, Shape shape);
template <class T>
void channel_affine(const T* x, Activated map, T* y, Shape shape);
// dy is the gradient behind the activation, if there is one.
template <class T>
void channel_reduce(const T* dy, const T* x, Small center, Activated map, SmallOut sum_dy, SmallOut sum_dy_x, Shape shape);
template <class T>
void channel_backward(const T* dy, const T* x, Small center, Small scale, Small slope, Small offset, Activated map, T* dx, Shape shape);

// `rows` rows of k * s elements; element i of row r has the parameter (r % groups) * k + i / s; the first `measured` elements of a
// row enter its statistic.
struct Rows {
  int64_t rows, groups, k, s, measured;
  bool centered;
  bool channels_last = false;  // the rows of a sample are interleaved, (s, groups * k); only with measured = k * s
  int64_t length() const { return k * s; }
  int64_t parameters() const { return groups * k; }
};

// weight and bias: one double per parameter; both or none. An activation needs s > 1 or no parameters.
template <class T>
void row_forward(const T* x, const double* weight, const double* bias, Activation f, T* y, double* mean, double* rstd, Rows shape,
                 double eps);
// dweight and dbias: one double per parameter; both or none; weight only together with them; bias only where an activation follows.
template <class T>
void row_backward(const T* dy, const T* x, const double* weight, const double* bias, Activation f, const double* mean,
                  const double* rstd, T* dx, double* dweight, double* dbias, Rows shape);

// The same for interleaved rows.
template <class T>
void interleaved_forward(const T* x, const double* weight, const double* bias, Activation f, T* y, double* mean, double* rstd, Rows shape,
                         double eps);
template <class T>
void interleaved_backward(const T* dy, const T* x, const double* weight, const double* bias, Activation f, const double* mean,
                          const double* rstd, T* dx, double* dweight, double* dbias, Rows shape);

}  // namespace equinorm
