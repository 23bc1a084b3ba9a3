// The long-vector passes of a solve: residual, writing a pair with its inner products, the step.
//
// A state has some hundred thousand values and a history some ten states: what counts is how often
// they are read. Each operation goes over its vectors once, a block at a time that stays in the
// cache while every product with it is formed. Sums are made per block and added in the order of
// blocks, so that a sample's result depends neither on threads nor on the rest of its batch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <type_traits>

#include "lanes.h"

namespace mdeq {
namespace {

using at::Tensor;

constexpr int64_t kBlock = 2048;

int64_t blocks_of(int64_t d) { return (d + kBlock - 1) / kBlock; }

// body(sample, block, begin, end) for all blocks of all samples, in parallel.
template <class Body>
void for_blocks(int64_t n, int64_t d, const Body& body) {
  const int64_t blocks = blocks_of(d);
  at::parallel_for(0, n * blocks, 8, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % blocks * kBlock;
      body(i / blocks, i % blocks, begin, std::min(begin + kBlock, d));
    }
  });
}

template <class A>
A sum_of(typename Vector<A>::V v) {
  A total = 0;
  for (int64_t i = 0; i < Vector<A>::width; ++i) total += v[i];
  return total;
}

// sum of a[i] * b[i], where each may be stored in lower precision than A.
template <class A, class S, class T>
A dot(const S* a, const T* b, int64_t count) {
  using Lanes = Vector<A>;
  typename Lanes::V even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * Lanes::width <= count; i += 2 * Lanes::width) {
    even += Lanes::load(a + i) * Lanes::load(b + i);
    odd += Lanes::load(a + i + Lanes::width) * Lanes::load(b + i + Lanes::width);
  }
  A total = sum_of<A>(even + odd);
  for (; i < count; ++i) total += Scalar<A>::load(a + i) * Scalar<A>::load(b + i);
  return total;
}

// (N, blocks, K) partial sums -> (N, K) in the dtype of like.
Tensor total_of(const Tensor& partial, const Tensor& like) {
  return partial.sum(1).to(like.scalar_type());
}

Tensor partial_sums(const Tensor& like, int64_t n, int64_t d, int64_t k) {
  return at::empty({n, blocks_of(d), k}, like.options().dtype(at::kDouble));
}

template <class Run>
auto for_real(at::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case at::kFloat:
      return run(float{});
    case at::kDouble:
      return run(double{});
    default:
      TORCH_CHECK(false, "states must be float32 or float64, got ", dtype);
  }
}

template <class A, class Run>
auto for_history(at::ScalarType dtype, const Run& run) {
  if constexpr (std::is_same_v<A, float>)
    if (dtype == at::kBFloat16) return run(bf16{});
  TORCH_CHECK(dtype == c10::CppTypeToScalarType<A>::value, "history of ", dtype);
  return run(A{});
}

template <class T>
T* data_of(const Tensor& x) {
  TORCH_CHECK(x.is_contiguous(), "vectors must be contiguous");
  return static_cast<T*>(x.data_ptr());
}

// g = fz - z; lengths of g and of fz, (N,).
std::tuple<Tensor, Tensor> residual(const Tensor& fz, const Tensor& z, Tensor g) {
  const int64_t n = z.size(0), d = z.size(1);
  const Tensor partial = partial_sums(z, n, d, 2);
  double* sums = partial.data_ptr<double>();
  for_real(z.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    using Lanes = Vector<A>;
    const A *pf = data_of<A>(fz), *pz = data_of<A>(z);
    A* pg = data_of<A>(g);
    for_blocks(n, d, [&](int64_t sample, int64_t block, int64_t begin, int64_t end) {
      const int64_t base = sample * d;
      typename Lanes::V gg{}, ff{};
      A tail_g = 0, tail_f = 0;
      int64_t i = begin;
      for (; i + Lanes::width <= end; i += Lanes::width) {
        const auto f = Lanes::load(pf + base + i);
        const auto r = f - Lanes::load(pz + base + i);
        Lanes::store(pg + base + i, r);
        gg += r * r;
        ff += f * f;
      }
      for (; i < end; ++i) {
        const A f = pf[base + i], r = f - pz[base + i];
        pg[base + i] = r;
        tail_g += r * r;
        tail_f += f * f;
      }
      double* out = sums + (sample * blocks_of(d) + block) * 2;
      out[0] = double(sum_of<A>(gg)) + tail_g;
      out[1] = double(sum_of<A>(ff)) + tail_f;
    });
  });
  const Tensor lengths = partial.sum(1).sqrt().to(z.scalar_type());
  return {lengths.select(1, 0).contiguous(), lengths.select(1, 1).contiguous()};
}

