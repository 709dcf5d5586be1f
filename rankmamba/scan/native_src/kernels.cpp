// One build of all kernels. Compiled several times, with WIDTH lanes for an instruction set called ISA.
#include "selective_scan.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

extern "C" const Kernels JOIN(rankmamba_kernels_, ISA) = {
    W, BLOCK, TILE,
    {forward_items, forward_workspace, forward_run},
    {backward_items, backward_workspace, backward_run},
};
