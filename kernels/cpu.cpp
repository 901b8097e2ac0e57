// Operations in bfloat16 for CPUs with AVX512; `reference.py` is their specification.
//
// Plain C functions on strided rows, compiled where they run (`cpu.py`). Strides count elements.
// Sums, exponentials and rotations are in float32, and a result is rounded once. With WIDE,
// products are of float32, too: see `widened.py`.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifndef HEAD_DIM
#error "HEAD_DIM: features of a head, a multiple of 16"
#endif

#ifndef WIDE
#error "WIDE: 1 for products of float32, 0 for those of bfloat16"
#endif

namespace {

using bf16 = uint16_t;

constexpr int LANES = 16;  // of float32 in a register

inline __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

inline __m512 load(const bf16* x) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

inline __m256i narrow(__m512 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));  // ties go to even
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));  // stays a NaN
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet));
#endif
}

inline void store(bf16* out, __m256i x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x);
}

// 2^x of x up to 200, to a relative error of 2e-7: the minimax polynomial of the fraction. Written so
// that NaN stays NaN.
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.3276472e-3f);
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.6755410e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.5507131e-2f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.4022120e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9314694e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0000001f));
  return _mm512_scalef_ps(sum, whole);
}

constexpr float LOG2_E = 1.4426950408889634f;

// ---- attention of a step ----

constexpr int D = HEAD_DIM;
constexpr int VECTORS = D / LANES;   // of a row of values, in float32
constexpr int ROWS = 72;             // queries of a task
constexpr int TILE = 64;             // keys that are packed together
constexpr int CHUNK = 4 * TILE;      // keys between two corrections of the sums by a new maximum
// Rows of a product at once, so that its sums fill 24 of the 32 registers.
constexpr int SCORE_ROWS = 24 / (TILE / LANES);
constexpr int VALUE_ROWS = VECTORS > 24 ? 1 : 24 / VECTORS;
constexpr int PIECE = TILE * D;      // values of a packed tile of keys, or of values

static_assert(D % LANES == 0, "HEAD_DIM must be a multiple of 16");
static_assert(ROWS % SCORE_ROWS == 0 && ROWS % VALUE_ROWS == 0, "no row is computed twice");

// What products take: TOGETHER neighbours of the dimension that is summed, for each lane.
#if WIDE
using Operand = float;
using Operands = __m512;
constexpr int TOGETHER = 1;

inline Operands operands(const Operand* x) { return _mm512_loadu_ps(x); }
inline Operands broadcast(const Operand* x) { return _mm512_set1_ps(*x); }
inline __m512 multiply(__m512 sum, Operands a, Operands b) { return _mm512_fmadd_ps(a, b, sum); }
#else
using Operand = bf16;
using Operands = __m512bh;
constexpr int TOGETHER = 2;

inline Operands operands(const Operand* x) { return (__m512bh)_mm512_loadu_si512(x); }
inline Operands broadcast(const Operand* x) {
  int32_t both;
  std::memcpy(&both, x, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}
inline __m512 multiply(__m512 sum, Operands a, Operands b) { return _mm512_dpbf16_ps(sum, a, b); }
#endif

inline Operand operand(bf16 x) {
#if WIDE
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#else
  return x;
#endif
}

inline void store_operands(Operand* out, __m512 first, __m512 second) {
#if WIDE
  _mm512_storeu_ps(out, first);
  _mm512_storeu_ps(out + LANES, second);
#else
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(second, first));
#endif
}

// To [D / TOGETHER][TILE][TOGETHER]; missing keys are zero.
void pack_keys(const bf16* k, int64_t stride, int keys, Operand* out) {
  alignas(64) int32_t bytes[LANES];  // from the first of some keys to each
  for (int lane = 0; lane < LANES; lane++) bytes[lane] = lane * stride * sizeof(bf16);
  const __m512i places = _mm512_load_si512(bytes), zero = _mm512_setzero_si512();
  for (int key = 0; key < TILE; key += LANES) {
    const int here = std::clamp(keys - key, 0, LANES);
    const __mmask16 present = static_cast<__mmask16>((1u << here) - 1);
    for (int i = 0; i < D; i += 2) {
      const bf16* from = here ? k + key * stride + i : k;
      const __m512i both = _mm512_mask_i32gather_epi32(zero, present, places, from, 1);
#if WIDE
      const __m512i second = _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000));
      _mm512_storeu_si512(out + i * TILE + key, _mm512_slli_epi32(both, 16));
      _mm512_storeu_si512(out + (i + 1) * TILE + key, second);
#else
      _mm512_storeu_si512(out + i * TILE + key * 2, both);
#endif
    }
  }
}

