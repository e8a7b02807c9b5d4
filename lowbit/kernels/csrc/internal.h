/* What the files of the native kernels share. */
#ifndef LOWBIT_INTERNAL_H
#define LOWBIT_INTERNAL_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "lowbit.h"

#define LB_INLINE static inline __attribute__((always_inline, unused))
#define LB_ROW 64 /* bytes of a decoded row: [16 outputs][4 k] */

/* k runs through a row of activations in pieces: `length` bytes (a multiple of 4) at `offset` from the row's start. */
typedef struct {
  int64_t offset, length;
} lb_span;

/* One product of 8-bit rows by packed weights. An activation q is stored as the byte q + zero: unsigned bytes for the
 * instruction sets that multiply unsigned by signed, signed ones else. Pads are stored as 0 and so meet no weight. */
typedef struct {
  const uint8_t *packed;
  int64_t block_bytes, k; /* of one block of 16 outputs; K as packed, a multiple of 64 */
  int bits;
  int16_t levels[16]; /* not of 8 bits, where the bytes are the weights */
  int largest; /* the largest |level| */
  const void *found; /* what `find` of the instruction set has found, or NULL */

  const uint8_t *map;       /* stored activations */
  const int64_t *row_start; /* in map, of each row; followed by at least 64 readable bytes at the end of map */
  const lb_span *spans;
  int n_spans;
  int64_t used_k;          /* sum of the spans' lengths, <= k */
  const int64_t *k_offset; /* [used_k / 4]: where the 4 bytes of a row of weights lie, from the row's start */

  int32_t zero;
  const float *row_scale; /* of each row */
  const float *scale, *bias;
  const int32_t *sums;
  int relu, out_type, add_type;
  float out_scale, out_low, out_high, add_scale;
  int64_t outputs;
  const void *add; /* [rows][outputs] or NULL */
  void *out; /* [rows][outputs] or NULL */
  /* Stored activations of the next product, or NULL: of each row at `next_start` from there, q + next_zero, where q is
   * the output rounded by out_scale. `out` then is float. */
  uint8_t *next;
  const int64_t *next_start;
  int32_t next_zero;
} lb_job;

/* Log-mel features; see vector_mel. */
typedef struct {
  int64_t n_fft, hop, length, bands;
  const float *window, *filters, *cosine; /* [length], [n_fft / 2 + 1][bands], [n_fft] */
  const int64_t *range;                   /* of each band: the first frequency and the one behind the last */
} lb_mel;

/* See vector_round. gain, before and after may be NULL; *_all: n numbers, not one. */
typedef struct {
  const float *scale, *gain, *before, *after;
  int scale_all, gain_all, before_all, after_all;
  float low, high;
} lb_rounding;

/* Functions of single numbers; see vector_curve. */
enum { LB_CURVE_GELU, LB_CURVE_SIGMOID, LB_CURVE_SILU, LB_CURVE_GELU_TANH, LB_CURVE_HARDSIGMOID, LB_CURVE_HARDSWISH,
       LB_CURVE_INVERSE_ROOT, LB_CURVE_INVERSE, LB_CURVES };

/* Operations on rows of floats; vector.h has their definitions. */
typedef struct {
  void (*curve)(const float *x, int64_t n, int which, float *y);
  void (*norm)(const float *x, int64_t n, float eps, const float *gain, const float *bias, float *y);
  void (*softmax)(float *x, int64_t n, float scale);
  void (*multiply)(int64_t rows, int64_t panels, int64_t k, const float *a, int64_t a_row, const float *b,
                   int64_t b_panel, int64_t b_row, float *c, int64_t c_row);
  void (*transpose)(const float *x, int64_t step, int64_t rows, int64_t n, float *panels);
  void (*affine)(const float *x, const float *gain, const float *bias, int64_t n, int relu, float most, float *y);
  void (*pool)(const float *const *rows, int64_t count, int64_t n, float divisor, int largest, float *y);
  void (*mel)(const lb_mel *m, const float *const x[16], float *room, float *out);
  void (*standardize)(float *x, int64_t n, float room);
  void (*round)(const float *x, int64_t n, const lb_rounding *r, float *y);
  void (*depthwise)(const uint8_t *map, const int64_t *tap, int64_t taps, const int16_t *weights, int64_t n,
                    int is_signed, int32_t *sums);
} lb_vector_table;
/* A 3x3 convolution with stride 1 by Winograd's form: where its map lies and what comes out; see winograd.h and
 * winograd4.h. */
typedef struct {
  int64_t line, place, image;     /* bytes in job->map from one line, place or image to the next */
  int64_t images, height, width;  /* of the outputs; the map has two more lines and places */
  int64_t channels;               /* as packed: a multiple of 4 */
  int tile;                       /* outputs of a tile in each direction: 2 or 4 */
} lb_winograd;

typedef struct {
  int (*weights)(const lb_job *job, int64_t channels, int64_t block0, int64_t block1, void *weights);
  int (*run)(const lb_job *job, const lb_winograd *w, const void *weights, int64_t row0, int64_t row1, int64_t block0,
             int64_t block1);
  int channels, tiles; /* takes multiples of so many channels; is not faster for fewer tiles */
} lb_winograd_form;

