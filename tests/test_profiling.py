"""What is measured is what is claimed: counted operations, seen memory, parts that add up, crossovers of known curves."""

import runpy
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from transformers import GPTNeoXModel

from rankmamba import profiling, scan
from rankmamba.collection import load
from rankmamba.data.formats import write_documents, write_qrels, write_queries
from rankmamba.errors import InputError
from rankmamba.profiling import MODES, Subject, build, measure, measurements, parts
from rankmamba.profiling import plots as profile_plots
from rankmamba.profiling import tables as profile_tables
from rankmamba.profiling.flops import forward_flops
from rankmamba.profiling.parts import TextPass, breakdown
from rankmamba.profiling.shapes import size_of
from rankmamba.results import fingerprint, read_records, write_record

ROOT = Path(__file__).resolve().parent.parent
D, E, K = 768, 1536, 4


def products(length, *shapes):
    return 2 * length * sum(rows * columns for rows, columns in shapes)


TRANSFORMER = [(D, D)] * 4 + [(D, 4 * D), (4 * D, D)]
# operations of one layer on L tokens, by hand
LAYERS = {
    "bert-base": lambda L: products(L, *TRANSFORMER) + 2 * 2 * L * L * D,
    "pythia-160m": lambda L: products(L, *TRANSFORMER) + 2 * 2 * D * L * (L + 1) // 2,
    "mamba-130m": lambda L: products(L, (D, 2 * E), (E, 48 + 32), (48, E), (E, D)) + L * E * (2 * K + 7 * 16 + 11),
    "mamba2-130m": lambda L: products(L, (D, 2 * E + 256 + 24), (E, D)) + L * (E + 256) * 2 * K + L * E * (5 * 128 + 3 + 9),
}


