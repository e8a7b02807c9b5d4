/* AMX: 16 rows of activations by 16 outputs by 64 k an instruction, unsigned by signed, summed in int32.
 *
 * Two by two tiles of sums. Two blocks of weights are decoded for a piece of k at a time, which stays in the
 * first-level cache; sums wait in memory between the pieces. A tile of activations is 16 rows of the map with one
 * distance between them, read in place: rows of a linear layer, neighboring places of a line. Other rows are copied
 * together first.
 *
 * The instructions have not met the real hardware: with -DLOWBIT_EMULATE_AMX the tiles are C functions
 * (amx_emulated.h), by which everything else in this file is tested on any processor with AVX-512. */
#define _GNU_SOURCE
#include "internal.h"

#if defined(__x86_64__)
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cpuid.h>
#include <immintrin.h>
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,amx-tile,amx-int8"
#if defined(LOWBIT_EMULATE_AMX)
#undef TARGET
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni"
#endif
#if defined(__clang__)
#define PRAGMA(X) _Pragma(#X)
#define PUSH(T) PRAGMA(clang attribute push(__attribute__((target(T))), apply_to = function))
PUSH(TARGET)
#else
#define PRAGMA(X) _Pragma(#X)
#define PUSH(T) PRAGMA(GCC target(T))
#pragma GCC push_options
PUSH(TARGET)
#endif
#include "avx512.h"
#if defined(LOWBIT_EMULATE_AMX)
#include "amx_emulated.h"
#endif

enum { ROWS = 16, PIECE = 512, FEWEST = 8 };

typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} __attribute__((aligned(64))) tile_config;

/* Tiles 0-3 sums, 4 and 5 activations, 6 and 7 weights: 16 rows of 64 bytes each. Constant data: compilers are known to
 * drop the stores of a configuration on the stack. */
static const tile_config config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* 16 rows for one tile of k: where the first one starts, and how far it is to the next. */
typedef struct {
  const uint8_t *at;
  int64_t stride;
} rows16;

/* Whether rows row ... row+15 lie in the map at one distance. */
static int in_place(const lb_job *job, int64_t row, int64_t last, int64_t *stride) {
  if (row + ROWS > last) return 0;
  *stride = job->row_start[row + 1] - job->row_start[row];
  for (int i = 2; i < ROWS; i++)
    if (job->row_start[row + i] - job->row_start[row + i - 1] != *stride) return 0;
  return 1;
}

/* Copies 16 rows (fewer at the end, and zeros) to [k / 64][16][64]. */
static void gather(const lb_job *job, int64_t row, int64_t last, uint8_t *out) {
  for (int64_t t = 0; t < job->used_k / 64; t++)
    for (int i = 0; i < ROWS; i++, out += 64) {
      if (row + i < last) memcpy(out, job->map + job->row_start[row + i] + job->k_offset[t * 16], 64);
      else memset(out, 0, 64);
    }
}

/* The rows of tile number t (64 k each) of a row tile. */
LB_INLINE rows16 tile_rows(const lb_job *job, const uint8_t *gathered, int64_t row, int64_t stride, int64_t t) {
  if (gathered) return (rows16){gathered + t * ROWS * 64, 64};
  return (rows16){job->map + job->row_start[row] + job->k_offset[t * 16], stride};
}

/* Which of these tiles, [tile][16][64], hold anything. */
static void find_filled(const int8_t *plane, int64_t tiles, uint8_t *filled) {
  for (int64_t t = 0; t < tiles; t++) {
    __m512i any = _mm512_setzero_si512();
    for (int i = 0; i < 16; i++, plane += LB_ROW) any = _mm512_or_si512(any, _mm512_load_si512(plane));
    filled[t] = _mm512_test_epi8_mask(any, any) != 0;
  }
}