typedef struct {
  const char *name;
  int (*available)(void);
  int signed_bytes; /* how it wants activations stored */
  uint32_t (*absmax)(const float *x, int64_t n); /* bits of max |x|; those of a NaN if there is one */
  void (*quantize)(const float *x, int64_t n, float scale, float low, float high, int zero, uint8_t *out);
  int (*product)(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1); /* LB_OK, ... */
  int span; /* all spans are multiples of this many bytes, 4 at least; used_k then is too */
  const lb_vector_table *vector;
  int (*winograd_weights)(const lb_job *job, int64_t channels, int64_t block0, int64_t block1, void *weights);
  int (*winograd_run)(const lb_job *job, const lb_winograd *w, const void *weights, int64_t row0, int64_t row1,
                      int64_t block0, int64_t block1);
  int winograd_channels; /* from this many on Winograd's form may be faster; 0: never, or not measured */
  /* What its products otherwise look for in the weights of `blocks` blocks at each call, to be freed; `room`: bytes that
   * it may take, and how many are left then. NULL, here or returned: nothing. */
  void *(*find)(const lb_job *job, int64_t blocks, int64_t *room);
  const lb_winograd_form *winograd4; /* tiles of 4x4 outputs, or NULL: it has none */
} lb_isa_table;

/* Winograd's form of a 3x3 convolution with stride 1 and dilation 1: the same bits as `product`, with 16 products for
 * 36. Of the job all but row_start, spans and k_offset count. */

/* Whether it can be used: weights of 2 or 3 bits with |level| <= 8, activations stored as they are (`zero` is 0), and
 * all of them 0 ... 31: `high` is what the caller promises of the map. */
enum { LB_WINOGRAD_HIGH = 31 };
int lb_winograd_fits(const lb_job *job, int64_t channels, int64_t high);
/* Whether it is expected to be faster too, with weights transformed beforehand (prepared != 0) or for each call. */
int lb_winograd_pays(const lb_isa_table *isa, const lb_winograd *w, int prepared);
/* Whether tiles of 4x4 outputs can be used, for any stored activations, and are expected to be faster. */
int lb_winograd4_pays(const lb_isa_table *isa, const lb_job *job, const lb_winograd *w);
/* Bytes of transformed weights. They belong to the instruction set that made them, and to the size of the tiles. */
int64_t lb_winograd_bytes(const lb_winograd *w, int64_t outputs);
/* Transforms blocks block0 ... block1-1 of the weights into `weights`, of lb_winograd_bytes, aligned to 64 bytes. */
int lb_winograd_weights(const lb_isa_table *isa, const lb_job *job, const lb_winograd *w, int64_t block0, int64_t block1,
                        void *weights);
/* Rows row0 ... row1-1 of tiles, of lb_winograd_rows, and blocks block0 ... block1-1 of the outputs. */
int64_t lb_winograd_rows(const lb_winograd *w);
int lb_winograd_run(const lb_isa_table *isa, const lb_job *job, const lb_winograd *w, const void *weights, int64_t row0,
                    int64_t row1, int64_t block0, int64_t block1);

/* A whole product of `rows` rows, shared by up to `threads` threads; by Winograd's form with transformed `weights`, or
 * directly if they are NULL. */
int lb_multiply(const lb_isa_table *isa, const lb_job *job, const lb_winograd *w, const void *weights, int64_t rows,
                int64_t threads);

/* `product` of rows of used_k floats at `map`; see floats.h. Not in the tables, so that programs without it are small. */
typedef int lb_product_fn(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1);
extern lb_product_fn lb_portable_floats, lb_avx2_floats, lb_neon_floats;

extern const lb_isa_table lb_portable;
const lb_isa_table *lb_isa_in_use(void);
#if defined(__x86_64__)
extern const lb_isa_table lb_avx2, lb_avx512vnni, lb_amx;
extern const lb_vector_table lb_vector512;
int lb_avx512_available(void);
#endif
#if defined(__aarch64__)
extern const lb_isa_table lb_neon, lb_neon_plain;
#endif

/* Calls fn on ranges of at most `grain` items that make up 0 ... items-1, by up to `threads` threads at once. */
typedef void (*lb_range_fn)(void *arg, int64_t begin, int64_t end);
void lb_parallel(int64_t threads, int64_t items, int64_t grain, lb_range_fn fn, void *arg);

/* A buffer of this thread, aligned to 64 bytes, kept until more is asked of the slot; NULL: no memory. */
enum { LB_SLOT_MAP, LB_SLOT_ROWS, LB_SLOT_WINDOWS, LB_SLOT_DECODED, LB_SLOT_EXTRA, LB_SLOT_SUMS,
       LB_SLOT_LINE, LB_SLOT_PANELS, LB_SLOT_SCALES, LB_SLOTS };
void *lb_scratch(int slot, size_t bytes);
void lb_scratch_trim(void); /* gives back what is unusually large */

LB_INLINE int64_t lb_min(int64_t a, int64_t b) { return a < b ? a : b; }
LB_INLINE int64_t lb_max(int64_t a, int64_t b) { return a > b ? a : b; }
LB_INLINE int64_t lb_round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

/* Outputs along one dim of a convolution; 0: the kernel is larger than its input. */
LB_INLINE int64_t lb_out_size(int64_t size, int64_t padding, int64_t kernel, int64_t dilation, int64_t stride) {
  const int64_t room = size + 2 * padding - (kernel - 1) * dilation - 1;
  return room < 0 ? 0 : room / stride + 1;
}

/* The scale by which numbers are rounded to -high ... high, if `bits` are those of the largest magnitude. */
LB_INLINE float lb_scale_from_absmax(uint32_t bits, int64_t high) {
  float largest;
  memcpy(&largest, &bits, 4);
  const float scale = largest / (float)high;
  return scale < 1.17549435e-38f ? 1.17549435e-38f : scale; /* NaN stays NaN */
}

/* 1 / scale to multiply by in place of a division; NaN where it is not exact enough for that. See lb_steps512_of. */
LB_INLINE float lb_inverse(float scale) { return scale > 1e-30f && scale < 1e30f ? 1.0f / scale : NAN; }

/* Of eight rows of 3-bit codes, where row r's top bit lies; see packing.py. */
static const int lb_top_bit[8] = {2, 0, 1, 3, 6, 4, 5, 7};

#endif
