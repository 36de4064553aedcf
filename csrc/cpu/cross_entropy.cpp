// loss = log(sum) - (z[label] - max),   sum = sum e^(z - max)
// dz = (e^(z - max) / sum - onehot) dloss
//
// backward computes max and sum again while the row is in cache: e^(z - lse) with an fp32 lse would
// be off by |lse| ulp(1) / 2.
#include "cross_entropy.h"

#include "scratch.h"
#include "softmax.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// logits per thread: fewer do not pay for starting one
constexpr int64_t kGrain = 8192;

// rows of a task. Ignored rows cost nothing, so threads take tasks dynamically
inline int64_t rows_at_once(int64_t V) { return imax(1, kGrain / imax(V, 1)); }

template <typename T>
void cross_entropy_fwd_row(const T* z, int64_t label, int64_t V, float* loss, float* lse) {
  const SoftmaxRow row = softmax_pass<false>(z, V, nullptr, nullptr);
  const bool valid = label >= 0 && label < V;
  *loss = valid ? row.loss(load1(z + label)) : __builtin_nanf("");
  *lse = row.lse();
}

template <typename T>
void cross_entropy_inplace_row(T* z, int64_t label, int64_t V, float* loss, float* lse,
                               float* room) {
  const bool valid = label >= 0 && label < V;
  const float z_label = valid ? load1(z + label) : __builtin_nanf("");
  const SoftmaxRow row = softmax_grad_row(z, label, 1.0f, V, z, room);
  *loss = row.loss(z_label);
  *lse = row.lse();
}

template <typename T>
void zero_row(T* dz, int64_t V) {
  __builtin_memset(dz, 0, static_cast<size_t>(V) * sizeof(T));
}

template <typename T>
void forward(const T* logits, const int64_t* labels, float* loss, float* lse, int64_t N, int64_t V,
             int64_t ignore_index, int threads) {
  const int team = team_size(N * V, kGrain, N, threads);
#pragma omp parallel for num_threads(team) schedule(dynamic, rows_at_once(V)) if (team > 1)
  for (int64_t i = 0; i < N; ++i) {
    if (labels[i] == ignore_index)
      loss[i] = lse[i] = 0.0f;
    else
      cross_entropy_fwd_row(logits + i * V, labels[i], V, loss + i, lse + i);
  }
}

// Runs row(i, room) for the labelled rows, with one room per thread, and zeroes the other rows of
// dz.
template <typename T, typename Row>
void labelled_rows(T* dz, const int64_t* labels, int64_t N, int64_t V, int64_t ignore_index,
                   int threads, const Row& row) {
  const int team = team_size(N * V, kGrain, N, threads);
  const Scratch rooms(team, softmax_room<T>(V));
  int64_t next = 0;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int part = 0; part < team; ++part) {
    float* room = rooms[part];
    const int64_t step = rows_at_once(V);
    for (;;) {
      const int64_t first = __atomic_fetch_add(&next, step, __ATOMIC_RELAXED);
      if (first >= N) break;
      for (int64_t i = first; i < imin(first + step, N); ++i) {
        if (labels[i] == ignore_index)
          zero_row(dz + i * V, V);
        else
          row(i, room);
      }
    }
  }
}

template <typename T>
void backward(const float* dloss, const T* logits, const int64_t* labels, T* dlogits, int64_t N,
              int64_t V, int64_t ignore_index, int threads) {
  labelled_rows(dlogits, labels, N, V, ignore_index, threads, [&](int64_t i, float* room) {
    softmax_grad_row(logits + i * V, labels[i], dloss[i], V, dlogits + i * V, room);
  });
}

template <typename T>
void inplace(T* logits, const int64_t* labels, float* loss, float* lse, int64_t N, int64_t V,
             int64_t ignore_index, int threads) {
  for (int64_t i = 0; i < N; ++i) loss[i] = lse[i] = 0.0f;
  labelled_rows(logits, labels, N, V, ignore_index, threads, [&](int64_t i, float* room) {
    cross_entropy_inplace_row(logits + i * V, labels[i], V, loss + i, lse + i, room);
  });
}

}  // namespace

void cross_entropy_fwd(int dtype, const void* logits, const int64_t* labels, float* loss,
                       float* lse, int64_t N, int64_t V, int64_t ignore_index, int threads) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    forward(static_cast<const T*>(logits), labels, loss, lse, N, V, ignore_index, threads);
  });
}

void cross_entropy_bwd(int dtype, const float* dloss, const void* logits, const int64_t* labels,
                       void* dlogits, int64_t N, int64_t V, int64_t ignore_index, int threads) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    backward(dloss, static_cast<const T*>(logits), labels, static_cast<T*>(dlogits), N, V,
             ignore_index, threads);
  });
}

void cross_entropy_inplace(int dtype, void* logits, const int64_t* labels, float* loss, float* lse,
                           int64_t N, int64_t V, int64_t ignore_index, int threads) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    inplace(static_cast<T*>(logits), labels, loss, lse, N, V, ignore_index, threads);
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
