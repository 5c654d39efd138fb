// The decode step on a CPU: few rows through all layers, in one call (see kernel.py).
//
// Products read the model's own weights, row after row as torch stores them (float32, bfloat16, or
// int8 with one scale a row), so nothing is packed or kept twice. Activations are float32. A row m
// of a step is one slot: it is written at slot[m] of cache row row[m] and sees what is there up to
// itself, so rows of one request (a window of codes) and of many mix freely.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float V __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t H __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t B __attribute__((vector_size(LANES), aligned(1), may_alias));

struct bf16 {
  uint16_t bits;
  operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  bf16& operator=(float f) {  // to nearest, ties to even
    uint32_t u;
    std::memcpy(&u, &f, 4);
    bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    return *this;
  }
};

// Mirrored by ctypes in kernel.py, field for field.
enum Kind : int64_t { FLOAT32, BFLOAT16, INT8 };
struct Weight {
  const void* w;  // (rows, cols)
  const float *scale, *bias;  // (rows,) or null
  int64_t kind, rows, cols;
};
struct Layer {
  Weight q, k, v, o, gate, up, down;
  const float *norm1, *norm2, *q_norm, *k_norm;  // the last two may be null
};
struct Model {
  const Layer* layers;
  const float *norm, *frequency;  // (dim,), (width,) signed
  int64_t count, dim, heads, kv_heads, width, hidden;
  float eps;
};
struct Drawing {
  Weight table, first, last;  // the codes' vectors (codes, dim), and the head's two layers
  float guidance, temperature;
};
struct Cache {
  void *const *k, *const *v;  // of every layer, (rows, kv_heads, capacity, width)
  int64_t kind, capacity;
};

static inline V load(const float* p) { return *(const V*)p; }
static inline V load(const bf16* p) { return (V)(__builtin_convertvector(*(const H*)p, U) << 16); }
// gcc widens four times lane by lane, and is five times as slow.
static inline V load(const int8_t* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(__builtin_convertvector(*(const B*)p, I), V);
#endif
}

// Lanes without bit H: the sum of two lanes of a; those with it: of b.
template <int H, int... l>
static inline V fold(V a, V b, std::integer_sequence<int, l...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, ((l & H) ? LANES + l - H : l)...) +
         __builtin_shufflevector(a, b, ((l & H) ? LANES + l : l + H)...);
#else
  return (V)__builtin_shuffle(a, b, (I){((l & H) ? LANES + l - H : l)...}) +
         (V)__builtin_shuffle(a, b, (I){((l & H) ? LANES + l : l + H)...});
#endif
}

// The sums of the lanes of S vectors, S <= LANES a power of two: that of v[i] at lane i * LANES / S.
template <int S, int H = LANES / 2>
static inline V totals(V* v) {
  if constexpr (H == 0) return v[0];
  else {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    constexpr int rest = S > 1 ? S / 2 : 1;
#pragma GCC unroll 8
    for (int i = 0; i < rest; i++) v[i] = fold<H>(v[i], v[S > 1 ? i + rest : i], lanes);
    return totals<rest, H / 2>(v);
  }
}

// y[m, n] = the lanes of sum[n][m], scaled and biased.
template <int M, int N, int P>
static inline void finish(const Weight& a, int64_t n0, int64_t gap, V (*sum)[P], float* y,
                          int64_t stride) {
  constexpr int S = N * P < LANES ? N * P : LANES;
  V* flat = sum[0];
#pragma GCC unroll 8
  for (int s = 0; s < N * P; s += S) {
    const V all = totals<S>(flat + s);
#pragma GCC unroll 16
    for (int i = 0; i < S; i++) {
      const int m = (s + i) % P;
      const int64_t at = n0 + (s + i) / P * gap;
      if (m < M)
        y[m * stride + at] =
            all[i * (LANES / S)] * (a.scale ? a.scale[at] : 1.f) + (a.bias ? a.bias[at] : 0.f);
    }
  }
}

constexpr int AHEAD = 8192;  // bytes of a row's stream to have in the second cache

