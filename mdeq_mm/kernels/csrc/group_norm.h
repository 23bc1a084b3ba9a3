// Mean and variance of groups of channels, and the gradient of normalizing by them.
#pragma once

#include "maps.h"

namespace mdeq {

// Mean and 1 / sqrt(variance + eps) of each group of one image. value(lane, i, c) gives the values
// to normalize, read from maps of T; it may store them, and may be called again.
//
// The sums are taken block by block, about the mean of the block's first rows, and once more about
// the block's own mean where that lies far off: no digits are lost, whatever the values are. The
// blocks are joined by the formula of Chan, Golub & LeVeque (1983).
template <class T, class A, class Value>
void moments(const Layout& layout, double eps, const Value& value, A* mean, A* rstd) {
  const int64_t groups = layout.groups, width = layout.group_channels();
  const auto values = [&](int64_t begin, int64_t end) {
    return double((end - begin) / layout.channels * width);
  };
  // (blocks, 2, groups): mean, sum of squares about it.
  Buffer<double> partial(layout.blocks() * 2 * groups);
  share(layout.blocks(), [&](int64_t b) {
    const int64_t begin = layout.begin(b), end = layout.end(b);
    const int64_t head = std::min(begin + kHead * layout.period, end);
    double* means = partial.get() + b * 2 * groups;
    double* squares = means + groups;
    Buffer<A> center(layout.period), sums(layout.period), products(layout.period);
    std::fill_n(center.get(), layout.period, A(0));
    const auto pass = [&](int64_t stop) {
      std::fill_n(sums.get(), layout.period, A(0));
      std::fill_n(products.get(), layout.period, A(0));
      reduce<T, A, 2>(
          begin,
          stop,
          layout.period,
          {sums.get(), products.get()},
          [&](auto lane, int64_t i, int64_t c) {
            const auto d = value(lane, i, c) - lane.load(center.get() + c);
            return std::array<typename decltype(lane)::V, 2>{d, d * d};
          });
    };
    pass(head);
    for (int64_t g = 0; g < groups; ++g)
      means[g] = gather_group(layout, sums.get(), g) / values(begin, head);
    const double count = values(begin, end);
    for (bool far = true, again = true; far; again = false) {
      spread(layout, center.get(), [&](int64_t c) { return means[c / width]; });
      pass(end);
      far = false;
      for (int64_t g = 0; g < groups; ++g) {
        const double sum = gather_group(layout, sums.get(), g);
        const double about_center = gather_group(layout, products.get(), g);
        means[g] = double(center[g * width]) + sum / count;
        squares[g] = about_center - sum * sum / count;
        far = far || (again && squares[g] < about_center / 2);
      }
    }
  });

  for (int64_t g = 0; g < groups; ++g) {
    double count = 0, m = 0, square = 0;
    for (int64_t b = 0; b < layout.blocks(); ++b) {
      const double n = values(layout.begin(b), layout.end(b));
      const double step = partial[b * 2 * groups + g] - m;
      square += partial[(b * 2 + 1) * groups + g] + step * step * count * n / (count + n);
      m += step * n / (count + n);
      count += n;
    }
    mean[g] = A(m);
    // A difference of sums may fall below zero by rounding; NaN must pass.
    rstd[g] = A(1 / std::sqrt((square < 0 ? 0 : square) / count + eps));
  }
}

// The same of a map in memory.
template <class T, class A>
void map_moments(const Layout& layout, double eps, const T* x, A* mean, A* rstd) {
  const auto value = [&](auto lane, int64_t i, int64_t) { return lane.load(x + i); };
  moments<T>(layout, eps, value, mean, rstd);
}

// (x - mean) * scale + shift, the norm with its affine map, one column a channel.
template <class A>
struct Columns {
  Buffer<A> mean, scale, shift;

  explicit Columns(const Layout& layout)
      : mean(layout.period), scale(layout.period), shift(layout.period) {}

