// act(own + sum of terms). A term may have another resolution, and is then read as nearest
// upsampling would write it; and it may be given before its group norm, which is then applied where
// the term is read. Neither result is ever a map in memory.
#pragma once

#include <memory>
#include <vector>

#include "group_norm.h"

namespace mdeq {

// The source pixel of each pixel along one side, by the rule of torch's nearest interpolation.
inline std::vector<int64_t> nearest(int64_t source, int64_t target) {
  std::vector<int64_t> index(target);
  const float ratio = float(source) / float(target);
  for (int64_t i = 0; i < target; ++i)
    index[i] = source == target ? i
        : target == 2 * source
        ? i / 2
        : std::min(int64_t(std::floor(float(i) * ratio)), source - 1);
  return index;
}

// One term: (images, height, width, channels).
template <class T, class A>
struct Term {
  const T* x;
  int64_t height, width;
  bool same;                           // as high and as wide as the sum
  std::vector<int64_t> rows, columns;  // source pixels otherwise
  Layout layout;
  bool normed;
  double eps;
  const A *weight, *bias;
  A *means, *rstds;  // (images, groups)
  T* dx;             // null where the gradient is that of own
  double* affine;    // (images, 2, channels) or null

  const T* image(int64_t n) const { return x + n * layout.size(); }
  A* mean(int64_t n) const { return means + n * layout.groups; }
  A* rstd(int64_t n) const { return rstds + n * layout.groups; }
};

// Row `row` of the sum's height, taken from a term of another height or width. to: (width, channels).
template <class T, class A>
void expand(
    const Term<T, A>& term, Columns<A>& norm, int64_t n, int64_t row, int64_t width, A* to) {
  const int64_t channels = term.layout.channels;
  const T* from = term.image(n) + term.rows[row] * term.width * channels;
  for (int64_t i = 0; i < width; ++i) {
    A* pixel = to + i * channels;
    if (i > 0 && term.columns[i] == term.columns[i - 1]) {
      std::memcpy(pixel, pixel - channels, channels * sizeof(A));
      continue;
    }
    const T* source = from + term.columns[i] * channels;
    sweep<A>(0, channels, term.layout.period, [&](auto lane, int64_t j, int64_t c) {
      const auto v = lane.load(source + j);
      lane.store(pixel + j, term.normed ? norm(lane, v, c) : v);
    });
  }
}

// The rows [begin, end) of the result. Every source row is expanded once, however many rows of the
// sum it serves.
template <class Act, class T, class A>
void sum_rows(
    const T* own,
    const std::vector<Term<T, A>>& terms,
    const std::vector<std::unique_ptr<Columns<A>>>& norms,
    T* out,
    int64_t n,
    int64_t begin,
    int64_t end,
    int64_t width,
    const Layout& layout) {
  const int64_t length = width * layout.channels;
  Buffer<A> total(length);
  std::vector<std::unique_ptr<Buffer<A>>> expanded;
  for (const auto& term : terms)
    expanded.push_back(std::make_unique<Buffer<A>>(term.same ? 0 : length));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * length;
    const T* source = own + start;
    const auto add = [&](const auto& value) {
      sweep<A>(0, length, layout.period, [&](auto lane, int64_t i, int64_t c) {
        lane.store(total.get() + i, lane.load(total.get() + i) + value(lane, i, c));
      });
    };
    sweep<A>(0, length, layout.period, [&](auto lane, int64_t i, int64_t) {
      lane.store(total.get() + i, lane.load(source + i));
    });
    for (size_t k = 0; k < terms.size(); ++k) {
      const Term<T, A>& term = terms[k];
      if (term.same) {
        const T* from = term.image(n) + start;
        Columns<A>& norm = *norms[k];
        if (term.normed)
          add([&](auto lane, int64_t i, int64_t c) { return norm(lane, lane.load(from + i), c); });
        else
          add([&](auto lane, int64_t i, int64_t) { return lane.load(from + i); });
        continue;
      }
      A* from = expanded[k]->get();
      if (row == begin || term.rows[row] != term.rows[row - 1])
        expand(term, *norms[k], n, row, width, from);
      add([&](auto lane, int64_t i, int64_t) { return lane.load(from + i); });
    }
    sweep<A>(0, length, layout.period, [&](auto lane, int64_t i, int64_t) {
      lane.store(out + start + i, Act::template of<A>(lane, lane.load(total.get() + i))[0]);
    });
  }
}