// N rows of a weight, `gap` apart, by M inputs; y[m, n] with row stride `stride`.
template <class T, int M, int N>
static inline void tile(
    const Weight& a, int64_t n0, int64_t gap, const float* x, float* y, int64_t stride) {
  const int64_t cols = a.cols;
  const T* w = (const T*)a.w + n0 * cols;
  constexpr int P = M == 3 ? 4 : M;
  V sum[N][P] = {};
  for (int64_t k = 0; k < cols; k += LANES) {
    V in[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) in[m] = load(x + m * cols + k);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const V row = load(w + n * gap * cols + k);
      if (M > 2) __builtin_prefetch((const char*)(w + n * gap * cols + k) + AHEAD, 0, 2);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sum[n][m] += row * in[m];
    }
  }
  finish<M, N, P>(a, n0, gap, sum, y, stride);
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)
// The same with bfloat16 inputs: two products a lane, sums in float32. Needs cols % 32 == 0.
template <int M, int N>
static inline void dots(
    const Weight& a, int64_t n0, int64_t gap, const bf16* x, float* y, int64_t stride) {
  const int64_t cols = a.cols;
  const bf16* w = (const bf16*)a.w + n0 * cols;
  constexpr int P = M == 3 ? 4 : M;
  V sum[N][P] = {};
  for (int64_t k = 0; k < cols; k += 32) {
    __m512bh in[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) in[m] = (__m512bh)_mm512_loadu_si512(x + m * cols + k);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const __m512bh row = (__m512bh)_mm512_loadu_si512(w + n * gap * cols + k);
      if (M > 2) __builtin_prefetch((const char*)(w + n * gap * cols + k) + AHEAD, 0, 2);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sum[n][m] = (V)_mm512_dpbf16_ps((__m512)sum[n][m], row, in[m]);
    }
  }
  finish<M, N, P>(a, n0, gap, sum, y, stride);
}
constexpr bool DOTS = true;
#else
template <int M, int N>
static inline void dots(const Weight&, int64_t, int64_t, const bf16*, float*, int64_t) {}
constexpr bool DOTS = false;
#endif

static inline bool by_dots(const Weight& a) {
  return DOTS && a.kind == BFLOAT16 && a.cols % 32 == 0;
}

template <int M, int N>
static inline void any_tile(const Weight& a, int64_t n, int64_t gap, const float* x, const bf16* h,
                            float* y, int64_t stride) {
  if (by_dots(a)) return dots<M, N>(a, n, gap, h, y, stride);
  if (a.kind == FLOAT32) return tile<float, M, N>(a, n, gap, x, y, stride);
  if (a.kind == BFLOAT16) return tile<bf16, M, N>(a, n, gap, x, y, stride);
  return tile<int8_t, M, N>(a, n, gap, x, y, stride);
}

// Four rows of a weight, far apart, so that each is a stream that the memory runs ahead of; the
// turns behind those take one of the rows that are left over.
template <int M>
static void block(const Weight& a, int64_t n, const float* x, const bf16* h, float* y,
                  int64_t stride) {
  const int64_t gap = a.rows / 4;
  constexpr int N = LANES == 8 && M == 4 ? 2 : 4;  // sums that the registers hold
  if (n < gap)
    for (int64_t i = n; i < 4 * gap; i += N * gap) any_tile<M, N>(a, i, gap, x, h, y, stride);
  else
    any_tile<M, 1>(a, n + 3 * gap, 0, x, h, y, stride);
}

// y (rows, stride) = x (rows, cols) a^T + bias; h: x in bfloat16. Shared by the threads of a team.
static void product(const Weight& a, const float* x, const bf16* h, float* y, int64_t rows,
                    int64_t stride) {
#pragma omp for schedule(static) nowait
  for (int64_t n = 0; n < a.rows / 4 + a.rows % 4; n++) {
    for (int64_t m = 0; m < rows; m += 4) {
      const float* in = x + m * a.cols;
      const bf16* half = h + m * a.cols;
      float* out = y + m * stride;
      switch (rows - m) {
        case 1: block<1>(a, n, in, half, out, stride); break;
        case 2: block<2>(a, n, in, half, out, stride); break;
        case 3: block<3>(a, n, in, half, out, stride); break;
        default: block<4>(a, n, in, half, out, stride);
      }
    }
  }
}

