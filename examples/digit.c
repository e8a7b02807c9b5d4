/* Classifies an 8x8 image of a digit with a plan, without Python. Build and use:
 *
 *   make runner
 *   cc -Ilowbit/kernels/csrc examples/digit.c build/liblowbit.a -pthread -lm -o digit
 *   ./digit digits.lbp < image.raw                 # 64 numbers of 4 bytes, as the network was trained on them */
#include <stdio.h>
#include <stdlib.h>

#include "plan.h"

int main(int argc, char **argv) {
  static char bytes[1 << 22];
  float image[64], scores[10];
  char why[256];
  lb_plan *plan;
  FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
  if (!file) return fprintf(stderr, "usage: digit PLAN < IMAGE\n"), 2;
  const size_t size = fread(bytes, 1, sizeof bytes, file);
  fclose(file);
  if (lb_plan_load(bytes, (long)size, &plan, why, sizeof why)) return fprintf(stderr, "%s\n", why), 1;
  if (lb_plan_inputs(plan) != 64 || lb_plan_outputs(plan) != 10) return fprintf(stderr, "no plan for digits\n"), 1;
  if (fread(image, sizeof *image, 64, stdin) != 64) return fprintf(stderr, "an image has 64 numbers\n"), 1;
  if (lb_plan_run(plan, 1, image, scores, 1)) return fprintf(stderr, "no memory\n"), 1;
  int best = 0;
  for (int i = 1; i < 10; i++)
    if (scores[i] > scores[best]) best = i;
  printf("%d\n", best);
  lb_plan_free(plan);
  return 0;
}