// To [TILE / TOGETHER][D][TOGETHER]; missing keys are zero.
void pack_values(const bf16* v, int64_t stride, int keys, Operand* out) {
  for (int key = 0; key < TILE; key += TOGETHER) {
    for (int i = 0; i < D; i++) {
      for (int j = 0; j < TOGETHER; j++)
        out[key * D + i * TOGETHER + j] =
            key + j < keys ? operand(v[(key + j) * stride + i]) : 0;
    }
  }
}

// One head of `half` pairs (a, b) to (a cos - b sin, b cos + a sin). out may be x; half is a
// multiple of 16.
inline void rotate(
    const bf16* x, const float* cos, const float* sin, int64_t half, bf16* out) {
  for (int64_t i = 0; i < half; i += LANES) {
    const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
    const __m512 a = load(x + i), b = load(x + half + i);
    store(out + i, narrow(_mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c))));
    store(out + half + i, narrow(_mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c))));
  }
}

struct Task {
  alignas(64) Operand q[ROWS * D];      // rows beyond the last query are zero
  alignas(64) float scores[ROWS * CHUNK];
#if !WIDE
  alignas(64) bf16 narrow_weights[ROWS * CHUNK];
#endif
  alignas(64) float out[ROWS * D];      // not yet divided by `total`
  float largest[ROWS], total[ROWS];

  // Of a chunk. In float32 in the place of its scores: half of the traffic between the caches.
  Operand* weights() {
#if WIDE
    return scores;
#else
    return narrow_weights;
#endif
  }
};

// scores = q keys^T of one tile.
void multiply_keys(const Task& task, int rows, const Operand* keys, float* scores) {
  for (int first = 0; first < rows; first += SCORE_ROWS) {
    __m512 sums[SCORE_ROWS][TILE / LANES];
    for (auto& row : sums)
      for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int i = 0; i < D; i += TOGETHER) {
      Operands b[TILE / LANES];
      for (int j = 0; j < TILE / LANES; j++)
        b[j] = operands(keys + i * TILE + j * LANES * TOGETHER);
      for (int r = 0; r < SCORE_ROWS; r++) {
        const Operands a = broadcast(task.q + (first + r) * D + i);
        for (int j = 0; j < TILE / LANES; j++) sums[r][j] = multiply(sums[r][j], a, b[j]);
      }
    }
    for (int r = 0; r < SCORE_ROWS; r++)
      for (int j = 0; j < TILE / LANES; j++)
        _mm512_storeu_ps(scores + (first + r) * CHUNK + j * LANES, sums[r][j]);
  }
}

// out += weights values of one tile.
void multiply_values(Task& task, int rows, const Operand* weights, const Operand* values) {
  for (int first = 0; first < rows; first += VALUE_ROWS) {
    __m512 sums[VALUE_ROWS][VECTORS];
    for (int r = 0; r < VALUE_ROWS; r++)
      for (int j = 0; j < VECTORS; j++)
        sums[r][j] = _mm512_loadu_ps(task.out + (first + r) * D + j * LANES);
    for (int i = 0; i < TILE; i += TOGETHER) {
      Operands b[VECTORS];
      for (int j = 0; j < VECTORS; j++) b[j] = operands(values + i * D + j * LANES * TOGETHER);
      for (int r = 0; r < VALUE_ROWS; r++) {
        const Operands a = broadcast(weights + (first + r) * CHUNK + i);
        for (int j = 0; j < VECTORS; j++) sums[r][j] = multiply(sums[r][j], a, b[j]);
      }
    }
    for (int r = 0; r < VALUE_ROWS; r++)
      for (int j = 0; j < VECTORS; j++)
        _mm512_storeu_ps(task.out + (first + r) * D + j * LANES, sums[r][j]);
  }
}

