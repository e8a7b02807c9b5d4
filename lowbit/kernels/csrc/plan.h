/* Plans: whole networks as a list of operations, made by lowbit.plan in Python, run here in one call.
 *
 *   lb_plan *plan;
 *   if (lb_plan_load(bytes, size, &plan, why, sizeof why)) ...   // `bytes` is copied
 *   lb_plan_run(plan, batch, x, y, threads);                     // any number of times, from any threads
 *   lb_plan_free(plan);
 *
 * x is [batch][inputs] and y [batch][outputs], float32. A file is checked before anything of it is used: whatever is in
 * it, no call reads or writes outside its own memory.
 *
 * The file, little-endian: lb_plan_header, tensors, operations, data. Each value of one item of the batch is a tensor:
 *
 * - floats [height][width][channels], or
 * - a map of stored activations, bytes: lines and places with a border of places around them, `place` bytes from one to
 *   the next. It holds integers q of the range low ... high; the border holds q = 0.
 *
 * Limits: 2^16 tensors and operations, 2^24 places of a tensor and of all outputs together, sums of 2^16 products, a
 * file of 2^34 bytes. Loading takes at most 20 bytes for each place of the outputs and 2^31 bytes of tables and of weights
 * in another form, beside the file. A run takes the arena, of at most 2^32 bytes, and for each thread at most 2^32 bytes of
 * scratch memory. That much only for plans that say so: whoever takes plans from strangers asks lb_plan_arena and
 * lb_plan_work before the first run.
 *
 * All tensors but the input and the output lie in one arena at the offsets given. */
#ifndef LOWBIT_PLAN_H
#define LOWBIT_PLAN_H
#include "lowbit.h"

#define LB_PLAN_MAGIC "lowbit plan\n"
#define LB_PLAN_VERSION 1
enum { LB_BAD_PLAN = 5 };

enum { LB_TENSOR_FLOATS = 0, LB_TENSOR_MAP = 1 };

enum {
  LB_OP_QUANTIZE = 0, /* floats -> map */
  LB_OP_PRODUCT,      /* map x packed weights -> floats and/or map */
  LB_OP_COPY,         /* pieces of up to 4 float tensors and a constant -> floats */
  LB_OP_ADD,          /* floats + floats or a constant -> floats and/or map */
  LB_OP_AFFINE,       /* floats * gain + bias by channel -> floats */
  LB_OP_POOL,         /* floats -> floats */
  LB_OP_NORM,         /* LayerNorm: floats -> floats and/or map */
  LB_OP_GELU,         /* floats -> floats and/or map */
  LB_OP_MEL,          /* log-mel features of sound: floats -> floats */
  LB_OP_ATTENTION,    /* softmax(q k^T * scale) v of floats -> floats and/or map */
  LB_OP_DEPTHWISE,    /* map x int16 weights, channel by channel -> floats and/or map */
  LB_OP_ROUND,        /* floats, rounded to steps -> floats */
  LB_OP_MATMUL,       /* floats x floats -> floats, for each of a number of matrices */
  LB_OP_SOFTMAX,      /* rows of floats -> floats */
  LB_OP_CONV,         /* convolution or linear layer in full precision: floats -> floats and/or map */
  LB_OP_INTEGERS,     /* attention whose four factors are rounded to integers: floats -> floats and/or map */
  LB_OP_CURVE,        /* a function of each number: floats -> floats and/or map */
  LB_OP_TIMES,        /* floats * floats or a constant -> floats and/or map */
  LB_OP_GROUPS,       /* conv, of groups of channels */
  LB_OPS
};

/* Indices of lb_plan_op.n. Rows of floats are read as views: row r at `offset` + r * `step` of the tensor. */
enum { LB_N_OFFSET = 0, LB_N_STEP = 1 };
enum { LB_N_PLANAR = 2, LB_N_DYNAMIC = 3 };                              /* quantize */
enum { LB_DYNAMIC_NO = 0, LB_DYNAMIC_ROW = 1, LB_DYNAMIC_ITEM = 2, LB_DYNAMIC_GIVEN = 3 }; /* where the scale comes from:
                                              f[0]; computed for each row, or the item; data 1, one number for each row */
enum { LB_N_BITS = 2, LB_N_KERNEL_Y, LB_N_KERNEL_X, LB_N_STRIDE_Y, LB_N_STRIDE_X, LB_N_PADDING_Y, LB_N_PADDING_X,
       LB_N_DILATION_Y, LB_N_DILATION_X, LB_N_RELU };                    /* product; relu also of add and affine */
