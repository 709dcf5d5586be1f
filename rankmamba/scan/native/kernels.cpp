// One build of all kernels. Compiled several times, with WIDTH lanes for an instruction set called ISA.
#include "add_norm.h"
#include "attention_backward.h"
#include "causal_conv1d.h"
#include "gelu.h"
#include "rms_norm.h"
#include "selective_scan.h"
#include "ssd_backward.h"
#include "ssd_forward.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

extern "C" const Kernels JOIN(rankmamba_kernels_, ISA) = {
    W,
    BLOCK,
    TILE,
    ITEM_ROWS,
    TAPS,
    {scan_items, forward_workspace, forward_run},
    {scan_items, backward_workspace, backward_run},
    {conv_forward_items, conv_workspace, conv_forward_run},
    {conv_backward_items, conv_workspace, conv_backward_run},
    {ssd_items<SsdForward>, workspace_of<SsdForwardPart>, run_item<SsdForwardPart>},
    {ssd_items<SsdBackward>, workspace_of<SsdBackwardPart>, run_item<SsdBackwardPart>},
    {norm_items, norm_workspace, norm_forward_run},
    {norm_items, norm_workspace, norm_backward_run},
    {attention_items, workspace_of<AttentionForward>, run_item<AttentionForward>},
    {attention_backward_items, workspace_of<AttentionBackward>, run_item<AttentionBackward>},
    {gelu_items, gelu_workspace, gelu_forward_run},
    {gelu_items, gelu_backward_workspace, gelu_backward_run},
    {add_norm_items, add_norm_workspace, add_norm_run},
};