static void rms_norm(const float* x, const float* weight, float* y, int64_t size, float eps) {
  float sum = 0;
  for (int64_t i = 0; i < size; i++) sum += x[i] * x[i];
  const float scale = 1.f / std::sqrt(sum / size + eps);
  for (int64_t i = 0; i < size; i++) y[i] = x[i] * scale * weight[i];
}

static void halve(const float* x, bf16* h, int64_t size) {
  for (int64_t i = 0; i < size; i++) h[i] = x[i];
}

// Cosines, then sines, of the halves of a head at a position: (width,).
static void turn(float* angles, const Model& g, int64_t position) {
  const int64_t half = g.width / 2;
  for (int64_t i = 0; i < half; i++) {
    const float angle = float(position) * g.frequency[half + i];
    angles[i] = std::cos(angle);
    angles[half + i] = std::sin(angle);
  }
}

static void rotate(float* x, int64_t width, const float* angles) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[half + i];
    x[i] = a * angles[i] - b * angles[half + i];
    x[half + i] = b * angles[i] + a * angles[half + i];
  }
}

// Scores become exp(score - best); their sum.
static float soften(float* score, float best, int64_t count) {
  float sum = 0;
  for (int64_t t = 0; t < count; t++) score[t] = std::exp(score[t] - best);
  for (int64_t t = 0; t < count; t++) sum += score[t];
  return sum;
}

template <class T, int E>
static void attend_to(const float* q, const T* k, const T* v, int64_t seen, int64_t width,
                      float* out, float* score) {
  const int64_t e = E ? E : width;
  const float scale = 1.f / std::sqrt(float(e));
  float best = -1e30f;
  for (int64_t t = 0; t < seen; t++) {
    float s = 0;
    const T* key = k + t * e;
    for (int64_t i = 0; i < e; i++) s += q[i] * float(key[i]);
    score[t] = s * scale;
    best = std::max(best, score[t]);
  }
  const float sum = soften(score, best, seen);
  for (int64_t i = 0; i < e; i++) out[i] = 0;
  for (int64_t t = 0; t < seen; t++) {
    const T* value = v + t * e;
    for (int64_t i = 0; i < e; i++) out[i] += score[t] * float(value[i]);
  }
  for (int64_t i = 0; i < e; i++) out[i] /= sum;
}

#ifdef __AVX512BF16__
// The same with bfloat16 factors (queries and shares are rounded), two products a lane. While keys
// are read, the values are fetched; while those are, `next`, the keys that another call will read.
template <int E>
static void attend_by_dots(const float* q, const bf16* k, const bf16* v, const bf16* next,
                           int64_t seen, float* out, float* score) {
  constexpr int P = E / 32;
  bf16 half[E];
  halve(q, half, E);
  __m512bh in[P];
  for (int p = 0; p < P; p++) in[p] = (__m512bh)_mm512_loadu_si512(half + 32 * p);
  for (int64_t t = 0; t < seen; t += LANES) {
    V sum[LANES] = {};
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++)
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) {
        const int64_t at = std::min(t + j, seen - 1) * E + 32 * p;
        __builtin_prefetch(v + at, 0, 2);
        const __m512bh key = (__m512bh)_mm512_loadu_si512(k + at);
        sum[j] = (V)_mm512_dpbf16_ps((__m512)sum[j], key, in[p]);
      }
    const V all = totals<LANES>(sum) / std::sqrt(float(E));
    std::memcpy(score + t, &all, 4 * std::min<int64_t>(LANES, seen - t));
  }
  const float best = *std::max_element(score, score + seen), total = soften(score, best, seen);
  __m512 low[P], high[P];  // of each eight lanes of `out`, the first four and the last
  for (int p = 0; p < P; p++) low[p] = high[p] = _mm512_setzero_ps();
  for (int64_t t = 0; t < seen; t += 2) {
    const bool two = t + 1 < seen;
    bf16 first, second;
    first = score[t], second = two ? score[t + 1] : 0.f;
    const __m512bh shares = (__m512bh)_mm512_set1_epi32(first.bits | uint32_t(second.bits) << 16);
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
      const int64_t at = t * E + 32 * p;
      __builtin_prefetch(next + at, 0, 2);
      __builtin_prefetch(next + at + E, 0, 2);
      const __m512i a = _mm512_loadu_si512(v + at);
      const __m512i b = two ? _mm512_loadu_si512(v + at + E) : a;
      low[p] = _mm512_dpbf16_ps(low[p], shares, (__m512bh)_mm512_unpacklo_epi16(a, b));
      high[p] = _mm512_dpbf16_ps(high[p], shares, (__m512bh)_mm512_unpackhi_epi16(a, b));
    }
  }
  for (int i = 0; i < E; i++) {
    const V from = (V)(i % 8 < 4 ? low : high)[i / 32];
    out[i] = from[i % 32 / 8 * 4 + i % 4] / total;
  }
}
#endif

