// The operations as torch knows them: checks, memory and dtypes around the loops of the headers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "norm_relu.h"
#include "residual_norms.h"
#include "sum_rectify.h"

namespace mdeq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// run(T{}) with the storage type of dtype.
template <class Run>
auto for_dtype(at::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case at::kFloat:
      return run(float{});
    case at::kDouble:
      return run(double{});
    case at::kBFloat16:
      return run(bf16{});
    default:
      TORCH_CHECK(false, "mdeq_mm kernels take float32, float64 and bfloat16, got ", dtype);
  }
}

template <class Run>
void for_rectifier(bool smooth, const Run& run) {
  if (smooth)
    run(Softplus{});
  else
    run(Relu{});
}

at::ScalarType arithmetic(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// (N, C, H, W) with C innermost in memory.
Tensor map_of(const Tensor& x, const Tensor& like) {
  TORCH_CHECK(x.dim() == 4, "expected (N, C, H, W), got a tensor of ", x.dim(), " dimensions");
  TORCH_CHECK(
      x.scalar_type() == like.scalar_type(),
      "all maps must have one dtype, got ",
      x.scalar_type(),
      " beside ",
      like.scalar_type());
  return x.contiguous(at::MemoryFormat::ChannelsLast);
}

Tensor same_size(const Tensor& x, const Tensor& like) {
  TORCH_CHECK(x.sizes() == like.sizes(), "expected size ", like.sizes(), ", got ", x.sizes());
  return map_of(x, like);
}

// Scale, shift or mask in the dtype of the arithmetic; undefined for none.
Tensor values_of(const OptionalTensor& values, const Tensor& x, int64_t count) {
  if (!values || !values->defined()) return {};
  TORCH_CHECK(values->numel() == count, "expected ", count, " values, got ", values->numel());
  return values->to(arithmetic(x)).contiguous();
}

Tensor empty_map(const Tensor& x) {
  return at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// (2, N, groups): means and reciprocals of standard deviations.
Tensor empty_stats(const Tensor& x, int64_t groups) {
  return at::empty({2, x.size(0), groups}, x.options().dtype(arithmetic(x)));
}

template <class T>
T* pointer(const Tensor& x) {
  return x.defined() ? static_cast<T*>(x.data_ptr()) : nullptr;
}

template <class A>
Layout layout_of(const Tensor& x, int64_t groups) {
  TORCH_CHECK(
      groups > 0 && x.size(1) % groups == 0,
      x.size(1),
      " channels do not split into ",
      groups,
      " groups");
  return Layout::of<A>(x.size(2) * x.size(3), std::max<int64_t>(x.size(1), 1), groups);
}

// Gradients of weight and bias: (images, 2, channels) while they are made, then their sum.
class AffineGradient {
 public:
  AffineGradient(const Tensor& x, bool wanted)
      : options_(x.options().dtype(arithmetic(x))),
        images_(wanted ? x.size(0) : 0),
        channels_(wanted ? x.size(1) : 0),
        parts_(images_ * 2 * channels_) {
    std::fill_n(parts_.get(), images_ * 2 * channels_, 0.0);
  }
  double* get() { return channels_ ? parts_.get() : nullptr; }
  // (2, channels), or (2, 0) where it was not wanted.
  Tensor total() {
    Tensor result = at::zeros({2, channels_}, options_);
    for_dtype(result.scalar_type(), [&](auto type) {
      auto* to = pointer<decltype(type)>(result);
      if constexpr (!std::is_same_v<decltype(type), bf16>)
        for (int64_t c = 0; c < 2 * channels_; ++c) {
          double sum = 0;
          for (int64_t n = 0; n < images_; ++n) sum += parts_[n * 2 * channels_ + c];
          to[c] = decltype(type)(sum);
        }
    });
    return result;
  }

 private:
  at::TensorOptions options_;
  int64_t images_, channels_;
  Buffer<double> parts_;
};

void run_norm_relu(
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    int64_t groups,
    double eps,
    bool relu,
    const Tensor& y,
    const Tensor& stats) {
  const Tensor w = values_of(weight, x, x.size(1)), b = values_of(bias, x, x.size(1));
  if (x.numel() == 0) {
    stats.zero_();
    return;
  }
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = typename Arithmetic<T>::type;
    const Layout layout = layout_of<A>(x, groups);
    A* means = pointer<A>(stats);
    A* rstds = means + x.size(0) * groups;
    const auto run = [&](auto act) {
      norm_relu<decltype(act)>(
          pointer<const T>(x),
          pointer<const A>(w),
          pointer<const A>(b),
          pointer<T>(y),
          means,
          rstds,
          x.size(0),
          layout,
          eps);
    };
    if (relu)
      run(Relu{});
    else
      run(Identity{});
  });
}

