// For one (sequence, head) and one block of rows at a time. The block's scores of student and
// teacher against all rows stay in cache: both softmaxes are exact, and memory grows with the
// length L, not L^2. Products run on gemm.h's inner loop.
//
//   S = Z Z^T / sqrt(D),  P = softmax(S),  P' of the teacher likewise
//   loss = sum P' (log P' - log P),  dS = dloss (P - P'),  dZ = (dS + dS^T) Z / sqrt(D)
//
// S is symmetric: e^(S_ij - top_j) / sum_j is P_ji, so that backward makes dS + dS^T for its own
// rows alone, from the saved top and sum of every row. A single log-sum-exp would not do: e^(S -
// lse) has the rounding error of lse.
#include "relation_loss.h"

#include "heads.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// Products in a sum before it is added to the others: a row's product with itself has no terms of
// the other sign, and its rounding errors would grow.
constexpr int64_t kSlice = 32;

// One head of one sequence of the student or the teacher, and its statistics.
template <typename T>
struct Side {
  const T* z;  // (T, H, D), from the first row and this head on
  float* top;  // (L,) the largest product of a row, or null
  float* sum;  // (L,) the sum of exponentials
  int64_t H, D;
  float scale;

  Operand<T> operand(int64_t first, int64_t count, bool across) const {
    return {matrix(z + first * H * D, H * D, 1), across ? D : count, across};
  }
};

template <typename T>
struct Pair {
  Side<T> student, teacher;
  int64_t L;
  float* loss;  // (L,)

  int64_t ld() const { return round_up(L, kNR); }
};

// Scores of a block of rows against all rows; packed operands.
template <typename T>
class Scores {
 public:
  static int64_t room(int64_t L, int64_t D) {
    const int64_t ld = round_up(L, kNR), rows = block_rows(L);
    return ld * D + rows * (D + ld) + 4 * W;
  }

  Scores(const Side<T>& side, int64_t L, float*& room)
      : side_(side), L_(L), ld_(round_up(L, kNR)), keys_(room) {
    values_ = keys_ + ld_ * side.D;
    queries_ = values_ + block_rows(L) * ld_;
    room += Scores::room(L, side.D);
    side.operand(0, L, false).template pack<false>(0, ld_ / kNR, kNR, 0, side.D, keys_);
  }

  // the products of rows [i, i + rows) with all rows
  void fill(int64_t i, int64_t rows) const {
    side_.operand(i, rows, false)
        .template pack<false>(0, ceil_div(rows, kMR), kMR, 0, side_.D, queries_);
    product_packed(rows, ld_, side_.D, queries_, keys_, values_, ld_, kSlice);
  }

  float* row(int64_t r) const { return values_ + r * ld_; }
  float scale() const { return side_.scale; }

  // the largest value of row r
  float top(int64_t r) const {
    const F lowest = set1(-__builtin_inff());
    F found = lowest;
    for (int64_t j = 0; j < L_; j += W) {
      const F v = load(row(r) + j);
      found = max(j + W > L_ ? (below(L_ - j) ? v : lowest) : v, found);
    }
    return max(found);
  }

 private:
  const Side<T>& side_;
  int64_t L_, ld_;
  float *keys_, *values_, *queries_;
};

// p - q - q u with u = log(p / q): the terms of sum q log(q / p), since p and q each add up to 1.
// Each is at least 0, and 0 where p is q, so that rounding errors of u hardly count where student
// and teacher agree. There p - q - q u = q (e^u - 1 - u) comes from its series.
inline F divergence(F p, F q, F u) {
  F series = u * (1.0f / 3628800) + 1.0f / 362880;
  series = series * u + 1.0f / 40320;
  series = series * u + 1.0f / 5040;
  series = series * u + 1.0f / 720;
  series = series * u + 1.0f / 120;
  series = series * u + 1.0f / 24;
  series = series * u + 1.0f / 6;
  series = series * u + 0.5f;
  return abs(u) < set1(1.0f) ? q * (u * u * series) : (p - q) - q * u;
}

// One row's loss. s and t, its products with all n rows of the student and the teacher, become
// exponentials; `apart` is room for n numbers. Leaves both sums of exponentials.
inline float relation_loss_fwd_row(float* s, float* t, float* apart, float s_top, float t_top,
                                   float s_scale, float t_scale, int64_t n, float& s_sum,
                                   float& t_sum) {
  F s_total = zero(), t_total = zero(), loss = zero();
  for (int64_t j = 0; j < n; j += W) {
    const F x = (load(s + j) - s_top) * s_scale, y = (load(t + j) - t_top) * t_scale;
    F p = exp_nonpositive(x), q = exp_nonpositive(y), u = x - y;
    if (j + W > n) {
      const I inside = below(n - j);
      p = inside ? p : zero(), q = inside ? q : zero(), u = inside ? u : zero();
    }
    store(s + j, p), store(t + j, q), store(apart + j, u);
    s_total += p, t_total += q;
  }
  s_sum = sum(s_total), t_sum = sum(t_total);
  const float s_inverse = 1.0f / s_sum, t_inverse = 1.0f / t_sum;
  const float ratio = __builtin_logf(s_sum / t_sum);
  for (int64_t j = 0; j < n; j += W) {
    const F u = load(apart + j) - ratio;
    const F term = divergence(load(s + j) * s_inverse, load(t + j) * t_inverse, u);
    loss += j + W > n ? (below(n - j) ? term : zero()) : term;
  }
  return sum(loss);
}

