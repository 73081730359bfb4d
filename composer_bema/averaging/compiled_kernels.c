/* Copyright 2026 composer_bema authors
   SPDX-License-Identifier: Apache-2.0 */

/* The kernels of compiled.py, in host memory. Each thread calls one with the same arguments, and they share the work.

   It is cut into pieces, elements in a row of one tensor, which threads take in turn. A piece is done block by block: the
   operands of a block stay in the cache nearest to the core, so that each is read from memory once, whatever the rows. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Compiled once for each kind of processor; the right one is chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 1024, PIECE = 64 * BLOCK };

enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* Elements wherever they lie, be it across the words of memory. */
typedef float float32 __attribute__((aligned(1), may_alias));
typedef uint32_t bits32 __attribute__((aligned(1), may_alias));
typedef uint16_t bits16 __attribute__((aligned(1), may_alias));

/* Tensors, each of which has the same number of operands. */
struct tensors {
    char *const *addresses; /* of the operands of the first tensor, of the second, and so on */
    int64_t num_operands;
    const int64_t *sizes; /* in elements */
    int64_t num_tensors;
    int64_t *num_taken; /* the pieces that threads have taken, 0 at first */
};

struct piece {
    int64_t tensor, offset, count;
    int64_t first; /* the number of the tensor's first piece among all */
};

/* target <- base + scale (minuend - subtrahend), or target <- base where minuend and subtrahend are one operand. */
struct row {
    int32_t target, base, minuend, subtrahend;
    float scale;
};

/* Tells the caller whether it is his source that was compiled. */
uint32_t source_digest(void)
{
    return SOURCE_DIGEST;
}

INLINE int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Takes a piece after the one that this thread had, if there is one left. */
INLINE int take(const struct tensors *tensors, struct piece *piece)
{
    int64_t number = __atomic_fetch_add(tensors->num_taken, 1, __ATOMIC_RELAXED);
    for (; piece->tensor < tensors->num_tensors; piece->tensor++) {
        int64_t size = tensors->sizes[piece->tensor], pieces = (size + PIECE - 1) / PIECE;
        if (number < piece->first + pieces) {
            piece->offset = (number - piece->first) * PIECE;
            piece->count = smaller(PIECE, size - piece->offset);
            return 1;
        }
        piece->first += pieces;
    }
    return 0;
}

INLINE int64_t width(int32_t dtype)
{
    return dtype == BFLOAT16 ? 2 : 4;
}

/* The values of an operand: where they are or, if they have to be widened, in `room`. */
INLINE const float32 *as_float32(const char *operand, int32_t dtype, int64_t count, float32 *room)
{
    if (dtype == FLOAT32)
        return (const float32 *)operand;
    const bits16 *halves = (const bits16 *)operand;
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
        ((bits32 *)room)[i] = (uint32_t)halves[i] << 16;
    return room;
}

INLINE void copy(char *target, int32_t dtype, const char *base, int32_t base_dtype, int64_t count)
{
    if (dtype == base_dtype)
        memmove(target, base, count * width(dtype));
    else
        as_float32(base, base_dtype, count, (float32 *)target);
}

INLINE void combine(
    float32 *target, const float32 *base, float scale, const float32 *minuend, const float32 *subtrahend, int64_t count)
{
    /* The product and the sum are rounded once, as torch does it. The target may be one of the operands. */
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
        target[i] = fmaf(scale, minuend[i] - subtrahend[i], base[i]);
}

/* Where the elements of an operand from `offset` on are. */
INLINE char *at(char *const *operands, const int32_t *dtypes, int32_t operand, int64_t offset)
{
    return operands[operand] + offset * width(dtypes[operand]);
}

INLINE void apply_row(
    const struct row *row, char *const *operands, const int32_t *dtypes, int64_t offset, int64_t count)
{
    float32 rooms[3][BLOCK];
    char *target = at(operands, dtypes, row->target, offset);
    const char *base = at(operands, dtypes, row->base, offset);
    if (row->minuend == row->subtrahend) {
        copy(target, dtypes[row->target], base, dtypes[row->base], count);
        return;
    }
    const char *minuend = at(operands, dtypes, row->minuend, offset);
    const char *subtrahend = at(operands, dtypes, row->subtrahend, offset);
    combine(
        (float32 *)target, as_float32(base, dtypes[row->base], count, rooms[0]), row->scale,
        as_float32(minuend, dtypes[row->minuend], count, rooms[1]),
        as_float32(subtrahend, dtypes[row->subtrahend], count, rooms[2]), count);
}

/* Applies rows in their order. `dtypes` has one for each operand. */
FOR_EACH_PROCESSOR
void apply_rows(const struct tensors *tensors, const int32_t *dtypes, const struct row *rows, int64_t num_rows)
{
    struct piece piece = {0};
    while (take(tensors, &piece)) {
        char *const *operands = tensors->addresses + piece.tensor * tensors->num_operands;
        for (int64_t done = 0; done < piece.count; done += BLOCK)
            for (int64_t row = 0; row < num_rows; row++)
                apply_row(rows + row, operands, dtypes, piece.offset + done, smaller(BLOCK, piece.count - done));
    }
}

/* Exchanges two operands. Their elements are bytes, whatever they mean. */
void exchange(const struct tensors *tensors)
{
    char room[16 * BLOCK];
    struct piece piece = {0};
    while (take(tensors, &piece)) {
        char *const *operands = tensors->addresses + 2 * piece.tensor;
        for (int64_t done = 0; done < piece.count; done += sizeof room) {
            char *left = operands[0] + piece.offset + done, *right = operands[1] + piece.offset + done;
            int64_t count = smaller(sizeof room, piece.count - done);
            memcpy(room, left, count);
            memcpy(left, right, count);
            memcpy(right, room, count);
        }
    }
}

/* Whether a value has all bits of the exponent: NaNs and infinities do. */
INLINE int any_nonfinite(const char *values, int32_t dtype, int64_t count)
{
    int any = 0;
    if (dtype == BFLOAT16) {
#pragma omp simd reduction(| : any)
        for (int64_t i = 0; i < count; i++)
            any |= (((const bits16 *)values)[i] & 0x7F80u) == 0x7F80u;
    } else {
#pragma omp simd reduction(| : any)
        for (int64_t i = 0; i < count; i++)
            any |= (((const bits32 *)values)[i] & 0x7F800000u) == 0x7F800000u;
    }
    return any;
}

/* Returns the first tensor that holds a value that is not finite, of the pieces that this thread has taken, or -1. */
FOR_EACH_PROCESSOR
int64_t first_nonfinite(const struct tensors *tensors, int32_t dtype)
{
    struct piece piece = {0};
    while (take(tensors, &piece)) {
        const char *values = tensors->addresses[piece.tensor] + piece.offset * width(dtype);
        for (int64_t done = 0; done < piece.count; done += BLOCK)
            if (any_nonfinite(values + done * width(dtype), dtype, smaller(BLOCK, piece.count - done)))
                return piece.tensor;
    }
    return -1;
}
