// Convolution of 3x3 with stride 1 and padding 1 by Winograd's minimal filtering F(2x2, 3x3)
// (Lavin & Gray 2016): 16 products where the definition has 36, for each 2x2 pixels of the result.
//
// For tiles of 4x4 pixels d and kernels g, Y = A'[(G g G') * (B'd B)]A with * of entries, summed over
// channels: 16 matrix products, one an entry, of (tiles, C) with (C, K). Blocks of tiles are
// transformed, multiplied and transformed back one after the other, so that what lies between stays
// in the cache. Each value is computed alike whatever the block, so that a sample's result depends
// neither on threads nor on the rest of its batch.
//
// The gradient of the input is the convolution of the result's gradient with the kernels turned by
// 180 degrees, input and output channels exchanged.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "lanes.h"

namespace mdeq {
namespace {

using at::Tensor;

constexpr int64_t kEntries = 16;
// A multiple of the rows of every product below.
constexpr int64_t kTiles = 24;

// Products of `Registers` registers of columns take so many rows of a block: as many accumulators
// as hide the latency of a multiplication and fit into the registers.
template <int Registers>
constexpr int kRows = Registers == 1 ? 12 : 6;

int64_t up_to_multiple(int64_t value, int64_t of) { return (value + of - 1) / of * of; }

template <class A>
typename Vector<A>::V load_some(const A* p, int64_t count) {
  typename Vector<A>::V v{};
  std::memcpy(&v, p, size_t(count) * sizeof(A));
  return v;
}

template <class A>
void store_some(A* p, typename Vector<A>::V v, int64_t count) {
  std::memcpy(p, &v, size_t(count) * sizeof(A));
}

// Kernels as the products read them: for each entry, panels of two registers of output channels, or
// one at the end, (C, columns) each.
template <class A>
struct Kernels {
  static constexpr int64_t width = Vector<A>::width;
  int64_t inputs, outputs, columns;
  Tensor values;

  Kernels(int64_t inputs, int64_t outputs, const Tensor& like)
      : inputs(inputs), outputs(outputs), columns(up_to_multiple(outputs, width)),
        values(at::empty({kEntries * columns * inputs}, like.options())) {}

  int64_t panel(int64_t k) const { return std::min(columns - k, 2 * width); }
  A* at(int64_t entry, int64_t k) const {
    return values.mutable_data_ptr<A>() + (entry * columns + k) * inputs;
  }
};

// Memory of a thread that its next call finds again: fresh memory costs more than what is done here.
template <class A, int which>
A* scratch(int64_t count) {
  static thread_local std::vector<A> memory;
  if (int64_t(memory.size()) < count) memory.resize(size_t(count));
  return memory.data();
}

// G g G' of the kernels (outputs, inputs, 3, 3), or of their transposes with `transposed`.
template <class A>
Kernels<A> transformed(const Tensor& weight, bool transposed) {
  using Lanes = Vector<A>;
  using V = typename Lanes::V;
  Kernels<A> kernels(weight.size(transposed ? 0 : 1), weight.size(transposed ? 1 : 0), weight);
  const Tensor dense = weight.contiguous();
  const A* given = dense.const_data_ptr<A>();
  const int64_t row = 9 * weight.size(1);
  const int64_t by_input = transposed ? row : 9, by_output = transposed ? 9 : row;
  constexpr int64_t chunk = 32;
  const int64_t chunks = (kernels.inputs + chunk - 1) / chunk, width = Lanes::width;
  const int64_t registers = kernels.columns / width;
  at::parallel_for(0, registers * chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / chunks * width, first = i % chunks * chunk;
      const int64_t count = std::min(width, kernels.outputs - k);
      // The panel that holds these columns, and where in it they are.
      const int64_t start = k / (2 * width) * 2 * width, columns = kernels.panel(start);
      for (int64_t c = first; c < std::min(first + chunk, kernels.inputs); ++c) {
        V g[3][3], half[4][3];
        for (int p = 0; p < 9; ++p) {
          A lanes[Lanes::width] = {};
          const A* from = given + c * by_input + k * by_output + (transposed ? 8 - p : p);
          for (int64_t j = 0; j < count; ++j) lanes[j] = from[j * by_output];
          g[p / 3][p % 3] = Lanes::load(lanes);
        }
        for (int j = 0; j < 3; ++j) {
          const V sum = A(0.5) * (g[0][j] + g[2][j]), middle = A(0.5) * g[1][j];
          half[0][j] = g[0][j];
          half[1][j] = sum + middle;
          half[2][j] = sum - middle;
          half[3][j] = g[2][j];
        }
        for (int r = 0; r < 4; ++r) {
          const V sum = A(0.5) * (half[r][0] + half[r][2]), middle = A(0.5) * half[r][1];
          const V entries[] = {half[r][0], sum + middle, sum - middle, half[r][2]};
          for (int j = 0; j < 4; ++j)
            Lanes::store(kernels.at(4 * r + j, start) + c * columns + k - start, entries[j]);
        }
      }
    }
  });
  return kernels;
}

