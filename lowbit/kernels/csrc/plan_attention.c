/* Attention in plans, on floats and on integers. */
#include "plan_parts.h"

/* ---- attention ----
 * Of each head: keys as panels [tokens / 16][size][16], values as panels [size / 16][tokens][16], zeros behind. */

enum { QUERIES = 16 };

/* Values of whole vectors are read where they lie. */
static int values_in_place(const lb_plan_op *op) { return op->n[LB_N_SIZE] % 16 == 0; }

static int64_t panel_floats(const lb_plan_op *op, int64_t tokens, int64_t *keys) {
  const int64_t size = op->n[LB_N_SIZE];
  *keys = panels_of(tokens) * size * 16;
  return *keys + (values_in_place(op) ? 0 : panels_of(size) * tokens * 16);
}

static void fill_panels(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t tokens = r->tokens, size = op->n[LB_N_SIZE], step = op->n[LB_N_STEP];
  int64_t keys;
  const int64_t floats = panel_floats(op, tokens, &keys);
  for (int64_t head = begin; head < end; head++) {
    float *k = (float *)r->panels + head * floats, *v = k + keys;
    const float *from_k = r->in + op->n[LB_N_K_OFFSET] + head * size;
    const float *from_v = r->in + op->n[LB_N_V_OFFSET] + head * size;
    r->isa->vector->transpose(from_k, step, tokens, size, k);
    if (values_in_place(op)) continue;
    memset(v, 0, (size_t)(floats - keys) * sizeof *v);
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t i = 0; i < size; i += 16)
        memcpy(v + (i / 16 * tokens + t) * 16, from_v + t * step + i, (size_t)lb_min(16, size - i) * sizeof *v);
  }
}

static void attend(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const lb_vector_table *vector = r->isa->vector;
  const int64_t tokens = r->tokens, size = op->n[LB_N_SIZE], step = op->n[LB_N_STEP];
  int64_t keys;
  const int64_t floats = panel_floats(op, tokens, &keys);
  const int64_t parts = (tokens + QUERIES - 1) / QUERIES, channels = op->n[LB_N_HEADS] * size;
  const int64_t row_room = panels_of(tokens) * 16, out_room = panels_of(size) * 16;
  float *logits = scratch(r, LB_SLOT_LINE, (size_t)(QUERIES * (row_room + out_room)) * sizeof *logits);
  if (!logits) return;
  float *result = logits + QUERIES * row_room;
  for (int64_t i = begin; i < end; i++) {
    const int64_t head = i / parts, first = i % parts * QUERIES, rows = lb_min(QUERIES, tokens - first);
    const float *k = (const float *)r->panels + head * floats, *v = r->in + op->n[LB_N_V_OFFSET] + head * size;
    const float *q = r->in + op->n[LB_N_OFFSET] + first * step + head * size;
    const int in_place = values_in_place(op);
    vector->multiply(rows, panels_of(tokens), size, q, step, k, size * 16, 16, logits, row_room);
    for (int64_t t = 0; t < rows; t++) vector->softmax(logits + t * row_room, tokens, (float)op->f[0]);
    vector->multiply(rows, panels_of(size), tokens, logits, row_room, in_place ? v : k + keys,
                     in_place ? 16 : tokens * 16, in_place ? step : 16, result, out_room);
    for (int64_t t = 0; t < rows; t++) {
      const float *from = result + t * out_room;
      if (r->out) memcpy(r->out + (first + t) * channels + head * size, from, (size_t)size * sizeof *from);
      if (r->map) store_row(r, first + t, head * size, from, size, (float)op->f[1]);
    }
  }
}

void lb_run_attention(run *r) {
  const lb_plan_op *op = r->op;
  const int64_t heads = op->n[LB_N_HEADS], size = op->n[LB_N_SIZE];
  int64_t keys;
  const int64_t tokens = rows_of(r->map_tensor ? r->map_tensor : r->plan->tensors + op->out[0]);
  r->tokens = tokens;
  const int64_t floats = heads * panel_floats(op, tokens, &keys);
  r->panels = scratch(r, LB_SLOT_PANELS, (size_t)floats * sizeof(float));
  if (!r->panels) return;
  parallel(r, heads, tokens * size * 8, fill_panels, r);
  parallel(r, heads * ((tokens + QUERIES - 1) / QUERIES), QUERIES * tokens * size * 2, attend, r);
}

