/* The CPU kernels of a decode step: what torch would run as many small operations.
 *
 * `native.py` compiles this file and calls it with addresses. float32 or bfloat16 elements, all
 * arithmetic in float32. Everything is inlined into the exported functions for the element types and
 * head sizes that matter, so that the compiler sees constants and fills whole vectors. A row's result
 * depends on that row alone: not on the batch, nor on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MAX_HEAD 256     /* model_config.MAX_HEAD_DIM */
#define MAX_QUERY 8192   /* native.MAX_QUERY: elements of the queries that a task holds */
#define MAX_HEADS 128    /* native.MAX_HEADS: of which there are so many */
#define CHUNK 16         /* keys whose scores are held at once */
#define SERIAL (1 << 15) /* less work than so many elements is not worth a second thread */

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float get(int bf16, const void *from, int64_t i) {
    if (bf16) return bits_to_float((uint32_t)((const uint16_t *)from)[i] << 16);
    return ((const float *)from)[i];
}

/* Rounds to nearest even, as torch does. */
INLINE void put(int bf16, void *to, int64_t i, float value) {
    if (!bf16) {
        ((float *)to)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    ((uint16_t *)to)[i] = (uint16_t)(value != value ? 0x7fc0 : rounded);
}

/* Sixteen elements; a compiler for narrower registers takes several for one. */
#define LANES 16
typedef float lanes __attribute__((vector_size(64)));
typedef uint32_t wide_bits __attribute__((vector_size(64)));
typedef uint16_t narrow_bits __attribute__((vector_size(32)));

INLINE lanes get_lanes(int bf16, const void *from, int64_t i) {
    lanes values;
    if (bf16) {
        narrow_bits bits;
        memcpy(&bits, (const uint16_t *)from + i, sizeof bits);
        wide_bits shifted = __builtin_convertvector(bits, wide_bits) << 16;
        memcpy(&values, &shifted, sizeof values);
    } else {
        memcpy(&values, (const float *)from + i, sizeof values);
    }
    return values;
}

INLINE float sum_of_lanes(lanes x) {
    typedef float half __attribute__((vector_size(32)));
    typedef float quarter __attribute__((vector_size(16)));
    half halves[2];
    quarter quarters[2];
    memcpy(halves, &x, sizeof x);
    halves[0] += halves[1];
    memcpy(quarters, halves, sizeof quarters);
    quarters[0] += quarters[1];
    return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

INLINE const void *at(int bf16, const void *base, int64_t i) {
    return (const char *)base + i * (bf16 ? 2 : 4);
}

/* e^x for x <= 88, two units of the last place off at most; 0 far below, NaN for NaN.
 * Range reduction and polynomial of Cephes' expf. */
INLINE float exponential(float x) {
    float low = x < -87.0f ? -87.0f : x;
    float n = low * 1.44269504f + 12582912.0f - 12582912.0f; /* nearest integer */
    float r = low - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return x < -87.0f ? 0.0f : p * bits_to_float((uint32_t)((int32_t)n + 127) << 23);
}

INLINE float sum_of_squares(int bf16, const void *x, int64_t size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) {
        float value = get(bf16, x, i);
        sum += value * value;
    }
    return sum;
}

/* One head [size], normed if there is a weight, then turned by the angles [2 * size] of its token
 * (nn/rope.py) if there are any. */
INLINE void norm_and_rotate(int bf16, int64_t size, const void *head, const void *weight, float eps,
                            const void *angles, float *result) {
    float x[MAX_HEAD];
    int64_t half = size / 2;
    if (weight) {
        float scale = 1.0f / sqrtf(sum_of_squares(bf16, head, size) / (float)size + eps);
#pragma omp simd
        for (int64_t i = 0; i < size; i++) x[i] = get(bf16, head, i) * scale * get(bf16, weight, i);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < size; i++) x[i] = get(bf16, head, i);
    }
    if (!angles) {
        memcpy(result, x, size * sizeof(float));
        return;
    }
    const void *sines = at(bf16, angles, size);
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        result[i] = x[i] * get(bf16, angles, i) + x[i + half] * get(bf16, sines, i);
        result[i + half] =
            x[i + half] * get(bf16, angles, i + half) + x[i] * get(bf16, sines, i + half);
    }
}

/* The arguments of `attention`, with the meaning that they have in attention.py, and in the order of
 * its `_ARGUMENTS`. kv: the cache as [places, 2, num_kv_heads, head_dim]. q: [tokens, num_heads,
 * head_dim] float32, where the queries are left, normed, rotated and scaled. threads: at most.
 * cos_sin, q_norm, k_norm and sinks may be null, soft_cap may be 0; window is beyond all lengths where
 * there is none. */
