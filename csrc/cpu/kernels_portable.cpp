// The kernels for any processor: vectors of 16 bytes, in whatever instructions the compiler was told to use.
#include "headers.h"

#define EJMP_ISA portable
#define EJMP_BYTES 16
#include "kernels.h"
