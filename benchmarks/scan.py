"""How fast, how memory-hungry and how exact is the scan beside Hugging Face's slow path and mambapy? `python benchmarks/scan.py`

The same float32 inputs for all, one process, variants alternating, medians of process CPU time, Mamba's own initialisation of A
and of the step. Each timed pass follows one of its own kind: it finds the memory as a training loop leaves it, and does not pay
for freeing another variant's. Hugging Face's backward is quadratic in L and is not run: for training, mambapy is the one to compare with.

    python benchmarks/scan.py                           # the shapes that the project makes promises about; some minutes
    python benchmarks/scan.py --batch 1 8 32 --length 128 512 2048        # everything that fits the memory; an hour
    python benchmarks/scan.py --threads 1 2 --family mamba2
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import statistics
import time
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from rankmamba import scan
from rankmamba.results import environment
from rankmamba.scan import portable

N, STATE2, WIDTH2 = 16, 128, 64  # state sizes of Mamba and of Mamba-2, the width of Mamba-2's heads


def mamba_inputs(batch, length, inner, dtype=torch.float32):
    """As a fresh Mamba has them: A = -1 ... -N, steps log-uniform in 0.001 ... 0.1 and moved by the tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    step = torch.exp(torch.rand(inner, generator=generator) * 4.6 - 6.9)
    return {
        "u": normal(batch, length, inner),
        "delta": normal(batch, length, inner) * 0.5,
        "A": -torch.arange(1.0, N + 1).repeat(inner, 1),
        "B": normal(batch, length, N),
        "C": normal(batch, length, N),
        "D": torch.ones(inner),
        "z": normal(batch, length, inner),
        "delta_bias": torch.log(torch.expm1(step)),
    }


