/* Operations of plans on floats, but for attention. */
#include "plan_parts.h"

/* ---- rows ---- */

/* A row's result goes to the floats, to the map, or both. */
void lb_norm_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t n = (r->map_tensor ? r->map_tensor : r->plan->tensors + op->out[0])->channels;
  const float *gain = op->kind == LB_OP_NORM ? data_of(r->plan, op, 0) : NULL;
  const float *bias = op->kind == LB_OP_NORM ? data_of(r->plan, op, 1) : NULL;
  float *room = scratch(r, LB_SLOT_LINE, (size_t)n * sizeof *room);
  if (!room) return;
  for (int64_t row = begin; row < end; row++) {
    const float *x = r->in + op->n[LB_N_OFFSET] + row * op->n[LB_N_STEP];
    float *y = r->out ? r->out + row * n : room;
    if (op->kind == LB_OP_NORM) {
      r->isa->vector->norm(x, n, (float)op->f[0], gain, bias, y);
    } else if (op->kind == LB_OP_SOFTMAX) {
      memcpy(y, x, (size_t)n * sizeof *y);
      r->isa->vector->softmax(y, n, 1.0f);
    } else {
      r->isa->vector->curve(x, n, op->kind == LB_OP_GELU ? LB_CURVE_GELU : (int)op->n[LB_N_CURVE], y);
    }
    if (r->map) store_row(r, row, 0, y, n, (float)op->f[1]);
  }
}

void lb_affine_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t n = r->plan->tensors[op->out[0]].channels;
  const float *gain = data_of(r->plan, op, 0), *bias = data_of(r->plan, op, 1);
  for (int64_t row = begin; row < end; row++)
    r->isa->vector->affine(r->in + op->n[LB_N_OFFSET] + row * op->n[LB_N_STEP], gain, bias, n, (int)op->n[LB_N_RELU],
                           most_of(op), r->out + row * n);
}

/* Sums and products of two: what affine_rows does, with a tensor in the place of `gain` or `bias`. */
void lb_pair_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t n = (r->map_tensor ? r->map_tensor : r->plan->tensors + op->out[0])->channels, how = op->n[LB_N_SECOND];
  const float *second = op->in[1] < 0 ? data_of(r->plan, op, 0) : memory_of(r, op->in[1]);
  float *room = scratch(r, LB_SLOT_LINE, (size_t)(2 * n) * sizeof *room);
  if (!room) return;
  const int64_t at_once = how == LB_SECOND_EACH && !r->map ? end - begin : 1;
  for (int64_t row = begin; row < end; row += at_once) {
    const float *other = how == LB_SECOND_EACH ? second + row * n : how == LB_SECOND_ROW ? second : room + n;
    float *y = r->out ? r->out + row * n : room;
    for (int64_t i = 0; how == LB_SECOND_NUMBER && i < n; i++) room[n + i] = second[row];
    r->isa->vector->affine(r->in + row * n, op->kind == LB_OP_TIMES ? other : NULL, op->kind == LB_OP_ADD ? other : NULL,
                           at_once * n, (int)op->n[LB_N_RELU], most_of(op), y);
    if (r->map) store_row(r, row, 0, y, n, (float)op->f[1]);
  }
}

void lb_run_copy(run *r) {
  const lb_plan_op *op = r->op;
  const int64_t *piece = data_of(r->plan, op, 0);
  for (int64_t i = 0; i < op->data[0].bytes / 32; i++, piece += 4) {
    const float *from = piece[1] < 4 ? memory_of(r, op->in[piece[1]]) : data_of(r->plan, op, 1);
    memcpy(r->out + piece[0], from + piece[2], (size_t)piece[3] * sizeof(float));
  }
}

void lb_pool_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const lb_plan_tensor *x = r->plan->tensors + op->in[0];
  const int64_t *n = op->n, width = out_width(op, x), channels = x->channels;
  const float **rows = scratch(r, LB_SLOT_LINE, (size_t)(n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X]) * sizeof *rows);
  if (!rows) return;
  for (int64_t row = begin; row < end; row++) {
    const int64_t y0 = row / width * n[LB_N_STRIDE_Y] - n[LB_N_PADDING_Y];
    const int64_t x0 = row % width * n[LB_N_STRIDE_X] - n[LB_N_PADDING_X];
    int64_t count = 0;
    for (int64_t y = lb_max(0, y0); y < lb_min(x->height, y0 + n[LB_N_KERNEL_Y]); y++)
      for (int64_t z = lb_max(0, x0); z < lb_min(x->width, x0 + n[LB_N_KERNEL_X]); z++)
        rows[count++] = r->in + (y * x->width + z) * channels;
    const float divisor = (float)(n[LB_N_DIVISOR] ? n[LB_N_DIVISOR] : count);
    if (count) r->isa->vector->pool(rows, count, channels, divisor, (int)n[LB_N_LARGEST], r->out + row * channels);
  }
}