// Queries, keys and values of `rows` slots -> the heads' outputs, through the cache of a layer.
template <class T>
static void attention(const Model& g, const Layer& l, const Cache& c, int64_t layer, int64_t rows,
                      const int64_t* row, const int64_t* slot, const float* angles, float* q,
                      float* k, const float* v, float* out, float* scores) {
  const int64_t e = g.width, group = g.heads / g.kv_heads;
  T *keys = (T*)c.k[layer], *values = (T*)c.v[layer];
#pragma omp for schedule(static)
  for (int64_t j = 0; j < rows * g.kv_heads; j++) {
    const int64_t m = j / g.kv_heads;
    const int64_t at = ((row[m] * g.kv_heads + j % g.kv_heads) * c.capacity + slot[m]) * e;
    float* key = k + j * e;
    if (l.k_norm) rms_norm(key, l.k_norm, key, e, g.eps);
    rotate(key, e, angles + m * e);
    for (int64_t i = 0; i < e; i++) keys[at + i] = key[i];
    for (int64_t i = 0; i < e; i++) values[at + i] = v[j * e + i];
  }
#pragma omp for schedule(static)
  for (int64_t j = 0; j < rows * g.heads; j++) {
    const int64_t m = j / g.heads, head = j % g.heads / group;
    const int64_t at = (row[m] * g.kv_heads + head) * c.capacity * e;
    float *query = q + j * e, *score = scores + j * c.capacity;
    if (l.q_norm) rms_norm(query, l.q_norm, query, e, g.eps);
    rotate(query, e, angles + m * e);
    const int64_t seen = slot[m] + 1;
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, bf16>)
      if (e == 64) {
        const bf16* next = keys + at + c.capacity * e;
        attend_by_dots<64>(query, keys + at, values + at, next, seen, out + j * e, score);
        continue;
      }
#endif
    if (e == 64)
      attend_to<T, 64>(query, keys + at, values + at, seen, e, out + j * e, score);
    else
      attend_to<T, 0>(query, keys + at, values + at, seen, e, out + j * e, score);
  }
}

static uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

