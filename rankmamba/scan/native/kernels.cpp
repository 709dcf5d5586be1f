// One build of all kernels. Compiled several times, with WIDTH lanes for an instruction set called ISA.
#include "causal_conv1d.h"
#include "gated_norm.h"
#include "selective_scan.h"
#include "ssd_backward.h"
#include "ssd_forward.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

extern "C" const Kernels JOIN(rankmamba_kernels_, ISA) = {
    W,
    BLOCK,
    TILE,
    {forward_items, forward_workspace, forward_run},
    {backward_items, backward_workspace, backward_run},
    {conv_items, conv_forward_workspace, conv_forward_run},
    {conv_items, conv_backward_workspace, conv_backward_run},
    {ssd_forward_items, ssd_forward_workspace, ssd_forward_run},
    {ssd_items, ssd_backward_workspace, ssd_backward_run},
    {weigh_items, weigh_workspace, weigh_run},
    {pass_items, pass_workspace, pass_run},
    {norm_items, norm_workspace, norm_forward_run},
    {norm_items, norm_workspace, norm_backward_run},
};