/* The windows of up to 16 places, side by side, of `channels` channels from channel `from` on. */
static void copy_places(const run *r, int64_t first, int64_t count, int64_t from, int64_t channels, float *to) {
  const int64_t *n = r->op->n;
  const lb_plan_tensor seen = {.height = n[LB_N_HEIGHT], .width = n[LB_N_WIDTH]};
  const int64_t width = out_width(r->op, &seen);
  for (int64_t row = first; row < first + count; row++)
    for (int64_t i = 0; i < n[LB_N_KERNEL_Y]; i++)
      for (int64_t j = 0; j < n[LB_N_KERNEL_X]; j++, to += channels) {
        const int64_t at_y = row / width * n[LB_N_STRIDE_Y] - n[LB_N_PADDING_Y] + i * n[LB_N_DILATION_Y];
        const int64_t at_x = row % width * n[LB_N_STRIDE_X] - n[LB_N_PADDING_X] + j * n[LB_N_DILATION_X];
        if (!is_between(at_y, 0, seen.height - 1) || !is_between(at_x, 0, seen.width - 1)) {
          memset(to, 0, (size_t)channels * sizeof *to);
          continue;
        }
        const float *x = r->in + n[LB_N_OFFSET] + at_y * n[LB_N_STEP_Y] + at_x * n[LB_N_STEP] + from * n[LB_N_STEP_C];
        if (n[LB_N_STEP_C] == 1) memcpy(to, x, (size_t)channels * sizeof *to);
        else for (int64_t c = 0; c < channels; c++) to[c] = x[c * n[LB_N_STEP_C]];
      }
}

/* 16 rows of outputs at a time, group by group. */
void lb_conv_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t *n = op->n, groups = groups_of(op), channels = n[LB_N_CHANNELS] / groups;
  const lb_plan_tensor *y = r->map_tensor ? r->map_tensor : r->plan->tensors + op->out[0];
  const int64_t rows = rows_of(y), outputs = y->channels / groups, panels = panels_of(outputs);
  const int64_t k = n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X] * channels;
  const float *weights = data_of(r->plan, op, 0), *bias = data_of(r->plan, op, 1);
  float *windows = scratch(r, LB_SLOT_LINE, (size_t)(16 * (k + panels * 16)) * sizeof *windows);
  if (!windows) return;
  float *result = windows + 16 * k;
  for (int64_t i = begin; i < end; i++)
    for (int64_t g = 0, from = 0; g < groups; g++, from += outputs) {
      const int64_t first = i * 16, count = lb_min(16, rows - first);
      copy_places(r, first, count, g * channels, channels, windows);
      r->isa->vector->multiply(count, panels, k, windows, k, weights + g * panels * k * 16, k * 16, 16, result, panels * 16);
      for (int64_t row = 0; row < count; row++) {
        float *values = result + row * panels * 16;
        if (bias || n[LB_N_RELU])
          r->isa->vector->affine(values, NULL, bias ? bias + from : NULL, outputs, (int)n[LB_N_RELU], most_of(op), values);
        if (r->out) memcpy(r->out + (first + row) * y->channels + from, values, (size_t)outputs * sizeof *values);
        if (r->map) store_row(r, first + row, from, values, outputs, (float)op->f[1]);
      }
    }
}

void lb_round_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t n = r->plan->tensors[op->out[0]].channels;
  for (int64_t row = begin; row < end; row++) {
    const float *part[4];
    int all[4];
    for (int i = 0; i < 4; i++) {
      part[i] = data_of(r->plan, op, i);
      all[i] = op->data[i].bytes > 4;
      if (part[i] && op->data[i].bytes > 4 * n) part[i] += row * n;
    }
    const lb_rounding rounding = {.scale = part[0], .gain = part[1], .before = part[2], .after = part[3],
                                  .scale_all = all[0], .gain_all = all[1], .before_all = all[2], .after_all = all[3],
                                  .low = (float)(op->n[LB_N_LOW] - 256), .high = (float)op->n[LB_N_HIGH]};
    r->isa->vector->round(r->in + row * n, n, &rounding, r->out + row * n);
  }
}

