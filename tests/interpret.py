"""Compare Mamba and Mamba-2 with mamba-ssm's own code where there is no GPU: whole backbones, and scans that continue a state.

    python tests/interpret.py            needs a package registry; takes about three minutes; not part of the test suite

Triton's kernels (Mamba-2's scan, the norms) run as they are, in Triton's interpreter, so `scan.cuda` is checked beside the code that a
GPU runs, and with it mamba-ssm's fused layers. For causal-conv1d and the selective scan, which are written in CUDA, stand their
formulas: what is checked there is how they are called. Hidden states, and the gradients of all weights; the judge is float64.
"""

import contextlib
import copy
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

SOURCES, WHEELS = ("mamba-ssm>=2.3", "causal-conv1d>=1.6"), ("triton", "einops")
LIMIT = 1e-5  # error relative to the largest value; found are 4e-7 to 7e-7 in values and 1e-6 to 7e-6 in gradients
WIDTH, LAYERS, WORDS = 64, 2, 97


def fetch(folder: Path) -> None:
    """Put mamba-ssm's and causal-conv1d's Python half and the interpreter into `folder`."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    unbuilt = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}
    sources = [*pip, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder), *SOURCES]
    subprocess.run(sources, check=True, env=os.environ | unbuilt)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), *WHEELS], check=True)
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        sys.path.insert(0, str(folder / archive.name.removesuffix(".tar.gz")))
    sys.path.insert(0, str(folder))


def pretend_a_gpu() -> None:
    """Let mamba-ssm import and run on a CPU."""
    import torch
    import triton

    autotune = triton.autotune
    triton.autotune = lambda configs, key, **_: autotune(configs=configs[-1:], key=key)  # nothing to choose, so nothing is timed
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=2)
    for name, functions in {"causal_conv1d_cuda": Convolution, "selective_scan_cuda": SelectiveScan}.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(vars(functions))


class Convolution:
    """causal_conv1d_cuda: x and y (B, W, L), weight (W, K); results go into what is given."""

    def causal_conv1d_fwd(x, weight, bias, seq_idx, initial, out, final, silu):
        assert seq_idx is initial is final is None
        out.copy_(Convolution.silu(Convolution.convolve(x, weight, bias)) if silu else Convolution.convolve(x, weight, bias))

    def causal_conv1d_bwd(x, weight, bias, dout, seq_idx, initial, dfinal, dx, dweight, dbias, dinitial, silu):
        import torch
        import torch.nn.functional as F

        taps, length = weight.shape[1], x.shape[2]
        if silu:
            before = Convolution.convolve(x, weight, bias)
            share = torch.sigmoid(before)
            dout = dout * share * (1 + before * (1 - share))
        inputs, later = F.pad(x, (taps - 1, 0)), F.pad(dout, (0, taps - 1))
        dx.copy_(sum(weight[:, taps - 1 - k, None] * later[..., k : k + length] for k in range(taps)))
        dweight.copy_(torch.stack([(inputs[..., k : k + length] * dout).sum((0, 2)) for k in range(taps)], 1))
        if bias is not None:
            dbias.copy_(dout.sum((0, 2)))

    def convolve(x, weight, bias):
        import torch.nn.functional as F

        return F.conv1d(x, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=len(weight))[..., : x.shape[2]]

    def silu(y):
        return y * y.sigmoid()


class SelectiveScan:
    """selective_scan_cuda, by mamba-ssm's own reference: u, delta, z (B, E, L), A (E, N), B and C (B, 1, N, L)."""

    def fwd(u, delta, A, B, C, D, z, delta_bias, softplus):
        y, last = SelectiveScan.reference(u, delta, A, B, C, D, None, delta_bias, softplus, True)
        states = y.new_zeros(*u.shape[:2], 1, 2 * A.shape[1])
        states[:, :, 0, 1::2] = last  # where mamba-ssm looks for it
        return (y, states) if z is None else (y, states, y * Convolution.silu(z))

    def bwd(u, delta, A, B, C, D, z, delta_bias, dout, states, out, dz, softplus, want_y):
        import torch

        given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
        with torch.enable_grad():
            leaves = {name: t.detach().requires_grad_() for name, t in given.items() if t is not None}
            y = SelectiveScan.reference(*(leaves.get(name) for name in given), softplus)
        found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dout), strict=True))
        if dz is not None:
            dz.copy_(found["z"])
        gate = [] if z is None else [found["z"]]
        return [found.get(name) for name in given if name != "z"] + gate + ([y.detach()] if want_y else [])

    def reference(u, delta, A, B, C, *others):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

        return selective_scan_ref(u, delta, A, B.squeeze(1), C.squeeze(1), *others)