template <typename T>
struct Forward {
  static int64_t room(int64_t L, int64_t D, int64_t Dt) {
    return Scores<T>::room(L, D) + Scores<T>::room(L, Dt) + round_up(L, kNR);
  }

  // rows [from, to) of a head
  static void run(const Pair<T>& pair, int64_t from, int64_t to, float* room) {
    const Scores<T> student(pair.student, pair.L, room), teacher(pair.teacher, pair.L, room);
    const int64_t most = block_rows(pair.L);
    for (int64_t i = from; i < to; i += most) {
      const int64_t rows = imin(most, to - i);
      student.fill(i, rows), teacher.fill(i, rows);
      for (int64_t r = 0; r < rows; ++r) {
        const float s_top = student.top(r), t_top = teacher.top(r);
        float s_sum, t_sum;
        pair.loss[i + r] =
            relation_loss_fwd_row(student.row(r), teacher.row(r), room, s_top, t_top,
                                  student.scale(), teacher.scale(), pair.L, s_sum, t_sum);
        keep(pair.student, i + r, s_top, s_sum), keep(pair.teacher, i + r, t_top, t_sum);
      }
    }
  }

 private:
  static void keep(const Side<T>& side, int64_t i, float top, float sum) {
    if (side.top) side.top[i] = top, side.sum[i] = sum;
  }
};

// A row's part of dS + dS^T / dloss: s, products of the student, becomes P_ij + P_ji - P'_ij -
// P'_ji. `tops` and `inverses` are those of all rows, i the row's number.
inline void relation_loss_bwd_row(float* s, const float* t, const float* s_tops,
                                  const float* s_inverses, const float* t_tops,
                                  const float* t_inverses, float s_scale, float t_scale, int64_t i,
                                  int64_t n) {
  const float s_top = s_tops[i], s_inverse = s_inverses[i], t_top = t_tops[i],
              t_inverse = t_inverses[i];
  for (int64_t j = 0; j < n; j += W) {
    const F x = load(s + j), y = load(t + j);
    const F p = exp_nonpositive((x - s_top) * s_scale) * s_inverse +
                exp_nonpositive((x - load(s_tops + j)) * s_scale) * load(s_inverses + j);
    const F q = exp_nonpositive((y - t_top) * t_scale) * t_inverse +
                exp_nonpositive((y - load(t_tops + j)) * t_scale) * load(t_inverses + j);
    store(s + j, p - q);
  }
}

template <typename T>
class Backward {
 public:
  static int64_t room(int64_t L, int64_t D, int64_t Dt) {
    const int64_t ld = round_up(L, kNR), depth = round_up(D, kNR);
    return Scores<T>::room(L, D) + Scores<T>::room(L, Dt) + 4 * ld + depth * (L + block_rows(L));
  }

  // rows [from, to) of a head; dz is laid out as the student's z
  static void run(const Pair<T>& pair, float dloss, T* dz, int64_t from, int64_t to, float* room) {
    const Side<T>& side = pair.student;
    const int64_t L = pair.L, ld = pair.ld(), D = side.D, depth = round_up(D, kNR);
    const Scores<T> student(side, L, room), teacher(pair.teacher, L, room);
    const float* stats = statistics(pair, room);
    float* across = room + 4 * ld;
    float* result = across + depth * L;
    side.operand(0, L, true).template pack<false>(0, depth / kNR, kNR, 0, L, across);
    const int64_t most = block_rows(L);
    for (int64_t i = from; i < to; i += most) {
      const int64_t rows = imin(most, to - i);
      student.fill(i, rows), teacher.fill(i, rows);
      for (int64_t r = 0; r < rows; ++r)
        relation_loss_bwd_row(student.row(r), teacher.row(r), stats, stats + ld, stats + 2 * ld,
                              stats + 3 * ld, student.scale(), teacher.scale(), i + r, L);
      // slices of the sum over rows: a long sum would lose precision
      for (int64_t k = 0; k < L; k += kKC)
        product(rows, depth, imin(kKC, L - k), student.row(0) + k, Rows{ld}, across + k * kNR, L,
                result, depth, k > 0);
      for (int64_t r = 0; r < rows; ++r) {
        T* to_row = dz + (i + r) * side.H * D;
        for (int64_t d = 0; d < D; d += W)
          store(to_row + d, load(result + r * depth + d) * (dloss * side.scale), D - d);
      }
    }
  }

