// SiLU of a group norm (Wu & He 2018), in two passes over memory.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 256;  // pixels whose sums one thread makes

// x / (1 + e^-x)
inline Vec silu(Vec x) {
  Vec small = pow2((Vec)((Int)x | INT32_MIN) * 1.44269504f);  // e^-|x|
  return x * (x > 0.f ? all(1.f) : small) / (1.f + small);
}

// Sums over pixels of d = x - pivot and of d^2, (in,) each: a pivot near the mean keeps their difference exact.
void add_up(const float* x, int64_t pixels, int64_t in, const float* pivot, float* sums) {
  for (int64_t c = 0; c < in; c += W) {
    Vec first{}, second{}, p = load(pivot + c);
    for (int64_t i = 0; i < pixels; i++) {
      Vec d = load(x + i * in + c) - p;
      first += d;
      second += d * d;
    }
    store(sums + c, first);
    store(sums + in + c, second);
  }
}

// What a channel is multiplied by, (in,), and what is added then, (in,), so that each group of (x + added) has mean 0
// and deviation 1 and then goes through weight and bias. The sums of all blocks are added in their order.
void factors(const float* sums, int64_t blocks, int64_t pixels, int64_t in, int64_t groups, const float* pivot,
             const float* added, const float* weight, const float* bias, float eps, float* out) {
  const int64_t width = in / groups;
  std::vector<double> mean(width), square(width);
  for (int64_t g = 0; g < groups; g++) {
    double whole = 0, variance = 0;
    for (int64_t j = 0; j < width; j++) {
      const int64_t c = g * width + j;
      double first = 0, second = 0;
      for (int64_t k = 0; k < blocks; k++) {
        first += sums[2 * k * in + c];
        second += sums[(2 * k + 1) * in + c];
      }
      const double d = first / pixels;
      mean[j] = pivot[c] + d + (added ? added[c] : 0);
      square[j] = second / pixels - d * d;
      whole += mean[j] / width;
    }
    for (int64_t j = 0; j < width; j++) variance += (square[j] + (mean[j] - whole) * (mean[j] - whole)) / width;
    const double inverse = 1 / std::sqrt(std::max(variance, 0.) + eps);
    for (int64_t j = 0; j < width; j++) {
      const int64_t c = g * width + j;
      out[c] = inverse * weight[c];
      out[in + c] = bias[c] + ((added ? added[c] : 0) - whole) * inverse * weight[c];
    }
  }
}

}  // namespace

// x and y (batch, pixels, in), added (batch, in) or null, weight and bias (in); in is a multiple of W and of groups.
extern "C" void norm(const float* x, const float* added, const float* weight, const float* bias, float* y,
                     int64_t batch, int64_t pixels, int64_t in, int64_t groups, double eps, int threads) {
  const int64_t blocks = up(pixels, BLOCK) / BLOCK;
  Scratch sums(2 * batch * blocks * in), scales(2 * batch * in);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t task = 0; task < batch * blocks; task++) {
      const int64_t b = task / blocks, first = task % blocks * BLOCK;
      add_up(x + (b * pixels + first) * in, std::min(BLOCK, pixels - first), in, x + b * pixels * in,
             sums.p + 2 * task * in);
    }
#pragma omp for
    for (int64_t b = 0; b < batch; b++)
      factors(sums.p + 2 * b * blocks * in, blocks, pixels, in, groups, x + b * pixels * in,
              added ? added + b * in : added, weight, bias, eps, scales.p + 2 * b * in);
#pragma omp for
    for (int64_t task = 0; task < batch * blocks; task++) {
      const int64_t b = task / blocks, first = task % blocks * BLOCK;
      const float* scale = scales.p + 2 * b * in;
      for (int64_t i = first; i < std::min(first + BLOCK, pixels); i++)
        for (int64_t c = 0; c < in; c += W) {
          const int64_t at = (b * pixels + i) * in + c;
          store(y + at, silu(load(x + at) * load(scale + c) + load(scale + in + c)));
        }
    }
  }
}
