/* Untrusted files: loads what a fuzzer made, and runs what was accepted, if it is small. A run depends on nothing but
 * its input, so all instruction sets must give the same numbers, whatever ran before and lay where the output goes:
 * anything else aborts. For libFuzzer (-fsanitize=fuzzer), for AFL++ (which brings a main for LLVMFuzzerTestOneInput),
 * or with -DWITH_MAIN for files named on the command line. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan.h"

enum { MOST_VALUES = 1 << 16, MOST_ARENA = 1 << 22, MOST_WORK = 1 << 22 };

/* The same bits, or NaN in both: which NaN it is differs between processors. */
static int is_same(const float *a, const float *b, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (memcmp(a + i, b + i, sizeof *a) && (a[i] == a[i] || b[i] == b[i])) return 0;
  return 1;
}

static void fill(float *x, int64_t n, int step) {
  for (int64_t i = 0; i < n; i++) x[i] = (float)(i * step % 17) - 8.0f;
}

/* One run among others, by the instruction set in use, into memory that holds `byte`. */
static int answer(const uint8_t *bytes, size_t size, const float *x, const float *other, float *y, int byte) {
  lb_plan *plan;
  if (lb_plan_load(bytes, (int64_t)size, &plan, NULL, 0)) return 0;
  const size_t room = (size_t)lb_plan_outputs(plan) * sizeof *y;
  int status = lb_plan_run(plan, 1, other, y, 1);
  memset(y, byte, room);
  if (!status) status = lb_plan_run(plan, 1, x, y, 2);
  lb_plan_free(plan);
  return !status;
}

static void compare(const uint8_t *bytes, size_t size, int64_t inputs, int64_t outputs) {
  float *x = malloc((size_t)inputs * sizeof *x), *other = malloc((size_t)inputs * sizeof *x);
  float *y = malloc((size_t)outputs * sizeof *y), *expected = malloc((size_t)outputs * sizeof *y);
  if (x && other && y && expected) {
    char names[128], *rest = names;
    fill(x, inputs, 1), fill(other, inputs, 5);
    snprintf(names, sizeof names, "%s", lb_isas(0));
    int known = 0;
    for (char *name; (name = strtok_r(rest, ",", &rest));) {
      lb_select(name);
      if (!answer(bytes, size, x, x, known ? y : expected, 0)) continue;
      if (known && !is_same(y, expected, outputs)) {
        fprintf(stderr, "%s gives other numbers\n", name);
        abort();
      }
      known = 1;
      if (answer(bytes, size, x, other, y, 0x41) && !is_same(y, expected, outputs)) {
        fprintf(stderr, "%s: an answer that depends on an earlier one\n", name);
        abort();
      }
    }
    lb_select(NULL);
  }
  free(x), free(other), free(y), free(expected);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  lb_plan *plan;
  char why[256];
  if (lb_plan_load(bytes, (int64_t)size, &plan, why, sizeof why)) return 0;
  const int64_t inputs = lb_plan_inputs(plan), outputs = lb_plan_outputs(plan);
  const int is_small = inputs <= MOST_VALUES && outputs <= MOST_VALUES && lb_plan_arena(plan) <= MOST_ARENA &&
                       lb_plan_work(plan) <= MOST_WORK;
  lb_plan_free(plan);
  if (is_small) compare(bytes, size, inputs, outputs);
  return 0;
}

#if defined(WITH_MAIN)
int main(int argc, char **argv) {
  for (int i = 1; i < argc; i++) {
    FILE *file = fopen(argv[i], "rb");
    if (!file) return 2;
    static uint8_t bytes[1 << 22];
    LLVMFuzzerTestOneInput(bytes, fread(bytes, 1, sizeof bytes, file));
    fclose(file);
  }
  printf("%d files\n", argc - 1);
  return 0;
}
#endif
