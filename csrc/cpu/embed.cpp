// BERT's embeddings in one pass: gather, add, LayerNorm and dropout.
//
//   z = word[ids] + position[positions] + type[types]
//   y = dropout((z - mean) * rstd * weight + bias),   mean, var over the row
//
// backward gathers z again. From dln = dropout'(dy) it computes dz, dweight and dbias as layer_norm
// does. The gradient of a table's row r is the sum of dz over the tokens of id r, in their order.
#include "embed.h"

#include "norm.h"
#include "philox.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// the tables, and for each token the rows that it adds
template <typename E>
struct Tables {
  const int64_t *ids, *positions, *types;
  const E *word, *position, *type;

  Tables(const int64_t* ids_, const int64_t* positions_, const int64_t* types_, const void* word_,
         const void* position_, const void* type_)
      : ids(ids_),
        positions(positions_),
        types(types_),
        word(static_cast<const E*>(word_)),
        position(static_cast<const E*>(position_)),
        type(static_cast<const E*>(type_)) {}

  // writes z (C) of token t in whole vectors and returns its sum
  float gather(int64_t t, int64_t C, float* z) const {
    const E* a = word + (ids ? ids[t] : t) * C;
    const E* b = position + positions[t] * C;
    const E* d = types ? type + types[t] * C : nullptr;
    const auto [total] = column_sums<1>(C, [&](int64_t c, int64_t n, int k, Chains* sums) {
      F value = load(a + c, n) + load(b + c, n);
      if (d) value += load(d + c, n);
      store(z + c, value);
      sums->of[k] += value;
    });
    return total;
  }
};

// factors (C): dropout's factors, or null
template <typename O>
void embed_fwd_row(const float* z, float total, const float* weight, const float* bias,
                   const float* factors, int64_t C, float eps, O* y, float* mean, float* rstd) {
  norm_row(z, total, weight, bias, C, eps, mean, rstd, [=](int64_t c, int64_t n, F value) {
    if (factors) value = dropped(value, load(factors + c));
    store(y + c, value, n);
  });
}

template <typename E, typename O>
void forward(const Tables<E>& tables, const float* weight, const float* bias, O* y, float* mean,
             float* rstd, int64_t T, int64_t C, float eps, const Dropout& dropout, int threads) {
  norm_rows(T, C, dropout, threads, [&](int64_t t, float* z, const float* factors) {
    const float total = tables.gather(t, C, z);
    embed_fwd_row(z, total, weight, bias, factors, C, eps, y + t * C, mean + t, rstd + t);
  });
}

// computes dz (T, C), dweight and dbias
template <typename E, typename O>
void backward_rows(const Tables<E>& tables, const O* dy, const float* weight, const float* mean,
                   const float* rstd, float* dz, float* dweight, float* dbias, int64_t T, int64_t C,
                   const Dropout& dropout, int threads) {
  const int64_t room = round_up(C, kPhiloxWords);
  const bool drops = dropout.enabled();
  norm_partitions(T, C, dweight, dbias, 4 * room, threads,
                  [&](int64_t t, auto count, float* dw, float* db, float* z) {
                    constexpr int kRows = count.value;
                    float* dln = z + 2 * room;
                    for (int r = 0; r < kRows; ++r) {
                      tables.gather(t + r, C, z + r * room);
                      float* row = dln + r * room;
                      if (drops) row_factors(dropout, t + r, C, row);
                      columns(C, [&](int64_t c, int64_t n, int) {
                        const F d = load(dy + (t + r) * C + c, n);
                        store(row + c, drops ? dropped(d, load(row + c)) : d);
                      });
                    }
                    norm_bwd_rows<kRows>(dln, z, room, weight, mean + t, rstd + t, C, dw, db,
                                         [=](int r, int64_t c, int64_t n, F value) {
                                           store(dz + (t + r) * C + c, value, n);
                                         });
                  });
}

// columns of a task in tables of few rows: tasks of whole rows would occupy few threads
constexpr int64_t kScatterColumns = 64;
constexpr int64_t kScatterFewRows = 64;
// rows of a task in other tables: frequent ids are neighbours, and short tasks spread them
constexpr int64_t kScatterRows = 16;

// columns [from, to) of one row: the sum of dz over the list of tokens, which may be empty
template <typename E>
void scatter_row(const float* dz, int32_t first, const int32_t* next, int64_t C, int64_t from,
                 int64_t to, E* row) {
  int64_t c = from;
  for (; c + 4 * W <= to; c += 4 * W) {
    F a = zero(), b = a, d = a, e = a;
    for (int32_t t = first; t >= 0; t = next[t]) {
      const float* grad = dz + t * C + c;
      a += load(grad);
      b += load(grad + W);
      d += load(grad + 2 * W);
      e += load(grad + 3 * W);
    }
    store(row + c, a);
    store(row + c + W, b);
    store(row + c + 2 * W, d);
    store(row + c + 3 * W, e);
  }
  for (; c < to; c += W) {
    F a = zero();
    for (int32_t t = first; t >= 0; t = next[t]) a += load(dz + t * C + c, to - c);
    store(row + c, a, to - c);
  }
}

