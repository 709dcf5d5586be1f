"""How fast are whole models on this machine, and how near its matrix peak? `python benchmarks/backbones.py`

Published backbones as rerankers with random weights, their attention as a reranker runs it or as the name says; models take turns in one
process, medians of CPU time with one thread and of wall time with more. share: the arithmetic of the whole pass
(`rankmamba.profiling.flops`) over what one large matrix product reaches in the same run and precision. On a CPU two depths run and the
full one is worked out (`profiling.Subject`).

    python benchmarks/backbones.py                                   # float32, 512 tokens; some minutes
    python benchmarks/backbones.py --full-depth --length 128 512 2048 --dtype float32 bfloat16 --threads 2
bfloat16 without AMX or AVX512-BF16 is emulated and some hundred times slower: the run then says so and leaves it out.
"""

import argparse
import json
import os

os.environ["OMP_WAIT_POLICY"] = "passive"

import torch

from rankmamba import scan
from rankmamba.precision import autocast_dtype
from rankmamba.profiling import MODES, Subject, measure_together
from rankmamba.results import environment

MODELS = ["mamba-130m", "mamba2-130m", "pythia-160m", "pythia-160m (sdpa)", "bert-base", "bert-base (sdpa)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--full-depth", action="store_true", help="run all layers; minutes and gigabytes a model")
    parser.add_argument("--length", nargs="+", type=int, default=[512])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a batch")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="also write what was measured to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernel = scan.kernel("cpu")
    print(f"device cpu, {options.threads} thread(s); scan kernel: {kernel.name} ({kernel.reason}); torch {torch.__version__}")
    table = []
    for name in options.dtype:
        dtype = getattr(torch, name)
        if dtype == torch.bfloat16 and autocast_dtype("cpu")[0] != dtype:
            print(f"bfloat16 is left out: {autocast_dtype('cpu')[1]}")
            continue
        longest, full = max(options.length), options.full_depth
        subjects = [Subject(model, longest, full, "cpu", dtype) for model in options.models]
        for length in options.length:
            batch = max(1, options.tokens // length)
            found = measure_together(subjects, length, batch, batch, options.repeats, seconds=600)
            for mode in MODES:
                print(f"{name}, {batch} x {length} tokens, {mode}", flush=True)
                for model, result in found.items():
                    rate, share, layers = (
                        result[mode]["tokens_per_s"],
                        result[mode]["share"],
                        result["depths"] or [result["layers"]],
                    )
                    ran = " and ".join(map(str, layers))
                    print(
                        f"  {model:<18} {rate:9.0f} tokens/s   share of the peak {share:4.0%}   {ran} of {result['layers']} layers ran"
                    )
            table += [
                {"model": model, "dtype": name, "length": length, "batch": batch, **result} for model, result in found.items()
            ]
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"kernel": vars(kernel), "environment": environment(), "table": table}, file, indent=1)


if __name__ == "__main__":
    main()