static int product(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  if (row1 - row0 < FEWEST) return lb_avx512vnni.product(job, row0, row1, block0, block1);
  enum { TILES = PIECE / 64, TILE_BYTES = 1024 };
  const int64_t row_tiles = (row1 - row0 + ROWS - 1) / ROWS, k_tiles = job->used_k / 64;
  const lb_tables t = lb_make_tables(job);
  const int two = lb_needs_two(job);

  /* [2 blocks] decoded, [2] beyond int8, [row tiles][2] sums, two tables of row tiles, [row tiles] copies if needed */
  const int64_t fixed = 4 * TILES * TILE_BYTES + lb_round_up(row_tiles, 2) * 2 * TILE_BYTES;
  int64_t copies = 0, stride;
  for (int64_t i = 0; i < row_tiles; i++) copies += !in_place(job, row0 + i * ROWS, row1, &stride);
  int8_t *const decoded = lb_scratch(LB_SLOT_DECODED, (size_t)(fixed + copies * job->used_k * ROWS + row_tiles * 16));
  if (!decoded) return LB_NO_MEMORY;
  int8_t *const rest = decoded + 2 * TILES * TILE_BYTES;
  int32_t *const sums = (int32_t *)(rest + 2 * TILES * TILE_BYTES);
  uint8_t *copy = (uint8_t *)decoded + fixed;
  int64_t *const strides = (int64_t *)(copy + copies * job->used_k * ROWS);
  const uint8_t **const gathered = (const uint8_t **)(strides + row_tiles);
  for (int64_t i = 0; i < row_tiles; i++) {
    gathered[i] = NULL;
    if (in_place(job, row0 + i * ROWS, row1, &strides[i])) continue;
    gather(job, row0 + i * ROWS, row1, copy);
    gathered[i] = copy;
    copy += job->used_k * ROWS;
  }

  _tile_loadconfig(&config);
  for (int64_t b = block0; b < block1; b += 2) {
    const int blocks = (int)lb_min(2, block1 - b);
    for (int64_t t0 = 0; t0 < k_tiles; t0 += TILES) {
      const int64_t tiles = lb_min(TILES, k_tiles - t0);
      uint8_t filled[2][TILES];
      for (int h = 0; h < blocks; h++) {
        int8_t *const r = rest + h * TILES * TILE_BYTES;
        lb_decode(job, b + h, t0 * 16, (t0 + tiles) * 16, &t, decoded + h * TILES * TILE_BYTES, two ? r : NULL);
        if (two) find_filled(r, tiles, filled[h]);
      }
      __asm__ volatile("" ::: "memory"); /* gcc's tile loads don't tell the compiler that they read memory */
      const int last = blocks - 1; /* the second block, or the first once more */
      const int8_t *w0 = decoded, *w1 = decoded + last * TILES * TILE_BYTES;
      const int8_t *r0 = rest, *r1 = rest + last * TILES * TILE_BYTES;
      const uint8_t *f0 = filled[0], *f1 = filled[last];
      for (int64_t i = 0; i < row_tiles; i += 2) {
        const int pair = i + 1 < row_tiles;
        const int64_t row = row0 + i * ROWS;
        int32_t *c = sums + i * 512; /* [row tile][block][16][16] */
        if (t0) {
          _tile_loadd(0, c, 64);
          _tile_loadd(1, c + 256, 64);
          if (pair) {
            _tile_loadd(2, c + 512, 64);
            _tile_loadd(3, c + 768, 64);
          }
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t j = 0; j < tiles; j++) {
          const rows16 a0 = tile_rows(job, gathered[i], row, strides[i], t0 + j);
          _tile_loadd(6, w0 + j * TILE_BYTES, 64);
          _tile_loadd(4, a0.at, a0.stride);
          _tile_loadd(7, w1 + j * TILE_BYTES, 64);
          _tile_dpbusd(0, 4, 6);
          _tile_dpbusd(1, 4, 7);
          if (pair) {
            const rows16 a1 = tile_rows(job, gathered[i + 1], row + ROWS, strides[i + 1], t0 + j);
            _tile_loadd(5, a1.at, a1.stride);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
          }
          if (two && f0[j]) {
            _tile_loadd(6, r0 + j * TILE_BYTES, 64);
            _tile_dpbusd(0, 4, 6);
            if (pair) _tile_dpbusd(2, 5, 6);
          }
          if (two && f1[j]) {
            _tile_loadd(7, r1 + j * TILE_BYTES, 64);
            _tile_dpbusd(1, 4, 7);
            if (pair) _tile_dpbusd(3, 5, 7);
          }
        }
        _tile_stored(0, c, 64);
        _tile_stored(1, c + 256, 64);
        if (pair) {
          _tile_stored(2, c + 512, 64);
          _tile_stored(3, c + 768, 64);
        }
        if (t0 + tiles < k_tiles) continue;
        for (int64_t m = row; m < lb_min(row + 2 * ROWS, row1); m++)
          for (int h = 0; h < blocks; h++) {
            const __m512i acc = _mm512_loadu_si512(c + ((m - row) / ROWS * 2 + h) * 256 + (m - row) % ROWS * 16);
            lb_finish512(job, m, 1, b + h, &acc, 0);
          }
      }
    }
  }
  _tile_release();
  return LB_OK;
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static uint32_t absmax(const float *x, int64_t n) { return lb_avx512vnni.absmax(x, n); }

static void quantize(const float *x, int64_t n, float scale, float low, float high, int zero, uint8_t *out) {
  lb_avx512vnni.quantize(x, n, scale, low, high, zero, out);
}

static int winograd_weights(const lb_job *job, int64_t channels, int64_t block0, int64_t block1, void *weights) {
  return lb_avx512vnni.winograd_weights(job, channels, block0, block1, weights);
}

static int winograd_run(const lb_job *job, const lb_winograd *w, const void *weights, int64_t row0, int64_t row1,
                        int64_t block0, int64_t block1) {
  return lb_avx512vnni.winograd_run(job, w, weights, row0, row1, block0, block1);
}

static int available(void) {
  if (!lb_avx512_available()) return 0;
#if defined(LOWBIT_EMULATE_AMX)
  return 1;
#elif defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return 0; /* AMX-TILE, AMX-INT8 */
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return 0;                          /* the system saves the tiles */
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; /* and lets this process use them */
#else
  return 0;
#endif
}

const lb_isa_table lb_amx = {"amx", available, 0, absmax, quantize, product, 64,
                             &lb_vector512,
    winograd_weights, winograd_run, 0}; /* tiles multiply more than 36 / 16 times as fast */
#endif