// out (rows, columns) = a (rows, depth) times b (depth, columns).
template <class A, int Registers>
void product(const A* a, const A* b, A* out, int64_t depth) {
  using Lanes = Vector<A>;
  constexpr int rows = kRows<Registers>;
  typename Lanes::V sums[rows][Registers] = {};
  for (int64_t c = 0; c < depth; ++c) {
    typename Lanes::V row[Registers];
#pragma GCC unroll 2
    for (int j = 0; j < Registers; ++j)
      row[j] = Lanes::load(b + (c * Registers + j) * Lanes::width);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < Registers; ++j) sums[r][j] += a[r * depth + c] * row[j];
  }
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < Registers; ++j)
      Lanes::store(out + (r * Registers + j) * Lanes::width, sums[r][j]);
}

// Sizes of a map and of its grid of tiles.
struct Grid {
  int64_t n, h, w;
  int64_t rows() const { return (h + 1) / 2; }
  int64_t columns() const { return (w + 1) / 2; }
  int64_t tiles() const { return n * rows() * columns(); }
  int64_t image(int64_t tile) const { return tile / (rows() * columns()); }
  // Of the first pixel of the result.
  int64_t row(int64_t tile) const { return tile / columns() % rows() * 2; }
  int64_t column(int64_t tile) const { return tile % columns() * 2; }
};

// B'd B of some tiles of x (N, H, W, C), into (16, kTiles, C).
template <class A>
void gather(const A* x, const Grid& grid, int64_t channels, int64_t first, int64_t count, A* out) {
  using Lanes = Vector<A>;
  using V = typename Lanes::V;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t tile = first + t, top = grid.row(tile) - 1, left = grid.column(tile) - 1;
    const A* image = x + grid.image(tile) * grid.h * grid.w * channels;
    std::array<const A*, kEntries> pixels;
    for (int64_t p = 0; p < kEntries; ++p) {
      const int64_t i = top + p / 4, j = left + p % 4;
      const bool inside = i >= 0 && i < grid.h && j >= 0 && j < grid.w;
      pixels[p] = inside ? image + (i * grid.w + j) * channels : nullptr;
    }
    const auto transform = [&](int64_t c, const auto& load, const auto& store) {
      V d[4][4], half[4][4];
#pragma GCC unroll 16
      for (int p = 0; p < kEntries; ++p) d[p / 4][p % 4] = pixels[p] ? load(pixels[p] + c) : V{};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        half[0][j] = d[0][j] - d[2][j];
        half[1][j] = d[1][j] + d[2][j];
        half[2][j] = d[2][j] - d[1][j];
        half[3][j] = d[1][j] - d[3][j];
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const V* h = half[r];
        const V entries[] = {h[0] - h[2], h[1] + h[2], h[2] - h[1], h[1] - h[3]};
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          store(out + ((4 * r + j) * kTiles + t) * channels + c, entries[j]);
      }
    };
    int64_t c = 0;
    for (; c + Lanes::width <= channels; c += Lanes::width)
      transform(
          c, [](const A* p) { return Lanes::load(p); }, [](A* p, V v) { Lanes::store(p, v); });
    if (const int64_t left_over = channels - c; left_over > 0)
      transform(
          c,
          [&](const A* p) { return load_some(p, left_over); },
          [&](A* p, V v) { store_some(p, v, left_over); });
  }
}

