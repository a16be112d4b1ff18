// The operations with an index on CPUs: one pass over tiles of the index, compiled on the machine that runs it.
//
// Same arithmetic as reference.py: fp32, one rounding per operation (-ffp-contract=off), IEEE division and square root.
// A tile's gradients and positions are brought into small arrays first, so that the loop with the arithmetic has a plain
// shape that compilers turn into vector instructions.
#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 1024

enum { FP32 = 0, BF16 = 1 };

typedef struct {
    const int64_t *base;
    const void *offset;
    int64_t is_narrow;  // offsets are uint16, else int32
} Index;

// What masters are pulled to, see pull.py.
typedef struct {
    const void *old, *importance;
    const float *rate;
    int old_dtype, importance_dtype;
} Pull;

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40 : rounded;
}

// Distances of the entries first:last of a tile from its base.
static void decode(const Index *index, int64_t tile, int first, int last, int32_t *offset) {
    if (index->is_narrow) {
        const uint16_t *narrow = (const uint16_t *)index->offset + tile * TILE;
        for (int i = first; i < last; i++) offset[i] = narrow[i];
    } else {
        memcpy(offset + first, (const int32_t *)index->offset + tile * TILE + first, 4 * (last - first));
    }
}

static void load_at(const void *dense, int dtype, int64_t origin, const int32_t *offset, int first, int last,
                    float *value) {
    if (dtype == BF16) {
        const uint16_t *source = (const uint16_t *)dense + origin;
        for (int i = first; i < last; i++) value[i] = from_bf16(source[offset[i]]);
    } else {
        const float *source = (const float *)dense + origin;
        for (int i = first; i < last; i++) value[i] = source[offset[i]];
    }
}

static void store_at(void *dense, int dtype, int64_t origin, const int32_t *offset, int count, const float *value) {
    if (dtype == BF16) {
        uint16_t rounded[TILE], *target = (uint16_t *)dense + origin;
        for (int i = 0; i < count; i++) rounded[i] = to_bf16(value[i]);
        for (int i = 0; i < count; i++) target[offset[i]] = rounded[i];
    } else {
        float *target = (float *)dense + origin;
        for (int i = 0; i < count; i++) target[offset[i]] = value[i];
    }
}

static inline uint64_t fmix64(uint64_t x) {
    x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdu;
    x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53u;
    return x ^ (x >> 33);
}

// Stochastic rounding to bf16, see rounding.py. first_place: of the tile's base.
static void store_stochastic(void *dense, int64_t origin, const int32_t *offset, int count, const float *value,
                             uint64_t key, uint64_t first_place) {
    uint16_t rounded[TILE], *target = (uint16_t *)dense + origin;
    for (int i = 0; i < count; i++) {
        const uint32_t random = fmix64((first_place + (uint64_t)offset[i]) * 0x9e3779b97f4a7c15u + key) >> 48;
        uint32_t bits;
        memcpy(&bits, &value[i], 4);
        rounded[i] = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40 : (bits + random) >> 16;
    }
    for (int i = 0; i < count; i++) target[offset[i]] = rounded[i];
}

static void load_compact(const void *compact, int dtype, int64_t start, int count, float *value) {
    if (dtype == BF16) {
        const uint16_t *source = (const uint16_t *)compact + start;
        for (int i = 0; i < count; i++) value[i] = from_bf16(source[i]);
    } else {
        memcpy(value, (const float *)compact + start, 4 * count);
    }
}

// What the steps share: the tile's offsets and its gradient, from compact or dense memory.
static void load_tile(const Index *index, int64_t tile, int count, const void *gradient, int dtype, int is_compact,
                      int32_t *offset, float *g) {
    decode(index, tile, 0, count, offset);
    if (is_compact)
        load_compact(gradient, dtype, tile * TILE, count, g);
    else
        load_at(gradient, dtype, index->base[tile], offset, 0, count, g);
}

static void pull_tile(const Pull *pull, int64_t tile, int count, float *restrict w) {
    const float rate = *pull->rate;
    float old[TILE], importance[TILE];
    load_compact(pull->old, pull->old_dtype, tile * TILE, count, old);
    load_compact(pull->importance, pull->importance_dtype, tile * TILE, count, importance);
    for (int i = 0; i < count; i++) {
        const float c = importance[i] * rate;
        w[i] = w[i] - (w[i] - old[i]) * (c / (1 + c));
    }
}

static inline int entries_of(int64_t tile, int64_t num_active) {
    int64_t left = num_active - tile * TILE;
    return left < TILE ? (int)left : TILE;
}

void lota_adamw(void *weights, int weights_dtype, const void *gradient, int gradient_dtype, int is_compact, Index index,
                int64_t num_active, float *restrict master, float *restrict exp_avg, float *restrict exp_avg_sq,
                const float *scalars, float one_minus_beta1, float beta2, float one_minus_beta2, float eps,
                const int64_t *rounding, int64_t origin, const Pull *pull, int num_threads) {
    const float scale = scalars[0], decay = scalars[1], step_size = scalars[2], root = scalars[3];
    if (scalars[4] != 0) return;
    const int64_t num_tiles = (num_active + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        const int count = entries_of(tile, num_active);
        int32_t offset[TILE];
        float g[TILE];
        load_tile(&index, tile, count, gradient, gradient_dtype, is_compact, offset, g);
        float *restrict w = master + tile * TILE, *restrict m = exp_avg + tile * TILE, *restrict v = exp_avg_sq + tile * TILE;
        for (int i = 0; i < count; i++) {
            const float x = g[i] * scale;
            m[i] = m[i] + (x - m[i]) * one_minus_beta1;
            v[i] = v[i] * beta2 + x * x * one_minus_beta2;
            w[i] = w[i] * decay - m[i] / (sqrtf(v[i]) / root + eps) * step_size;
        }
        if (pull) pull_tile(pull, tile, count, w);
        if (rounding)
            store_stochastic(weights, index.base[tile], offset, count, w, *rounding, origin + index.base[tile]);
        else
            store_at(weights, weights_dtype, index.base[tile], offset, count, w);
    }
}