enum { LB_N_LARGEST = 2, LB_N_DIVISOR = 11 };                            /* pool, with the window of product */
enum { LB_N_CURVE = 2 };                                                  /* curve: of LB_CURVES, in internal.h */
enum { LB_N_SECOND = 2 };                                                 /* add, times: how the second operand lies */
enum { LB_SECOND_EACH = 0, LB_SECOND_ROW = 1, LB_SECOND_NUMBER = 2 };     /* as the first; one row for all; a number
                                                                           * for each row */
enum { LB_N_FFT = 2, LB_N_HOP = 3 };                                      /* mel */
enum { LB_N_HEADS = 2, LB_N_SIZE = 3, LB_N_K_OFFSET = 4, LB_N_V_OFFSET = 5 }; /* attention */
enum { LB_N_K_STEP = 6, LB_N_V_STEP = 7, LB_N_Q_HEAD = 8, LB_N_K_HEAD = 9, LB_N_V_HEAD = 10, LB_N_V_SIZE = 11,
       LB_N_Q_RANGE = 12, LB_N_K_RANGE = 13, LB_N_V_RANGE = 14, LB_N_SHARE_RANGE = 15 };
/* attention on integers: of head h, q[i][d] is at offset + h * q_head + i * step + d of the first tensor, k of the second
 * and v of the third; a range low ... high is (low + 256) * 1024 + high */

enum { LB_N_LOW = 2, LB_N_HIGH = 3 };                                     /* round: low + 256 */
enum { LB_N_COUNT = 2, LB_N_M = 3, LB_N_K = 4, LB_N_N = 5, LB_N_A_COUNT = 6, LB_N_B_OFFSET = 7, LB_N_B_COUNT = 8,
       LB_N_B_K = 9, LB_N_B_N = 10 }; /* matmul: of matrix i, a[m][k] is at offset + i * a_count + m * step + k,
                                       * b[k][n] at b_offset + i * b_count + k * b_k + n * b_n */

enum { LB_N_STEP_Y = 2, LB_N_HEIGHT = 12, LB_N_WIDTH = 13, LB_N_CHANNELS = 14, LB_N_STEP_C = 15 };
/* conv, with the window of product: x[y][z][c] is at offset + y * step_y + z * step + c * step_c */

typedef struct {
  char magic[12];
  uint32_t version;
  int64_t file_bytes, arena_bytes, data_offset;
  int32_t tensors, ops, input, output;
} lb_plan_header;

typedef struct {
  int32_t kind, border_y, border_x, low, high, reserved;
  int64_t height, width, channels, place; /* place: of a map; floats have channels */
  int64_t offset;                         /* in the arena; -1: the input or the output */
} lb_plan_tensor;

typedef struct {
  int64_t offset, bytes; /* from the start of the file */
} lb_plan_data;

typedef struct {
  int32_t kind, reserved, in[4], out[2]; /* tensors; -1: none. out: floats, map (of quantize: scales, map) */
  int64_t n[16];
  double f[4]; /* 0: scale of the input or of logits, eps, groups; 1: scale by which the output map is rounded;
                * 2: of affine, depthwise and sums, what ReLU clips at, 0 for nothing */
  lb_plan_data data[5]; /* product: packed, scale, sums, bias, levels; others: see plan_check.c */
} lb_plan_op;

typedef struct lb_plan lb_plan;

LB_PUBLIC int lb_plan_load(const void *bytes, int64_t size, lb_plan **plan, char *why, int64_t why_bytes);
LB_PUBLIC int lb_plan_run(lb_plan *plan, int64_t batch, const float *x, float *y, int64_t threads);
LB_PUBLIC void lb_plan_free(lb_plan *plan);
LB_PUBLIC int64_t lb_plan_inputs(const lb_plan *plan);  /* floats of one item */
LB_PUBLIC int64_t lb_plan_outputs(const lb_plan *plan); /* floats of one item */
LB_PUBLIC int64_t lb_plan_arena(const lb_plan *plan);   /* bytes that a run works in, for each thread of a batch */
LB_PUBLIC int64_t lb_plan_work(const lb_plan *plan);  /* about how many multiplications one item takes */
/* Seconds that each operation took in the last run with LB_PLAN_TIMES; NULL: none yet. */
LB_PUBLIC const double *lb_plan_times(lb_plan *plan, int on);

#endif
