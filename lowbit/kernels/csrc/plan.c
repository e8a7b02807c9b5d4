/* Loads and runs plans; see plan.h. */
#define _GNU_SOURCE
#include "plan_parts.h"

#include <stdio.h>
#include <time.h>

/* ---- what is known beforehand ---- */

/* Where each row of a map starts. */
static int64_t *starts_of(const lb_plan_tensor *map) {
  int64_t *start = malloc((size_t)rows_of(map) * sizeof *start);
  if (!start) return NULL;
  for (int64_t y = 0, row = 0; y < map->height; y++)
    for (int64_t x = 0; x < map->width; x++, row++)
      start[row] = ((y + map->border_y) * (map->width + 2 * map->border_x) + x + map->border_x) * map->place;
  return start;
}

static int prepare(lb_plan *plan) {
  const lb_plan_header *h = plan->header;
  plan->prepared = calloc((size_t)h->ops, sizeof *plan->prepared);
  plan->times = calloc((size_t)h->ops, sizeof *plan->times);
  if (!plan->prepared || !plan->times) return LB_NO_MEMORY;
  int64_t room = MOST_TABLES;
  for (int i = 0; i < h->ops; i++) {
    const lb_plan_op *op = plan->ops + i;
    prepared *p = plan->prepared + i;
    if (op->kind == LB_OP_PRODUCT && lb_prepare_product(plan, op, p, &room)) return LB_NO_MEMORY;
    if (op->kind == LB_OP_DEPTHWISE && lb_prepare_depthwise(plan, op, p)) return LB_NO_MEMORY;
    if (op->kind == LB_OP_MEL && lb_prepare_mel(plan, op, p)) return LB_NO_MEMORY;
    if (op->out[1] >= 0 && !(p->next_start = starts_of(plan->tensors + op->out[1]))) return LB_NO_MEMORY;
  }
  return LB_OK;
}

int lb_plan_load(const void *bytes, int64_t size, lb_plan **out, char *why, int64_t why_bytes) {
  *out = NULL;
  if (size < (int64_t)sizeof(lb_plan_header) || size > MOST_BYTES) {
    if (why && why_bytes > 0) snprintf(why, (size_t)why_bytes, "not a plan");
    return LB_BAD_PLAN;
  }
  lb_plan *plan = calloc(1, sizeof *plan);
  if (!plan) return LB_NO_MEMORY;
  pthread_mutex_init(&plan->mutex, NULL);
  plan->bytes = aligned_alloc(64, (size_t)lb_round_up(size, 64) + 64);
  int status = plan->bytes ? LB_OK : LB_NO_MEMORY;
  if (!status) {
    memcpy(plan->bytes, bytes, (size_t)size);
    memset(plan->bytes + size, 0, (size_t)(lb_round_up(size, 64) + 64 - size));
    plan->header = (const lb_plan_header *)plan->bytes;
    status = lb_plan_check(plan, size, why, why_bytes);
  }
  if (!status) status = prepare(plan);
  if (status) {
    plan->header = plan->prepared ? plan->header : NULL;
    lb_plan_free(plan);
    return status;
  }
  plan->inputs = values_of(plan->tensors + plan->header->input);
  plan->outputs = values_of(plan->tensors + plan->header->output);
  *out = plan;
  return LB_OK;
}

void lb_plan_free(lb_plan *plan) {
  if (!plan) return;
  for (state *s = plan->free, *next; s; s = next) {
    next = s->next;
    free(s->arena);
    free(s);
  }
  for (int i = 0; plan->prepared && i < plan->header->ops; i++) {
    prepared *p = plan->prepared + i;
    free(p->row_start), free(p->k_offset), free(p->next_start), free(p->row_scale), free(p->spans);
    free(p->winograd), free(p->found);
  }
  pthread_mutex_destroy(&plan->mutex);
  free(plan->prepared);
  free(plan->times);
  free(plan->bytes);
  free(plan);
}

int64_t lb_plan_inputs(const lb_plan *plan) { return plan->inputs; }
int64_t lb_plan_outputs(const lb_plan *plan) { return plan->outputs; }