/* ---- attention on integers ----
 * Q = q rounded, and so on; both products are exact. Of head h, query i and key j, in this order and each rounded:
 *
 *   logit = float(sum of Q[i][d] K[j][d] over d) * (q_step[i] * scale) * k_step[j] + bias[j]
 *   bias[j] = (sum of q_after[d] * float(K[j][d]) over d, ascending) * (k_step[j] * scale), if there are biases
 *   S = vector_softmax(logits, 1), rounded by share_step[i]
 *   y[i][c] = float(sum of S[i][j] V[j][c] over j) * share_step[i] * v_step[c] + more, if there are biases:
 *   more = float(sum of S[i][j] over j) * share_step[i] * v_after[c]
 *
 * What is added to k after it was rounded adds the same to all logits of a query, and so changes nothing. A step of v for
 * each token would be no factor of the sum over tokens: there is none. */

enum { ROWS = 32 /* queries at once */ };

/* Bytes of a row of queries and of shares, and where in the memory of a head its keys and values lie: both packed as
 * weights of 8 bits, with their sums, their steps and the keys' bias. */
typedef struct {
  int64_t heads, tokens, size, v_size, q_row, share_row, k_block, v_block;
  int64_t v, k_sums, v_sums, k_steps, v_steps, k_bias, bytes;
} integers;

static integers integers_of(const run *r) {
  const int64_t *n = r->op->n, span = lb_max(4, r->isa->span);
  integers a = {.heads = n[LB_N_HEADS], .tokens = r->tokens, .size = n[LB_N_SIZE], .v_size = n[LB_N_V_SIZE]};
  const int64_t of_keys = lb_round_up(a.tokens, 16) * 4, of_values = lb_round_up(a.v_size, 16) * 4;
  a.q_row = lb_round_up(a.size, span), a.share_row = lb_round_up(a.tokens, span);
  a.k_block = 16 * lb_round_up(a.size, 64), a.v_block = 16 * lb_round_up(a.tokens, 64);
  a.v = panels_of(a.tokens) * a.k_block;
  a.k_sums = a.v + panels_of(a.v_size) * a.v_block, a.v_sums = a.k_sums + of_keys;
  a.k_steps = a.v_sums + of_values, a.v_steps = a.k_steps + of_keys, a.k_bias = a.v_steps + of_values;
  a.bytes = a.k_bias + of_keys;
  return a;
}

static float step_of(const run *r, int factor, int64_t i) {
  const float *steps = data_of(r->plan, r->op, factor);
  return steps[r->op->data[factor].bytes == 4 ? 0 : i];
}

/* What is added to the rows of a head, or NULL; see check_integers. */
enum { Q_BEFORE, Q_AFTER, K_BEFORE, V_BEFORE, V_AFTER };
static const float *bias_of(const run *r, const integers *a, int which, int64_t head) {
  const float *all = data_of(r->plan, r->op, 4);
  if (!all) return NULL;
  if (which >= V_BEFORE) return all + a->heads * (3 * a->size + (which - V_BEFORE) * a->v_size) + head * a->v_size;
  return all + (which * a->heads + head) * a->size;
}

/* One row of n floats as bytes. `room`: as many floats. */
static void round_row(const run *r, const float *x, const float *before, int64_t n, float step, int range, int zero,
                      float *room, uint8_t *out) {
  if (before) r->isa->vector->affine(x, NULL, before, n, 0, INFINITY, room);
  r->isa->quantize(before ? room : x, n, step, (float)low_of(r->op, range), (float)high_of(r->op, range), zero, out);
}

static void pack_keys(const run *r, const integers *a, int64_t head, uint8_t *memory, float *room) {
  const int64_t *n = r->op->n;
  const float *k = (const float *)memory_of(r, r->op->in[1]) + n[LB_N_K_OFFSET] + head * n[LB_N_K_HEAD];
  const float *before = bias_of(r, a, K_BEFORE, head), *after = bias_of(r, a, Q_AFTER, head);
  int32_t *sums = (int32_t *)(memory + a->k_sums);
  float *steps = (float *)(memory + a->k_steps), *bias = (float *)(memory + a->k_bias);
  int8_t *row = (int8_t *)(room + a->size);
  const int64_t words = (a->size + 3) / 4;
  memset(row + a->size, 0, (size_t)(4 * words - a->size));
  for (int64_t j = 0; j < a->tokens; j++) {
    steps[j] = step_of(r, 1, head * a->tokens + j);
    round_row(r, k + j * n[LB_N_K_STEP], before, a->size, steps[j], LB_N_K_RANGE, 0, room, (uint8_t *)row);
    uint8_t *to = memory + j / 16 * a->k_block + j % 16 * 4;
    for (int64_t i = 0; i < words; i++) memcpy(to + i * LB_ROW, row + 4 * i, 4);
    sums[j] = 0;
    for (int64_t d = 0; d < a->size; d++) sums[j] += row[d];
    if (!after) continue;
    float dot = 0;
    for (int64_t d = 0; d < a->size; d++) dot += after[d] * (float)row[d];
    bias[j] = dot * (steps[j] * (float)r->op->f[0]);
  }
}

