/* Arm: signed activations times signed weights. With the dot-product extension 16 products an instruction, summed in
 * int32; without it products of 16 bits, added in pairs into 32. 128 is split into 127 and 1, as in the others. */
#include "internal.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#include "floats.h"
#define LB_VECTOR_NEON
#include "vector.h"
#include "winograd_generic.h"

enum { TILE = 4 };

#if defined(__clang__)
#define DOT_TARGET __attribute__((target("dotprod")))
#else
#define DOT_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

/* Rows of weights with something beyond int8: their index (k / 4), and what is missing. Where no such code occurs they
 * cost nothing. */
typedef struct {
  int64_t count;
  int32_t *index;
  int8_t *rows;
} beyond;

/* Room for k / 4 rows. */
static int make_room(beyond *extra, int64_t k) {
  const int64_t rows = k / 4;
  extra->rows = lb_scratch(LB_SLOT_EXTRA, (size_t)rows * (LB_ROW + sizeof *extra->index));
  if (!extra->rows) return LB_NO_MEMORY;
  extra->index = (int32_t *)(extra->rows + rows * LB_ROW);
  return LB_OK;
}

typedef struct {
  int8x16_t first, rest;
  int two;
} tables;

static tables make_tables(const lb_job *job) {
  int8_t first[16], rest[16];
  tables t = {.two = 0};
  for (int i = 0; i < 16; i++) {
    first[i] = (int8_t)lb_min(127, job->levels[i]);
    rest[i] = (int8_t)(job->levels[i] - first[i]);
    t.two |= rest[i] != 0;
  }
  t.first = vld1q_s8(first);
  t.rest = vld1q_s8(rest);
  return t;
}

/* Codes of row r of a group of 8, one quarter of 16 bytes; p is the group. */
LB_INLINE uint8x16_t codes_of(const int bits, const int r, const uint8_t *p, int quarter) {
#define PART(I) vld1q_u8(p + 64 * (I) + 16 * quarter)
  if (bits == 4) return r & 1 ? vshrq_n_u8(PART(r >> 1), 4) : vandq_u8(PART(r >> 1), vdupq_n_u8(15));
  const uint8x16_t low = vandq_u8(vshlq_u8(PART(r >> 2), vdupq_n_s8((int8_t)(-2 * (r & 3)))), vdupq_n_u8(3));
  if (bits == 2) return low;
  const uint8x16_t top = vshlq_u8(PART(2), vdupq_n_s8((int8_t)(2 - lb_top_bit[r])));
  return vorrq_u8(low, vandq_u8(top, vdupq_n_u8(4)));
#undef PART
}

LB_INLINE void decode_bits(const int bits, const lb_job *job, int64_t b, const tables *t, int8_t *plane,
                           beyond *extra) {
  const uint8_t *p = job->packed + b * job->block_bytes;
  extra->count = 0;
  for (int64_t row = 0; row < job->used_k / 4; row += 8, p += bits * 64, plane += 8 * LB_ROW)
    for (int r = 0; r < 8; r++) {
      const int listed = t->two && row + r < job->used_k / 4;
      int8_t *rest = listed ? extra->rows + extra->count * LB_ROW : NULL;
      uint8x16_t any = vdupq_n_u8(0);
      for (int i = 0; i < 4; i++) {
        const uint8x16_t codes = codes_of(bits, r, p, i);
        vst1q_s8(plane + r * LB_ROW + 16 * i, vqtbl1q_s8(t->first, codes));
        if (listed) {
          const int8x16_t missing = vqtbl1q_s8(t->rest, codes);
          vst1q_s8(rest + 16 * i, missing);
          any = vorrq_u8(any, vreinterpretq_u8_s8(missing));
        }
      }
      if (listed) {
        extra->index[extra->count] = (int32_t)(row + r);
        extra->count += vmaxvq_u8(any) != 0;
      }
    }
}

LB_INLINE int8x16_t four(const uint8_t *a) {
  int32_t bytes;
  memcpy(&bytes, a, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(bytes));
}

DOT_TARGET static inline int32x4_t add_dot(int32x4_t acc, int8x16_t w, int8x16_t x) { return vdotq_s32(acc, w, x); }

static inline int32x4_t add_plain(int32x4_t acc, int8x16_t w, int8x16_t x) {
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
  const int32x4_t high = vpaddlq_s16(vmull_high_s8(w, x));
  return vaddq_s32(acc, vpaddq_s32(low, high));
}