struct attention {
    const void *qkv;
    const int64_t *positions;
    void *kv;
    const int64_t *slot_mapping;
    const int32_t *block_table;
    const int32_t *seq_lens;
    const int32_t *query_start_loc;
    void *out;
    const void *cos_sin;
    const void *q_norm;
    const void *k_norm;
    const void *sinks;
    float *q;
    int64_t tokens;
    int64_t rows;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t block_size;
    int64_t table_stride;
    int64_t threads;
    int64_t window;
    double eps;
    double scale;
    double soft_cap;
};

/* A token: its queries to `q`, its keys and values to the cache. */
INLINE void write_token(int bf16, int64_t size, const struct attention *a, int64_t token) {
    int64_t kv_width = a->num_kv_heads * size, place = a->slot_mapping[token];
    const void *row = at(bf16, a->qkv, token * (a->num_heads * size + 2 * kv_width));
    const void *angles =
        a->cos_sin ? at(bf16, a->cos_sin, a->positions[token] * 2 * size) : a->cos_sin;
    float *q = a->q + token * a->num_heads * size;
    float scale = (float)a->scale, k[MAX_HEAD];
    void *entry = (void *)at(bf16, a->kv, place * 2 * kv_width);
    for (int64_t head = 0; head < a->num_heads; head++) {
        norm_and_rotate(bf16, size, at(bf16, row, head * size), a->q_norm, (float)a->eps, angles,
                        q + head * size);
#pragma omp simd
        for (int64_t i = 0; i < size; i++) q[head * size + i] *= scale;
    }
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        norm_and_rotate(bf16, size, at(bf16, row, (a->num_heads + head) * size), a->k_norm,
                        (float)a->eps, angles, k);
#pragma omp simd
        for (int64_t i = 0; i < size; i++) put(bf16, entry, head * size + i, k[i]);
    }
    memcpy((char *)entry + kv_width * (bf16 ? 2 : 4),
           at(bf16, row, (a->num_heads + a->num_kv_heads) * size), kv_width * (bf16 ? 2 : 4));
}

/* Where the keys [begin, begin + CHUNK) of a row lie, from key head `first` on; the last one's place
 * again beyond `length`. */
INLINE void find_entries(int bf16, int64_t size, const struct attention *a, const int32_t *blocks,
                         int64_t first, int64_t begin, int64_t length, const char **entries) {
    for (int64_t j = 0; j < CHUNK; j++) {
        int64_t position = begin + j < length ? begin + j : length - 1;
        int64_t place =
            (int64_t)blocks[position / a->block_size] * a->block_size + position % a->block_size;
        entries[j] = at(bf16, a->kv, (place * 2 * a->num_kv_heads + first) * size);
    }
}

/* Ask for a head's bytes before they are needed: a row's blocks lie anywhere in memory. */
INLINE void fetch(int bf16, int64_t size, const char *head) {
    for (int64_t i = 0; i < size * (bf16 ? 2 : 4); i += 64) __builtin_prefetch(head + i);
}

/* cap * tanh(x / cap), by e^-2|x / cap|. */
INLINE float bounded(float x, float cap) {
    float power = exponential(-2.0f * fabsf(x / cap));
    return copysignf(cap * ((1.0f - power) / (1.0f + power)), x);
}

/* The first position that the last position of a row sees. */
INLINE int64_t first_seen(const struct attention *a, int64_t length) {
    return length > a->window ? length - a->window : 0;
}

/* A row of one query, for the key heads [first, last): softmax(q K) V, by chunks of keys with a
 * running maximum (Milakov and Gimelshein 2018). K and V are read where they lie in the cache. */