static int64_t work_of(const lb_plan *plan, const lb_plan_op *op) {
  const int32_t written = op->out[1] >= 0 ? op->out[1] : op->out[0];
  const int64_t rows = rows_of(plan->tensors + written), values = values_of(plan->tensors + written), *n = op->n;
  switch (op->kind) {
    case LB_OP_PRODUCT: return rows * (op->data[0].bytes * 8 / n[LB_N_BITS]);
    case LB_OP_CONV:
    case LB_OP_GROUPS: return rows * (op->data[0].bytes / 4);
    case LB_OP_DEPTHWISE:
    case LB_OP_POOL: return values * n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X];
    case LB_OP_ATTENTION: return 2 * values * rows;
    case LB_OP_INTEGERS:
      return lb_min(rows * n[LB_N_HEADS] * (n[LB_N_SIZE] + n[LB_N_V_SIZE]), (int64_t)1 << 38) * rows;
    case LB_OP_MATMUL: return values * n[LB_N_K];
    case LB_OP_MEL: return values * n[LB_N_FFT];
    default: return values;
  }
}

int64_t lb_plan_work(const lb_plan *plan) {
  int64_t work = 0; /* of at most 2^16 operations, each below 2^46 */
  for (int i = 0; i < plan->header->ops; i++) work += lb_min(work_of(plan, plan->ops + i), (int64_t)1 << 46);
  return work;
}

int64_t lb_plan_arena(const lb_plan *plan) { return plan->header->arena_bytes; }

const double *lb_plan_times(lb_plan *plan, int on) {
  plan->timed = on;
  return plan->times;
}

/* ---- one operation ---- */

/* Border and pad channels of a map that is about to be written: the arena held something else there. */
static void clear_border(const lb_plan_tensor *t, uint8_t *map, int zero) {
  const int64_t line = (t->width + 2 * t->border_x) * t->place, side = t->border_x * t->place;
  const int pads = is_tight(t) ? 0 : (int)(lb_round_up(t->channels, 4) - t->channels);
  const int byte = pads ? 0 : (uint8_t)zero; /* with pads: all zero first, then the channels of the border */
  memset(map, byte, (size_t)(t->border_y * line + side));
  uint8_t *at = map + t->border_y * line + side;
  for (int64_t y = 1; side && y < t->height; y++) memset(at + y * line - 2 * side, byte, (size_t)(2 * side));
  memset(at + (t->height - 1) * line + t->width * t->place, byte, (size_t)(side + t->border_y * line + TAIL));
  if (!pads) return;
  for (int64_t y = 0; y < t->height + 2 * t->border_y; y++)
    for (int64_t x = 0; x < t->width + 2 * t->border_x; x++) {
      uint8_t *place = map + y * line + x * t->place;
      const int inside = is_between(y - t->border_y, 0, t->height - 1) && is_between(x - t->border_x, 0, t->width - 1);
      if (inside) memset(place + t->channels, 0, (size_t)pads);
      else memset(place, (uint8_t)zero, (size_t)t->channels);
    }
}

static void begin_map(run *r) {
  if (r->op->out[1] < 0) return;
  r->map_tensor = r->plan->tensors + r->op->out[1];
  r->map = memory_of(r, r->op->out[1]);
  clear_border(r->map_tensor, r->map, zero_of(r, r->map_tensor));
}

