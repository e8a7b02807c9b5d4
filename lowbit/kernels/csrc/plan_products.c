/* Operations of plans on integers: rounding into maps, products with packed weights, depthwise convolutions. */
#include "plan_parts.h"

/* ---- quantize ---- */

static const float *row_with_offset(const run *r, const float *x, int64_t n, float *room) {
  const float *before = data_of(r->plan, r->op, 0);
  if (!before) return x;
  const int one = r->op->data[0].bytes == 4;
  for (int64_t i = 0; i < n; i++) room[i] = x[i] + before[one ? 0 : i];
  return room;
}

static void quantize_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t n = r->map_tensor->channels, dynamic = op->n[LB_N_DYNAMIC];
  float *room = scratch(r, LB_SLOT_LINE, (size_t)n * sizeof *room);
  if (!room) return;
  const float *given = dynamic == LB_DYNAMIC_GIVEN ? data_of(r->plan, op, 1) : NULL;
  const int by_row = dynamic == LB_DYNAMIC_ROW || given;
  const int whole = r->map_tensor->place == n && op->n[LB_N_STEP] == n && !by_row && !op->data[0].bytes;
  if (whole) { /* lines of places that follow each other, here as in the map */
    const int64_t width = r->map_tensor->width;
    for (int64_t row = begin, next; row < end; row = next) {
      next = lb_min(end, row - row % width + width);
      store_row(r, row, 0, r->in + op->n[LB_N_OFFSET] + row * n, (next - row) * n,
                dynamic == LB_DYNAMIC_ITEM ? r->out[0] : (float)op->f[0]);
    }
    return;
  }
  for (int64_t row = begin; row < end; row++) {
    const float *x = row_with_offset(r, r->in + op->n[LB_N_OFFSET] + row * op->n[LB_N_STEP], n, room);
    float scale = dynamic == LB_DYNAMIC_ITEM ? r->out[0] : (float)op->f[0];
    if (given) r->out[row] = scale = given[row];
    if (dynamic == LB_DYNAMIC_ROW) r->out[row] = scale = lb_scale_from_absmax(r->isa->absmax(x, n), r->map_tensor->high);
    store_row(r, row, 0, x, n, scale);
  }
}

/* Lines of planes [channels][height][width]: bytes of each plane, then side by side. */
static void quantize_lines(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_tensor *t = r->map_tensor;
  const int64_t width = t->width, plane = rows_of(t), channels = t->channels;
  const float scale = r->op->n[LB_N_DYNAMIC] ? r->out[0] : (float)r->op->f[0];
  const float *before = data_of(r->plan, r->op, 0);
  const int one = r->op->data[0].bytes == 4, zero = zero_of(r, t);
  const int together = channels == 3 && t->place == 3;
  float *room = scratch(r, LB_SLOT_LINE, (size_t)(width * 7));
  if (!room) return;
  uint8_t *bytes = (uint8_t *)(room + width);
  for (int64_t y = begin; y < end; y++) {
    uint8_t *to = r->map + r->ready->next_start[y * width];
    for (int64_t c = 0; c < channels; c++) {
      const float *x = r->in + c * plane + y * width;
      if (before) {
        for (int64_t i = 0; i < width; i++) room[i] = x[i] + before[one ? 0 : c];
        x = room;
      }
      r->isa->quantize(x, width, scale, (float)t->low, (float)t->high, zero, bytes);
      for (int64_t i = 0; !together && i < width; i++) to[i * t->place + c] = bytes[i];
      bytes += together ? width : 0;
    }
    if (together) {
      bytes -= 3 * width;
      for (int64_t i = 0; i < width; i++) {
        to[3 * i] = bytes[i];
        to[3 * i + 1] = bytes[width + i];
        to[3 * i + 2] = bytes[2 * width + i];
      }
    }
  }
}