// Writes the pair of step s into its slot: test vector s or y = g - last_g, image s + mixing y.
// Gives products of the test vectors with g and with y, (N, used) each, and the length of the
// new test vector, (N,).
std::tuple<Tensor, Tensor, Tensor> remember(
    Tensor tests,
    Tensor images,
    int64_t slot,
    int64_t used,
    const Tensor& s,
    const Tensor& g,
    const Tensor& last_g,
    double mixing,
    bool test_with_steps) {
  const int64_t n = g.size(0), d = g.size(1), memory = tests.size(1);
  const Tensor partial = partial_sums(g, n, d, 2 * used + 1);
  double* sums = partial.data_ptr<double>();
  for_real(g.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    for_history<A>(tests.scalar_type(), [&](auto stored) {
      using T = decltype(stored);
      using Lanes = Vector<A>;
      const A *ps = data_of<A>(s), *pg = data_of<A>(g), *pl = data_of<A>(last_g);
      T *pt = data_of<T>(tests), *pw = data_of<T>(images);
      for_blocks(n, d, [&](int64_t sample, int64_t block, int64_t begin, int64_t end) {
        const int64_t base = sample * d, count = end - begin;
        A y[kBlock];
        T* test = pt + (sample * memory + slot) * d + begin;
        T* image = pw + (sample * memory + slot) * d + begin;
        const A *bs = ps + base + begin, *bg = pg + base + begin, *bl = pl + base + begin;
        const A mix = A(mixing);
        int64_t i = 0;
        for (; i + Lanes::width <= count; i += Lanes::width) {
          const auto step = Lanes::load(bs + i);
          const auto change = Lanes::load(bg + i) - Lanes::load(bl + i);
          Lanes::store(y + i, change);
          Lanes::store(test + i, test_with_steps ? step : change);
          Lanes::store(image + i, step + mix * change);
        }
        for (; i < count; ++i) {
          const A change = bg[i] - bl[i];
          y[i] = change;
          Scalar<A>::store(test + i, test_with_steps ? bs[i] : change);
          Scalar<A>::store(image + i, bs[i] + mix * change);
        }
        double* out = sums + (sample * blocks_of(d) + block) * (2 * used + 1);
        for (int64_t j = 0; j < used; ++j) {
          const T* other = pt + (sample * memory + j) * d + begin;
          out[j] = dot<A>(other, bg, count);
          out[used + j] = dot<A>(other, y, count);
        }
        out[2 * used] = dot<A>(test, test, count);
      });
    });
  });
  const Tensor total = partial.sum(1);
  const auto dtype = g.scalar_type();
  return {
      total.narrow(1, 0, used).to(dtype),
      total.narrow(1, used, used).to(dtype),
      total.select(1, 2 * used).sqrt().to(dtype)};
}

// step = mixing g - sum of weights times images; with rows its products with the images, (N, used).
Tensor combine(
    const Tensor& images, const Tensor& weights, const Tensor& g, double mixing, Tensor step,
    bool rows) {
  const int64_t n = g.size(0), d = g.size(1), memory = images.size(1), used = weights.size(1);
  const Tensor partial = partial_sums(g, n, d, rows ? used : 0);
  double* sums = partial.data_ptr<double>();
  const Tensor w = weights.contiguous();
  for_real(g.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    for_history<A>(images.scalar_type(), [&](auto stored) {
      using T = decltype(stored);
      using Lanes = Vector<A>;
      const A *pg = data_of<A>(g), *pc = data_of<A>(w);
      const T* pw = data_of<T>(images);
      A* pp = data_of<A>(step);
      for_blocks(n, d, [&](int64_t sample, int64_t block, int64_t begin, int64_t end) {
        const int64_t count = end - begin;
        const A* bg = pg + sample * d + begin;
        const A* c = pc + sample * used;
        const T* image = pw + sample * memory * d + begin;
        A* p = pp + sample * d + begin;
        const A mix = A(mixing);
        int64_t i = 0;
        for (; i + Lanes::width <= count; i += Lanes::width) {
          auto v = mix * Lanes::load(bg + i);
          for (int64_t j = 0; j < used; ++j) v -= c[j] * Lanes::load(image + j * d + i);
          Lanes::store(p + i, v);
        }
        for (; i < count; ++i) {
          A v = mix * bg[i];
          for (int64_t j = 0; j < used; ++j) v -= c[j] * Scalar<A>::load(image + j * d + i);
          p[i] = v;
        }
        if (!rows) return;
        double* out = sums + (sample * blocks_of(d) + block) * used;
        for (int64_t j = 0; j < used; ++j) out[j] = dot<A>(image + j * d, p, count);
      });
    });
  });
  return total_of(partial, g);
}

}  // namespace
}  // namespace mdeq

TORCH_LIBRARY_FRAGMENT(mdeq_mm, library) {
  library.def("secant_residual(Tensor fz, Tensor z, Tensor(a!) g) -> (Tensor, Tensor)");
  library.def(
      "secant_remember(Tensor(a!) tests, Tensor(b!) images, int slot, int used, Tensor s, Tensor g,"
      " Tensor last_g, float mixing, bool test_with_steps) -> (Tensor, Tensor, Tensor)");
  library.def(
      "secant_combine(Tensor images, Tensor weights, Tensor g, float mixing, Tensor(a!) step,"
      " bool rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(mdeq_mm, CPU, library) {
  library.impl("secant_residual", mdeq::residual);
  library.impl("secant_remember", mdeq::remember);
  library.impl("secant_combine", mdeq::combine);
}