#pragma GCC visibility push(protected)  // glibc has a `step` too
extern "C" {

// Floats of scratch memory that `step` wants.
int64_t scratch_size(const Model* g, int64_t rows, int64_t capacity) {
  const int64_t wide = std::max(std::max(g->dim, g->hidden), g->heads * g->width);
  const int64_t heads = g->heads + 2 * g->kv_heads + 1;
  return rows * (7 * wide + heads * g->width + g->heads * capacity) + 64;
}

// x (rows, dim) at slot[m] of cache row row[m] -> normed hidden states, in place.
void step(const Model* model, const Cache* cache, int64_t rows, float* x, const int64_t* row,
          const int64_t* slot, float* scratch, int threads) {
  const Model& g = *model;
  const int64_t d = g.dim, e = g.width, wide = std::max(std::max(d, g.hidden), g.heads * e);
  float* seen = scratch;
  bf16* half = (bf16*)(seen + rows * wide);
  float* q = (float*)(half + 2 * rows * wide);
  float* k = q + rows * g.heads * e;
  float* v = k + rows * g.kv_heads * e;
  float* mixed = v + rows * g.kv_heads * e;
  float* gate = mixed + rows * wide;
  float* up = gate + rows * wide;
  float* out = up + rows * wide;
  float* angles = out + rows * wide;
  float* scores = angles + rows * e;
  for (int64_t m = 0; m < rows; m++) turn(angles + m * e, g, slot[m]);
#pragma omp parallel num_threads(threads)
  for (int64_t i = 0; i <= g.count; i++) {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++) {  // the last round is the norm at the end
      if (i)
        for (int64_t j = 0; j < d; j++) x[m * d + j] += out[m * d + j];
      rms_norm(x + m * d, i < g.count ? g.layers[i].norm1 : g.norm, seen + m * d, d, g.eps);
      halve(seen + m * d, half + m * d, d);
    }
    if (i == g.count) continue;
    const Layer& l = g.layers[i];
    product(l.q, seen, half, q, rows, g.heads * e);
    product(l.k, seen, half, k, rows, g.kv_heads * e);
    product(l.v, seen, half, v, rows, g.kv_heads * e);
#pragma omp barrier
    if (cache->kind == FLOAT32)
      attention<float>(g, l, *cache, i, rows, row, slot, angles, q, k, v, mixed, scores);
    else
      attention<bf16>(g, l, *cache, i, rows, row, slot, angles, q, k, v, mixed, scores);
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++)
      halve(mixed + m * g.heads * e, half + m * g.heads * e, g.heads * e);
    product(l.o, mixed, half, out, rows, d);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++) {
      for (int64_t j = 0; j < d; j++) x[m * d + j] += out[m * d + j];
      rms_norm(x + m * d, l.norm2, seen + m * d, d, g.eps);
      halve(seen + m * d, half + m * d, d);
    }
    product(l.gate, seen, half, gate, rows, g.hidden);
    product(l.up, seen, half, up, rows, g.hidden);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++) {
      float *a = gate + m * g.hidden, *b = up + m * g.hidden;
      for (int64_t j = 0; j < g.hidden; j++) a[j] = a[j] / (1.f + std::exp(-a[j])) * b[j];
      halve(a, half + m * g.hidden, g.hidden);
    }
    product(l.down, gate, half, out, rows, d);
#pragma omp barrier
  }
  std::memcpy(x, seen, sizeof(float) * rows * d);
}

// One layer's attention for many rows, q (rows, heads, width), k and v (rows, kv_heads, width).
void attend(const Model* g, const Cache* c, int64_t layer, int64_t rows, const int64_t* row,
            const int64_t* slot, float* q, float* k, const float* v, float* out, float* scratch,
            int threads) {
  float *angles = scratch, *scores = scratch + rows * g->width;
  for (int64_t m = 0; m < rows; m++) turn(angles + m * g->width, *g, slot[m]);
#pragma omp parallel num_threads(threads)
  if (c->kind == FLOAT32)
    attention<float>(*g, g->layers[layer], *c, layer, rows, row, slot, angles, q, k, v, out,
                     scores);
  else
    attention<bf16>(*g, g->layers[layer], *c, layer, rows, row, slot, angles, q, k, v, out,
                     scores);
}

// y (rows, a.rows) = x (rows, a.cols) a^T + bias.
void linear(const Weight* a, int64_t rows, const float* x, float* y, float* scratch, int threads) {
  bf16* half = (bf16*)scratch;
  if (by_dots(*a)) halve(x, half, rows * a->cols);
#pragma omp parallel num_threads(threads)
  product(*a, x, half, y, rows, a->rows);
}

// Two linear layers with GELU between them: y (rows, b.rows), x (rows, a.cols).
void head(const Weight* a, const Weight* b, int64_t rows, const float* x, float* y, float* scratch,
          int threads) {
  const int64_t inner = a->rows;
  float* between = scratch;
  bf16* half = (bf16*)(between + rows * inner);
  halve(x, half, rows * a->cols);
#pragma omp parallel num_threads(threads)
  {
    product(*a, x, half, between, rows, inner);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++) {
      float* z = between + m * inner;
      for (int64_t j = 0; j < inner; j++) z[j] *= 0.5f + 0.5f * std::erf(z[j] * 0.70710678f);
      halve(z, half + m * inner, inner);
    }
    product(*b, between, half, y, rows, b->rows);
  }
}