@pytest.mark.parametrize("system", LAYERS)
def test_the_operations_of_a_layer_are_those_counted_by_hand(system):
    one, two = (build(system, 512, layers, "cpu").model for layers in (1, 2))
    for length in (96, 512):
        assert forward_flops(two, length) - forward_flops(one, length) == LAYERS[system](length)
    # the last layer: keys and values are needed of every token, all else of the one that the head reads
    if system == "bert-base":
        assert forward_flops(one, 512) == products(512, (D, D), (D, D)) + products(1, *TRANSFORMER[2:], (D, 1)) + 2 * 2 * 512 * D
    if system == "pythia-160m":  # its queries are made together with keys and values
        assert forward_flops(one, 512) == products(512, (D, 3 * D)) + products(1, *TRANSFORMER[3:], (D, 1)) + 2 * 2 * 512 * D


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_allocation_of_100_mb_is_seen_every_time_and_one_that_was_freed_before_is_not():
    def allocate():
        torch.ones(100_000_000 // 4).sum()

    torch.ones(100_000_000 // 2)
    for _ in range(2):
        assert profiling.added_mib(allocate, torch.device("cpu")) == pytest.approx(100e6 / 2**20, abs=4)
    assert profiling.added_mib(lambda: None, torch.device("cpu")) < 4


def test_memory_is_measured_without_glibc(monkeypatch):
    def no_library(name):
        raise TypeError(f"argument of type {type(name).__name__} is not iterable")  # as on Windows

    monkeypatch.setattr("ctypes.CDLL", no_library)
    assert (profiling.added_mib(lambda: None, torch.device("cpu")) or 0) < 4


def test_depth_is_worked_out_from_two_depths():
    subject = Subject.__new__(Subject)
    subject.layers, subject.depths = 24, (2, 4)
    assert subject.whole([1.0 + 2 * 0.5, 1.0 + 4 * 0.5]) == pytest.approx(1.0 + 24 * 0.5)


@pytest.mark.parametrize("system", ["tiny-bert", "tiny-mamba", "tiny-mamba2"])
@pytest.mark.parametrize("mode", MODES)
def test_the_parts_of_a_pass_add_up_to_its_time_and_name_what_the_system_is_made_of(system, mode, monkeypatch):
    run = TextPass(mode, build(system, 96), [(f"who was {i}", "a river " * (1 + 3 * i)) for i in range(8)], 256, group_size=4)
    run()
    monkeypatch.setattr("rankmamba.profiling.parts.timed", lambda *_: 2.0)
    spent = breakdown(run)
    assert sum(spent.values()) == pytest.approx(2.0)
    own = {"tiny-bert": {"attention"}, "tiny-mamba": {"scan", "convolution"}, "tiny-mamba2": {"scan", "convolution"}}[system]
    expected = own | {"projections", "tokeniser", "padding"} | ({"optimizer"} if mode == "training" else set())
    assert {part for part, seconds in spent.items() if seconds > 0} == expected | {"norms and other"}


@pytest.mark.parametrize(
    "label, part",
    [("SelectiveScanFn", "scan"), ("MambaChunkScanCombinedFn", "scan"), ("CausalConv1dFn", "convolution")],
)
def test_on_a_gpu_kernels_count_for_the_part_that_calls_them_and_the_tokeniser_by_its_time_on_the_cpu(label, part):
    def event(name, on_cpu, on_gpu=0, calls=()):
        made = FunctionEvent(1, name, 0, 0, on_cpu, device_type=DeviceType.CPU, use_device="cuda", is_legacy=False)
        if on_gpu:
            made.append_kernel(name, 0, on_gpu)
        for called in calls:
            made.append_cpu_child(called)
        return made

    calls = [("rankmamba::tokenise", 6000), ("aten::mm", 100, 3000), ("aten::add", 100, 1000), (f"{label}Backward", 100, 500)]
    spent = dict.fromkeys([*parts.PARTS, parts.OTHER], 0.0)
    parts._claim(event("rankmamba::all", 12000, calls=[event(*call) for call in calls]), spent, "device_time_total")
    assert {name: time for name, time in spent.items() if time} == {"tokeniser": 6000, "projections": 3000, part: 500, parts.OTHER: 1000}


def test_flash_attention_in_float32_is_refused_before_it_runs(monkeypatch):
    monkeypatch.setattr(GPTNeoXModel, "set_attn_implementation", lambda *_: None)
    with pytest.raises(InputError, match="takes no float32"):
        build("tiny-neox (flash_attention_2)", 64, dtype=torch.float32)


LENGTHS = np.array([128, 512, 2048, 8192])


def test_a_crossover_lies_where_two_known_curves_meet():
    # constant against one that falls with the length: they meet at 1,000, and power laws are straight lines in the logarithms
    assert profile_tables.crossover(LENGTHS, [500.0] * 4, 500.0 * 1000 / LENGTHS) == pytest.approx(1000)
    assert profile_tables.crossover(LENGTHS, [1, 1, 1, 1], [2, 2, 1, 0.5]) == pytest.approx(2048)


@pytest.mark.parametrize("ours", [1.0, 3.0])
def test_curves_that_do_not_cross_have_no_crossover(ours):
    assert profile_tables.crossover(LENGTHS, [ours] * 4, [2.0] * 4) is None


def test_a_slow_first_pass_counts_for_scoring_and_never_for_training_which_gets_memory_in_it(monkeypatch):
    first = profiling._first
    monkeypatch.setattr(profiling, "_first", lambda subject, passes: ([1e6 for _ in first(subject, passes)[0]], None))
    found = profiling.measure_together([Subject("tiny-mamba", 16, device="cpu")], 16, 2, 2, repeats=1)["tiny-mamba"]
    assert found["inference"]["seconds"] == [1e6] and len(found["training"]["seconds"]) == 1
    assert found["training"]["seconds"][0] < 1e3


def test_a_training_step_is_timed_twice_and_what_is_worked_out_from_two_depths_three_times(monkeypatch):
    monkeypatch.setattr(profiling, "_first", lambda subject, passes: ([run() or 1e6 for run in passes], None))
    whole, estimated = (Subject("tiny-mamba", 16, device="cpu") for _ in range(2))
    estimated.layers, estimated.depths, estimated.rerankers = 8, (2, 4), estimated.rerankers * 2
    for subject, turns in ((whole, [2, 1]), (estimated, [3, 3])):  # a long scoring counts at once
        found = profiling.measure_together([subject], 16, 2, 2, repeats=5, seconds=0)["tiny-mamba"]
        assert [len(found[mode]["seconds"]) for mode in MODES] == turns


def test_a_measurement_is_a_record_that_says_how_it_was_made_and_a_second_run_finds_it(tmp_path):
    cases = [(2, 64), (2, 64)]  # a further batch that is that of the length: one row
    again = [measurements.speed(tmp_path, "tiny", ["tiny-mamba", "tiny-neox"], cases, seconds=0.05) for _ in range(2)]
    assert again[0] == again[1] == read_records(tmp_path, "profile")
    mamba, neox = again[0]
    for record in again[0]:
        assert {"device", "threads", "dtype", "precision", "scan", "attention", "fused"} <= set(record["environment"])
        for mode in MODES:
            timing = record["timing"][mode]
            assert timing["low"] <= timing["tokens_per_s"] <= timing["high"] and timing["peak_mib"] > 0
            assert timing["tokens_per_s"] == pytest.approx(128 / np.median(timing["seconds"]))
            work = record["result"]["flops"][mode] / np.median(timing["seconds"])
            assert timing["share"] == pytest.approx(work / 1e9 / record["timing"]["peak_gflops"])
    assert (mamba["environment"]["scan"], neox["environment"]["scan"]) == (scan.kernel("cpu").name, "none")
    assert mamba["environment"]["scan_reason"]
    attention = "rankmamba_native" if scan.kernel("cpu").name == "native" else "sdpa"
    assert [record["environment"]["attention"].split(":")[0] for record in (mamba, neox)] == ["none", attention]
    assert fingerprint(mamba) == fingerprint(
        measurements.speed(tmp_path / "b", "tiny", ["tiny-mamba"], [(2, 64)], seconds=0.05)[0]
    )


def test_the_turn_that_pays_for_the_memory_measurement_is_not_timed(monkeypatch):
    monkeypatch.setattr(profiling, "gemm_gflops", lambda device, dtype: 1.0)
    monkeypatch.setattr(profiling, "_first", lambda subject, passes: ([0.0], None))
    seconds = iter([9.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(profiling, "timed", lambda run, device: next(seconds))
    found = profiling.measure_together([Subject("tiny-mamba", 16, device="cpu")], 16, 2, 2, repeats=3, modes=["training"])
    assert found["tiny-mamba"]["training"]["seconds"] == [1.0, 2.0, 3.0]


def test_a_measurement_stops_between_two_passes():
    stop = threading.Event()
    stop.set()
    assert not set(MODES) & set(measure("tiny-mamba", 64, stop=stop))
    with pytest.raises(InputError, match="expected a batch of whole groups, got 3 pairs in groups of 2"):
        measure("tiny-mamba", 64, batch=3, group_size=2)


def test_a_gpu_is_one_machine_whatever_its_hosts_threads():
    (gpu,) = measurements.recorded([ROOT / "data" / "gpu"])
    assert len({record["environment"]["threads"] for record in gpu}) > 1
    assert "mamba2-130m against the fastest Transformer of its size" in profile_tables.verdict(gpu)


def records(speeds):
    """Records of one machine: {(system, has a scan): {length: tokens/s in training}}."""
    for (system, scans), by_length in speeds.items():
        for length, rate in by_length.items():
            timing = {
                "tokens_per_s": rate,
                "low": 0.99 * rate,
                "high": 1.01 * rate,
                "pairs_per_s": 1,
                "latency_ms": 1,
                "seconds": [1] * 3,
            }
            yield {
                "system": system,
                "collection": f"1 x {length} random tokens",
                "config": {"length": length, "batch": 1},
                "result": {"parameters": 1, "layers": None, "depths": None, "flops": {"training": 1}, "out_of_memory": []},
                "timing": {"training": timing | {"peak_mib": 1.0, "share": 0.5}},
                "environment": {
                    "scan": "native" if scans else "none",
                    "device": "cpu",
                    "cpu": "X",
                    "dtype": "float32",
                    "threads": 1,
                },
            }


@pytest.mark.parametrize(
    "rates, says",
    [
        ([100, 100, 100], "**holds**"),
        ([100, 250, 400], "**holds in part**"),
        ([300, 300, 400], "**does not hold**"),
        ([201, 199, 200], "**does not hold**"),
    ],
)
def test_the_verdict_follows_the_records_against_the_fastest_transformer(rates, says):
    lengths = [128, 512, 2048]
    made = {("nano-mamba", True): rates, ("nano-bert", False): [200] * 3, ("nano-neox", False): [150] * 3}
    made = list(records({key: dict(zip(lengths, values, strict=True)) for key, values in made.items()}))
    text = profile_tables.verdict(made)
    assert says in text and ("overtakes at about" in text) == (rates == [100, 250, 400])
    assert set(profile_tables.against_transformers(profile_tables.speed_table(made))["rival"]) == {"nano-bert"}


def test_speeds_of_one_pass_or_of_some_layers_are_not_told_apart_within_a_fifth():
    for change in ("turns", "depths"):
        made = list(records({("nano-mamba", True): {128: 115}, ("nano-bert", False): {128: 100}}))
        assert profile_tables.against_transformers(profile_tables.speed_table(made))["standing"].tolist() == ["faster"]
        ours = next(record for record in made if record["system"] == "nano-mamba")
        if change == "turns":
            ours["timing"]["training"]["seconds"] = ours["timing"]["training"]["seconds"][:1]
        else:
            ours["result"] |= {"layers": 24, "depths": [2, 6]}
        assert profile_tables.against_transformers(profile_tables.speed_table(made))["standing"].tolist() == ["not told apart"]
        assert "**is not decided**" in profile_tables.verdict(made)


def test_level_is_within_the_margin_and_speeds_that_scatter_are_not_told_apart():
    made = list(records({("nano-mamba", True): {128: 98, 512: 90}, ("nano-bert", False): {128: 100, 512: 100}}))
    made[1]["timing"]["training"]["high"] = 100
    assert "level at 128 tokens (0.98 times its tokens/s), not told apart at 512 tokens" in profile_tables.verdict(made)


def test_a_single_pass_is_marked_and_makes_no_crossing():
    rates = {("nano-mamba", True): {128: 100, 512: 250, 2048: 400}, ("nano-bert", False): {128: 200, 512: 200, 2048: 200}}
    made = list(records(rates))
    for record in made:
        if record["config"]["length"] > 128:
            record["timing"]["training"]["seconds"] = [1]
    text = profile_tables.verdict(made)
    assert "slower at 128 tokens (0.50 times its tokens/s), faster at 512 to 2,048 tokens" in text
    assert "(1.25 to 2.00 times its tokens/s; one pass)" in text and "overtakes" not in text


def test_a_machine_whose_own_product_was_disturbed_is_called_busy_first():
    made = list(records({("nano-mamba", True): {128: 100}, ("nano-bert", False): {128: 200}}))
    for peaks, begins in (
        ((100, 120), "On X"),
        ((100, 190), "This machine was busy while it measured (its reference product varied by 1.9"),
    ):
        for record, peak in zip(made, peaks, strict=True):
            record["timing"]["peak_gflops"] = peak
        assert profile_tables.verdict(made).startswith(begins)


def test_a_whole_system_is_no_estimate_beside_one_of_which_some_layers_ran():
    rates = {("nano-mamba", True): 115, ("nano-bert", False): 100, ("mamba-130m", True): 100, ("pythia-160m", False): 115}
    made = list(records({system: {128: rate} for system, rate in rates.items()}))
    for record in made[2:]:
        record["result"] |= {"layers": 24, "depths": [2, 6]}
    table = profile_tables.speed_table(made)
    compared = profile_tables.against_transformers(table).set_index("system")
    assert compared["standing"].to_dict() == {"nano-mamba": "faster", "mamba-130m": "not told apart"}
    assert profile_tables.readable(table)["layers run"].tolist() == ["all", "all", "2 and 6 of 24", "2 and 6 of 24"]


def test_the_gpu_benchmark_refuses_without_one_and_runs_to_its_end_on_toy_models(tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))["main"]
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path)])
        assert main() == 1 and "expected a CUDA device, found none" in capsys.readouterr().err and not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--results", str(tmp_path)])
    assert main() == 0
    said = capsys.readouterr().out
    assert "tiny-neox (eager)" in said and "the claim that Mamba trains slower" in said
    assert len(read_records(tmp_path, "profile")) == 10 and (tmp_path / "figures" / "throughput.png").is_file()
    record = read_records(tmp_path, "profile")[0]
    write_record(tmp_path, record | {"system": "elsewhere", "environment": record["environment"] | {"torch": "1.0"}})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--minutes", "0", "--results", str(tmp_path)])
    assert main() == 0 and "elsewhere" not in capsys.readouterr().out  # what another machine measured is not compared