template <class Act, class T, class A>
void sum_rectify(
    const T* own,
    const std::vector<Term<T, A>>& terms,
    T* y,
    int64_t images,
    int64_t height,
    int64_t width,
    const Layout& layout) {
  const int64_t rows = std::max<int64_t>(kBlock / (width * layout.channels), 1);
  for_images(images, layout.size(), [&](int64_t begin, int64_t end) {
    std::vector<std::unique_ptr<Columns<A>>> norms;
    for (const auto& term : terms) norms.push_back(std::make_unique<Columns<A>>(term.layout));
    for (int64_t n = begin; n < end; ++n) {
      for (size_t k = 0; k < terms.size(); ++k) {
        const Term<T, A>& term = terms[k];
        if (!term.normed) continue;
        map_moments(term.layout, term.eps, term.image(n), term.mean(n), term.rstd(n));
        norms[k]->set(term.layout, term.weight, term.bias, term.mean(n), term.rstd(n));
      }
      share((height + rows - 1) / rows, [&](int64_t b) {
        sum_rows<Act>(
            own + n * layout.size(),
            terms,
            norms,
            y + n * layout.size(),
            n,
            b * rows,
            std::min((b + 1) * rows, height),
            width,
            layout);
      });
    }
  });
}

// The gradient of a term of another resolution: each source pixel's sum over the pixels it was
// read for. grad: (height, width, channels) of the sum, to: of the term.
template <class T, class A>
void shrink(
    const Term<T, A>& term, const T* grad, int64_t height, int64_t width, A* to) {
  const int64_t channels = term.layout.channels;
  share(term.height, [&](int64_t source) {
    A* target = to + source * term.width * channels;
    std::fill_n(target, term.width * channels, A(0));
    const auto [first, last] = std::equal_range(term.rows.begin(), term.rows.end(), source);
    for (int64_t row = first - term.rows.begin(); row < last - term.rows.begin(); ++row)
      for (int64_t i = 0; i < width; ++i) {
        const T* from = grad + (row * width + i) * channels;
        A* pixel = target + term.columns[i] * channels;
        sweep<A>(0, channels, term.layout.period, [&](auto lane, int64_t j, int64_t) {
          lane.store(pixel + j, lane.load(pixel + j) + lane.load(from + j));
        });
      }
  });
}

// The gradient of one term of one image, from that of its values at its own resolution.
template <class T, class A, class G>
void term_backward(
    const Term<T, A>& term,
    Columns<A>& norm,
    Gradient<A>& gradient,
    const G* grad,
    int64_t n) {
  const Layout& layout = term.layout;
  const T* x = term.image(n);
  T* dx = term.dx + n * layout.size();
  const auto store = [&](const auto& value) {
    share(layout.blocks(), [&](int64_t b) {
      sweep<A>(layout.begin(b), layout.end(b), layout.period, [&](auto lane, int64_t i, int64_t c) {
        lane.store(dx + i, value(lane, i, c));
      });
    });
  };
  if (!term.normed)
    return store([&](auto lane, int64_t i, int64_t) { return lane.load(grad + i); });
  norm.set(layout, term.weight, term.bias, term.mean(n), term.rstd(n));
  const auto values = [&](auto lane, int64_t i, int64_t c) {
    return std::array<typename decltype(lane)::V, 2>{
        lane.load(grad + i), norm.centered(lane, lane.load(x + i), c)};
  };
  gradient.template collect<T>(layout, values);
  gradient.set(layout, term.weight, term.rstd(n));
  gradient.affine(layout, term.rstd(n), term.affine ? term.affine + n * 2 * layout.channels : nullptr);
  store([&](auto lane, int64_t i, int64_t c) {
    const auto [g, centered] = values(lane, i, c);
    return gradient(lane, g, centered, norm.scale.get(), c);
  });
}

// y, the result, tells the slope of the rectifier. down: gradient of own, and of every plain term of
// its resolution.
template <class Act, class T, class A>
void sum_rectify_backward(
    const T* grad,
    const T* y,
    const std::vector<Term<T, A>>& terms,
    T* down,
    int64_t images,
    int64_t height,
    int64_t width,
    const Layout& layout) {
  int64_t largest = 0;
  for (const auto& term : terms)
    if (!term.same) largest = std::max(largest, term.layout.size());
  for_images(images, layout.size(), [&](int64_t begin, int64_t end) {
    Buffer<A> shrunk(largest);
    for (int64_t n = begin; n < end; ++n) {
      const T *dy = grad + n * layout.size(), *result = y + n * layout.size();
      T* g = down + n * layout.size();
      share(layout.blocks(), [&](int64_t b) {
        sweep<A>(layout.begin(b), layout.end(b), layout.period, [&](auto lane, int64_t i, int64_t) {
          lane.store(
              g + i,
              Act::template backward_of<A>(lane, lane.load(result + i), lane.load(dy + i)));
        });
      });
      for (const auto& term : terms) {
        if (!term.dx) continue;
        Columns<A> norm(term.layout);
        Gradient<A> gradient(term.layout);
        if (term.same) {
          term_backward(term, norm, gradient, g, n);
        } else {
          shrink(term, g, height, width, shrunk.get());
          term_backward(term, norm, gradient, static_cast<const A*>(shrunk.get()), n);
        }
      }
    }
  });
}

}  // namespace mdeq