def backbones(layer: str):
    """(mamba-ssm's, transformers' with our kernels), of the same weights. layer: "Mamba1" or "Mamba2"."""
    import torch
    from mamba_ssm.models.mixer_seq_simple import MixerModel
    from transformers import Mamba2Config, Mamba2Model, MambaConfig, MambaModel

    from rankmamba.network.substitutes import use_kernels

    sizes = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    if layer == "Mamba1":
        own, ours = {"d_state": 16}, MambaModel(MambaConfig(**sizes, state_size=16))
    else:
        own = {"d_state": 32, "headdim": 32, "ngroups": 2}
        ours = Mamba2Model(Mamba2Config(**sizes, state_size=32, head_dim=32, num_heads=4, n_groups=2))
    fused = {"rms_norm": True, "fused_add_norm": True, "residual_in_fp32": True}
    theirs = MixerModel(WIDTH, LAYERS, 0, WORDS, ssm_cfg={"layer": layer} | own, **fused)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight += torch.randn_like(weight) / 20  # those that begin as ones or zeros, too
    ours.load_state_dict({renamed(name): weight for name, weight in theirs.state_dict().items()})
    return theirs, use_kernels(ours)


def renamed(name: str) -> str:
    return name.replace("embedding.", "embeddings.")


def compare(layer: str) -> float:
    """Print the errors of every way to compute a backbone, and return the largest."""
    import torch

    from rankmamba import scan

    ids, weights = torch.randint(WORDS, (2, 75)), torch.randn(2, 75, WIDTH, dtype=torch.float64)

    def values(model, **options):
        hidden = model(ids, **options)
        hidden = hidden if torch.is_tensor(hidden) else hidden.last_hidden_state
        model.zero_grad()
        (hidden.double() * weights).sum().backward()
        return {"hidden states": hidden.detach()} | {renamed(name): p.grad for name, p in model.named_parameters()}

    theirs, ours = backbones(layer)
    exact = values(copy.deepcopy(ours).double(), use_cache=False)
    found = {"mamba-ssm's own": values(theirs)}
    for kernel in ("cuda", "native", "portable"):
        with scan.forced(kernel):
            found[f"ours, {kernel}"] = values(ours, use_cache=False)
    largest = 0.0
    for way, got in found.items():
        errors = {name: float((got[name] - exact[name]).abs().max() / exact[name].abs().max()) for name in exact}
        hidden = errors.pop("hidden states")
        worst = max(errors, key=errors.get)
        largest = max(largest, hidden, errors[worst])
        print(
            f"{layer} {way:16} hidden states {hidden:.1e}, {len(errors)} gradients at most {errors[worst]:.1e} ({worst})",
            flush=True,
        )
    return largest


def main() -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        fetch(Path(folder))
        import torch

        pretend_a_gpu()
        from test_scan import check, mamba2

        torch.manual_seed(0)
        for length in (1, 40, 300):
            check("ssd_scan", "cuda", mamba2(2, length, 4, 16, 2, 16), LIMIT, LIMIT, return_final_state=True)
        return int(max(compare("Mamba1"), compare("Mamba2")) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