// Scores of a chunk to weights; what was summed before is corrected by the new maximum (Milakov &
// Gimelshein, 2018). `scale` includes log2(e).
void softmax(Task& task, int rows, int keys, float scale) {
  const __m512 scales = _mm512_set1_ps(scale);
  for (int r = 0; r < rows; r++) {
    const float* scores = task.scores + r * CHUNK;
    __m512 largest[TILE / LANES];  // several chains of maxima, so that none waits for another
    for (auto& one : largest) one = _mm512_set1_ps(task.largest[r]);
    for (int j = 0; j < keys; j += TILE)
      for (int i = 0; i < TILE / LANES; i++)
        largest[i] = _mm512_max_ps(largest[i], _mm512_loadu_ps(scores + j + i * LANES));
    for (int i = 1; i < TILE / LANES; i++) largest[0] = _mm512_max_ps(largest[0], largest[i]);
    const float top = _mm512_reduce_max_ps(largest[0]);
    const __m512 shift = _mm512_set1_ps(-top * scale);
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < keys; j += 2 * LANES) {
      const __m512 a = exp2(_mm512_fmadd_ps(_mm512_loadu_ps(scores + j), scales, shift));
      const __m512 b = exp2(_mm512_fmadd_ps(_mm512_loadu_ps(scores + j + LANES), scales, shift));
      sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
      store_operands(task.weights() + r * CHUNK + j, a, b);
    }
    if (task.largest[r] != top) {
      const __m512 factor = exp2(_mm512_set1_ps((task.largest[r] - top) * scale));
      task.total[r] *= _mm512_cvtss_f32(factor);
      for (int j = 0; j < D; j += LANES) {
        float* out = task.out + r * D + j;
        _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_loadu_ps(out), factor));
      }
      task.largest[r] = top;
    }
    task.total[r] += _mm512_reduce_add_ps(sum);
  }
}

}  // namespace

