// qkv_proj's forward: one GEMM over one matrix of weights or three, with the biases in its
// epilogue. Its output already has the layout (T, 3, H, D). The backward is the library's.
//
// A block computes a tile of kM x kN sums. It loops over tiles of x and w of kK columns in kStages
// buffers, which cp.async fills two steps ahead; each warp multiplies its part of them.
//
// Template budget: {fp32, bf16, fp16}, 3 kernels.
//
//             tile       warps  registers (sm_80)  KB of shared memory
//   16 bit    128 x 128  2 x 4  128                48
//   fp32      64 x 64    2 x 2  168                48
#include "entries.h"
#include "launch.cuh"
#include "mma.cuh"

namespace fastbert {
namespace {

template <typename T>
struct Product {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kM = kHalf ? 128 : 64, kN = kM, kK = 32, kStages = 3;
  static constexpr int kWarpsM = 2, kWarpsN = kHalf ? 4 : 2;
  // a warp's 16-row and 8-column tiles
  static constexpr int kRows = kM / kWarpsM / 16, kColumns = kN / kWarpsN / 8;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kResident = 2;
  static constexpr int kStage = (kM + kN) * kK;
  // the sums are written through the same memory
  static constexpr int kBytes =
      sizeof(T) * (kStages * kStage > kM * kN ? kStages * kStage : kM * kN);
};

// rows of up to three matrices of `part` rows each
template <typename P>
struct Pieces {
  const P* data[3];
  int part;

  __device__ const P* row(int n, int64_t length) const {
    const int piece = n < part ? 0 : n < 2 * part ? 1 : 2;
    return (piece == 0 ? data[0] : piece == 1 ? data[1] : data[2]) + (n - piece * part) * length;
  }
};

struct Biases {
  const void* data[3];  // (part,) each, or null
  int dtype, part;

  template <typename P>
  __device__ float read(int n) const {
    const Pieces<P> pieces = {{static_cast<const P*>(data[0]), static_cast<const P*>(data[1]),
                               static_cast<const P*>(data[2])},
                              part};
    return widen(*pieces.row(n, 1));
  }

  template <typename T>
  __device__ float at(int n) const {
    if (!data[0]) return 0.f;
    return sizeof(T) == 4 || dtype == kFloat32 ? read<float>(n) : read<T>(n);
  }
};

template <typename T>
__global__ void __launch_bounds__(Product<T>::kThreads, Product<T>::kResident)
    qkv_proj_fwd_kernel(const T* x,     // (rows, K)
                        Pieces<T> w,    // (N, K)
                        Biases biases,  // (N,), or null
                        T* y,           // (rows, N)
                        int64_t rows, int K, int N, bool wide, bool wide_out) {
  using P = Product<T>;
  extern __shared__ __align__(128) char product_memory[];
  T* const memory = reinterpret_cast<T*>(product_memory);
  const int64_t tiles = (rows + P::kM - 1) / P::kM;
  const int64_t row0 = blockIdx.x % tiles * P::kM;
  const int column0 = static_cast<int>(blockIdx.x / tiles) * P::kN;
  const int count = static_cast<int>(min(rows - row0, int64_t{P::kM}));
  const int steps = (K + P::kK - 1) / P::kK;
  const auto tile_x = [&](int step) {
    return Tile<T, P::kK>{memory + step % P::kStages * P::kStage};
  };
  const auto tile_w = [&](int step) {
    return Tile<T, P::kK>{memory + step % P::kStages * P::kStage + P::kM * P::kK};
  };
  const auto ask = [&](int step) {
    if (step < steps) {
      const int k = step * P::kK;
      fetch_rows(
          tile_x(step), P::kM, [&](int row) { return x + (row0 + row) * K + k; }, x, count, K - k,
          wide);
      fetch_rows(
          tile_w(step), P::kN, [&](int row) { return w.row(column0 + row, K) + k; }, w.data[0],
          N - column0, K - k, wide);
    }
    copies_commit();
  };
  const int warp = threadIdx.x / 32;
  const int row = warp / P::kWarpsN * 16 * P::kRows, column = warp % P::kWarpsN * 8 * P::kColumns;
  float sums[P::kRows][P::kColumns][4] = {};
  for (int step = 0; step < P::kStages - 1; ++step) ask(step);
  for (int step = 0; step < steps; ++step) {
    copies_left<P::kStages - 2>();
    // fills the buffer of the previous step
    ask(step + P::kStages - 1);
#pragma unroll
    for (int k = 0; k < P::kK; k += 16) {
      FragmentA<T> a[P::kRows];
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) load_a(a[r], tile_x(step), row + 16 * r, k);
#pragma unroll
      for (int n = 0; n < P::kColumns; n += 2) {
        FragmentB<T> b[2];
        load_b_trans(b, tile_w(step), column + 8 * n, k);
#pragma unroll
        for (int r = 0; r < P::kRows; ++r) {
          mma(sums[r][n], a[r], b[0]);
          mma(sums[r][n + 1], a[r], b[1]);
        }
      }
    }
  }
  // waits until every warp is done with the tiles
  copies_done();
  const Tile<T, P::kN> out = {memory};
#pragma unroll
  for (int n = 0; n < P::kColumns; ++n) {
    const int at = column0 + column + 8 * n + lane_id() % 4 * 2;
    const float bias[2] = {at < N ? biases.at<T>(at) : 0.f,
                           at + 1 < N ? biases.at<T>(at + 1) : 0.f};
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[r][n][e] += bias[e % 2];
      store_c(out, row + 16 * r, column + 8 * n, sums[r][n]);
    }
  }
  __syncthreads();
  constexpr int kVector = kVec<T>, kChunks = P::kN / kVector;
  for (int i = threadIdx.x; i < count * kChunks; i += P::kThreads) {
    const int r = i / kChunks, chunk = i % kChunks;
    copy_chunk(out.at(r & ~7, r & 7, 0, chunk), y + (row0 + r) * N, column0 + chunk * kVector, N,
               wide_out);
  }
}

}  // namespace

void qkv_proj_fwd(int dtype, const void* x, const void* w0, const void* w1, const void* w2,
                  const void* b0, const void* b1, const void* b2, int bias_dtype, void* y,
                  int64_t T, int64_t K, int64_t N, int device, cudaStream_t stream) {
  const Launch launch("qkv_proj_fwd", T, N, device, stream);
  const int part = static_cast<int>(w1 ? N / 3 : N);
  by_dtype(dtype, [&](auto t) {
    using E = decltype(t);
    using P = Product<E>;
    const Pieces<E> w = {
        {static_cast<const E*>(w0), static_cast<const E*>(w1), static_cast<const E*>(w2)}, part};
    const int64_t blocks = int64_t{cdiv(T, P::kM)} * cdiv(N, P::kN);
    qkv_proj_fwd_kernel<E><<<static_cast<unsigned>(blocks), P::kThreads, P::kBytes, stream>>>(
        static_cast<const E*>(x), w, {{b0, b1, b2}, bias_dtype, part}, static_cast<E*>(y), T,
        static_cast<int>(K), static_cast<int>(N), aligned(K, kVec<E>, x, w0, w1, w2),
        aligned(N, kVec<E>, y));
  });
  launch.check();
}

}  // namespace fastbert