 private:
  // top and 1 / sum of the student, then of the teacher, each (ld,) with zeros from L on
  static const float* statistics(const Pair<T>& pair, float* room) {
    const int64_t ld = pair.ld();
    float* to = room;
    const Side<T>* const both[] = {&pair.student, &pair.teacher};
    for (const Side<T>* side : both) {
      for (int64_t j = 0; j < ld; ++j) {
        to[j] = j < pair.L ? side->top[j] : 0.0f;
        to[ld + j] = j < pair.L ? 1.0f / side->sum[j] : 0.0f;
      }
      to += 2 * ld;
    }
    return room;
  }
};

// The packed batch: sizes, and the pair of a task.
template <typename T>
struct Batch {
  const T *student, *teacher;
  Sequences sequences;
  int64_t rows, H, D, Dt;
  float *student_stats, *teacher_stats, *losses;

  Pair<T> pair(int64_t b, int64_t h) const {
    return {side(student, student_stats, D, b, h), side(teacher, teacher_stats, Dt, b, h),
            sequences.length(b), losses ? losses + h * rows + sequences.cu[b] : nullptr};
  }
  Side<T> side(const T* z, float* stats, int64_t size, int64_t b, int64_t h) const {
    const int64_t start = sequences.cu[b];
    float* top = stats ? stats + h * rows + start : nullptr;
    return {z + (start * H + h) * size,
            top,
            stats ? top + H * rows : nullptr,
            H,
            size,
            1.0f / sqrt1(static_cast<float>(size))};
  }
  // body(pair, b, h, part, room) for each part of the rows of each head of each sequence
  template <typename Pass, typename Body>
  void each(int threads, const Body& body) const {
    const int64_t chunks = sequences.chunks(H, threads);
    const int64_t room = sequences.most([&](int64_t L) { return Pass::room(L, D, Dt); });
    const int64_t work = sequences.pairs() * H * (D + Dt);
    each_task(sequences.B * H * chunks, work, room, threads, [&](int64_t i, float* at) {
      const int64_t b = i / chunks / H, h = i / chunks % H;
      const Span part = part_of(sequences.length(b), i % chunks, chunks);
      if (part.from < part.to) body(pair(b, h), b, h, part, at);
    });
  }
  // zeros in the statistics of rows past the last sequence
  void finish(float* stats) const {
    const int64_t end = sequences.cu[sequences.B];
    for (int64_t k = 0; stats && k < 2 * H; ++k) zeros(stats + k * rows + end, rows - end);
  }
};

}  // namespace

void relation_loss_fwd(int dtype, const void* student, const void* teacher,
                       const int32_t* cu_seqlens, float* loss, float* student_stats,
                       float* teacher_stats, int64_t T, int64_t B, int64_t H, int64_t D, int64_t Dt,
                       int threads) {
  const Scratch losses(1, H * T);
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    const Batch<E> batch = {static_cast<const E*>(student),
                            static_cast<const E*>(teacher),
                            {cu_seqlens, B},
                            T,
                            H,
                            D,
                            Dt,
                            student_stats,
                            teacher_stats,
                            losses[0]};
    batch.template each<Forward<E>>(
        threads, [](const Pair<E>& pair, int64_t, int64_t, const Span& part, float* room) {
          Forward<E>::run(pair, part.from, part.to, room);
        });
    batch.finish(student_stats), batch.finish(teacher_stats);
  });
  // one order of the sum, whatever the threads
  double total = 0.0;
  for (int64_t h = 0; h < H; ++h)
    for (int64_t i = 0; i < cu_seqlens[B]; ++i) total += losses[0][h * T + i];
  *loss = static_cast<float>(total);
}

void relation_loss_bwd(int dtype, float dloss, const void* student, const void* teacher,
                       const float* student_stats, const float* teacher_stats,
                       const int32_t* cu_seqlens, void* dstudent, int64_t T, int64_t B, int64_t H,
                       int64_t D, int64_t Dt, int threads) {
  with_type(dtype, [&](auto t) {
    using E = decltype(t);
    auto* d = static_cast<E*>(dstudent);
    const Batch<E> batch = {static_cast<const E*>(student),
                            static_cast<const E*>(teacher),
                            {cu_seqlens, B},
                            T,
                            H,
                            D,
                            Dt,
                            const_cast<float*>(student_stats),
                            const_cast<float*>(teacher_stats),
                            nullptr};
    batch.template each<Backward<E>>(
        threads, [&](const Pair<E>& pair, int64_t b, int64_t h, const Span& part, float* room) {
          E* dz = d + (static_cast<int64_t>(cu_seqlens[b]) * H + h) * D;
          Backward<E>::run(pair, dloss, dz, part.from, part.to, room);
        });
    const int64_t end = cu_seqlens[B];
    zeros(d + end * H * D, (T - end) * H * D);
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