void lb_matmul_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const int64_t *n = r->op->n, panels = (n[LB_N_N] + 15) / 16, k = n[LB_N_K], parts = (n[LB_N_M] + 15) / 16;
  float *panel = scratch(r, LB_SLOT_LINE, (size_t)(panels * 16 * (k + 16)) * sizeof *panel);
  if (!panel) return;
  float *result = panel + panels * 16 * k; /* [16 rows][panels * 16] */
  for (int64_t i = begin, ready = -1; i < end; i++) {
    const int64_t matrix = i / parts, first = i % parts * 16, rows = lb_min(16, n[LB_N_M] - first);
    const float *a = r->in + n[LB_N_OFFSET] + matrix * n[LB_N_A_COUNT] + first * n[LB_N_STEP];
    const float *b = (const float *)memory_of(r, r->op->in[1]) + n[LB_N_B_OFFSET] + matrix * n[LB_N_B_COUNT];
    if (ready != matrix && n[LB_N_B_K] == 1) r->isa->vector->transpose(b, n[LB_N_B_N], n[LB_N_N], k, panel);
    else if (ready != matrix)
      for (int64_t p = 0; p < panels; p++)
        for (int64_t j = 0; j < k; j++)
          for (int64_t lane = 0; lane < 16; lane++) {
            const int64_t column = 16 * p + lane;
            panel[(p * k + j) * 16 + lane] = column < n[LB_N_N] ? b[j * n[LB_N_B_K] + column * n[LB_N_B_N]] : 0;
          }
    ready = matrix;
    r->isa->vector->multiply(rows, panels, k, a, n[LB_N_STEP], panel, k * 16, 16, result, panels * 16);
    for (int64_t m = 0; m < rows; m++)
      memcpy(r->out + (matrix * n[LB_N_M] + first + m) * n[LB_N_N], result + m * panels * 16, (size_t)n[LB_N_N] * sizeof *result);
  }
}

/* ---- log-mel features ---- */

/* Which frequencies each band has: the other filters are 0. */
int lb_prepare_mel(const lb_plan *plan, const lb_plan_op *op, prepared *p) {
  const int64_t bands = plan->tensors[op->out[0]].height, frequencies = op->n[LB_N_FFT] / 2 + 1;
  const float *filters = data_of(plan, op, 1);
  p->row_start = calloc((size_t)(2 * bands), sizeof *p->row_start);
  if (!p->row_start) return LB_NO_MEMORY;
  for (int64_t band = 0; band < bands; band++)
    for (int64_t k = 0; k < frequencies; k++)
      if (filters[k * bands + band] != 0) {
        if (!p->row_start[2 * band + 1]) p->row_start[2 * band] = k;
        p->row_start[2 * band + 1] = k + 1;
      }
  return LB_OK;
}

static void mel_frames(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const lb_plan_tensor *y = r->plan->tensors + op->out[0];
  const int64_t n_fft = op->n[LB_N_FFT], bands = y->height, frames = y->width;
  const lb_mel mel = {.n_fft = n_fft, .hop = op->n[LB_N_HOP], .length = op->data[0].bytes / 4, .bands = bands,
                      .window = data_of(r->plan, op, 0), .filters = data_of(r->plan, op, 1),
                      .cosine = data_of(r->plan, op, 2), .range = r->ready->row_start};
  float *room = scratch(r, LB_SLOT_LINE, (size_t)((2 * n_fft + bands + 4) * 16) * sizeof *room);
  if (!room) return;
  float *decibels = room + (2 * n_fft + 4) * 16;
  for (int64_t group = begin; group < end; group++) {
    const float *window[16];
    for (int lane = 0; lane < 16; lane++) {
      const int64_t frame = lb_min(group * 16 + lane, frames - 1);
      window[lane] = (const float *)r->panels + frame * mel.hop + (n_fft - mel.length) / 2;
    }
    r->isa->vector->mel(&mel, window, room, decibels);
    for (int64_t band = 0; band < bands; band++)
      memcpy(r->out + band * frames + group * 16, decibels + 16 * band,
             (size_t)lb_min(16, frames - group * 16) * sizeof *room);
  }
}

/* The sound is mirrored at both ends by half a window. */
void lb_run_mel(run *r) {
  const lb_plan_op *op = r->op;
  const lb_plan_tensor *y = r->plan->tensors + op->out[0];
  const int64_t samples = values_of(r->plan->tensors + op->in[0]), half = op->n[LB_N_FFT] / 2;
  float *mirrored = r->panels = scratch(r, LB_SLOT_PANELS, (size_t)(samples + 2 * half) * sizeof(float));
  if (!mirrored) return;
  memcpy(mirrored + half, r->in, (size_t)samples * sizeof(float));
  for (int64_t i = 1; i <= half; i++) {
    mirrored[half - i] = r->in[i];
    mirrored[half + samples - 1 + i] = r->in[samples - 1 - i];
  }
  parallel(r, (y->width + 15) / 16, op->n[LB_N_FFT] * 400, mel_frames, r);
  r->isa->vector->standardize(r->out, values_of(y), (float)op->f[0]);
}