void lb_run_quantize(run *r) {
  const lb_plan_op *op = r->op;
  const int64_t rows = rows_of(r->map_tensor), n = r->map_tensor->channels;
  if (op->n[LB_N_DYNAMIC] == LB_DYNAMIC_ITEM) {
    uint32_t most = 0;
    float *room = scratch(r, LB_SLOT_LINE, (size_t)lb_max(n, rows) * sizeof *room);
    if (!room) return;
    const int64_t lines = op->n[LB_N_PLANAR] ? n : rows, length = op->n[LB_N_PLANAR] ? rows : n;
    for (int64_t i = 0; i < lines; i++) {
      const float *x = op->n[LB_N_PLANAR] ? r->in + i * rows : r->in + op->n[LB_N_OFFSET] + i * op->n[LB_N_STEP];
      if (op->n[LB_N_PLANAR] && data_of(r->plan, op, 0)) {
        const float *before = data_of(r->plan, op, 0);
        for (int64_t j = 0; j < rows; j++) room[j] = x[j] + before[op->data[0].bytes == 4 ? 0 : i];
        x = room;
      } else if (!op->n[LB_N_PLANAR]) {
        x = row_with_offset(r, x, n, room);
      }
      const uint32_t bits = r->isa->absmax(x, length);
      most = bits > most ? bits : most;
    }
    r->out[0] = lb_scale_from_absmax(most, r->map_tensor->high);
  }
  if (op->n[LB_N_PLANAR]) parallel(r, r->map_tensor->height, r->map_tensor->width * n * 4, quantize_lines, r);
  else parallel(r, rows, n * 4, quantize_rows, r);
}

/* ---- product ---- */

/* Where the rows and the pieces of a window lie. */
static int prepare_tables(const lb_plan *plan, const lb_plan_op *op, prepared *p) {
  const lb_plan_tensor *x = plan->tensors + op->in[0];
  const int64_t *n = op->n, height = out_height(op, x), width = out_width(op, x);
  const int64_t line = (x->width + 2 * x->border_x) * x->place, channels = lb_round_up(x->channels, 4);
  const int joined = is_tight(x) || (n[LB_N_DILATION_X] == 1 && x->place == channels);
  const int64_t taps = n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X];
  p->rows = height * width;
  p->used_k = n[LB_N_KERNEL_Y] * line_k(op, x);
  p->k = lb_round_up(p->used_k, 64);
  p->row_start = malloc((size_t)p->rows * sizeof *p->row_start);
  p->row_scale = malloc((size_t)p->rows * sizeof *p->row_scale);
  p->k_offset = malloc((size_t)p->k / 4 * sizeof *p->k_offset);
  p->spans = malloc((size_t)taps * sizeof *p->spans);
  if (!p->row_start || !p->row_scale || !p->k_offset || !p->spans) return LB_NO_MEMORY;
  for (int64_t y = 0, row = 0; y < height; y++)
    for (int64_t z = 0; z < width; z++, row++) {
      p->row_start[row] = (y * n[LB_N_STRIDE_Y] + x->border_y - n[LB_N_PADDING_Y]) * line +
                          (z * n[LB_N_STRIDE_X] + x->border_x - n[LB_N_PADDING_X]) * x->place;
      p->row_scale[row] = (float)op->f[0];
    }
  for (int64_t y = 0; y < n[LB_N_KERNEL_Y]; y++)
    for (int64_t z = 0; z < (joined ? 1 : n[LB_N_KERNEL_X]); z++) {
      lb_span *span = p->spans + p->n_spans++;
      span->offset = y * n[LB_N_DILATION_Y] * line + z * n[LB_N_DILATION_X] * x->place;
      span->length = joined ? line_k(op, x) : channels;
    }
  int64_t *offset = p->k_offset;
  for (int s = 0; s < p->n_spans; s++)
    for (int64_t i = 0; i < p->spans[s].length; i += 4) *offset++ = p->spans[s].offset + i;
  memcpy(p->levels, data_of(plan, op, 4), sizeof p->levels);
  for (int i = 0; i < 16; i++) p->largest = (int)lb_max(p->largest, abs(p->levels[i]));
  if (n[LB_N_BITS] == 8) p->largest = 128;
  return LB_OK;
}

/* A product by its tables. Winograd's form needs what lb_winograd says of the map beside it. */
static lb_job job_of(const lb_plan *plan, const lb_plan_op *op, const prepared *p) {
  lb_job job = {
      .packed = data_of(plan, op, 0), .k = p->k, .block_bytes = p->k * 2 * op->n[LB_N_BITS],
      .bits = (int)op->n[LB_N_BITS], .largest = p->largest, .row_start = p->row_start, .spans = p->spans,
      .n_spans = p->n_spans, .used_k = p->used_k, .k_offset = p->k_offset, .row_scale = p->row_scale,
      .scale = data_of(plan, op, 1), .sums = data_of(plan, op, 2), .bias = data_of(plan, op, 3),
      .relu = (int)op->n[LB_N_RELU], .out_type = LB_FLOAT32, .add_type = LB_FLOAT32,
      .outputs = op->data[1].bytes / 4, .out_scale = (float)op->f[1],
  };
  memcpy(job.levels, p->levels, sizeof job.levels);
  return job;
}