def test_a_panel_says_that_memory_ran_out_for_all_and_one_length_has_room_around_it():
    ran = list(records({("nano-bert", False): {512: 100.0}, ("bert-base", False): {512: 10.0}}))
    ran[1] |= {"timing": {}, "result": ran[1]["result"] | {"out_of_memory": ["training"]}}
    for draw in (profile_plots.throughput, profile_plots.memory):
        base, nano = sorted(draw(profile_tables.speed_table(ran)).axes, key=lambda axes: axes.get_title())
        assert [text.get_text() for text in base.texts] == ["out of memory"] and nano.get_xlim() == (256, 1024)


def test_a_folder_is_compared_by_its_own_name_and_not_by_where_it_lies():
    assert [size_of(name) for name in ("/home/my-study/bert-large", "/home/my-study/mamba-130m")] == ["370m", "130m"]
    assert size_of("/home/a-b/own-bert") == size_of("/elsewhere/own-mamba") == "own" and size_of("mamba-130m (sdpa)") == "130m"


def test_a_saved_reranker_is_measured_and_no_system_beyond_its_positions(tmp_path):
    build("tiny-mamba", 64).save_pretrained(tmp_path / "saved")
    assert build(str(tmp_path / "saved"), 4096).inputs.max_length == 4096
    with pytest.raises(InputError, match="512 .the positions minilm-l6 has., got 1024"):
        build("minilm-l6", 1024)


