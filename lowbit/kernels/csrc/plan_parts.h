/* What plan.c, plan_check.c and the files of the operations share. */
#ifndef LOWBIT_PLAN_PARTS_H
#define LOWBIT_PLAN_PARTS_H
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "plan.h"

enum { MOST = 1 << 24, LEAST_WORK = 1 << 19, MOST_TAPS = 1 << 16, MOST_K = 1 << 16, MOST_ROWS = 1 << 24, TAIL = 128 };
static const int64_t MOST_BYTES = (int64_t)1 << 34, MOST_ROOM = (int64_t)1 << 32, MOST_TABLES = (int64_t)1 << 30;

/* What one run works in. */
typedef struct state {
  struct state *next;
  uint8_t *arena;
} state;

/* What is known of an operation before it runs. */
typedef struct {
  int64_t *row_start, *k_offset, *next_start; /* of a product; next_start of all that write a map */
  float *row_scale;
  lb_span *spans;
  int n_spans;
  int64_t rows, k, used_k;
  int largest;
  int16_t levels[16];
  const lb_isa_table *winograd_isa; /* whose transformed weights there are, or NULL */
  void *winograd;
  int tile; /* of it */
  const lb_isa_table *found_isa; /* who found something in the weights */
  void *found;
} prepared;

struct lb_plan {
  uint8_t *bytes;
  const lb_plan_header *header;
  const lb_plan_tensor *tensors;
  const lb_plan_op *ops;
  prepared *prepared;
  int64_t inputs, outputs;
  pthread_mutex_t mutex;
  state *free; /* guarded by mutex */
  double *times;
  int timed;
};

/* ---- tensors and operations ---- */

static inline int64_t rows_of(const lb_plan_tensor *t) { return t->height * t->width; }

static inline int64_t values_of(const lb_plan_tensor *t) { return rows_of(t) * t->channels; }

static inline int64_t bytes_of(const lb_plan_tensor *t) {
  if (t->kind == LB_TENSOR_FLOATS) return values_of(t) * 4;
  return (t->height + 2 * t->border_y) * (t->width + 2 * t->border_x) * t->place + TAIL;
}

static inline int is_between(int64_t value, int64_t low, int64_t high) { return low <= value && value <= high; }

static inline int64_t out_height(const lb_plan_op *op, const lb_plan_tensor *t) {
  return lb_out_size(t->height, op->n[LB_N_PADDING_Y], op->n[LB_N_KERNEL_Y], op->n[LB_N_DILATION_Y],
                  op->n[LB_N_STRIDE_Y]);
}

static inline int64_t out_width(const lb_plan_op *op, const lb_plan_tensor *t) {
  return lb_out_size(t->width, op->n[LB_N_PADDING_X], op->n[LB_N_KERNEL_X], op->n[LB_N_DILATION_X],
                  op->n[LB_N_STRIDE_X]);
}

/* Bytes of each tap, and of each line of taps. Without pads between places the taps of a line follow each other. */
static inline int is_tight(const lb_plan_tensor *map) { return map->place < lb_round_up(map->channels, 4); }

static inline int64_t line_k(const lb_plan_op *op, const lb_plan_tensor *map) {
  if (is_tight(map)) return lb_round_up(op->n[LB_N_KERNEL_X] * map->channels, 4);
  return op->n[LB_N_KERNEL_X] * lb_round_up(map->channels, 4);
}

/* The range at n[i]. */
static inline int low_of(const lb_plan_op *op, int i) { return (int)(op->n[i] / 1024) - 256; }

static inline int high_of(const lb_plan_op *op, int i) { return (int)(op->n[i] % 1024); }

static inline int64_t panels_of(int64_t n) { return (n + 15) / 16; }

static inline int64_t groups_of(const lb_plan_op *op) { return op->kind == LB_OP_GROUPS ? (int64_t)op->f[0] : 1; }