std::tuple<Tensor, Tensor> norm_relu_op(
    const Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    int64_t groups,
    double eps,
    bool relu) {
  const Tensor x = map_of(input, input);
  Tensor y = empty_map(x), stats = empty_stats(x, groups);
  run_norm_relu(x, weight, bias, groups, eps, relu, y, stats);
  return {y, stats};
}

void norm_relu_inplace_op(
    Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    int64_t groups,
    double eps,
    bool relu) {
  TORCH_CHECK(
      x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast),
      "in place, the map must be contiguous with channels last");
  run_norm_relu(x, weight, bias, groups, eps, relu, x, empty_stats(x, groups));
}

std::tuple<Tensor, Tensor> norm_relu_backward_op(
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& stats,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    int64_t groups,
    bool relu,
    bool affine) {
  const Tensor x = map_of(input, input), grad = same_size(grad_output, x);
  const Tensor w = values_of(weight, x, x.size(1)), b = values_of(bias, x, x.size(1));
  Tensor dx = empty_map(x);
  AffineGradient parameters(x, affine);
  if (x.numel() != 0)
    for_dtype(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      using A = typename Arithmetic<T>::type;
      const Layout layout = layout_of<A>(x, groups);
      const A* means = pointer<const A>(stats);
      const auto run = [&](auto act) {
        norm_relu_backward<decltype(act)>(
            pointer<const T>(grad),
            pointer<const T>(x),
            pointer<const A>(w),
            pointer<const A>(b),
            means,
            means + x.size(0) * groups,
            pointer<T>(dx),
            parameters.get(),
            x.size(0),
            layout);
      };
      if (relu)
        run(Relu{});
      else
        run(Identity{});
    });
  return {dx, parameters.total()};
}

// The inputs of residual_norms with their memory kept alive.
struct ResidualTensors {
  Tensor x, z, injection, mask, weight2, bias2, weight3, bias3;

  ResidualTensors(
      const Tensor& input,
      const Tensor& state,
      const OptionalTensor& injected,
      const OptionalTensor& dropped,
      const OptionalTensor& w2,
      const OptionalTensor& b2,
      const OptionalTensor& w3,
      const OptionalTensor& b3)
      : x(map_of(input, input)), z(same_size(state, x)) {
    if (injected && injected->defined()) injection = same_size(*injected, x);
    mask = values_of(dropped, x, x.size(0) * x.size(1));
    weight2 = values_of(w2, x, x.size(1));
    bias2 = values_of(b2, x, x.size(1));
    weight3 = values_of(w3, x, x.size(1));
    bias3 = values_of(b3, x, x.size(1));
  }
  template <class T, class A>
  Residual<T, A> pointers() const {
    return {
        pointer<const T>(x),
        pointer<const T>(z),
        pointer<const T>(injection),
        pointer<const A>(mask),
        pointer<const A>(weight2),
        pointer<const A>(bias2),
        pointer<const A>(weight3),
        pointer<const A>(bias3)};
  }
};

std::tuple<Tensor, Tensor, Tensor> residual_norms_op(
    const Tensor& input,
    const Tensor& z,
    const OptionalTensor& injection,
    const OptionalTensor& mask,
    const OptionalTensor& weight2,
    const OptionalTensor& bias2,
    const OptionalTensor& weight3,
    const OptionalTensor& bias3,
    int64_t groups2,
    int64_t groups3,
    double eps2,
    double eps3,
    bool smooth) {
  const ResidualTensors in(input, z, injection, mask, weight2, bias2, weight3, bias3);
  const Tensor& x = in.x;
  const int64_t images = x.size(0);
  Tensor y = empty_map(x), stats2 = empty_stats(x, groups2), stats3 = empty_stats(x, groups3);
  if (x.numel() == 0) return {y, stats2.zero_(), stats3.zero_()};
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = typename Arithmetic<T>::type;
    for_rectifier(smooth, [&](auto act) {
      residual_norms<decltype(act)>(
          in.pointers<T, A>(),
          pointer<T>(y),
          pointer<A>(stats2),
          pointer<A>(stats2) + images * groups2,
          pointer<A>(stats3),
          pointer<A>(stats3) + images * groups3,
          images,
          layout_of<A>(x, groups2),
          layout_of<A>(x, groups3),
          eps2,
          eps3);
    });
  });
  return {y, stats2, stats3};
}