// Every row of grad (rows, C): the sum of dz over its tokens, 0 for the padding row. A row is
// written once, by one thread, whatever the thread count.
template <typename E>
void scatter(const float* dz, const int64_t* ids, E* grad, int64_t T, int64_t C, int64_t rows,
             int64_t padding, int threads) {
  // linked lists of the tokens of each row: first[row], then next[token], until -1
  const Scratch lists(1, rows + T);
  int32_t* first = reinterpret_cast<int32_t*>(lists[0]);
  int32_t* next = first + rows;
  for (int64_t r = 0; r < rows; ++r) first[r] = -1;
  for (int64_t t = T - 1; t >= 0; --t) {
    if (ids[t] == padding) continue;
    next[t] = first[ids[t]];
    first[ids[t]] = static_cast<int32_t>(t);
  }
  const bool few = rows < kScatterFewRows;
  const int64_t width = few ? kScatterColumns : C, height = few ? 1 : kScatterRows;
  const int64_t across = ceil_div(C, width), tasks = ceil_div(rows, height) * across;
  const int team = team_size((rows + T) * C, kNormGrain, tasks, threads);
#pragma omp parallel for num_threads(team) schedule(static, 1) if (team > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t from = task % across * width, to = imin(C, from + width);
    int64_t r = task / across * height;
    const int64_t end = imin(rows, r + height);
    while (r < end) {
      int64_t next_used = r;
      while (!few && next_used < end && first[next_used] < 0) ++next_used;
      // most rows have no token: memset writes whole cache lines without reading them first
      if (next_used > r)
        __builtin_memset(grad + r * C, 0, static_cast<size_t>((next_used - r) * C) * sizeof(E));
      r = next_used;
      if (r < end) scatter_row(dz, first[r], next, C, from, to, grad + r * C);
      ++r;
    }
  }
}

// dz in the dtype of the given embeddings
template <typename E>
void copy(const float* dz, E* grad, int64_t size, int threads) {
  const int64_t tasks = ceil_div(size, kNormGrain);
  const int team = team_size(size, kNormGrain, tasks, threads);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t start = task * kNormGrain;
    columns(imin(kNormGrain, size - start), [&](int64_t c, int64_t n, int) {
      store(grad + start + c, load(dz + start + c, n), n);
    });
  }
}

}  // namespace

void embed_fwd(int dtype, int out_dtype, const int64_t* ids, const int64_t* positions,
               const int64_t* types, const void* word, const void* position, const void* type,
               const float* weight, const float* bias, void* y, float* mean, float* rstd, int64_t T,
               int64_t C, float eps, const int64_t* seed, uint32_t site, uint32_t threshold,
               float scale, int threads) {
  const Dropout dropout = {seed, site, threshold, scale, nullptr};
  with_type(dtype, [&](auto e) {
    using E = decltype(e);
    const Tables<E> tables(ids, positions, types, word, position, type);
    with_type(out_dtype, [&](auto o) {
      forward(tables, weight, bias, static_cast<decltype(o)*>(y), mean, rstd, T, C, eps, dropout,
              threads);
    });
  });
}

void embed_bwd(int dtype, int out_dtype, const void* dy, const int64_t* ids,
               const int64_t* positions, const int64_t* types, const void* word,
               const void* position, const void* type, const float* weight, const float* mean,
               const float* rstd, void* dword, void* dposition, void* dtype_table, float* dweight,
               float* dbias, int64_t T, int64_t C, int64_t V, int64_t P, int64_t Y, int64_t padding,
               int64_t position_padding, const int64_t* seed, uint32_t site, uint32_t threshold,
               float scale, int threads) {
  const Dropout dropout = {seed, site, threshold, scale, nullptr};
  const Scratch memory(1, T * C);
  float* dz = memory[0];
  with_type(dtype, [&](auto e) {
    using E = decltype(e);
    const Tables<E> tables(ids, positions, types, word, position, type);
    with_type(out_dtype, [&](auto o) {
      backward_rows(tables, static_cast<const decltype(o)*>(dy), weight, mean, rstd, dz, dweight,
                    dbias, T, C, dropout, threads);
    });
    if (ids)
      scatter(dz, ids, static_cast<E*>(dword), T, C, V, padding, threads);
    else
      copy(dz, static_cast<E*>(dword), T * C, threads);
    if (dposition)
      scatter(dz, positions, static_cast<E*>(dposition), T, C, P, position_padding, threads);
    if (types) scatter(dz, types, static_cast<E*>(dtype_table), T, C, Y, -1, threads);
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