static void pack_values(const run *r, const integers *a, int64_t head, uint8_t *memory, float *room) {
  const int64_t *n = r->op->n, size = a->v_size, padded = lb_round_up(size, 16);
  const float *v = (const float *)memory_of(r, r->op->in[2]) + n[LB_N_V_OFFSET] + head * n[LB_N_V_HEAD];
  const float *before = bias_of(r, a, V_BEFORE, head), *step = data_of(r->plan, r->op, 2);
  int32_t *sums = (int32_t *)(memory + a->v_sums);
  float *steps = (float *)(memory + a->v_steps);
  uint8_t *rows = (uint8_t *)(room + size); /* of 4 tokens */
  for (int64_t c = 0; c < size; c++) steps[c] = step_of(r, 2, head * size + c);
  memset(sums, 0, (size_t)padded * sizeof *sums);
  memset(rows, 0, (size_t)(4 * padded));
  for (int64_t j = 0; j < a->tokens; j += 4) {
    for (int64_t t = 0; t < 4; t++) {
      uint8_t *row = rows + t * padded;
      const float *x = v + (j + t) * n[LB_N_V_STEP];
      if (j + t >= a->tokens) {
        memset(row, 0, (size_t)size);
      } else if (r->op->data[2].bytes == 4) {
        round_row(r, x, before, size, *step, LB_N_V_RANGE, 0, room, row);
      } else {
        for (int64_t c = 0; c < size; c++)
          round_row(r, x + c, before ? before + c : NULL, 1, steps[c], LB_N_V_RANGE, 0, room, row + c);
      }
    }
    for (int64_t c = 0; c < padded; c += 16) {
      uint8_t *to = memory + a->v + c / 16 * a->v_block + j / 4 * LB_ROW;
      for (int i = 0; i < 16; i++) {
        const uint8_t *at = rows + c + i;
        const uint32_t four = at[0] | at[padded] << 8 | at[2 * padded] << 16 | (uint32_t)at[3 * padded] << 24;
        memcpy(to + 4 * i, &four, 4);
        sums[c + i] += (int8_t)at[0] + (int8_t)at[padded] + (int8_t)at[2 * padded] + (int8_t)at[3 * padded];
      }
    }
  }
}

static int64_t offsets_of(const integers *a) { return lb_round_up(lb_max(a->q_row, a->share_row) / 4 + 2 * ROWS, 8); }

static void pack_heads(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const integers a = integers_of(r);
  float *room = scratch(r, LB_SLOT_LINE, (size_t)(5 * a.size + 8 * a.v_size + 128));
  if (!room) return;
  for (int64_t head = begin; head < end; head++) {
    uint8_t *memory = (uint8_t *)((int64_t *)r->panels + offsets_of(&a)) + head * a.bytes;
    memset(memory, 0, (size_t)a.k_sums);
    pack_keys(r, &a, head, memory, room);
    pack_values(r, &a, head, memory, room);
  }
}