// dx, dz, dinjection (no values unless it differs from dx), affine gradients of both norms.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_norms_backward_op(
    const Tensor& grad_output,
    const Tensor& input,
    const Tensor& z,
    const OptionalTensor& injection,
    const OptionalTensor& mask,
    const OptionalTensor& weight2,
    const OptionalTensor& bias2,
    const OptionalTensor& weight3,
    const OptionalTensor& bias3,
    const Tensor& stats2,
    const Tensor& stats3,
    int64_t groups2,
    int64_t groups3,
    bool smooth,
    bool inject,
    bool affine2,
    bool affine3) {
  const ResidualTensors in(input, z, injection, mask, weight2, bias2, weight3, bias3);
  const Tensor& x = in.x;
  const Tensor grad = same_size(grad_output, x);
  const int64_t images = x.size(0);
  const bool separate = inject && in.injection.defined() && in.mask.defined();
  Tensor dx = empty_map(x), dz = empty_map(x);
  Tensor dinjection = separate ? empty_map(x) : at::empty({0}, x.options());
  AffineGradient parameters2(x, affine2), parameters3(x, affine3);
  if (x.numel() != 0)
    for_dtype(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      using A = typename Arithmetic<T>::type;
      for_rectifier(smooth, [&](auto act) {
        residual_norms_backward<decltype(act)>(
            pointer<const T>(grad),
            in.pointers<T, A>(),
            pointer<const A>(stats2),
            pointer<const A>(stats2) + images * groups2,
            pointer<const A>(stats3),
            pointer<const A>(stats3) + images * groups3,
            pointer<T>(dx),
            pointer<T>(dz),
            separate ? pointer<T>(dinjection) : nullptr,
            parameters2.get(),
            parameters3.get(),
            images,
            layout_of<A>(x, groups2),
            layout_of<A>(x, groups3));
      });
    });
  return {dx, dz, dinjection, parameters2.total(), parameters3.total()};
}

using TensorList = at::TensorList;
using OptionalTensors = c10::List<OptionalTensor>;

// The terms of sum_rectify with their memory kept alive.
struct TermTensors {
  std::vector<Tensor> maps, weights, biases;

  TermTensors(
      const Tensor& own,
      TensorList terms,
      const OptionalTensors& all_weights,
      const OptionalTensors& all_biases,
      at::IntArrayRef groups) {
    TORCH_CHECK(
        terms.size() == groups.size() && terms.size() == all_weights.size() &&
            terms.size() == all_biases.size(),
        "weights, biases and groups must have one entry a term");
    for (size_t k = 0; k < terms.size(); ++k) {
      maps.push_back(map_of(terms[k], own));
      TORCH_CHECK(
          maps[k].size(0) == own.size(0) && maps[k].size(1) == own.size(1),
          "a term must have the images and channels of own, ",
          own.sizes(),
          ", got ",
          maps[k].sizes());
      TORCH_CHECK(
          maps[k].numel() > 0 || own.numel() == 0, "a term has no pixels: ", maps[k].sizes());
      weights.push_back(values_of(all_weights.get(k), own, own.size(1)));
      biases.push_back(values_of(all_biases.get(k), own, own.size(1)));
    }
  }
  template <class T, class A>
  std::vector<Term<T, A>> pointers(
      const Tensor& own, at::IntArrayRef groups, const Tensor& stats) const {
    std::vector<Term<T, A>> all;
    A* means = pointer<A>(stats);
    A* rstds = means + stats.numel() / 2;
    for (size_t k = 0; k < maps.size(); ++k) {
      const int64_t height = maps[k].size(2), width = maps[k].size(3);
      Term<T, A> term{};
      term.x = pointer<const T>(maps[k]);
      term.height = height;
      term.width = width;
      term.same = height == own.size(2) && width == own.size(3);
      if (!term.same) {
        term.rows = nearest(height, own.size(2));
        term.columns = nearest(width, own.size(3));
      }
      term.normed = groups[k] > 0;
      term.layout = layout_of<A>(maps[k], term.normed ? groups[k] : 1);
      term.weight = pointer<const A>(weights[k]);
      term.bias = pointer<const A>(biases[k]);
      if (term.normed) {
        term.means = means;
        term.rstds = rstds;
        means += own.size(0) * groups[k];
        rstds += own.size(0) * groups[k];
      }
      all.push_back(std::move(term));
    }
    return all;
  }
};

int64_t total_groups(at::IntArrayRef groups) {
  return std::accumulate(groups.begin(), groups.end(), int64_t(0));
}

std::tuple<Tensor, Tensor> sum_rectify_op(
    const Tensor& input,
    TensorList terms,
    const OptionalTensors& weights,
    const OptionalTensors& biases,
    at::IntArrayRef groups,
    at::ArrayRef<double> eps,
    bool smooth) {
  const Tensor own = map_of(input, input);
  const TermTensors in(own, terms, weights, biases, groups);
  TORCH_CHECK(eps.size() == groups.size(), "eps must have one entry a term");
  Tensor y = empty_map(own), stats = empty_stats(own, total_groups(groups));
  if (own.numel() == 0) return {y, stats.zero_()};
  for_dtype(own.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = typename Arithmetic<T>::type;
    auto all = in.pointers<T, A>(own, groups, stats);
    for (size_t k = 0; k < all.size(); ++k) all[k].eps = eps[k];
    for_rectifier(smooth, [&](auto act) {
      sum_rectify<decltype(act)>(
          pointer<const T>(own),
          all,
          pointer<T>(y),
          own.size(0),
          own.size(2),
          own.size(3),
          layout_of<A>(own, 1));
    });
  });
  return {y, stats};
}

