// The Newton-Schulz iteration of Muon (Jordan et al. 2024), for X with at most as many rows as
// columns, or for its transpose:
//
//   X <- X / |X|,  then in each step  A = X X^T,  B = b A + c A A,  X <- a X + B X
//
// A and B are symmetric: only blocks of them that reach the diagonal or lie below it are computed,
// and the others are their mirror image.
#include "muon.h"

#include "gemm.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// the least norm by which a matrix is divided
constexpr double kLeastNorm = 1e-7;
// elements per thread: fewer do not pay for starting one
constexpr int64_t kGrain = 1 << 15;

// writes alpha base + beta tile, without a base beta tile
struct Combine {
  const float* base;
  float* out;
  int64_t ld;
  float alpha, beta;

  void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, const float* tile,
                  int64_t tile_ld) const {
    const int64_t at = i * ld + j;
    tile_vectors(rows, cols,
                 [=, from = base, to = out, stride = ld, of_base = alpha, of_tile = beta](
                     int64_t r, int64_t c, int64_t n) {
                   const int64_t place = at + r * stride + c;
                   F value = load(tile + r * tile_ld + c) * of_tile;
                   if (from) value += load(from + place, n) * of_base;
                   store(to + place, value, n);
                 });
  }
};

// c[j, i] = c[i, j] for j < i
void mirror(float* c, int64_t n, int threads) {
  constexpr int64_t kTile = 32;
  const int64_t tiles = ceil_div(n, kTile);
  const int team = team_size(n * n, kGrain, tiles, threads);
#pragma omp parallel for num_threads(team) schedule(static, 1) if (team > 1)
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t j0 = tile * kTile, i0 = j0; i0 < n; i0 += kTile)
      for (int64_t j = j0; j < imin(j0 + kTile, n); ++j)
        for (int64_t i = imax(i0, j + 1); i < imin(i0 + kTile, n); ++i) c[j * n + i] = c[i * n + j];
}

// combine.out (S, S) from the product of x (S lines of K elements) with its transpose
void symmetric_product(const Operand<float>& x, int64_t S, int64_t K, float* packed,
                       const Combine& combine, int threads) {
  each_slice(S, K, K, threads, [&](int64_t q, int64_t u, int64_t to, int64_t at) {
    pack_slices<false>(x, q, q + 1, kNR, u, to, to - u, K, packed + at);
  });
  const int64_t h = panel_height(S), panels = ceil_div(S, h), block = imax(1, kMC / h);
  const Packed<kFloats> columns{packed};
  const Gemm<kFloats, float, Packed<kFloats>, Combine> work(x, columns, combine, {S, S, K, h});
  const int team = team_size(S * S * K / 2, kGemmGrain, panels, threads);
  // the first part t / team of the triangle's area has the square root of that part of its rows
  const auto start = [&](int t) {
    return static_cast<int64_t>(static_cast<double>(panels) *
                                __builtin_sqrt(static_cast<double>(t) / team));
  };
  const Scratch room(team, work.room({0, imin(block, panels), 0, ceil_div(S, kNR)}));
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int t = 0; t < team; ++t) {
    const int64_t end = t + 1 < team ? start(t + 1) : panels;
    for (int64_t m = start(t); m < end; m += block) {
      const int64_t m1 = imin(m + block, end);
      work.run({m, m1, 0, ceil_div(imin(m1 * h, S), kNR)}, room[t]);
    }
  }
  mirror(combine.out, S, threads);
}

double squares_row(const float* x, int64_t n) {
  E low_sum = {}, high_sum = {};
  for (int64_t k = 0; k < n; k += W) {
    E low, high;
    widen(load(x + k, n - k), low, high);
    low_sum += low * low;
    high_sum += high * high;
  }
  double sum = 0;
  for (int lane = 0; lane < W / 2; ++lane) sum += low_sum[lane] + high_sum[lane];
  return sum;
}

