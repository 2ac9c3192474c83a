/* check.h -- the whole test framework: CHECK in a test, RUN in main, one line a test.
 *
 *   static void test_pool_covers_every_item(void) { CHECK(n == 7, "n is %d", n); }
 *   int main(void) { RUN(test_pool_covers_every_item); return check_done(); }
 *
 * A test prints "ok   FILE: NAME" or "FAIL FILE: NAME" with the first failure; tests/run.sh
 * counts these lines.  CHECK demands a condition, so a NaN compared by <= fails.                */
#ifndef CHECK_H
#define CHECK_H

#include "../dsv4.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int check_failed_here, check_failed_ever;
static char check_note[256];       /* a measured figure to print behind the test's name         */

#define CHECK(cond, ...)                                                                         \
    do {                                                                                         \
        if (!(cond) && !check_failed_here++) {                                                   \
            printf("     %s:%d: %s: ", __FILE__, __LINE__, #cond);                               \
            printf(__VA_ARGS__);                                                                 \
            putchar('\n');                                                                       \
        }                                                                                        \
    } while (0)

#define NOTE(...) ((void)snprintf(check_note, sizeof check_note, __VA_ARGS__))

#define RUN(test) check_run(__FILE__, #test, test)

static inline void check_run(const char *file, const char *name, void (*test)(void)) {
    const char *base = strrchr(file, '/');
    check_failed_here = 0;
    check_note[0] = 0;
    test();
    printf("%s %s: %s%s%s\n", check_failed_here ? "FAIL" : "ok  ", base ? base + 1 : file, name,
           check_note[0] ? "  " : "", check_note);
    fflush(stdout);
    check_failed_ever |= check_failed_here != 0;
}

/* The values of a packed index row (dsv4.h, section 4). */
static inline void index_row_read(float *x, const void *row, int d) {
    const uint8_t *pairs = row, *scale = pairs + (d + 1) / 2;
    for (int c = 0; c < d; c++)
        x[c] = e2m1_to_f32((uint8_t)(pairs[c / 2] >> (4 * (c & 1)))) * e8m0_to_f32(scale[c / 32]);
}

static inline int check_done(void) { return check_failed_ever ? 1 : 0; }

#endif