def test_texts_that_were_edited_are_measured_anew(tmp_path):
    test, folder = load("rankmamba/tiny/test"), tmp_path / "own"
    write_queries(folder / "queries.tsv", test.queries)
    write_qrels(folder / "qrels.txt", test.qrels)
    tokens = []
    for words in (1, 1, 40):
        write_documents(folder / "documents.jsonl", {doc_id: "word " * words for doc_id in test.documents}.items())
        (record,) = measurements.texts(tmp_path / "results", "tiny", ["tiny-mamba"], load(str(folder)), 4, 64, 2)
        tokens.append((record["created"], record["result"]["tokens"]))
    assert tokens[0] == tokens[1] and tokens[2][1] > 2 * tokens[0][1]


def test_the_tables_count_a_pair_and_a_token():
    (record,) = records({("nano-mamba", True): {128: 100}})
    record["config"]["batch"], record["result"]["flops"] = 4, {"training": 8e9}
    assert profile_tables.speed_table([record])["gflops"].tolist() == [2.0]
    texts = {"system": "s", "config": {"n_pairs": 6}, "result": {"tokens": 200, "padded_tokens": {"by length": 250}}}
    texts["timing"] = {"parts": {"training": {"scan": 0.5}}, "seconds": {"by length": 3.0}}
    assert profile_tables.parts_table([record, texts])["us"].tolist() == [2500.0]
    assert profile_tables.padding_table([record, texts])[["padded", "pairs_per_s"]].to_numpy().tolist() == [[1.25, 2.0]]


