// relu(group_norm(x)), or group_norm(x) alone.
#pragma once

#include "group_norm.h"

namespace mdeq {

// x, y: (images, pixels, channels), y may be x. means, rstds: (images, groups), written.
template <class Act, class T, class A>
void norm_relu(
    const T* x,
    const A* weight,
    const A* bias,
    T* y,
    A* means,
    A* rstds,
    int64_t images,
    const Layout& layout,
    double eps) {
  for_images(images, layout.size(), [&](int64_t begin, int64_t end) {
    Columns<A> norm(layout);
    for (int64_t n = begin; n < end; ++n) {
      const T* in = x + n * layout.size();
      T* out = y + n * layout.size();
      A *mean = means + n * layout.groups, *rstd = rstds + n * layout.groups;
      map_moments(layout, eps, in, mean, rstd);
      norm.set(layout, weight, bias, mean, rstd);
      share(layout.blocks(), [&](int64_t b) {
        sweep<A>(layout.begin(b), layout.end(b), layout.period, [&](auto lane, int64_t i, int64_t c) {
          lane.store(out + i, Act::template of<A>(lane, norm(lane, lane.load(in + i), c))[0]);
        });
      });
    }
  });
}

// affine: (images, 2, channels), what each image gives to the gradients of weight and bias, or
// null. The sign of the norm is found again from x, so that y need not be kept.
template <class Act, class T, class A>
void norm_relu_backward(
    const T* grad,
    const T* x,
    const A* weight,
    const A* bias,
    const A* means,
    const A* rstds,
    T* dx,
    double* affine,
    int64_t images,
    const Layout& layout) {
  for_images(images, layout.size(), [&](int64_t begin, int64_t end) {
    Columns<A> norm(layout);
    Gradient<A> gradient(layout);
    for (int64_t n = begin; n < end; ++n) {
      const T *in = x + n * layout.size(), *dy = grad + n * layout.size();
      T* out = dx + n * layout.size();
      const A* rstd = rstds + n * layout.groups;
      norm.set(layout, weight, bias, means + n * layout.groups, rstd);
      const auto values = [&](auto lane, int64_t i, int64_t c) {
        const auto centered = norm.centered(lane, lane.load(in + i), c);
        const auto result = norm.affine(lane, centered, c);
        const auto g = Act::template backward<A>(lane, result, result, lane.load(dy + i));
        return std::array<typename decltype(lane)::V, 2>{g, centered};
      };
      gradient.template collect<T>(layout, values);
      gradient.set(layout, weight, rstd);
      gradient.affine(layout, rstd, affine ? affine + n * 2 * layout.channels : nullptr);
      share(layout.blocks(), [&](int64_t b) {
        sweep<A>(layout.begin(b), layout.end(b), layout.period, [&](auto lane, int64_t i, int64_t c) {
          const auto [g, centered] = values(lane, i, c);
          lane.store(out + i, gradient(lane, g, centered, norm.scale.get(), c));
        });
      });
    }
  });
}

}  // namespace mdeq
