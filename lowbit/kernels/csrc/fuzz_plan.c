/* Untrusted files: loads what a fuzzer made, and runs what was accepted, with a small budget. For libFuzzer
 * (-fsanitize=fuzzer), for AFL++ (which brings a main for LLVMFuzzerTestOneInput), or with -DWITH_MAIN for files named
 * on the command line. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  lb_plan *plan;
  char why[256];
  if (lb_plan_load(bytes, (int64_t)size, &plan, why, sizeof why)) return 0;
  const int64_t inputs = lb_plan_inputs(plan), outputs = lb_plan_outputs(plan);
  if (inputs <= 1 << 16 && outputs <= 1 << 16 && lb_plan_arena(plan) <= 1 << 22 && lb_plan_work(plan) <= 1 << 26) {
    float *x = malloc((size_t)inputs * sizeof *x), *y = malloc((size_t)outputs * sizeof *y);
    for (int64_t i = 0; x && i < inputs; i++) x[i] = (float)(i % 17) - 8.0f;
    if (x && y) lb_plan_run(plan, 1, x, y, 1);
    free(x), free(y);
  }
  lb_plan_free(plan);
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
