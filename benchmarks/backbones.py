"""How fast are whole models on this machine, and how near its matrix peak? `python benchmarks/backbones.py`

Mamba-130m, Mamba-2-130m, Pythia-160m and BERT-base at their real shapes with random weights (no embedding table to speak of, no
head), attention through torch's SDPA; one process, models alternating, medians of CPU time with one thread and of wall time with
more. share: the products with weights, 2 x parameters x tokens (three times that in training), over what one large matrix product
reaches in the same run and precision; what scan and attention compute comes on top of it and is not counted.

    python benchmarks/backbones.py                                   # float32, a third of the layers, 512 tokens; two minutes
    python benchmarks/backbones.py --layers 24 --length 128 512 2048 --dtype float32 bfloat16 --threads 2
bfloat16 without AMX or AVX512-BF16 is emulated and some hundred times slower: the run then says so and leaves it out.
"""

import argparse
import json
import os
import statistics
import time

os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
from transformers import BertConfig, BertModel, GPTNeoXConfig, GPTNeoXModel, Mamba2Config, Mamba2Model, MambaConfig, MambaModel

from rankmamba import scan
from rankmamba.mixers import use_scan
from rankmamba.precision import autocast_dtype
from rankmamba.results import environment

VOCABULARY = 1000  # an embedding table costs memory and next to no time


def mamba(layers):
    return use_scan(MambaModel(MambaConfig(vocab_size=VOCABULARY, hidden_size=768, num_hidden_layers=layers)))


def mamba2(layers):
    sizes = {"hidden_size": 768, "num_hidden_layers": layers, "num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1}
    return use_scan(Mamba2Model(Mamba2Config(vocab_size=VOCABULARY, **sizes)))


def pythia(layers):
    sizes = {"hidden_size": 768, "num_hidden_layers": layers // 2, "num_attention_heads": 12, "intermediate_size": 3072}
    return GPTNeoXModel(GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=8192, attention_dropout=0.0, **sizes))


def bert(layers):
    sizes = {"hidden_size": 768, "num_hidden_layers": layers // 2, "num_attention_heads": 12, "intermediate_size": 3072}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8192, **sizes, **dropout), add_pooling_layer=False)


MODELS = {"Mamba-130m": mamba, "Mamba-2-130m": mamba2, "Pythia-160m": pythia, "BERT-base": bert}


def gemm_peak(dtype, clock):
    """GFLOP/s of one large product, the best of some."""
    a, b = torch.randn(2048, 768).to(dtype), torch.randn(768, 3072).to(dtype)
    best = float("inf")
    for _ in range(7):
        start = clock()
        a @ b
        best = min(best, clock() - start)
    return 2 * 2048 * 768 * 3072 / best / 1e9


def passes(model, ids, dtype):
    """The two things to time: inference, and one training step without its optimizer (autocast on float32 weights)."""
    options = {} if isinstance(model, BertModel) else {"use_cache": False}
    cast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)

    def inference():
        with torch.no_grad(), cast:
            model(ids, **options)

    def training():
        with cast:
            hidden = model(ids, **options).last_hidden_state
        hidden.float().square().mean().backward()
        model.zero_grad()

    return {"inference": inference, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--layers", type=int, default=8, help="of the Mambas, 24 in the real models; the Transformers get half as many"
    )
    parser.add_argument("--length", nargs="+", type=int, default=[512])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a batch")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="also write what was measured to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    kernel = scan.kernel("cpu")
    print(f"device cpu, {options.threads} thread(s); scan kernel: {kernel.name} ({kernel.reason}); torch {torch.__version__}")
    print(f"{options.layers} Mamba layers, {options.layers // 2} Transformer layers (24 and 12 in the real models)", flush=True)
    models = {name: MODELS[name](options.layers) for name in options.models}
    table = []
    for name in options.dtype:
        dtype = getattr(torch, name)
        if dtype == torch.bfloat16 and autocast_dtype("cpu")[0] != dtype:
            print(f"bfloat16 is left out: {autocast_dtype('cpu')[1]}")
            continue
        peak = gemm_peak(dtype, clock)
        print(f"{name}: large matrix product {peak:.0f} GFLOP/s", flush=True)
        for length in options.length:
            ids = torch.randint(0, VOCABULARY, (max(1, options.tokens // length), length))
            for kind in ("inference", "training"):
                seconds = {}
                for _ in range(options.repeats + 1):  # the first one warms up
                    for model_name, model in models.items():
                        model.train(kind == "training")
                        run = passes(model, ids, dtype)[kind]
                        start = clock()
                        run()
                        seconds.setdefault(model_name, []).append(clock() - start)
                print(f"  {len(ids)} x {length} tokens, {kind}", flush=True)
                for model_name, times in seconds.items():
                    median, weights = statistics.median(times[1:]), models[model_name]
                    parameters = sum(m.weight.numel() for m in weights.modules() if isinstance(m, torch.nn.Linear))
                    work = 2 * parameters * ids.numel() * (3 if kind == "training" else 1)
                    rate, share = ids.numel() / median, work / median / 1e9 / peak
                    print(f"    {model_name:<13} {rate:9.0f} tokens/s   share of the peak {share:4.0%}", flush=True)
                    row = {"model": model_name, "dtype": name, "length": length, "batch": len(ids), "kind": kind}
                    table.append(row | {"tokens_per_s": rate, "share": share, "peak_gflops": peak, "seconds": times[1:]})
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            record = {"kernel": vars(kernel), "environment": environment(), "layers": options.layers, "threads": options.threads}
            json.dump(record | {"table": table}, file, indent=1)


if __name__ == "__main__":
    main()