void lota_rmsprop(void *weights, int weights_dtype, const void *gradient, int gradient_dtype, int is_compact,
                  Index index, int64_t num_active, float *restrict master, float *restrict square_avg,
                  const float *scalars, float alpha, float one_minus_alpha, float eps,
                  const int64_t *rounding, int64_t origin, const Pull *pull, int num_threads) {
    const float scale = scalars[0], weight_decay = scalars[1], lr = scalars[2];
    if (scalars[3] != 0) return;
    const int64_t num_tiles = (num_active + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        const int count = entries_of(tile, num_active);
        int32_t offset[TILE];
        float g[TILE];
        load_tile(&index, tile, count, gradient, gradient_dtype, is_compact, offset, g);
        float *restrict w = master + tile * TILE, *restrict v = square_avg + tile * TILE;
        for (int i = 0; i < count; i++) {
            const float x = g[i] * scale + w[i] * weight_decay;
            v[i] = v[i] * alpha + x * x * one_minus_alpha;
            w[i] = w[i] - x / (sqrtf(v[i]) + eps) * lr;
        }
        if (pull) pull_tile(pull, tile, count, w);
        if (rounding)
            store_stochastic(weights, index.base[tile], offset, count, w, *rounding, origin + index.base[tile]);
        else
            store_at(weights, weights_dtype, index.base[tile], offset, count, w);
    }
}

void lota_pull(float *restrict master, int64_t numel, const Pull *pull, const float *skip, int num_threads) {
    if (skip && *skip != 0) return;
    const int64_t num_tiles = (numel + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t tile = 0; tile < num_tiles; tile++) pull_tile(pull, tile, entries_of(tile, numel), master + tile * TILE);
}

// out[k - start] (+)= scale * source[position(k) - origin] for the entries start:stop, in fp32. scale: 1 value or null.
// squares: null, or for each tile of the span the sum of the squares of what was summed up in it.
void lota_gather(float *restrict out, const void *source, int source_dtype, Index index, const float *scale,
                 float *squares, int is_sum, int64_t start, int64_t stop, int64_t origin, int num_threads) {
    const int64_t last_tile = (stop + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t tile = start / TILE; tile < last_tile; tile++) {
        const int first = tile * TILE < start ? (int)(start - tile * TILE) : 0, last = entries_of(tile, stop);
        int32_t offset[TILE];
        float value[TILE];
        decode(&index, tile, first, last, offset);
        load_at(source, source_dtype, index.base[tile] - origin, offset, first, last, value);
        float *restrict to = out + (tile * TILE - start);
        if (scale)
            for (int i = first; i < last; i++) value[i] *= *scale;
        if (is_sum)
            for (int i = first; i < last; i++) to[i] += value[i];
        else
            memcpy(to + first, value + first, 4 * (last - first));
        if (squares) {
            double part[8] = {0};  // eight sums side by side: one would wait for itself at every entry
            for (int i = first; i < last; i++) part[i & 7] += (double)to[i] * to[i];
            for (int i = 1; i < 8; i++) part[0] += part[i];
            squares[tile - start / TILE] = (float)part[0];
        }
    }
}

// target[position(k)] = values[k], bits of `size` bytes; with `is_swap` the old ones go to values[k].
void lota_move(void *target, int size, Index index, int64_t num_active, void *values, int is_swap, int num_threads) {
    const int64_t num_tiles = (num_active + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        const int count = entries_of(tile, num_active);
        int32_t offset[TILE];
        decode(&index, tile, 0, count, offset);
        if (size == 2) {
            uint16_t *to = (uint16_t *)target + index.base[tile], *from = (uint16_t *)values + tile * TILE;
            for (int i = 0; i < count; i++) {
                const uint16_t old = to[offset[i]];
                to[offset[i]] = from[i];
                if (is_swap) from[i] = old;
            }
        } else {
            uint32_t *to = (uint32_t *)target + index.base[tile], *from = (uint32_t *)values + tile * TILE;
            for (int i = 0; i < count; i++) {
                const uint32_t old = to[offset[i]];
                to[offset[i]] = from[i];
                if (is_swap) from[i] = old;
            }
        }
    }
}

// target[position(k)] = (cast) values[k], or += alpha * values[k] where alpha is not null; saved gets the old bits.
void lota_scatter(void *target, int target_dtype, Index index, int64_t num_active, const void *values, int values_dtype,
                  const float *alpha, void *saved, int num_threads) {
    const int64_t num_tiles = (num_active + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        const int count = entries_of(tile, num_active);
        const int64_t base = index.base[tile];
        int32_t offset[TILE];
        float value[TILE], old[TILE];
        decode(&index, tile, 0, count, offset);
        load_compact(values, values_dtype, tile * TILE, count, value);
        if (alpha) {
            load_at(target, target_dtype, base, offset, 0, count, old);
            for (int i = 0; i < count; i++) value[i] = old[i] + value[i] * *alpha;
        }
        if (saved && target_dtype == BF16)
            for (int i = 0; i < count; i++)
                ((uint16_t *)saved)[tile * TILE + i] = ((const uint16_t *)target)[base + offset[i]];
        else if (saved)
            for (int i = 0; i < count; i++)
                ((uint32_t *)saved)[tile * TILE + i] = ((const uint32_t *)target)[base + offset[i]];
        store_at(target, target_dtype, base, offset, count, value);
    }
}