INLINE void attend(int bf16, int64_t size, const struct attention *a, int64_t row, int64_t first,
                   int64_t last) {
    int64_t group = a->num_heads / a->num_kv_heads, heads = (last - first) * group;
    int64_t kv_width = a->num_kv_heads * size, token = a->query_start_loc[row];
    int64_t length = a->seq_lens[row], start = first_seen(a, length);
    float cap = (float)a->soft_cap;
    const int32_t *blocks = a->block_table + row * a->table_stride;
    const float *q = a->q + (token * a->num_heads + first * group) * size;
    float sum[MAX_HEADS], most[MAX_HEADS], scores[MAX_HEADS][CHUNK];
    _Alignas(64) float mixed[MAX_QUERY];
    const char *places[2][CHUNK], **entries = places[0], **next = places[1];
    memset(mixed, 0, heads * size * sizeof(float));
    /* A sink is a score whose value is zero. */
    for (int64_t h = 0; h < heads; h++) {
        sum[h] = a->sinks ? 1.0f : 0.0f;
        most[h] = a->sinks ? get(bf16, a->sinks, first * group + h) : -INFINITY;
    }
    find_entries(bf16, size, a, blocks, first, start, length, next);

    for (int64_t begin = start; begin < length; begin += CHUNK) {
        int64_t n = length - begin < CHUNK ? length - begin : CHUNK;
        const char **swapped = entries;
        entries = next, next = swapped;
        find_entries(bf16, size, a, blocks, first, begin + CHUNK, length, next);
        for (int64_t j = 0; j < n; j++) {
            const float *query = q;
            for (int64_t head = 0; head < last - first; head++) {
                const void *k = at(bf16, entries[j], head * size);
                fetch(bf16, size, at(bf16, next[j], head * size));
                for (int64_t member = 0; member < group; member++, query += size) {
                    lanes dot = {0};
                    for (int64_t i = 0; i < size; i += LANES)
                        dot += get_lanes(0, query, i) * get_lanes(bf16, k, i);
                    scores[head * group + member][j] = sum_of_lanes(dot);
                }
            }
        }
        for (int64_t h = 0; h < heads; h++) {
            float top = most[h];
            if (cap > 0.0f)
                for (int64_t j = 0; j < n; j++) scores[h][j] = bounded(scores[h][j], cap);
            for (int64_t j = n; j < CHUNK; j++) scores[h][j] = -INFINITY;
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < CHUNK; j++) top = scores[h][j] > top ? scores[h][j] : top;
            /* A NaN is no maximum, but makes the sum NaN as it should. Where all scores are -inf so
             * far, nothing has been added yet. */
            float base = top == -INFINITY ? 0.0f : top;
            float kept = exponential(most[h] - base), added = 0.0f;
#pragma omp simd reduction(+ : added)
            for (int64_t j = 0; j < CHUNK; j++) {
                scores[h][j] = exponential(scores[h][j] - base);
                added += scores[h][j];
            }
            most[h] = top;
            sum[h] = sum[h] * kept + added;
            int64_t value = kv_width + h / group * size;
            lanes mix[MAX_HEAD / LANES];
            for (int64_t i = 0; i < size / LANES; i++)
                mix[i] = get_lanes(0, mixed, h * size + i * LANES) * kept;
            for (int64_t j = 0; j < n; j++) {
                const void *v = at(bf16, entries[j], value);
                fetch(bf16, size, at(bf16, next[j], value));
                for (int64_t i = 0; i < size / LANES; i++)
                    mix[i] += scores[h][j] * get_lanes(bf16, v, i * LANES);
            }
            memcpy(mixed + h * size, mix, size * sizeof(float));
        }
    }
    void *out = (void *)at(bf16, a->out, (token * a->num_heads + first * group) * size);
    for (int64_t h = 0; h < heads; h++) {
        float scale = 1.0f / sum[h];
#pragma omp simd
        for (int64_t i = 0; i < size; i++) put(bf16, out, h * size + i, mixed[h * size + i] * scale);
    }
}

/* Every token's keys, values and queries; the result of rows of one query, and of the padding
 * behind all rows. Returns how many rows have more queries, whose results are not computed. */
INLINE int64_t all_tokens(int bf16, int64_t size, const struct attention *a) {
    /* A row is one task where there are rows for all threads, as its cache entries are read in one
     * go then; else each of its key heads is. */
    int64_t group = a->num_heads / a->num_kv_heads;
    int64_t most = (MAX_QUERY / size < MAX_HEADS ? MAX_QUERY / size : MAX_HEADS) / group;
    int64_t together = a->rows >= a->threads ? a->num_kv_heads : 1;
    if (together > most) together = most;
    int64_t parts = (a->num_kv_heads + together - 1) / together, work = 0, others = 0;
    for (int64_t row = 0; row < a->rows; row++) {
        work += a->seq_lens[row] - first_seen(a, a->seq_lens[row]);
        others += a->query_start_loc[row + 1] - a->query_start_loc[row] > 1;
    }
    work *= a->num_kv_heads * size;
#pragma omp parallel num_threads(a->threads) if (work > SERIAL)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < a->tokens; token++) write_token(bf16, size, a, token);
        /* All have written. */
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < a->rows * parts; task++) {
            int64_t row = task / parts, first = task % parts * together;
            int64_t last = first + together;
            if (last > a->num_kv_heads) last = a->num_kv_heads;
            if (a->query_start_loc[row + 1] - a->query_start_loc[row] == 1)
                attend(bf16, size, a, row, first, last);
        }
    }
    int64_t width = a->num_heads * size, used = a->query_start_loc[a->rows];
    memset((void *)at(bf16, a->out, used * width), 0, (a->tokens - used) * width * (bf16 ? 2 : 4));
    return others;
}

