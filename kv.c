/* kv.c -- where the rows of KV live: in RAM, in a file of one session, in files that outlive it.
 *
 * What a row holds is kernels.cu's; which rows are wanted is dsv4.c's.
 *
 * Contents  1 the plan   2 rows in RAM and in a file   3 parked context                          */
#define _GNU_SOURCE
#include "dsv4.h"

/* === 1. The plan ============================================================================== */

/* === 2. Rows in RAM and in a file ============================================================= */

/* === 3. Parked context ======================================================================== */