/* What ReLU clips at. */
static inline float most_of(const lb_plan_op *op) { return op->f[2] > 0 ? (float)op->f[2] : INFINITY; }

static inline const void *data_of(const lb_plan *plan, const lb_plan_op *op, int i) {
  return op->data[i].bytes ? plan->bytes + op->data[i].offset : NULL;
}

/* ---- one operation of a run ---- */

typedef struct {
  const lb_plan *plan;
  const lb_isa_table *isa;
  const lb_plan_op *op;
  const prepared *ready;
  uint8_t *arena;
  const float *x;
  float *y;
  int64_t threads;
  /* of the operation at hand */
  lb_job job;
  const float *in;
  float *out;
  uint8_t *map;
  const lb_plan_tensor *map_tensor;
  void *panels; /* of attention: keys and values */
  int64_t tokens; /* of attention */
  atomic_int status;
} run;

static inline void *memory_of(const run *r, int32_t i) {
  if (i < 0) return NULL;
  if (i == r->plan->header->input) return (void *)r->x;
  if (i == r->plan->header->output) return r->y;
  return r->arena + r->plan->tensors[i].offset;
}

static inline void *scratch(run *r, int slot, size_t bytes) {
  void *memory = lb_scratch(slot, bytes);
  if (!memory) atomic_store(&r->status, LB_NO_MEMORY);
  return memory;
}

/* What is added to integers of that range, so that they are the bytes that the instruction set multiplies; see lb_job. */
static inline int zero_of_range(const run *r, int low, int high) {
  return r->isa->signed_bytes ? (high <= 127 ? 0 : -128) : (low >= 0 ? 0 : 128);
}

static inline int zero_of(const run *r, const lb_plan_tensor *map) { return zero_of_range(r, map->low, map->high); }

static inline void parallel(const run *r, int64_t items, int64_t work_of_one, lb_range_fn fn, void *arg) {
  const int64_t threads = lb_max(1, lb_min(r->threads, items * work_of_one / (LEAST_WORK / 8)));
  const int64_t grain = threads == 1 ? items : lb_max(1, items / (threads * 4));
  lb_parallel(threads, items, lb_max(1, grain), fn, arg);
}

/* Rounds n floats of a row into the map, from channel `first` on. */
static inline void store_row(const run *r, int64_t row, int64_t first, const float *values, int64_t n, float scale) {
  const lb_plan_tensor *t = r->map_tensor;
  r->isa->quantize(values, n, scale, (float)t->low, (float)t->high, zero_of(r, t),
                   r->map + r->ready->next_start[row] + first);
}

/* ---- what each file offers the others ---- */

int lb_plan_check(lb_plan *plan, int64_t size, char *why, int64_t why_bytes); /* also finds tensors and operations */

/* `room`: bytes that are left for weights in another form. */
int lb_prepare_product(const lb_plan *plan, const lb_plan_op *op, prepared *p, int64_t *room);
int lb_prepare_depthwise(const lb_plan *plan, const lb_plan_op *op, prepared *p);
int lb_prepare_mel(const lb_plan *plan, const lb_plan_op *op, prepared *p);

void lb_run_quantize(run *r);
void lb_run_product(run *r);
void lb_run_copy(run *r);
void lb_run_mel(run *r);
void lb_run_attention(run *r);
void lb_run_integers(run *r);

/* For `parallel`, over rows of the output; conv and matmul take 16 at a time. */
void lb_depthwise_rows(void *argument, int64_t begin, int64_t end);
void lb_norm_rows(void *argument, int64_t begin, int64_t end);
void lb_affine_rows(void *argument, int64_t begin, int64_t end);
void lb_pair_rows(void *argument, int64_t begin, int64_t end);
void lb_pool_rows(void *argument, int64_t begin, int64_t end);
void lb_conv_rows(void *argument, int64_t begin, int64_t end);
void lb_round_rows(void *argument, int64_t begin, int64_t end);
void lb_matmul_rows(void *argument, int64_t begin, int64_t end);

#endif