INLINE int64_t any_head(int bf16, const struct attention *a) {
    switch (a->head_dim) {
    case 64: return all_tokens(bf16, 64, a);
    case 128: return all_tokens(bf16, 128, a);
    default: return all_tokens(bf16, a->head_dim, a);
    }
}

int64_t attention_float32(const struct attention *a) { return any_head(0, a); }

int64_t attention_bfloat16(const struct attention *a) { return any_head(1, a); }

/* What the functions of elementwise.py take: [rows, size] elements at the addresses. */
#define ROWWISE const void *x, const void *weight, void *out, int64_t rows, int64_t size, \
                int64_t threads, double eps

INLINE float norm_scale(int bf16, const void *row, int64_t size, double eps) {
    return 1.0f / sqrtf(sum_of_squares(bf16, row, size) / (float)size + (float)eps);
}

INLINE void norm_row(int bf16, const void *from, const void *weight, void *to, int64_t size,
                     double eps) {
    float scale = norm_scale(bf16, from, size, eps);
#pragma omp simd
    for (int64_t i = 0; i < size; i++)
        put(bf16, to, i, get(bf16, from, i) * scale * get(bf16, weight, i));
}

INLINE void norm_rows(int bf16, ROWWISE) {
#pragma omp parallel for num_threads(threads) if (rows * size > SERIAL)
    for (int64_t row = 0; row < rows; row++)
        norm_row(bf16, at(bf16, x, row * size), weight, (void *)at(bf16, out, row * size), size, eps);
}

void rms_norm_float32(ROWWISE) { norm_rows(0, x, weight, out, rows, size, threads, eps); }

void rms_norm_bfloat16(ROWWISE) { norm_rows(1, x, weight, out, rows, size, threads, eps); }

/* The rows of elementwise.add_rms_norm: residual += norm(x), and out = norm(residual) if there is a
 * weight `after` for it. */
#define ADDED_ROWS const void *x, const void *weight, void *residual, const void *after, void *out, \
                   int64_t rows, int64_t size, int64_t threads, double eps

INLINE void add_normed_rows(int bf16, ADDED_ROWS) {
#pragma omp parallel for num_threads(threads) if (rows * size > SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const void *from = at(bf16, x, row * size);
        void *total = (void *)at(bf16, residual, row * size);
        float scale = norm_scale(bf16, from, size, eps);
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            put(bf16, total, i,
                get(bf16, total, i) + get(bf16, from, i) * scale * get(bf16, weight, i));
        if (after) norm_row(bf16, total, after, (void *)at(bf16, out, row * size), size, eps);
    }
}

void add_rms_norm_float32(ADDED_ROWS) {
    add_normed_rows(0, x, weight, residual, after, out, rows, size, threads, eps);
}

void add_rms_norm_bfloat16(ADDED_ROWS) {
    add_normed_rows(1, x, weight, residual, after, out, rows, size, threads, eps);
}

/* x: [rows, 2 * size], gate beside up. silu(x) = x sigmoid(x), and GELU by tanh is x sigmoid(2 u) with
 * u = sqrt(2 / pi) (x + 0.044715 x^3). sigmoid(z) = 1 / (1 + e^-z), by e^-|z|. */
INLINE void gate_rows(int bf16, int gelu, const void *x, void *out, int64_t rows, int64_t size,
                      int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const void *gates = at(bf16, x, row * 2 * size), *ups = at(bf16, gates, size);
        void *to = (void *)at(bf16, out, row * size);
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float gate = get(bf16, gates, i);
            float z = gelu ? 1.59576912f * (gate + 0.044715f * gate * gate * gate) : gate;
            float power = exponential(z < 0.0f ? z : -z);
            float sigmoid = (z < 0.0f ? power : 1.0f) / (1.0f + power);
            put(bf16, to, i, gate * sigmoid * get(bf16, ups, i));
        }
    }
}

void silu_and_mul_float32(ROWWISE) {
    (void)weight, (void)eps;
    gate_rows(0, 0, x, out, rows, size, threads);
}

void silu_and_mul_bfloat16(ROWWISE) {
    (void)weight, (void)eps;
    gate_rows(1, 0, x, out, rows, size, threads);
}

void gelu_tanh_and_mul_float32(ROWWISE) {
    (void)weight, (void)eps;
    gate_rows(0, 1, x, out, rows, size, threads);
}

void gelu_tanh_and_mul_bfloat16(ROWWISE) {
    (void)weight, (void)eps;
    gate_rows(1, 1, x, out, rows, size, threads);
}