  void set(const Layout& layout, const A* weight, const A* bias, const A* means, const A* rstds) {
    const int64_t width = layout.group_channels();
    spread(layout, mean.get(), [&](int64_t c) { return means[c / width]; });
    spread(layout, scale.get(), [&](int64_t c) {
      return weight ? weight[c] * rstds[c / width] : rstds[c / width];
    });
    spread(layout, shift.get(), [&](int64_t c) { return bias ? bias[c] : A(0); });
  }
  template <class L>
  typename L::V centered(L lane, typename L::V x, int64_t c) const {
    return x - lane.load(mean.get() + c);
  }
  template <class L>
  typename L::V affine(L lane, typename L::V centered, int64_t c) const {
    return centered * lane.load(scale.get() + c) + lane.load(shift.get() + c);
  }
  template <class L>
  typename L::V operator()(L lane, typename L::V x, int64_t c) const {
    return affine(lane, centered(lane, x, c), c);
  }
};

// The gradient of a norm needs, per channel, the sum of the gradient g of its result and that of
// g * (x - mean). The gradient of x is then g * scale - constant - (x - mean) * slope, and the sums
// themselves are the gradients of shift and scale.
template <class A>
struct Gradient {
  Buffer<A> constant, slope;
  Buffer<double> sums;  // (2, channels)

  explicit Gradient(const Layout& layout)
      : constant(layout.period), slope(layout.period), sums(2 * layout.channels) {}

  // values(lane, i, c) gives g and x - mean, read from maps of T, and may store.
  template <class T, class Values>
  void collect(const Layout& layout, const Values& values) {
    const int64_t channels = layout.channels;
    Buffer<double> partial(layout.blocks() * 2 * channels);
    share(layout.blocks(), [&](int64_t b) {
      Buffer<A> grads(layout.period), products(layout.period);
      std::fill_n(grads.get(), layout.period, A(0));
      std::fill_n(products.get(), layout.period, A(0));
      reduce<T, A, 2>(
          layout.begin(b),
          layout.end(b),
          layout.period,
          {grads.get(), products.get()},
          [&](auto lane, int64_t i, int64_t c) {
            auto pair = values(lane, i, c);
            pair[1] *= pair[0];
            return pair;
          });
      for (int64_t c = 0; c < channels; ++c) {
        partial[b * 2 * channels + c] = gather(layout, grads.get(), c);
        partial[(b * 2 + 1) * channels + c] = gather(layout, products.get(), c);
      }
    });
    std::fill_n(sums.get(), 2 * channels, 0.0);
    for (int64_t b = 0; b < layout.blocks(); ++b)
      for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += partial[b * 2 * channels + c];
  }

  void set(const Layout& layout, const A* weight, const A* rstds) {
    const int64_t width = layout.group_channels();
    const double count = double(layout.pixels * width);
    const double* grads = sums.get();
    const double* products = grads + layout.channels;
    for (int64_t g = 0; g < layout.groups; ++g) {
      double a = 0, b = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const double w = weight ? double(weight[c]) : 1.0;
        a += w * grads[c];
        b += w * products[c];
      }
      const double r = rstds[g];
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        constant[c] = A(r * a / count);
        slope[c] = A(r * r * r * b / count);
      }
    }
    spread(layout, constant.get(), [&](int64_t c) { return constant[c]; });
    spread(layout, slope.get(), [&](int64_t c) { return slope[c]; });
  }

  template <class L>
  typename L::V operator()(
      L lane, typename L::V grad, typename L::V centered, const A* scale, int64_t c) const {
    return grad * lane.load(scale + c) - lane.load(constant.get() + c) -
        centered * lane.load(slope.get() + c);
  }

  // The gradients of weight and bias from this image alone, (2, channels); to may be null.
  void affine(const Layout& layout, const A* rstds, double* to) {
    if (!to) return;
    for (int64_t c = 0; c < layout.channels; ++c) {
      to[c] = sums[layout.channels + c] * rstds[c / layout.group_channels()];
      to[layout.channels + c] = sums[c];
    }
  }
};

}  // namespace mdeq
