"""Does Mamba train slower than Transformers with fast attention on your GPU? `python benchmarks/gpu.py`, about ten minutes.

The paper's claim (2) (arXiv 2403.18276) as a table, a figure and the crossover length. First the kernels are checked against the
recurrence in float64. Then training (LCE groups of 8: forward, backward, AdamW) and inference are measured, time and peak memory, at
512 to 8192 tokens, with random weights in bfloat16 autocast: nothing is fetched. A second call goes on where the first ended.

The records land in results/gpu, where notebooks/05_profile.ipynb finds them. For Mamba's CUDA kernels, beside the torch in use:
    pip install --no-build-isolation '.[gpu]'
--tiny runs all of this with toy models on the CPU in seconds, to see that it works.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"

import torch

from rankmamba import plots, scan
from rankmamba.doctor import import_problem
from rankmamba.errors import InputError
from rankmamba.profiling import plots as profile_plots
from rankmamba.profiling.measurements import machine, speed
from rankmamba.profiling.tables import fastest_attention, one_batch, speed_table, verdict
from rankmamba.results import environment, new_record, read_records, write_record
from rankmamba.scan import reference

GROUP = 8
LENGTHS = [512, 1024, 2048, 4096, 8192]
TOKENS = 32768  # of a batch, where one group of 8 has fewer
PACKAGES = ("mamba_ssm", "causal_conv1d", "flash_attn")
# What the claim needs comes first, in case the time ends.
SYSTEMS = [
    "mamba-130m",
    "mamba2-130m",
    *(
        f"{name} ({attention})"
        for attention in ("flash_attention_2", "sdpa")
        for name in ("pythia-160m", "opt-125m", "bert-base")
    ),
    "mamba-370m",
    "mamba2-370m",
    *(f"{name} ({attention})" for attention in ("flash_attention_2", "sdpa") for name in ("pythia-410m", "bert-large")),
    *(f"{name} (eager)" for name in ("pythia-160m", "opt-125m", "bert-base")),
]
TINY = ["tiny-mamba", "tiny-mamba2", "tiny-bert (sdpa)", "tiny-neox (sdpa)", "tiny-neox (eager)"]
LIMIT = 0.02  # error of a kernel, relative to its largest value: products in TF32 reach 0.001


def inputs(length: int = 128, inner: int = 128, states: int = 16, width: int = 64) -> dict[str, dict[str, torch.Tensor]]:
    """{function of rankmamba.scan: its arguments}, float32, with Mamba's own range of steps and decays."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tokens, shared, heads = (2, length, inner), (2, length, states), inner // width
    return {
        "selective_scan": {
            **{name: normal(*tokens) for name in ("u", "delta", "z")},
            **{name: normal(*shared) for name in ("B", "C")},
            **{"A": -torch.arange(1.0, states + 1).repeat(inner, 1), "D": normal(inner), "delta_bias": normal(inner) - 4},
        },
        "ssd_scan": {
            **{"x": normal(2, length, heads, width), "delta": torch.nn.functional.softplus(normal(2, length, heads) - 4)},
            **{name: normal(2, length, 1, states) for name in ("B", "C")},
            **{"A": -torch.arange(1.0, heads + 1), "D": normal(heads)},
        },
        "causal_conv1d": {"x": normal(*tokens), "weight": normal(inner, 4), "bias": normal(inner)},
        "rms_norm": {"y": normal(*tokens), "z": normal(*tokens), "weight": normal(inner)},
    }


def parity(device: str) -> dict[str, float]:
    """Largest error of each function's values and gradients on `device`, relative to the largest value, against float64."""

    def values(function, tensors):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        y = function(**leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
        return [t.double().cpu() for t in (y.detach(), *gradients)]

    found = {}
    for name, tensors in inputs().items():
        exact = values(getattr(reference, name), {key: t.double() for key, t in tensors.items()})
        got = values(getattr(scan, name), {key: t.to(device) for key, t in tensors.items()})
        found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy models and lengths, on the CPU if there is no GPU")
    parser.add_argument("--minutes", type=float, default=10, help="no further system is begun after so many")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent.parent / "results" / "gpu")
    options = parser.parse_args()
    started = time.monotonic()
    if not torch.cuda.is_available() and not options.tiny:
        print("error: expected a CUDA device, found none (torch.cuda.is_available() is False); run it where there is one, or with "
              "--tiny on the CPU", file=sys.stderr)  # fmt: skip
        return 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"device {torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}, torch {torch.__version__}")
    for package in PACKAGES if device == "cuda" else ():
        print(f"  {package}: {import_problem(package) or 'imports'}")
    kernel = scan.kernel(device)
    print(f"scan kernel: {kernel.name} ({kernel.reason})")
    errors = parity(device)
    for name, error in errors.items():
        print(f"  {name}: largest error of values and gradients against float64 {error:.1e}")
    write_record(options.results, new_record("parity", f"scan {kernel.name}", "float64", "gpu", 0, {}, errors, {}, environment()))
    if max(errors.values()) > LIMIT:
        print(
            f"error: expected errors of at most {LIMIT}, so these kernels are wrong here and their speed means nothing",
            file=sys.stderr,
        )
        return 1
    lengths, tokens, group = ([32, 64], 128, 2) if options.tiny else (LENGTHS, TOKENS, GROUP)
    cases = [(group * max(1, tokens // (group * length)), length) for length in lengths]
    systems = TINY if options.tiny else SYSTEMS
    for place, system in enumerate(systems, 1):
        elapsed = time.monotonic() - started
        if elapsed > 60 * options.minutes:
            print(
                f"left out after {elapsed / 60:.0f} minutes: {', '.join(systems[place - 1 :])}; the same call again goes on there"
            )
            break
        print(f"[{place}/{len(systems)}] {system}, {elapsed:.0f} s", flush=True)
        try:
            speed(options.results, "gpu", [system], cases, group_size=group)
        except InputError as error:
            print(f"  left out: {error}")
    here = machine(environment())  # another GPU's records may lie in the folder
    records = [record for record in read_records(options.results, "profile") if machine(record["environment"]) == here]
    table = one_batch(speed_table(records))
    shown = ["system", "mode", "length", "batch", "tokens_per_s", "peak_mib", "share"]
    print(table[shown].to_string(index=False, float_format="{:,.3g}".format))
    print(f"\n{verdict(records)}")
    for name, draw in {"throughput": profile_plots.throughput, "memory": profile_plots.memory}.items():
        print(plots.save(draw(fastest_attention(table)), options.results / "figures", name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