def mamba2_inputs(batch, length, inner, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    heads = inner // WIDTH2
    return {
        "x": normal(batch, length, heads, WIDTH2),
        "delta": torch.nn.functional.softplus(torch.randn(batch, length, heads, generator=generator) - 4),
        "A": -torch.arange(1.0, heads + 1),
        "B": normal(batch, length, 1, STATE2),
        "C": normal(batch, length, 1, STATE2),
        "D": torch.ones(heads),
    }


def hugging_face(u, delta, A, B, C, D, z, delta_bias, use_mambapy=False):
    first = (t.mT for t in (u, delta))
    return mamba_selective_scan(*first, A, B.mT, C.mT, D, z.mT, delta_bias, True, use_mambapy=use_mambapy).mT


def mambapy(**tensors):
    return hugging_face(**tensors, use_mambapy=True)


def hugging_face2(x, delta, A, B, C, D):
    return mamba2_chunk_scan(x, delta, A, B, C, chunk_size=256, D=D)


def forced(kernel, function):
    def run(**tensors):
        with scan.forced(kernel):
            return function(**tensors)

    return run


FAMILIES = {
    "mamba": (mamba_inputs, scan.selective_scan, portable.selective_scan, {"hugging face": hugging_face, "mambapy": mambapy}),
    "mamba2": (mamba2_inputs, scan.ssd_scan, portable.ssd_scan, {"hugging face": hugging_face2}),
}


def variants(family):
    _, function, _, others = FAMILIES[family]
    ours = [scan.kernel("cpu").name, "portable"]
    return {name: forced(name, function) for name in dict.fromkeys(ours)} | others


def work(function, tensors, training):
    """One forward pass, or one forward and backward pass, as a call without arguments."""
    if not training:

        def run():
            with torch.no_grad():
                return function(**tensors)

    else:
        inputs = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        upstream = torch.ones_like(next(iter(tensors.values())))

        def run():
            gradients = torch.autograd.grad(function(**inputs), list(inputs.values()), upstream)
            return dict(zip(inputs, gradients, strict=True))

    return run


def ms(run, clock):
    gc.collect()
    start = clock()
    run()
    return (clock() - start) * 1e3


def extra_mib(family, name, shape, training):
    """Peak memory of one pass beyond inputs and libraries, measured in a fresh process (Linux)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_extra_mib, (family, name, shape, training))


def _extra_mib(family, name, shape, training):
    torch.set_num_threads(1)
    run = work(variants(family)[name], FAMILIES[family][0](*shape), training)
    work(variants(family)[name], FAMILIES[family][0](1, 2, shape[2]), training)()  # loads what is loaded late
    before = _peak_kib()
    kept = run()
    peak = _peak_kib()
    del kept
    return (peak - before) / 1024


def _peak_kib():
    """The most memory this process has held (ru_maxrss would include its parent's)."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def errors(family, shape, dtype):
    """Largest error of outputs and of gradients, relative to the largest value, against one sequence's pass in float64."""
    make, function, exact, _ = FAMILIES[family]
    tensors = make(1, *shape[1:], dtype=dtype)
    doubles = {name: t.double() for name, t in tensors.items()}
    found = []
    for training in (False, True):
        got, expected = work(function, tensors, training)(), work(exact, doubles, training)()
        if not training:
            got, expected = {"y": got}, {"y": expected}
        found.append(max(float((got[k].double() - expected[k]).abs().max() / expected[k].abs().max()) for k in expected))
    return found


def compare(family, shape, training, clock, options):
    """Time all variants on one shape; return {variant: median ms}."""
    tensors = FAMILIES[family][0](*shape)
    states = shape[0] * shape[1] * shape[2] * (N if family == "mamba" else 4) * 4 / 2**30
    runs = {}
    for name, function in variants(family).items():
        if name == "hugging face" and training and family == "mamba":
            continue  # quadratic in L
        if name not in ("native", "portable") and states * (12 if training else 6) > options.memory_gib:
            print(f"    {name}: left out, it would need about {states * (12 if training else 6):.0f} GiB")
            continue
        runs[name] = work(function, tensors, training)
    times = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            run()
            times[name].append(ms(run, clock))
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--length", nargs="+", type=int, default=[512])
    parser.add_argument("--inner", nargs="+", type=int, default=[256, 1536], help="E; a multiple of 64")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-gib", type=float, default=6, help="variants that would need more are left out")
    parser.add_argument("--json", help="also write what was measured to this file")
    options = parser.parse_args()
    try:
        import mambapy  # noqa: F401
    except ImportError:
        FAMILIES["mamba"][3].pop("mambapy")
        print("mambapy is not installed, so there is nothing to compare training with: pip install mambapy")
    kernel = scan.kernel("cpu")
    print(
        f"scan kernel: {kernel.name} ({kernel.reason}); device cpu, float32; torch {torch.__version__}; N = {N} (mamba), ", end=""
    )
    print(f"{STATE2} (mamba2); median of {options.repeats}, CPU time (1 thread) or wall time", flush=True)
    table = []
    shapes = [(b, length, e) for e in options.inner for length in options.length for b in options.batch]
    for family in options.family:
        for shape in shapes:
            for threads in options.threads:
                torch.set_num_threads(threads)
                clock = time.process_time if threads == 1 else time.perf_counter  # threads share the work, not the CPU time
                for training in (False, True):
                    what = "forward+backward" if training else "forward"
                    print(f"{family} B={shape[0]} L={shape[1]} E={shape[2]} {what}, {threads} thread(s)", flush=True)
                    times = compare(family, shape, training, clock, options)
                    memory = {}
                    if threads == options.threads[0]:
                        memory = {name: extra_mib(family, name, shape, training) for name in times}
                    best = next(iter(times))
                    for name, ms in times.items():
                        line = f"    {name:<13} {ms:10.2f} ms {ms / times[best]:7.1f}x"
                        if memory:
                            line += f" {memory[name]:9.1f} MiB extra {memory[name] / max(memory[best], 0.1):6.1f}x"
                        print(line, flush=True)
                    row = {"family": family, "shape": shape, "what": what, "threads": threads, "ms": times, "extra_mib": memory}
                    table.append(row)
            for dtype in (torch.float32, torch.bfloat16):
                forward, backward = errors(family, shape, dtype)
                print(
                    f"    error against float64, {str(dtype)[6:]} inputs: forward {forward:.1e}, gradients {backward:.1e}",
                    flush=True,
                )
                table.append({"family": family, "shape": shape, "dtype": str(dtype), "error": [forward, backward]})
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"kernel": vars(kernel), "environment": environment(), "table": table}, file, indent=1)


if __name__ == "__main__":
    main()
