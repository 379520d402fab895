// The CPU kernels for every processor of the architecture.
#define KERNELS baseline
#include "cpu_kernels.h"
