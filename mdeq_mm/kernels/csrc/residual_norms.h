// norm3(act(norm2(x * mask + injection) + z)), the end of a residual block.
#pragma once

#include "group_norm.h"

namespace mdeq {

// What the block's end is computed from, all but x and z optional. Maps are
// (images, pixels, channels), the mask (images, channels).
template <class T, class A>
struct Residual {
  const T *x, *z, *injection;
  const A* mask;
  const A *weight2, *bias2, *weight3, *bias3;
};

// One image of it: the sum that norm2 takes, and norm2's result plus z, from the start every time.
template <class T, class A>
struct ResidualImage {
  const T *x, *z, *injection;
  Buffer<A> mask;
  Columns<A> norm2;

  ResidualImage(const Layout& layout2) : mask(layout2.period), norm2(layout2) {}

  void set(const Residual<T, A>& all, const Layout& layout, int64_t n) {
    x = all.x + n * layout.size();
    z = all.z + n * layout.size();
    injection = all.injection ? all.injection + n * layout.size() : nullptr;
    const A* row = all.mask ? all.mask + n * layout.channels : nullptr;
    spread(layout, mask.get(), [&](int64_t c) { return row ? row[c] : A(1); });
  }
  template <class L>
  typename L::V sum(L lane, int64_t i, int64_t c) const {
    const auto u = lane.load(x + i) * lane.load(mask.get() + c);
    return injection ? u + lane.load(injection + i) : u;
  }
  void sum_moments(const Layout& layout, double eps, A* mean, A* rstd) const {
    const auto value = [&](auto lane, int64_t i, int64_t c) { return sum(lane, i, c); };
    moments<T>(layout, eps, value, mean, rstd);
  }
};

template <class Act, class T, class A>
void residual_norms(
    const Residual<T, A>& all,
    T* y,
    A* means2,
    A* rstds2,
    A* means3,
    A* rstds3,
    int64_t images,
    const Layout& layout2,
    const Layout& layout3,
    double eps2,
    double eps3) {
  for_images(images, layout2.size(), [&](int64_t begin, int64_t end) {
    ResidualImage<T, A> image(layout2);
    Columns<A> norm3(layout3);
    for (int64_t n = begin; n < end; ++n) {
      image.set(all, layout2, n);
      T* out = y + n * layout2.size();
      A *mean2 = means2 + n * layout2.groups, *rstd2 = rstds2 + n * layout2.groups;
      A *mean3 = means3 + n * layout3.groups, *rstd3 = rstds3 + n * layout3.groups;
      image.sum_moments(layout2, eps2, mean2, rstd2);
      image.norm2.set(layout2, all.weight2, all.bias2, mean2, rstd2);
      // The result's own memory holds what norm3 normalizes until it does.
      const auto rectified = [&](auto lane, int64_t i, int64_t c) {
        const auto t = Act::template of<A>(
            lane, image.norm2(lane, image.sum(lane, i, c), c) + lane.load(image.z + i))[0];
        lane.store(out + i, t);
        return t;
      };
      moments<T>(layout3, eps3, rectified, mean3, rstd3);
      norm3.set(layout3, all.weight3, all.bias3, mean3, rstd3);
      share(layout3.blocks(), [&](int64_t b) {
        sweep<A>(
            layout3.begin(b), layout3.end(b), layout3.period, [&](auto lane, int64_t i, int64_t c) {
              lane.store(out + i, norm3(lane, lane.load(out + i), c));
            });
      });
    }
  });
}

// Gradients: dx, dz always; dinjection null unless there is both an injection and a mask, since
// otherwise it is dx. affine2, affine3: (images, 2, channels) or null.
template <class Act, class T, class A>
void residual_norms_backward(
    const T* grad,
    const Residual<T, A>& all,
    const A* means2,
    const A* rstds2,
    const A* means3,
    const A* rstds3,
    T* dx,
    T* dz,
    T* dinjection,
    double* affine2,
    double* affine3,
    int64_t images,
    const Layout& layout2,
    const Layout& layout3) {
  const int64_t size = layout2.size(), channels = layout2.channels;
  for_images(images, size, [&](int64_t begin, int64_t end) {
    ResidualImage<T, A> image(layout2);
    Columns<A>& norm2 = image.norm2;
    Columns<A> norm3(layout3);
    Gradient<A> gradient2(layout2), gradient3(layout3);
    for (int64_t n = begin; n < end; ++n) {
      image.set(all, layout2, n);
      const T* dy = grad + n * size;
      T *dx_n = dx + n * size, *dz_n = dz + n * size;
      T* dinjection_n = dinjection ? dinjection + n * size : nullptr;
      const A *rstd2 = rstds2 + n * layout2.groups, *rstd3 = rstds3 + n * layout3.groups;
      norm2.set(layout2, all.weight2, all.bias2, means2 + n * layout2.groups, rstd2);
      norm3.set(layout3, all.weight3, all.bias3, means3 + n * layout3.groups, rstd3);

      // The sum about norm2's mean, and what the rectifier is given.
      const auto inner = [&](auto lane, int64_t i, int64_t c) {
        const auto centered =
            norm2.centered(lane, image.sum(lane, i, c), c);
        const auto t = norm2.affine(lane, centered, c) + lane.load(image.z + i);
        return std::array<typename decltype(lane)::V, 2>{centered, t};
      };
      gradient3.template collect<T>(layout3, [&](auto lane, int64_t i, int64_t c) {
        const auto t = Act::template of<A>(lane, inner(lane, i, c)[1])[0];
        return std::array<typename decltype(lane)::V, 2>{
            lane.load(dy + i), norm3.centered(lane, t, c)};
      });
      gradient3.set(layout3, all.weight3, rstd3);
      gradient3.affine(layout3, rstd3, affine3 ? affine3 + n * 2 * channels : nullptr);

      gradient2.template collect<T>(layout2, [&](auto lane, int64_t i, int64_t c) {
        const auto [centered, t] = inner(lane, i, c);
        const auto [rectified, key] = Act::template of<A>(lane, t);
        const auto outer = norm3.centered(lane, rectified, c);
        const auto dt = gradient3(lane, lane.load(dy + i), outer, norm3.scale.get(), c);
        const auto da = Act::template backward<A>(lane, t, key, dt);
        lane.store(dz_n + i, da);
        return std::array<typename decltype(lane)::V, 2>{da, centered};
      });
      gradient2.set(layout2, all.weight2, rstd2);
      gradient2.affine(layout2, rstd2, affine2 ? affine2 + n * 2 * channels : nullptr);

      share(layout2.blocks(), [&](int64_t b) {
        sweep<A>(
            layout2.begin(b), layout2.end(b), layout2.period, [&](auto lane, int64_t i, int64_t c) {
              const auto centered =
                  norm2.centered(lane, image.sum(lane, i, c), c);
              const auto du = gradient2(lane, lane.load(dz_n + i), centered, norm2.scale.get(), c);
              if (dinjection_n) lane.store(dinjection_n + i, du);
              lane.store(dx_n + i, du * lane.load(image.mask.get() + c));
            });
      });
    }
  });
}

}  // namespace mdeq