/* R rows by one block. Compiled twice, for the two ways to add products. */
#define TILE_FUNCTION(NAME, TARGET, ADD) \
  TARGET static void NAME(const int R, const lb_job *job, int64_t row, int64_t block, const int8_t *w, \
                          const beyond *extra) { \
    const uint8_t *a[TILE]; \
    int32x4_t acc[TILE][4]; \
    for (int r = 0; r < TILE; r++) { \
      a[r] = job->map + job->row_start[row + (r < R ? r : 0)]; /* rows that are not there repeat the first */ \
      for (int i = 0; i < 4; i++) acc[r][i] = vdupq_n_s32(0); \
    } \
    for (int s = 0; s < job->n_spans; s++) { \
      const int64_t end = job->spans[s].offset + job->spans[s].length; \
      for (int64_t k = job->spans[s].offset; k < end; k += 4, w += LB_ROW) { \
        const int8x16_t w0 = vld1q_s8(w), w1 = vld1q_s8(w + 16), w2 = vld1q_s8(w + 32), w3 = vld1q_s8(w + 48); \
        for (int r = 0; r < TILE; r++) { \
          const int8x16_t x = four(a[r] + k); \
          acc[r][0] = ADD(acc[r][0], w0, x); \
          acc[r][1] = ADD(acc[r][1], w1, x); \
          acc[r][2] = ADD(acc[r][2], w2, x); \
          acc[r][3] = ADD(acc[r][3], w3, x); \
        } \
      } \
    } \
    for (int64_t e = 0; e < extra->count; e++) \
      for (int r = 0; r < R; r++) { \
        const int8x16_t x = four(a[r] + job->k_offset[extra->index[e]]); \
        for (int i = 0; i < 4; i++) acc[r][i] = ADD(acc[r][i], vld1q_s8(extra->rows + e * LB_ROW + 16 * i), x); \
      } \
    for (int r = 0; r < R; r++) { \
      int32_t sums[16]; \
      for (int i = 0; i < 4; i++) vst1q_s32(sums + 4 * i, acc[r][i]); \
      lb_finish(job, row + r, block, sums); \
    } \
  }
TILE_FUNCTION(tile_dot, DOT_TARGET, add_dot)
TILE_FUNCTION(tile_plain, , add_plain)

static int run_product(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1,
                       void (*tile)(int, const lb_job *, int64_t, int64_t, const int8_t *, const beyond *)) {
  const tables t = make_tables(job);
  beyond extra = {0};
  int8_t *plane = lb_scratch(LB_SLOT_DECODED, (size_t)(job->k * 16));
  if (!plane || (t.two && make_room(&extra, job->k))) return LB_NO_MEMORY;
  for (int64_t b = block0; b < block1; b++) {
    if (job->bits == 2) decode_bits(2, job, b, &t, plane, &extra);
    else if (job->bits == 3) decode_bits(3, job, b, &t, plane, &extra);
    else if (job->bits == 4) decode_bits(4, job, b, &t, plane, &extra);
    else memcpy(plane, job->packed + b * job->block_bytes, (size_t)(job->used_k * 16));
    for (int64_t m = row0; m < row1; m += TILE) tile((int)lb_min(TILE, row1 - m), job, m, b, plane, &extra);
  }
  return LB_OK;
}

static int has_dot(void) {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) >> 20 & 1) != 0; /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
  return 1; /* every Apple processor of this architecture that runs macOS */
#else
  return 0;
#endif
}

static int product_plain(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  return run_product(job, row0, row1, block0, block1, tile_plain);
}

static int product(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  return run_product(job, row0, row1, block0, block1, has_dot() ? tile_dot : tile_plain);
}

static void decode_floats(const lb_job *job, int64_t block, int64_t first, int64_t rows, float *panel) {
  lb_generic_decode_floats(job, block, first, rows, panel);
}

int lb_neon_floats(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  return float_product(job, row0, row1, block0, block1);
}

static int available(void) { return 1; }

const lb_isa_table lb_neon = {
    "neon", available, 1, lb_generic_absmax, lb_generic_quantize, product, 4,
    &vector_table, winograd_weights, winograd_run, 0};
const lb_isa_table lb_neon_plain = {
    "neon_plain", available, 1, lb_generic_absmax, lb_generic_quantize, product_plain, 4,
    &vector_table, winograd_weights, winograd_run, 0};
#endif