// The gradient of own; then of every term that is normed or of another resolution, in order (that
// of the others is own's); then the affine gradients (2, C) of every normed term where wanted.
std::vector<Tensor> sum_rectify_backward_op(
    const Tensor& grad_output,
    const Tensor& output,
    TensorList terms,
    const OptionalTensors& weights,
    const OptionalTensors& biases,
    const Tensor& stats,
    at::IntArrayRef groups,
    bool smooth,
    bool affine) {
  const Tensor y = map_of(output, output), grad = same_size(grad_output, y);
  const TermTensors in(y, terms, weights, biases, groups);
  std::vector<Tensor> result{empty_map(y)}, maps(groups.size());
  std::vector<std::unique_ptr<AffineGradient>> parameters(groups.size());
  for (size_t k = 0; k < groups.size(); ++k) {
    const bool same = in.maps[k].sizes() == y.sizes();
    if (groups[k] > 0 || !same) result.push_back(maps[k] = empty_map(in.maps[k]));
    if (groups[k] > 0 && affine) parameters[k] = std::make_unique<AffineGradient>(y, true);
  }
  if (y.numel() != 0)
    for_dtype(y.scalar_type(), [&](auto type) {
      using T = decltype(type);
      using A = typename Arithmetic<T>::type;
      auto all = in.pointers<T, A>(y, groups, stats);
      for (size_t k = 0; k < all.size(); ++k) {
        all[k].dx = pointer<T>(maps[k]);
        all[k].affine = parameters[k] ? parameters[k]->get() : nullptr;
      }
      for_rectifier(smooth, [&](auto act) {
        sum_rectify_backward<decltype(act)>(
            pointer<const T>(grad),
            pointer<const T>(y),
            all,
            pointer<T>(result[0]),
            y.size(0),
            y.size(2),
            y.size(3),
            layout_of<A>(y, 1));
      });
    });
  else
    for (auto& map : result) map.zero_();
  for (auto& gradient : parameters)
    if (gradient) result.push_back(gradient->total());
  return result;
}

}  // namespace
}  // namespace mdeq

TORCH_LIBRARY(mdeq_mm, library) {
  library.def(
      "norm_relu(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, bool relu)"
      " -> (Tensor, Tensor)");
  library.def(
      "norm_relu_(Tensor(a!) x, Tensor? weight, Tensor? bias, int groups, float eps, bool relu)"
      " -> ()");
  library.def(
      "norm_relu_backward(Tensor grad, Tensor x, Tensor stats, Tensor? weight, Tensor? bias,"
      " int groups, bool relu, bool affine) -> (Tensor, Tensor)");
  library.def(
      "residual_norms(Tensor x, Tensor z, Tensor? injection, Tensor? mask, Tensor? weight2,"
      " Tensor? bias2, Tensor? weight3, Tensor? bias3, int groups2, int groups3, float eps2,"
      " float eps3, bool smooth) -> (Tensor, Tensor, Tensor)");
  library.def(
      "residual_norms_backward(Tensor grad, Tensor x, Tensor z, Tensor? injection, Tensor? mask,"
      " Tensor? weight2, Tensor? bias2, Tensor? weight3, Tensor? bias3, Tensor stats2,"
      " Tensor stats3, int groups2, int groups3, bool smooth, bool inject, bool affine2,"
      " bool affine3) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "sum_rectify(Tensor own, Tensor[] terms, Tensor?[] weights, Tensor?[] biases, int[] groups,"
      " float[] eps, bool smooth) -> (Tensor, Tensor)");
  library.def(
      "sum_rectify_backward(Tensor grad, Tensor y, Tensor[] terms, Tensor?[] weights,"
      " Tensor?[] biases, Tensor stats, int[] groups, bool smooth, bool affine) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mdeq_mm, CPU, library) {
  library.impl("norm_relu", mdeq::norm_relu_op);
  library.impl("norm_relu_", mdeq::norm_relu_inplace_op);
  library.impl("norm_relu_backward", mdeq::norm_relu_backward_op);
  library.impl("residual_norms", mdeq::residual_norms_op);
  library.impl("residual_norms_backward", mdeq::residual_norms_backward_op);
  library.impl("sum_rectify", mdeq::sum_rectify_op);
  library.impl("sum_rectify_backward", mdeq::sum_rectify_backward_op);
}