static lb_winograd winograd_of(const lb_plan *plan, const lb_plan_op *op, int tile) {
  const lb_plan_tensor *x = plan->tensors + op->in[0];
  return (lb_winograd){.tile = tile, .line = (x->width + 2 * x->border_x) * x->place, .place = x->place, .images = 1,
                       .height = out_height(op, x), .width = out_width(op, x), .channels = lb_round_up(x->channels, 4)};
}

/* Transforms the weights for the instruction set in use, where Winograd's form is possible and faster. `room`: bytes
 * that are left for that. */
static int prepare_winograd(const lb_plan *plan, const lb_plan_op *op, prepared *p, int64_t *room) {
  const lb_plan_tensor *x = plan->tensors + op->in[0];
  const lb_isa_table *isa = lb_isa_in_use();
  const int64_t *n = op->n;
  const lb_job job = job_of(plan, op, p);
  lb_winograd w = winograd_of(plan, op, 2);
  if (n[LB_N_KERNEL_Y] != 3 || n[LB_N_KERNEL_X] != 3 || n[LB_N_STRIDE_Y] != 1 || n[LB_N_STRIDE_X] != 1 ||
      n[LB_N_DILATION_Y] != 1 || n[LB_N_DILATION_X] != 1 || is_tight(x) || isa->signed_bytes)
    return LB_OK;
  if (x->low < 0 || !lb_winograd_fits(&job, w.channels, x->high) || !lb_winograd_pays(isa, &w, 1)) {
    w.tile = 4;
    if (!lb_winograd4_pays(isa, &job, &w)) return LB_OK;
  }
  const int64_t bytes = lb_round_up(lb_winograd_bytes(&w, job.outputs), 64);
  if (bytes > *room || w.channels > MOST_TABLES / 18 / (w.width + 3)) return LB_OK; /* 16 or 18 bytes a place and channel */
  *room -= bytes;
  p->winograd = aligned_alloc(64, (size_t)bytes);
  if (!p->winograd) return LB_NO_MEMORY;
  p->winograd_isa = isa, p->tile = w.tile;
  return lb_winograd_weights(isa, &job, &w, 0, (job.outputs + 15) / 16, p->winograd);
}

static void find_in_weights(const lb_plan *plan, const lb_plan_op *op, prepared *p, int64_t *room) {
  const lb_job job = job_of(plan, op, p);
  p->found_isa = lb_isa_in_use();
  if (p->found_isa->find) p->found = p->found_isa->find(&job, (job.outputs + 15) / 16, room);
}

int lb_prepare_product(const lb_plan *plan, const lb_plan_op *op, prepared *p, int64_t *room) {
  if (prepare_tables(plan, op, p) || prepare_winograd(plan, op, p, room)) return LB_NO_MEMORY;
  find_in_weights(plan, op, p, room);
  return LB_OK;
}

/* Whether the instruction set wants larger pieces than this product has. */
static int spans_are_apart(const run *r) {
  int apart = 0;
  for (int s = 0; s < r->ready->n_spans; s++) apart |= r->ready->spans[s].length % r->isa->span != 0;
  return apart;
}

/* Copies of the windows, in one piece each. */
static int copy_windows(run *r, lb_span *whole) {
  const prepared *p = r->ready;
  const int64_t rows = p->rows, k = p->k;
  uint8_t *windows = scratch(r, LB_SLOT_WINDOWS, (size_t)(rows * k + TAIL));
  int64_t *table = scratch(r, LB_SLOT_ROWS, (size_t)(rows + k / 4) * sizeof *table);
  if (!windows || !table) return LB_NO_MEMORY;
  for (int64_t row = 0; row < rows; row++) {
    uint8_t *at = windows + row * k;
    for (int s = 0; s < p->n_spans; s++) {
      memcpy(at, r->job.map + p->row_start[row] + p->spans[s].offset, (size_t)p->spans[s].length);
      at += p->spans[s].length;
    }
    memset(at, 0, (size_t)(k - p->used_k));
    table[row] = row * k;
  }
  for (int64_t i = 0; i < k / 4; i++) table[rows + i] = 4 * i;
  *whole = (lb_span){0, k};
  r->job.map = windows, r->job.row_start = table, r->job.k_offset = table + rows;
  r->job.spans = whole, r->job.n_spans = 1, r->job.used_k = k;
  return LB_OK;
}