// Guided, tempered logits plus Gumbel noise -> the likeliest id; `sampling.choose` of codes,
// without filters.
// other: the unguided logits, or null. temperature 0: greedy.
void choose(const float* logits, const float* other, float guidance, int64_t size,
            float temperature, int64_t seed, int64_t position, float* scratch, int64_t* chosen) {
  float* z = scratch;
  for (int64_t i = 0; i < size; i++)
    z[i] = other ? other[i] + guidance * (logits[i] - other[i]) : logits[i];
  if (temperature > 0) {
    uint32_t key = mix(mix(uint32_t(seed)) ^ uint32_t(uint64_t(seed) >> 32));
    key = mix(key ^ (uint32_t(position) * 0x9E3779B1u));
    for (int64_t i = 0; i < size; i++) {
      const uint32_t bits = mix(key ^ (uint32_t(i) * 0xC2B2AE3Du));
      const float uniform = (float(int32_t(bits >> 9)) + 0.5f) * 0x1p-23f;
      z[i] = z[i] / temperature - std::log(-std::log(uniform));
    }
  }
  *chosen = std::max_element(z, z + size) - z;
}

// Up to `passes` passes for `count` pictures under way, every one of `window` slots a row through
// the table, the decoder and the head. The codes chosen count as far as the slots before them were
// guessed right, at least one (coupled Jacobi decoding). It ends early with the first picture.
// length (rows,) of the cache's rows moves on. numbers (5, count): the rows, guided and not (the
// same one without guidance); seeds; places of the codes chosen first; codes that are to come.
// guess (count, window): what goes in next, the last code and guesses; made (count,): codes chosen,
// which are in chosen (count, room).
void draw(const Model* g, const Cache* cache, const Drawing* how, int64_t rows, int64_t* length,
          int64_t count, int64_t window, int64_t passes, const int64_t* numbers, int64_t* guess,
          int64_t* made, int64_t* chosen, int64_t room, float* scratch, int threads) {
  const int64_t d = g->dim, codes = how->last.rows, *own = numbers, *other = numbers + count;
  const int64_t *seed = numbers + 2 * count, *place = numbers + 3 * count;
  const int64_t* left = numbers + 4 * count;
  float *x = scratch, *logits = x + rows * window * d, *rest = logits + rows * window * codes;
  std::vector<int64_t> row(rows * window), slot(rows * window), found(count * window);
  for (int64_t pass = 0; pass < passes; pass++) {
    int64_t w = window;
    for (int64_t n = 0; n < count; n++) w = std::min(w, left[n] - made[n]);
    if (w < 1) break;
    for (int64_t m = 0; m < rows * w; m++) row[m] = m / w, slot[m] = length[m / w] + m % w;
    for (int64_t j = 0; j < count * w; j++) {
      const int64_t n = j / w, k = j % w, from = guess[n * window + k] * d;
      for (const int64_t to : {own[n] * w + k, other[n] * w + k})
        for (int64_t i = 0; i < d; i++)
          x[to * d + i] = how->table.kind == FLOAT32 ? ((const float*)how->table.w)[from + i]
                                                     : float(((const bf16*)how->table.w)[from + i]);
    }
    step(g, cache, rows * w, x, row.data(), slot.data(), rest, threads);
    head(&how->first, &how->last, rows * w, x, logits, rest, threads);
#pragma omp parallel for num_threads(threads) if (count * w > 1)
    for (int64_t j = 0; j < count * w; j++) {
      const int64_t n = j / w, k = j % w;
      choose(logits + (own[n] * w + k) * codes, logits + (other[n] * w + k) * codes, how->guidance,
             codes, how->temperature, seed[n], place[n] + made[n] + k, rest + j * codes,
             found.data() + j);
    }
    for (int64_t n = 0; n < count; n++) {
      const int64_t *next = found.data() + n * w, last = w - 1;
      int64_t *tried = guess + n * window, right = 1;
      while (right < w && tried[right] == next[right - 1]) right++;
      std::copy(next, next + right, chosen + n * room + made[n]);
      for (int64_t k = 0; k < window; k++) tried[k] = next[std::min(right - 1 + k, last)];
      made[n] += right;
      length[own[n]] += right;
      if (other[n] != own[n]) length[other[n]] += right;
    }
  }
}

}  // extern "C"
#pragma GCC visibility pop