// A'm A of (16, kTiles, columns) products, into output channels k to k + columns of y (N, H, W, K).
template <class A>
void scatter(
    const A* products, int64_t columns, const Grid& grid, int64_t channels, int64_t k,
    int64_t first, int64_t count, A* y) {
  using Lanes = Vector<A>;
  using V = typename Lanes::V;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t tile = first + t, i = grid.row(tile), j = grid.column(tile);
    A* corner = y + ((grid.image(tile) * grid.h + i) * grid.w + j) * channels + k;
    for (int64_t c = 0; c < columns; c += Lanes::width) {
      V m[4][4], half[2][4];
#pragma GCC unroll 16
      for (int p = 0; p < kEntries; ++p)
        m[p / 4][p % 4] = Lanes::load(products + (p * kTiles + t) * columns + c);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        half[0][q] = m[0][q] + m[1][q] + m[2][q];
        half[1][q] = m[1][q] - m[2][q] - m[3][q];
      }
      const int64_t wanted = std::min(Lanes::width, channels - k - c);
      const auto put = [&](int64_t r, int64_t q, V v) {
        A* pixel = corner + (r * grid.w + q) * channels + c;
        if (wanted == Lanes::width)
          Lanes::store(pixel, v);
        else
          store_some(pixel, v, wanted);
      };
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        if (r == 1 && i + 1 == grid.h) break;
        const V* h = half[r];
        put(r, 0, h[0] + h[1] + h[2]);
        if (j + 1 < grid.w) put(r, 1, h[1] - h[2] - h[3]);
      }
    }
  }
}

template <class A, int Registers>
void products_of(const A* tiles, const A* kernels, int64_t depth, int64_t count, A* out) {
  constexpr int rows = kRows<Registers>;
  for (int64_t t = 0; t < count; t += rows)
    product<A, Registers>(
        tiles + t * depth, kernels, out + t * Registers * Vector<A>::width, depth);
}

template <class A>
void convolve(const A* x, const Kernels<A>& kernels, const Grid& grid, A* y) {
  constexpr int64_t width = Vector<A>::width;
  const int64_t depth = kernels.inputs, tiles = grid.tiles();
  at::parallel_for(0, (tiles + kTiles - 1) / kTiles, 1, [&](int64_t begin, int64_t end) {
    A* given = scratch<A, 0>(kEntries * kTiles * depth);
    A* products = scratch<A, 1>(kEntries * kTiles * 2 * width);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kTiles, count = std::min(kTiles, tiles - first);
      gather(x, grid, depth, first, count, given);
      for (int64_t k = 0; k < kernels.columns; k += 2 * width) {
        const int64_t columns = kernels.panel(k);
        for (int64_t entry = 0; entry < kEntries; ++entry) {
          const A* a = given + entry * kTiles * depth;
          A* out = products + entry * kTiles * columns;
          if (columns == width)
            products_of<A, 1>(a, kernels.at(entry, k), depth, count, out);
          else
            products_of<A, 2>(a, kernels.at(entry, k), depth, count, out);
        }
        scatter(products, columns, grid, kernels.outputs, k, first, count, y);
      }
    }
  });
}

// (N, C, H, W), (K, C, 3, 3) -> (N, K, H, W), channels last in memory. With `transposed` the
// gradient of the input, (N, K, H, W) -> (N, C, H, W).
Tensor conv3x3(const Tensor& given, const Tensor& weight, bool transposed) {
  const Tensor x = given.contiguous(at::MemoryFormat::ChannelsLast);
  TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
          weight.size(transposed ? 0 : 1) == x.size(1) && weight.scalar_type() == x.scalar_type(),
      "conv3x3: kernels ", weight.sizes(), " ", weight.scalar_type(), " for maps ", x.sizes(), " ",
      x.scalar_type());
  const Grid grid{x.size(0), x.size(2), x.size(3)};
  const int64_t outputs = weight.size(transposed ? 1 : 0);
  const Tensor y = at::empty(
      {grid.n, outputs, grid.h, grid.w}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv3x3", [&] {
    convolve<scalar_t>(
        x.const_data_ptr<scalar_t>(), transformed<scalar_t>(weight, transposed), grid,
        y.mutable_data_ptr<scalar_t>());
  });
  return y;
}

}  // namespace
}  // namespace mdeq

TORCH_LIBRARY_FRAGMENT(mdeq_mm, library) {
  library.def("conv3x3(Tensor x, Tensor weight, bool transposed) -> Tensor");
}

TORCH_LIBRARY_IMPL(mdeq_mm, CPU, library) { library.impl("conv3x3", mdeq::conv3x3); }