void lb_run_product(run *r) {
  const lb_plan_op *op = r->op;
  const prepared *p = r->ready;
  const lb_plan *plan = r->plan;
  const lb_plan_tensor *x = plan->tensors + op->in[0];
  lb_job *job = &r->job;
  *job = job_of(plan, op, p);
  job->map = memory_of(r, op->in[0]), job->zero = zero_of(r, x);
  job->add = memory_of(r, op->in[1]), job->out = r->out;
  if (r->map_tensor) {
    job->next = r->map, job->next_start = p->next_start, job->next_zero = zero_of(r, r->map_tensor);
    job->out_low = (float)r->map_tensor->low, job->out_high = (float)r->map_tensor->high;
  }
  if (op->in[2] >= 0) {
    const float *scales = memory_of(r, op->in[2]);
    if (values_of(plan->tensors + op->in[2]) == p->rows) {
      job->row_scale = scales;
    } else {
      float *all = scratch(r, LB_SLOT_SCALES, (size_t)p->rows * sizeof *all);
      if (!all) return;
      for (int64_t i = 0; i < p->rows; i++) all[i] = scales[0];
      job->row_scale = all;
    }
  }
  job->found = p->found_isa == r->isa ? p->found : NULL;
  const void *weights = p->winograd_isa == r->isa ? p->winograd : NULL;
  lb_winograd winograd = {0};
  lb_span whole;
  if (weights) {
    winograd = winograd_of(plan, op, p->tile);
    job->map += (x->border_y - op->n[LB_N_PADDING_Y]) * winograd.line + (x->border_x - op->n[LB_N_PADDING_X]) * x->place;
  } else if (spans_are_apart(r) && copy_windows(r, &whole)) {
    return;
  }
  const int status = lb_multiply(r->isa, job, &winograd, weights, p->rows, r->threads);
  if (status) atomic_store(&r->status, status);
}

/* ---- depthwise ---- */

int lb_prepare_depthwise(const lb_plan *plan, const lb_plan_op *op, prepared *p) {
  const lb_plan_tensor *x = plan->tensors + op->in[0];
  const int64_t *n = op->n, line = (x->width + 2 * x->border_x) * x->place;
  p->k_offset = malloc((size_t)(n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X]) * sizeof *p->k_offset);
  if (!p->k_offset) return LB_NO_MEMORY;
  for (int64_t y = 0, tap = 0; y < n[LB_N_KERNEL_Y]; y++)
    for (int64_t z = 0; z < n[LB_N_KERNEL_X]; z++)
      p->k_offset[tap++] = y * n[LB_N_DILATION_Y] * line + z * n[LB_N_DILATION_X] * x->place;
  return LB_OK;
}

void lb_depthwise_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const lb_plan_tensor *x = r->plan->tensors + op->in[0];
  const int64_t *n = op->n, channels = x->channels, width = out_width(op, x), taps = n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X];
  const int64_t line = (x->width + 2 * x->border_x) * x->place;
  const uint8_t *map = memory_of(r, op->in[0]);
  const float *scale = data_of(r->plan, op, 1), *bias = data_of(r->plan, op, 3), *norm = data_of(r->plan, op, 4);
  const float x_scale = op->in[2] < 0 ? (float)op->f[0] : *(const float *)memory_of(r, op->in[2]);
  const int32_t *all = data_of(r->plan, op, 2), zero = zero_of(r, x);
  int32_t *sums = scratch(r, LB_SLOT_LINE, (size_t)channels * 2 * sizeof *sums);
  if (!sums) return;
  float *room = (float *)(sums + channels);
  for (int64_t row = begin; row < end; row++) {
    const uint8_t *start = map + (row / width * n[LB_N_STRIDE_Y] + x->border_y - n[LB_N_PADDING_Y]) * line +
                           (row % width * n[LB_N_STRIDE_X] + x->border_x - n[LB_N_PADDING_X]) * x->place;
    float *y = r->out ? r->out + row * channels : room;
    r->isa->vector->depthwise(start, r->ready->k_offset, taps, data_of(r->plan, op, 0), channels, r->isa->signed_bytes, sums);
    for (int64_t c = 0; c < channels; c++)
      y[c] = (float)(int32_t)((uint32_t)sums[c] - (uint32_t)zero * (uint32_t)all[c]) * x_scale * scale[c];
    if (bias) r->isa->vector->affine(y, NULL, bias, channels, 0, INFINITY, y);
    if (norm || n[LB_N_RELU]) r->isa->vector->affine(y, norm, norm ? norm + channels : NULL, channels, (int)n[LB_N_RELU], most_of(op), y);
    if (r->map) store_row(r, row, 0, y, channels, (float)op->f[1]);
  }
}
