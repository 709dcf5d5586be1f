"""Run the native kernels under the address and undefined-behaviour sanitizers, every vector width, pairs and tiles, over awkward shapes.

    python tests/sanitize.py            needs g++; takes about seven minutes; not part of the test suite

Each width is built for itself, so 16 lanes are checked on processors without AVX-512 too, their results included; pairs and tiles where
there is AVX-512 at least, with `amx.h` for what the processor lacks. The kernels see torch's memory through the sanitizer's own
allocator: one float read or written beside a tensor ends the run.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "rankmamba"
SOURCES = PACKAGE / "scan" / "native"
FLAGS = "-std=c++17 -O1 -g -fPIC -pthread -ffp-contract=fast -Wno-psabi".split()
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer".split()


def has(*features: str) -> bool:
    return set(features) <= set(Path("/proc/cpuinfo").read_text().split())


def builds() -> dict[str, dict[str, tuple[int, list[str]]]]:
    """{title: {instruction set: (lanes, flags)}}, what this machine can run; the library takes the last one."""
    avx2 = ["-mavx2", "-mfma"] if has("avx2", "fma") else []
    found = {f"{lanes} lanes": {"base": (lanes, avx2 if lanes > 4 else [])} for lanes in (4, 8, 16)}
    if has("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"):
        avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
        pairs, emulated = [*avx512, "-mavx512bf16"], [*avx512, "-include", str(Path(__file__).with_name("amx.h"))]
        real = {"base": (4, []), "avx512": (16, avx512), "avx512bf16": (16, pairs)}
        if has("avx512_bf16"):
            found["pairs"] = real
        else:
            found["pairs, emulated"] = {"base": (16, [*emulated, "-DWITHOUT_TILES"])}
        if has("avx512_bf16", "amx_bf16"):
            found["tiles"] = {**real, "amx": (16, [*pairs, "-mamx-tile", "-mamx-bf16"])}
        else:
            found["tiles, emulated"] = {"base": (16, emulated)}
    return found


def build(kernels: dict[str, tuple[int, list[str]]], folder: Path) -> None:
    """Put the package's scan with a sanitized library of these kernels into `folder`."""
    copy = folder / "rankmamba"
    shutil.copytree(PACKAGE / "scan", copy / "scan", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(PACKAGE / "errors.py", copy)
    (copy / "__init__.py").touch()
    compiler = ["g++", *FLAGS, *SANITIZE]
    for name, (lanes, flags) in kernels.items():
        target = ["-c", str(SOURCES / "kernels.cpp"), "-o", str(folder / f"{name}.o")]
        subprocess.run([*compiler, *flags, f"-DISA={name}", f"-DWIDTH={lanes}", *target], check=True)
    have = [f"-DHAVE_{name.upper()}" for name in kernels]
    objects = [str(folder / f"{name}.o") for name in kernels]
    target = ["-shared", "-o", str(copy / "scan" / "native" / "_kernels.so")]
    subprocess.run([*compiler, *have, str(SOURCES / "dispatch.cpp"), *objects, *target], check=True)


def run_all_shapes() -> None:
    """Call every kernel, forward and backward, with tensors that end where their memory ends."""
    import torch

    from rankmamba import scan

    assert scan.kernel("cpu").name == "native", scan.kernel("cpu")

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape).to(dtype).requires_grad_()

    def tail(*shape, dtype=torch.float32):
        """The last channels of wider rows: the last row ends the memory."""
        return torch.randn(*shape[:-1], shape[-1] + 3).to(dtype).requires_grad_()[..., 3:]

    def backward(outputs):
        sum(o.float().sum() for o in outputs).backward()

    count = 0
    for threads, dtype, make in itertools.product((1, 3), (torch.float32, torch.bfloat16), (normal, tail)):
        torch.set_num_threads(threads)
        for batch, length, inner, n in [
            (1, 1, 1, 1),
            (2, 31, 3, 5),
            (1, 33, 65, 16),
            (3, 64, 31, 17),
            (2, 5, 130, 2),
            (1, 97, 16, 16),
        ]:
            rows = [make(batch, length, inner, dtype=dtype) for _ in range(3)]
            B, C = make(batch, length, n, dtype=dtype), make(batch, length, n, dtype=dtype)
            A = (-torch.rand(inner, n)).requires_grad_()
            for full in (True, False):
                extra = (normal(inner), rows[2], normal(inner), normal(batch, inner, n)) if full else (None,) * 4
                backward(scan.selective_scan(rows[0], rows[1], A, B, C, *extra, return_final_state=True))
                count += 1
            for taps in (1, 2, 4, 9):
                weight, bias, state = normal(inner, taps), normal(inner), normal(batch, taps - 1, inner, dtype=dtype)
                for activation, extra in (("silu", (bias, state)), (None, (None, None))):
                    backward(scan.causal_conv1d(rows[0], weight, *extra, True, activation))
                    count += 1
            backward([scan.rms_norm(rows[0], normal(inner), rows[1])])
            backward([scan.rms_norm(rows[0], normal(inner))])
            count += 2
        for batch, length, heads, width, groups, n in [
            (1, 1, 1, 1, 1, 1), (2, 63, 2, 5, 2, 3), (1, 65, 3, 17, 1, 9), (2, 130, 4, 8, 2, 16), (1, 64, 2, 64, 1, 33),
            (1, 150, 2, 64, 1, 128)
        ]:  # fmt: skip
            x = make(batch, length, heads * width, dtype=dtype).unflatten(-1, (heads, width))
            B, C = (make(batch, length, groups * n, dtype=dtype).unflatten(-1, (groups, n)) for _ in "BC")
            delta, A = torch.rand(batch, length, heads).requires_grad_(), (-torch.rand(heads)).requires_grad_()
            for D, state in ((normal(heads), normal(batch, heads, width, n)), (None, None)):
                backward(scan.ssd_scan(x, delta, A, B, C, D, state, return_final_state=True))
                backward([scan.ssd_scan(x, delta, A, B, C, D, state)])
                inner, convolved = heads * width, heads * width + 2 * groups * n
                projected, conv = make(batch, length, inner + convolved + heads, dtype=dtype), normal(convolved, 4)
                past = None if state is None else normal(batch, 3, convolved)
                weights = conv, None if D is None else normal(convolved), A, D, normal(heads), normal(inner)
                backward([scan.mamba2_inner(projected, *weights, past, state, groups=groups)])
                count += 3
        for batch, heads, shared, queries, keys, width in [
            (1, 1, 1, 1, 1, 1), (2, 3, 1, 7, 7, 5), (1, 4, 2, 33, 50, 16), (2, 2, 2, 8, 70, 31), (1, 2, 1, 65, 65, 32)
        ]:  # fmt: skip
            sizes = (heads, queries), (heads // shared, keys), (heads // shared, keys)
            tensors = [make(batch, *size, width, dtype=dtype) for size in sizes]
            for seen, causal in itertools.product((None, torch.ones(batch, keys)), (True, False)):
                with torch.no_grad():
                    scan.native.attention(*tensors, seen, causal, 0.5, normal(1, heads, queries, keys))
                angles = torch.randn(batch, queries, width // 2).tile(2)
                rotary = (angles.cos(), angles.sin()) * 2 if queries == keys and width > 1 else None
                backward([scan.native.attention(*tensors, seen, causal, 0.5, None, rotary)])
                count += 2
        for number, width in [(1, 1), (33, 65), (7, 31), (64, 130)]:
            x = make(number, width, dtype=dtype)
            for bias, precision in itertools.product((normal(width), None), (torch.float32, torch.bfloat16)):
                backward([scan.native.gelu(x, bias)])
                with torch.no_grad():
                    scan.native.gelu(x, bias)
                    scan.native.add_norm(x, bias, make(number, width, dtype=precision), normal(width), normal(width), 1e-5)
                count += 3
    print(f"{count} calls, forward and backward, without a finding", flush=True)


def main() -> int:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    for title, kernels in builds().items():
        with tempfile.TemporaryDirectory() as folder:
            build(kernels, Path(folder))
            # Python itself leaks on purpose, and torch's allocator is not the sanitizer's business
            environment = {
                "LD_PRELOAD": runtime,
                "ASAN_OPTIONS": "detect_leaks=0",
                "PYTHONPATH": folder,
                "OMP_WAIT_POLICY": "passive",
            }
            print(f"{title}: ", end="", flush=True)
            shapes = [sys.executable, __file__, "--run"]
            checked = (str(Path(__file__).with_name(f"test_{name}.py")) for name in ("scan", "attention", "fused"))
            results = [sys.executable, "-m", "pytest", "-q", "-k", "native or definition", *checked]
            for command in (shapes, results):
                if subprocess.run(command, env=os.environ | environment, cwd=folder).returncode:
                    return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--run"]:
        sys.path.remove(str(Path(__file__).resolve().parent))
        run_all_shapes()
    else:
        sys.exit(main())