/* ---- the whole ---- */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int run_item(lb_plan *plan, uint8_t *arena, const float *x, float *y, int64_t threads) {
  run r = {.plan = plan, .isa = lb_isa_in_use(), .arena = arena, .x = x, .y = y, .threads = threads};
  const int timed = plan->timed;
  for (int i = 0; i < plan->header->ops; i++) {
    const lb_plan_op *op = plan->ops + i;
    const double start = timed ? now() : 0;
    r.op = op, r.ready = plan->prepared + i;
    r.in = memory_of(&r, op->in[0]), r.out = memory_of(&r, op->out[0]);
    r.map = NULL, r.map_tensor = NULL;
    begin_map(&r);
    const lb_plan_tensor *out = op->out[0] < 0 ? NULL : plan->tensors + op->out[0];
    const lb_plan_tensor *rows = r.map_tensor ? r.map_tensor : out;
    switch (op->kind) {
      case LB_OP_QUANTIZE: lb_run_quantize(&r); break;
      case LB_OP_PRODUCT: lb_run_product(&r); break;
      case LB_OP_COPY: lb_run_copy(&r); break;
      case LB_OP_ADD:
      case LB_OP_TIMES: parallel(&r, rows_of(rows), rows->channels, lb_pair_rows, &r); break;
      case LB_OP_AFFINE: parallel(&r, rows_of(rows), rows->channels, lb_affine_rows, &r); break;
      case LB_OP_POOL:
        parallel(&r, rows_of(rows), op->n[LB_N_KERNEL_Y] * op->n[LB_N_KERNEL_X] * rows->channels, lb_pool_rows, &r);
        break;
      case LB_OP_NORM:
      case LB_OP_GELU:
      case LB_OP_SOFTMAX:
      case LB_OP_CURVE: parallel(&r, rows_of(rows), rows->channels * 8, lb_norm_rows, &r); break;
      case LB_OP_MEL: lb_run_mel(&r); break;
      case LB_OP_DEPTHWISE:
        parallel(&r, rows_of(rows), op->n[LB_N_KERNEL_Y] * op->n[LB_N_KERNEL_X] * rows->channels, lb_depthwise_rows, &r);
        break;
      case LB_OP_ROUND: parallel(&r, rows_of(rows), rows->channels * 4, lb_round_rows, &r); break;
      case LB_OP_CONV:
      case LB_OP_GROUPS:
        parallel(&r, panels_of(rows_of(rows)), op->data[0].bytes * 4, lb_conv_rows, &r);
        break;
      case LB_OP_MATMUL:
        parallel(&r, op->n[LB_N_COUNT] * ((op->n[LB_N_M] + 15) / 16), 16 * op->n[LB_N_K] * op->n[LB_N_N], lb_matmul_rows, &r);
        break;
      case LB_OP_INTEGERS: lb_run_integers(&r); break;
      default: lb_run_attention(&r); break;
    }
    if (timed) plan->times[i] = now() - start;
    if (atomic_load(&r.status)) return atomic_load(&r.status);
  }
  return LB_OK;
}

static state *take_state(lb_plan *plan) {
  pthread_mutex_lock(&plan->mutex);
  state *s = plan->free;
  if (s) plan->free = s->next;
  pthread_mutex_unlock(&plan->mutex);
  if (s) return s;
  s = calloc(1, sizeof *s);
  const size_t bytes = (size_t)lb_round_up(plan->header->arena_bytes, 64) + 64;
  if (s && !(s->arena = aligned_alloc(64, bytes))) {
    free(s);
    return NULL;
  }
  if (s) memset(s->arena, 0, bytes);
  return s;
}

static void give_state(lb_plan *plan, state *s) {
  pthread_mutex_lock(&plan->mutex);
  s->next = plan->free;
  plan->free = s;
  pthread_mutex_unlock(&plan->mutex);
}

typedef struct {
  lb_plan *plan;
  const float *x;
  float *y;
  int64_t threads; /* of one item */
  atomic_int status;
} items;

static void run_items(void *argument, int64_t begin, int64_t end) {
  items *a = argument;
  state *s = take_state(a->plan);
  if (!s) {
    atomic_store(&a->status, LB_NO_MEMORY);
    return;
  }
  for (int64_t i = begin; i < end; i++) {
    const int status = run_item(a->plan, s->arena, a->x + i * a->plan->inputs, a->y + i * a->plan->outputs, a->threads);
    if (status) atomic_store(&a->status, status);
  }
  give_state(a->plan, s);
}

/* Several items: each thread takes whole ones. A single one: its operations are shared. */
int lb_plan_run(lb_plan *plan, int64_t batch, const float *x, float *y, int64_t threads) {
  if (!plan || batch < 0 || (batch && (!x || !y))) return LB_WRONG_ARGS;
  threads = lb_max(1, threads);
  items a = {.plan = plan, .x = x, .y = y, .threads = batch == 1 ? threads : 1};
  if (batch == 1) lb_parallel(1, 1, 1, run_items, &a);
  else lb_parallel(threads, batch, 1, run_items, &a);
  return atomic_load(&a.status);
}