static void attend_integers(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t *n = op->n;
  const integers a = integers_of(r);
  const int64_t parts = (a.tokens + ROWS - 1) / ROWS, *offsets = r->panels, *starts = offsets + offsets_of(&a) - 2 * ROWS;
  const int q_zero = zero_of_range(r, low_of(op, LB_N_Q_RANGE), high_of(op, LB_N_Q_RANGE));
  const int share_zero = zero_of_range(r, low_of(op, LB_N_SHARE_RANGE), high_of(op, LB_N_SHARE_RANGE));
  const int64_t bytes = lb_round_up(ROWS * (a.q_row + a.share_row) + TAIL, 64);
  const int64_t floats = ROWS * (2 + a.tokens + 2 * a.v_size) + a.size;
  uint8_t *q = scratch(r, LB_SLOT_LINE, (size_t)bytes + (size_t)floats * sizeof(float));
  if (!q) return;
  memset(q, 0, (size_t)bytes);
  uint8_t *shares = q + ROWS * a.q_row;
  float *q_scale = (float *)(q + bytes), *share_step = q_scale + ROWS, *logits = share_step + ROWS;
  float *result = logits + ROWS * a.tokens, *more = result + ROWS * a.v_size, *room = more + ROWS * a.v_size;
  for (int64_t i = begin; i < end; i++) {
    const int64_t head = i / parts, first = i % parts * ROWS, rows = lb_min(ROWS, a.tokens - first);
    const uint8_t *memory = (const uint8_t *)(offsets + offsets_of(&a)) + head * a.bytes;
    const float *before = bias_of(r, &a, Q_BEFORE, head), *after = bias_of(r, &a, V_AFTER, head);
    for (int64_t t = 0; t < rows; t++) {
      const float *x = r->in + n[LB_N_OFFSET] + head * n[LB_N_Q_HEAD] + (first + t) * n[LB_N_STEP];
      const float step = step_of(r, 0, head * a.tokens + first + t);
      round_row(r, x, before, a.size, step, LB_N_Q_RANGE, q_zero, room, q + t * a.q_row);
      q_scale[t] = step * (float)op->f[0];
      share_step[t] = step_of(r, 3, head * a.tokens + first + t);
    }
    const lb_span span = {0, a.q_row}, share_span = {0, a.share_row};
    lb_job job = {.packed = memory, .block_bytes = a.k_block, .k = a.k_block / 16, .bits = 8, .largest = 128, .map = q,
                  .row_start = starts, .spans = &span, .n_spans = 1, .used_k = a.q_row, .k_offset = offsets,
                  .zero = q_zero, .row_scale = q_scale, .scale = (const float *)(memory + a.k_steps),
                  .bias = op->data[4].bytes ? (const float *)(memory + a.k_bias) : NULL,
                  .sums = (const int32_t *)(memory + a.k_sums), .out_type = LB_FLOAT32, .add_type = LB_FLOAT32,
                  .outputs = a.tokens, .out = logits};
    int status = r->isa->product(&job, 0, rows, 0, panels_of(a.tokens));
    for (int64_t t = 0; t < rows; t++) {
      uint8_t *share = shares + t * a.share_row;
      r->isa->vector->softmax(logits + t * a.tokens, a.tokens, 1.0f);
      round_row(r, logits + t * a.tokens, NULL, a.tokens, share_step[t], LB_N_SHARE_RANGE, share_zero, NULL, share);
      if (!after) continue;
      int32_t sum = 0;
      for (int64_t j = 0; j < a.tokens; j++)
        sum += (r->isa->signed_bytes ? (int8_t)share[j] : share[j]) - share_zero;
      for (int64_t c = 0; c < a.v_size; c++) more[t * a.v_size + c] = (float)sum * share_step[t] * after[c];
    }
    job.packed = memory + a.v, job.block_bytes = a.v_block, job.k = a.v_block / 16, job.map = shares;
    job.row_start = starts + ROWS, job.spans = &share_span, job.used_k = a.share_row, job.zero = share_zero;
    job.row_scale = share_step, job.scale = (const float *)(memory + a.v_steps), job.bias = NULL;
    job.sums = (const int32_t *)(memory + a.v_sums), job.outputs = a.v_size, job.add = after ? more : NULL;
    job.out = r->out ? result : NULL;
    if (r->map) {
      job.next = r->map + head * a.v_size, job.next_start = r->ready->next_start + first;
      job.next_zero = zero_of(r, r->map_tensor), job.out_scale = (float)op->f[1];
      job.out_low = (float)r->map_tensor->low, job.out_high = (float)r->map_tensor->high;
    }
    if (!status) status = r->isa->product(&job, 0, rows, 0, panels_of(a.v_size));
    if (status) atomic_store(&r->status, status);
    for (int64_t t = 0; r->out && t < rows; t++)
      memcpy(r->out + (first + t) * a.heads * a.v_size + head * a.v_size, result + t * a.v_size,
             (size_t)a.v_size * sizeof *result);
  }
}

void lb_run_integers(run *r) {
  r->tokens = rows_of(r->map_tensor ? r->map_tensor : r->plan->tensors + r->op->out[0]);
  const integers a = integers_of(r);
  const int64_t tables = offsets_of(&a);
  int64_t *table = r->panels = scratch(r, LB_SLOT_PANELS, (size_t)(tables * 8 + a.heads * a.bytes));
  if (!table) return;
  for (int64_t i = 0; i < tables - 2 * ROWS; i++) table[i] = 4 * i;
  for (int64_t i = 0; i < ROWS; i++) {
    table[tables - 2 * ROWS + i] = i * a.q_row;
    table[tables - ROWS + i] = i * a.share_row;
  }
  parallel(r, a.heads, a.tokens * (a.size + a.v_size) * 8, pack_heads, r);
  parallel(r, a.heads * ((a.tokens + ROWS - 1) / ROWS), ROWS * a.tokens * (a.size + a.v_size), attend_integers, r);
}
