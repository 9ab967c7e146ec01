// The planes of a residual pyramid on the CPU, map by map: a map's planes are channels-last and
// belong to one thread at a time.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "executor.h"
#include "kernels.h"
#include "search.h"

namespace tokenflow::cpu {

template <typename T>
const ChannelKernels<T>& channel_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().channels_float;
  } else {
    return kernels().channels_double;
  }
}

inline int64_t area(Extent e) { return static_cast<int64_t>(e.height) * e.width; }

template <typename T>
class Planes {
 public:
  Planes(const Pyramid& pyramid, int dim, const Executor& executor)
      : pyramid_(pyramid),
        dim_(dim),
        executor_(executor),
        plane_(channel_kernels<T>()),
        full_{pyramid.height, pyramid.width} {
    for (int s = 0; s < pyramid.num_scales; ++s) {
      const Extent e = pyramid.extent[s];
      scratch_size_ = std::max(
          {scratch_size_, area(e) * dim, static_cast<int64_t>(e.height) * full_.width * dim});
    }
  }

  // Elements of a plane, of a scale's rows, and of a scratch area, which holds either scale's rows.
  int64_t plane_size() const { return area(full_) * dim_; }
  int64_t row_size(int s) const { return area(pyramid_.extent[s]) * dim_; }
  int64_t scratch_size() const { return scratch_size_; }

  // task(b, scratch) for every map; scratch holds `areas` scratch areas.
  template <typename Task>
  void each_map(int areas, const Task& task) const {
    executor_.for_each(pyramid_.batch, [&](int64_t b) {
      thread_local std::vector<T> scratch;
      scratch.resize(std::max<size_t>(scratch.size(), areas * scratch_size_));
      task(b, scratch.data());
    });
  }

  // Between [batch, dim, height, width] and a map's plane.
  void load(const T* h, int64_t b, T* plane) const {
    plane_.to_channels_last(h + b * plane_size(), dim_, area(full_), plane);
  }
  void store(const T* plane, int64_t b, T* out) const {
    plane_.to_channels_first(plane, dim_, area(full_), out + b * plane_size());
  }

  // rows [extent[s], dim] = the plane pooled to scale s.
  void pool(const T* plane, int s, T* rows) const {
    if (is_full(s)) {
      std::copy_n(plane, plane_size(), rows);
    } else {
      plane_.pool(plane, dim_, full_, pyramid_.extent[s], rows);
    }
  }
  void pool_transpose_add(const T* grad_rows, int s, T* grad_plane) const {
    if (is_full(s)) {
      for (int64_t i = 0; i < plane_size(); ++i) grad_plane[i] += grad_rows[i];
    } else {
      plane_.pool_transpose_add(grad_rows, dim_, full_, pyramid_.extent[s], grad_plane);
    }
  }

  // sum += u, residual -= u for the upsampled rows of scale s; either may be null. `scratch` is one
  // area.
  void add(const T* rows, int s, T* scratch, T* sum, T* residual) const {
    if (is_full(s)) {
      for (int64_t i = 0; sum && i < plane_size(); ++i) sum[i] += rows[i];
      for (int64_t i = 0; residual && i < plane_size(); ++i) residual[i] -= rows[i];
    } else {
      plane_.upsample(rows, dim_, pyramid_.extent[s], full_, pyramid_.upsampling, scratch, sum,
                      residual);
    }
  }
  void add_transpose(const T* grad_plane, int s, T* scratch, T* grad_rows) const {
    if (is_full(s)) {
      std::copy_n(grad_plane, plane_size(), grad_rows);
    } else {
      plane_.upsample_transpose(grad_plane, dim_, pyramid_.extent[s], full_, pyramid_.upsampling,
                                scratch, grad_rows);
    }
  }

 private:
  // Such a scale neither averages nor interpolates.
  bool is_full(int s) const {
    return pyramid_.extent[s].height == full_.height && pyramid_.extent[s].width == full_.width;
  }

  const Pyramid& pyramid_;
  const int dim_;
  const Executor& executor_;
  const ChannelKernels<T>& plane_;
  const Extent full_;
  int64_t scratch_size_ = 0;
};

}  // namespace tokenflow::cpu