extern "C" {

extern const int64_t operand_bytes;  // of a value of `packed`
const int64_t operand_bytes = sizeof(Operand);

struct Keys {
  const bf16* k;  // [count, kv_heads, D]
  const bf16* v;
  int64_t k_stride, v_stride, count;
};

// Of the rotation of q: [rows, D / 2] each.
struct Angles {
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;
};

// One group: softmax(q [cached, own]^T / sqrt(D)) [cached, own].
//
// q and out [rows, heads, D]. With `angles` q is rotated first, and D is a multiple of 32. `packed`
// has 2 * PIECE operands for each tile of the keys of `heads_at_once` key heads; a run of keys
// begins a tile of its own.
void attention_step(
    const bf16* q, int64_t q_stride, bf16* out, int64_t out_stride, int64_t rows, int64_t heads,
    int64_t kv_heads, const Keys* cached, const Keys* own, Operand* packed,
    int64_t heads_at_once, const Angles* angles, int threads) {
  const auto tiles_of = [](const Keys* keys) { return (keys->count + TILE - 1) / TILE; };
  const int64_t cached_tiles = tiles_of(cached), tiles = cached_tiles + tiles_of(own);
  const int64_t blocks = (rows + ROWS - 1) / ROWS, share = heads / kv_heads;
  const float scale = LOG2_E / std::sqrt(static_cast<float>(D));
  const auto keys_of = [&](int64_t tile, const Keys** keys, int64_t* start) {
    *keys = tile < cached_tiles ? cached : own;
    *start = (tile < cached_tiles ? tile : tile - cached_tiles) * TILE;
    return static_cast<int>(std::min<int64_t>(TILE, (*keys)->count - *start));
  };
#pragma omp parallel num_threads(threads)
  {
    Task task;
    for (int64_t first = 0; first < kv_heads; first += heads_at_once) {
      const int64_t some = std::min(heads_at_once, kv_heads - first);
#pragma omp for
      for (int64_t i = 0; i < some * tiles; i++) {
        const Keys* keys;
        int64_t start;
        const int count = keys_of(i % tiles, &keys, &start);
        const int64_t head = (first + i / tiles) * D;
        Operand* at = packed + i * 2 * PIECE;
        pack_keys(keys->k + start * keys->k_stride + head, keys->k_stride, count, at);
        pack_values(keys->v + start * keys->v_stride + head, keys->v_stride, count, at + PIECE);
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < some * share * blocks; i++) {
        const int64_t head = first * share + i / blocks, start = i % blocks * ROWS;
        const int here = static_cast<int>(std::min<int64_t>(ROWS, rows - start));
        const Operand* at = packed + (head / share - first) * tiles * 2 * PIECE;
        std::memset(task.q, 0, sizeof task.q);
        std::memset(task.out, 0, sizeof task.out);
        for (int r = 0; r < here; r++) {
          const int64_t row = start + r;
          const bf16* from = q + row * q_stride + head * D;
          bf16 turned[D];
          if (angles) {
            rotate(
                from, angles->cos + row * angles->cos_stride,
                angles->sin + row * angles->sin_stride, D / 2, turned);
            from = turned;
          }
          for (int j = 0; j < D; j++) task.q[r * D + j] = operand(from[j]);
          task.largest[r] = -std::numeric_limits<float>::infinity();
          task.total[r] = 0;
        }
        for (int64_t tile = 0; tile < tiles; tile += CHUNK / TILE) {
          const int taken = static_cast<int>(std::min<int64_t>(CHUNK / TILE, tiles - tile));
          for (int t = 0; t < taken; t++) {
            float* scores = task.scores + t * TILE;
            multiply_keys(task, here, at + (tile + t) * 2 * PIECE, scores);
            const Keys* keys;
            int64_t before;
            const int count = keys_of(tile + t, &keys, &before);
            for (int r = 0; count < TILE && r < here; r++)
              std::fill(
                  scores + r * CHUNK + count, scores + r * CHUNK + TILE,
                  -std::numeric_limits<float>::infinity());
          }
          softmax(task, here, taken * TILE, scale);
          for (int t = 0; t < taken; t++)
            multiply_values(
                task, here, task.weights() + t * TILE, at + ((tile + t) * 2 + 1) * PIECE);
        }
        for (int r = 0; r < here; r++) {
          const __m512 factor = _mm512_set1_ps(1 / task.total[r]);
          for (int j = 0; j < D; j += LANES)
            store(
                out + (start + r) * out_stride + head * D + j,
                narrow(_mm512_mul_ps(_mm512_loadu_ps(task.out + r * D + j), factor)));
        }
      }
    }
  }
}

// `width` is a multiple of 16.
void rms_norm(
    const bf16* x, int64_t x_stride, const bf16* weight, bf16* out, int64_t out_stride,
    int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const bf16* at = x + row * x_stride;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES) {
      const __m512 value = load(at + i);
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
    const __m512 factor = _mm512_set1_ps(1 / std::sqrt(mean + eps));
    for (int64_t i = 0; i < width; i += LANES)
      store(
          out + row * out_stride + i,
          narrow(_mm512_mul_ps(_mm512_mul_ps(load(at + i), factor), load(weight + i))));
  }
}

// Rotates the first `heads` heads of each row. cos and sin [rows, half], contiguous in a row; half
// a head is a multiple of 16.
void rope(
    bf16* qkv, int64_t stride, const float* cos, int64_t cos_stride, const float* sin,
    int64_t sin_stride, int64_t rows, int64_t heads, int64_t half, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t head = 0; head < heads; head++) {
      bf16* at = qkv + row * stride + 2 * head * half;
      rotate(at, cos + row * cos_stride, sin + row * sin_stride, half, at);
    }
  }
}

// out = silu(gate) * up of rows [gate | up]; `width` of each is a multiple of 16. out may be the
// gate.
void swiglu(
    const bf16* gate_up, int64_t stride, bf16* out, int64_t out_stride, int64_t rows,
    int64_t width, int threads) {
  const __m512 one = _mm512_set1_ps(1.f), negative = _mm512_set1_ps(-LOG2_E);
  const __m512 largest = _mm512_set1_ps(200.f);
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t i = 0; i < width; i += LANES) {
      const __m512 gate = load(gate_up + row * stride + i);
      const __m512 up = load(gate_up + row * stride + width + i);
      const __m512 power = _mm512_min_ps(largest, _mm512_mul_ps(gate, negative));
      const __m512 divisor = _mm512_add_ps(one, exp2(power));
      store(
          out + row * out_stride + i,
          narrow(_mm512_mul_ps(_mm512_div_ps(gate, divisor), up)));
    }
  }
}

}  // extern "C"