// out = x / |x|
void normalise(const float* x, float* out, int64_t R, int64_t C, double* squares, int threads) {
  const int team = team_size(R * C, kGrain, R, threads);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t i = 0; i < R; ++i) squares[i] = squares_row(x + i * C, C);
  double sum = 0;
  for (int64_t i = 0; i < R; ++i) sum += squares[i];
  const double norm = __builtin_sqrt(sum);
  // of a norm that is not finite too, which makes every element NaN
  const float scale = static_cast<float>(1 / (norm < kLeastNorm ? kLeastNorm : norm));
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t i = 0; i < R; ++i)
    for (int64_t k = 0; k < C; k += W)
      store(out + i * C + k, load(x + i * C + k, C - k) * scale, C - k);
}

// A matrix (R, C) and the memory that its iteration needs, of `size` floats.
class Iteration {
 public:
  Iteration(int64_t R, int64_t C, float* memory)
      : R_(R), C_(C), S_(imin(R, C)), L_(imax(R, C)), spare_(memory) {
    gram_ = spare_ + round_up(R * C, 16);
    polynomial_ = gram_ + round_up(S_ * S_, 16);
    packed_ = polynomial_ + round_up(S_ * S_, 16);
    squares_ = reinterpret_cast<double*>(packed_ + round_up(packed_size(S_, L_, false), 16));
  }

  static int64_t size(int64_t R, int64_t C) {
    const int64_t S = imin(R, C);
    return round_up(R * C, 16) + 2 * round_up(S * S, 16) +
           round_up(packed_size(S, imax(R, C), false), 16) + 2 * R;
  }

  void run(const float* x, float* out, int64_t steps, float a, float b, float c,
           int threads) const {
    // the last step writes to out
    float *from = steps % 2 ? spare_ : out, *to = steps % 2 ? out : spare_;
    normalise(x, from, R_, C_, squares_, threads);
    for (int64_t step = 0; step < steps; ++step) {
      const Operand<float> lines = {matrix(from, C_, 1), S_, R_ > C_};
      symmetric_product(lines, S_, L_, packed_, {nullptr, gram_, S_, 0.0f, 1.0f}, threads);
      const Operand<float> rows = {matrix(gram_, S_, 1), S_, false};
      symmetric_product(rows, S_, S_, packed_, {gram_, polynomial_, S_, b, c}, threads);
      const Combine combine = {from, to, C_, a, 1.0f};
      const Operand<float> left = {matrix(R_ > C_ ? from : polynomial_, S_, 1), R_, false};
      const Operand<float> right = {matrix(R_ > C_ ? polynomial_ : from, C_, 1), C_, true};
      gemm<kFloats>(R_, C_, S_, left, right, threads, combine);
      float* const next = from;
      from = to, to = next;
    }
  }

 private:
  int64_t R_, C_, S_, L_;  // S <= L are the sides
  float *spare_, *gram_, *polynomial_, *packed_;
  double* squares_;
};

}  // namespace

void muon_orthogonalise(const int64_t* places, int64_t matrices, int64_t R, int64_t C,
                        int64_t steps, float a, float b, float c, int threads) {
  if (R * C == 0 || matrices == 0) return;
  // The first `own` matrices go to single threads, as many to each. All threads compute the rest,
  // one matrix after the other.
  const int team = static_cast<int>(imin(threads, matrices));
  const int64_t own = matrices - matrices % team;
  const Scratch room(team, Iteration::size(R, C));
  const auto run = [&](int64_t m, float* memory, int count) {
    const auto* x = reinterpret_cast<const float*>(places[2 * m]);
    auto* out = reinterpret_cast<float*>(places[2 * m + 1]);
    Iteration(R, C, memory).run(x, out, steps, a, b, c, count);
  };
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int t = 0; t < team; ++t)
    for (int64_t m = t; m < own; m += team) run(m, room[t], team > 1 ? 1 : threads);
  for (int64_t m = own; m < matrices; ++m) run(m, room[0], threads);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
