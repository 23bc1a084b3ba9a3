// Loops over the maps of an image, (pixels, channels) with channels innermost, and how images and
// blocks of pixels are shared among threads.
#pragma once

#include <ATen/Parallel.h>

#include <cstddef>
#include <new>
#include <numeric>

#include "lanes.h"

namespace mdeq {

// Uninitialized memory at the start of a cache line.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<A*>(
            ::operator new(size_t(std::max<int64_t>(size, 1)) * sizeof(A), std::align_val_t(64)))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  A* get() const { return data_; }
  A& operator[](int64_t i) const { return data_[i]; }

 private:
  A* data_;
};

// Values of a block of pixels: enough to hide what is done once a block, few enough for a float sum
// and to give every thread some of one image.
constexpr int64_t kBlock = 32768;
// Rows at the start of a block whose mean stands for the block's.
constexpr int64_t kHead = 8;
// Rows added up in registers before they are added to the sums in memory. Of one row at a time the
// processor prefetches best; where values must be converted first, that does not matter.
template <class T>
constexpr int64_t kRows = sizeof(T) == 2 ? 2 : 1;

// A map of one image. It is walked through in rows of `period` values, a multiple of both the
// channels and the register, so that any number of channels fills registers.
struct Layout {
  int64_t pixels, channels, groups, period, block;

  template <class A>
  static Layout of(int64_t pixels, int64_t channels, int64_t groups) {
    const int64_t period = std::lcm(channels, Vector<A>::width);
    const int64_t unit = kHead * period / channels;
    const int64_t block = std::max<int64_t>(kBlock / (unit * channels), 1) * unit;
    return {pixels, channels, groups, period, block};
  }
  int64_t size() const { return pixels * channels; }
  int64_t blocks() const { return (pixels + block - 1) / block; }
  int64_t begin(int64_t b) const { return b * block * channels; }
  int64_t end(int64_t b) const { return std::min((b + 1) * block, pixels) * channels; }
  int64_t group_channels() const { return channels / groups; }
};

// body(lane, i, c) for the values [begin, end), c the column of the value i in its row. begin is
// the start of a row.
template <class A, class Body>
inline void sweep(int64_t begin, int64_t end, int64_t period, const Body& body) {
  constexpr int64_t width = Vector<A>::width;
  int64_t i = begin;
  for (; i + period <= end; i += period)
    for (int64_t c = 0; c < period; c += width) body(Vector<A>{}, i + c, c);
  const int64_t rest = end - i;
  int64_t c = 0;
  for (; c + width <= rest; c += width) body(Vector<A>{}, i + c, c);
  for (; c < rest; ++c) body(Scalar<A>{}, i + c, c);
}

// Adds the K values that body(lane, i, c) gives, read from maps of T, to the columns sums[k][c].
template <class T, class A, size_t K, class Body>
inline void reduce(
    int64_t begin, int64_t end, int64_t period, const std::array<A*, K>& sums, const Body& body) {
  constexpr int64_t width = Vector<A>::width;
  const auto add = [&](auto lane, const auto& values, int64_t c) {
    for (size_t k = 0; k < K; ++k) lane.store(sums[k] + c, lane.load(sums[k] + c) + values[k]);
  };
  int64_t i = begin;
  for (; i + kRows<T> * period <= end; i += kRows<T> * period)
    for (int64_t c = 0; c < period; c += width) {
      auto total = body(Vector<A>{}, i + c, c);
      for (int64_t row = 1; row < kRows<T>; ++row) {
        const auto next = body(Vector<A>{}, i + row * period + c, c);
        for (size_t k = 0; k < K; ++k) total[k] += next[k];
      }
      add(Vector<A>{}, total, c);
    }
  sweep<A>(i, end, period, [&](auto lane, int64_t j, int64_t c) { add(lane, body(lane, j, c), c); });
}

// columns[c] = value(channel) over a whole period.
template <class A, class Value>
inline void spread(const Layout& layout, A* columns, const Value& value) {
  for (int64_t c = 0; c < layout.channels; ++c) columns[c] = A(value(c));
  for (int64_t c = layout.channels; c < layout.period; ++c) columns[c] = columns[c - layout.channels];
}

// The sum of the columns of one channel.
template <class A>
inline double gather(const Layout& layout, const A* columns, int64_t channel) {
  double total = 0;
  for (int64_t c = channel; c < layout.period; c += layout.channels) total += double(columns[c]);
  return total;
}

template <class A>
inline double gather_group(const Layout& layout, const A* columns, int64_t group) {
  const int64_t width = layout.group_channels();
  double total = 0;
  for (int64_t c = group * width; c < (group + 1) * width; ++c)
    total += gather(layout, columns, c);
  return total;
}

// task(i) for i < count, shared among the threads, unless all of them are at work already.
template <class Task>
inline void share(int64_t count, const Task& task) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// work(begin, end) over all images. As many as can be shared evenly are: each thread goes through
// its own one at a time, and so finds a map in its cache when it passes over it again. For what is
// left, a batch of one for instance, the threads share the blocks of one image. The blocks are the
// same in both cases, and so, to the bit, are the results.
template <class Work>
inline void for_images(int64_t images, int64_t values, const Work& work) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const bool small = images * values <= kBlock;
  const int64_t spread = threads == 1 || small ? 0 : images - images % threads;
  at::parallel_for(0, spread, 1, work);
  if (spread < images) work(spread, images);
}

}  // namespace mdeq