def test_a_summary_is_of_the_median_pass_and_its_quartiles_and_a_step_counts_three_forward_passes():
    found = profiling._summary([1.0, 2.0, 4.0], None, 8, 100, 0.5)
    assert [found[name] for name in ("tokens_per_s", "pairs_per_s", "latency_ms", "share")] == [400, 4, 25_000, 0.25]
    assert [found[name] for name in ("low", "high")] == pytest.approx([800 / 3, 800 / 1.5])
    stop = threading.Event()
    stop.set()
    flops, reranker = measure("tiny-mamba", 64, 2, stop, group_size=2)["flops"], build("tiny-mamba", 64)
    assert flops == {"inference": 2 * forward_flops(reranker.model, 64), "training": 6 * forward_flops(reranker.model, 64)}


def test_of_several_batches_the_largest_and_of_several_attentions_the_fastest_at_the_longest_length_is_compared():
    rates = ("x (a)", 5, 5), ("x (b)", 9, 9), ("x (c)", 10, 4)
    made = list(records({(name, False): {128: short, 512: long} for name, short, long in rates}))
    assert set(profile_tables.fastest_attention(profile_tables.speed_table(made))["system"]) == {"x (b)"}
    (larger,) = records({("x (a)", False): {128: 3}})
    larger["config"]["batch"] = 2
    largest = profile_tables.one_batch(profile_tables.speed_table([larger, *made])).set_index(["system", "length"])
    assert largest.loc[("x (a)", 128), "tokens_per_s"] == 3
