"""Timing, energy, platform, physics checks, latency table and the public metrics. No test asserts a speed."""

import contextlib
import json
import platform as system
import socket
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from hobs_rspar import surgery
from hobs_rspar.device import resolve_device
from hobs_rspar.errors import UserError
from hobs_rspar.hardware import cell, energy, physics, platform, timing
from hobs_rspar.hardware.latency_measurement import WHOLES, measure_table
from hobs_rspar.hardware.latency_table import LatencyTable, Layer, Whole
from hobs_rspar.hardware.metrics import SystemMetrics, measure_network
from hobs_rspar.hardware.physics import Bounds
from hobs_rspar.hardware.profiler import GPUProfiler
from hobs_rspar.hardware.timing import Comparison, Samples, Schedule
from small import zoo, zoo_groups

CPU = torch.device("cpu")


def samples(milliseconds, images=1, wall=1.0, cpu=None) -> Samples:
    return Samples(np.array(milliseconds, dtype=float), images, wall, cpu)


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))


class FakeClock:
    """Time passes only inside of calls: each takes as many seconds as it says."""

    warmup_calls = 2

    def __init__(self):
        self.time, self.log = 0.0, []

    def now(self):
        return self.time

    def cpu(self):
        return self.time

    def lap(self, call, calls):
        name, seconds = call()
        self.log.append((name, calls))
        self.time += calls * seconds
        return [1e3 * seconds] * calls


# --- timing

def test_summary_of_known_samples():
    summary = samples([range(1, 51), range(51, 101)], images=4, wall=2.0).summary()
    assert summary["p50_ms"] == 50.5 and summary["p90_ms"] == 90.1 and summary["p99_ms"] == 99.01
    assert summary["mean_ms"] == 50.5 and summary["iterations"] == 100
    assert summary["std_ms"] == pytest.approx(np.std(np.arange(1, 101), ddof=1), rel=1e-5)
    assert summary["throughput"] == 200  # 100 calls of 4 images in 2 s, whatever the latencies are


def test_networks_take_turns_and_the_order_turns_round():
    clock = FakeClock()
    calls = [lambda: ("dense", 0.02), lambda: ("pruned", 0.01)]
    dense, pruned = timing.interleave(calls, 8, Schedule(seconds=6.2, rounds=30), clock)
    rounds = [name for name, calls in clock.log if calls > 1]
    assert rounds[:6] == ["dense", "pruned", "pruned", "dense", "dense", "pruned"]
    assert dense.milliseconds.shape == pruned.milliseconds.shape
    assert (dense.milliseconds == 20).all() and (pruned.milliseconds == 10).all()
    assert clock.time <= 6.2
    assert dense.wall_seconds == pytest.approx(dense.milliseconds.size * 0.02)
    assert dense.images == 8 and not dense.disturbed(threads=1)


def test_warm_up_is_not_counted_and_a_slow_network_still_gets_its_rounds():
    clock = FakeClock()
    slow, = timing.interleave([lambda: ("slow", 5.0)], 1, Schedule(seconds=1.0, min_rounds=3), clock)
    assert slow.milliseconds.shape == (3, 1)
    assert len(clock.log) == 1 + 3  # one warm-up call already used up the seconds


def test_speedup_interval():
    dense, pruned = np.full((10, 4), 6.0), np.full((10, 4), 2.0)
    assert timing.speedup_interval(dense, pruned) == (3.0, 3.0)
    random = np.random.default_rng(0)
    dense, pruned = 6 + random.random((20, 4)), 2 + random.random((20, 4))
    lo, hi = timing.speedup_interval(dense, pruned)
    assert lo < np.median(dense) / np.median(pruned) < hi
    assert (lo, hi) == timing.speedup_interval(dense, pruned)


def test_speedup_is_dense_over_pruned():
    comparison = Comparison.of(samples(np.full((5, 2), 6.0)), samples(np.full((5, 2), 2.0)))
    assert comparison.record()["speedup"] == 3.0
    assert set(comparison.record()) == {"dense", "pruned", "speedup", "speedup_lo", "speedup_hi"}


@pytest.mark.parametrize(("cpu", "threads", "disturbed"), [(1.0, 1, False), (0.7, 1, True), (1.3, 1, True),
                                                           (1.3, 2, False), (None, 1, False)])
def test_cpu_time_is_a_cross_check(cpu, threads, disturbed):
    assert samples([[1.0]], wall=1.0, cpu=cpu).disturbed(threads) is disturbed


def test_real_networks_on_the_cpu():
    x = timing.example((2, 1, 6, 6), CPU)
    network = timing.prepared(tiny(), CPU)
    found = timing.compare(network, network, x, Schedule(0.1))
    assert x.is_contiguous(memory_format=torch.channels_last) and torch.equal(x, timing.example((2, 1, 6, 6), CPU))
    assert found.dense.images == 2 and found.lo <= found.speedup <= found.hi
    assert found.dense.cpu_seconds is not None


def test_threads_are_restored():
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_gpu_is_synchronised_before_every_timed_call(monkeypatch):
    log = []
    event = types.SimpleNamespace(record=lambda: log.append("event"), synchronize=lambda: log.append("wait"),
                                  elapsed_time=lambda end: 1.5)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    clock = timing.CudaClock(torch.device("cuda", 0))
    assert clock.lap(lambda: log.append("call"), 2) == [1.5, 1.5] and clock.cpu() is None
    assert log == ["idle", "event", "call", "event", "wait"] * 2


# --- physics

def test_bounds_of_a_uniform_plan():
    bounds = Bounds.of(macs_ratio=3.85, bytes_ratio=1.96)
    assert (bounds.lo, bounds.hi) == (1.96, 3.85)
    assert bounds.with_overhead() == Bounds(1.0, 3.85)
    assert Bounds.of(1.0, 1.0).with_overhead() == Bounds(1.0, 1.0)


@pytest.mark.parametrize(("interval", "holds"), [((1.5, 1.7), False), ((1.5, 1.9), True), ((2.5, 2.6), True),
                                                 ((4.0, 4.3), True), ((4.1, 4.3), False)])
def test_a_speedup_is_held_against_its_bounds(interval, holds):
    comparison = Comparison(None, None, sum(interval) / 2, *interval)
    assert Bounds(1.96, 3.85).hold(comparison) is holds


def outcome(speedup: float) -> Comparison:
    one = samples([[1.0]])
    return Comparison(one, one, speedup, speedup, speedup)


@pytest.mark.parametrize(("speedups", "measured", "flags"), [([3.0], 1, 0), ([9.0, 3.0], 2, 0), ([9.0, 9.0], 2, 1)])
def test_a_speedup_outside_its_bounds_is_measured_again_then_flagged(monkeypatch, speedups, measured, flags):
    seconds = []

    def fake(dense, pruned, x, schedule):
        seconds.append(schedule.seconds)
        return outcome(speedups[len(seconds) - 1])
    monkeypatch.setattr(cell, "compare", fake)
    comparison, found = cell._within([None, None], None, 2.0, Bounds(1.96, 3.85))
    assert seconds == [2.0, 1.0][:measured] and len(found) == flags
    assert comparison.speedup == speedups[-1]
    if found:
        assert "above the plan's own bound 3.85" in found[0] and "measured twice" in found[0]


def test_traffic_counts_every_operator_and_no_view():
    network = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Unflatten(1, (3, 1)), nn.Flatten())
    reads_and_writes = (2 * 4 + 3 * 4 + 2 * 3) + (2 * 3 + 2 * 3)
    assert physics.traffic(network, torch.zeros(2, 4)) == 4 * reads_and_writes


def test_halving_widths_halves_activation_bytes():
    wide, narrow = nn.Conv2d(32, 32, 1, bias=False), nn.Conv2d(16, 16, 1, bias=False)
    one, two = physics.traffic(wide, torch.zeros(4, 32, 8, 8)), physics.traffic(narrow, torch.zeros(4, 16, 8, 8))
    assert one - 4 * 32 * 32 == 2 * (two - 4 * 16 * 16)


def test_throughput_above_the_measured_peak_is_flagged(monkeypatch):
    asked = []
    monkeypatch.setattr(physics, "peak_macs", lambda device, trials=3: asked.append(trials) or 1e9)
    monkeypatch.setattr(physics.time, "sleep", lambda seconds: None)
    fine = samples([[1.0]], images=100, wall=0.1)  # 1,000 images/s
    assert physics.peak_flags([fine], [1_000_000], CPU) == []
    assert asked == [3]
    flag, = physics.peak_flags([fine, fine], [1, 2_000_000], CPU)
    assert flag.startswith("batch 100: the throughput implies 2 GMAC/s") and "only 1 GMAC/s" in flag
    assert asked == [3, 3, 20]  # the peak gets a second, longer chance


def test_peak_is_a_positive_rate():
    assert physics.peak_macs(CPU, trials=1) > 0


def test_timing_flags():
    assert physics.timing_flags(samples([[2.0] * 500], wall=1.0, cpu=1.0), "dense", 1) == []
    busy = physics.timing_flags(samples([[2.0] * 500], wall=1.0, cpu=0.5), "dense", 1)
    assert len(busy) == 1 and "CPU time is 0.50 of wall-clock time" in busy[0]
    wrong = physics.timing_flags(samples([[2.0] * 500], wall=2.0), "dense", 1)
    assert wrong == ["batch 1, dense: 250 images/s, but images / p50 is 500/s"]


def test_power_above_the_limit_fails():
    physics.require_within_power_cap(500, None, "x")
    physics.require_within_power_cap(500, 480, "x")
    with pytest.raises(UserError, match="is 13386 W, but the power limit is 575 W"):
        physics.require_within_power_cap(582 * 23, 575, "the published table")


def test_cpu_memory_is_not_measured():
    assert physics.peak_memory_mb(tiny(), torch.zeros(1, 1, 6, 6)) is None


# --- energy

def rapl(root, packages=("0",), value=1_000_000, limit=262_143_328_850):
    for package in packages:
        folder = root / f"intel-rapl:{package}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "energy_uj").write_text(f"{value}\n")
        (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return root


def test_rapl_adds_packages_and_survives_a_wrap(tmp_path):
    root = rapl(tmp_path, ("0", "1", "0:0"), value=900, limit=999)  # "0:0" is a part of package 0
    meter = energy.RaplMeter(root)
    assert meter.joules() == 0
    rapl(root, ("0", "1", "0:0"), value=400, limit=999)
    assert meter.joules() == pytest.approx(2 * 500e-6)


def test_reason_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    reason = energy.measure_energy({"a": lambda: None}, 1, CPU, 60)["a"].reason
    assert reason.startswith("not measured: RAPL counters are not there") and str(tmp_path / "powercap") in reason
    (tmp_path / "powercap").mkdir()
    assert "holds no intel-rapl package" in energy.measure_energy({"a": lambda: None}, 1, CPU, 60)["a"].reason
    monkeypatch.setattr(energy.RaplMeter, "_read", lambda self: (_ for _ in ()).throw(PermissionError()))
    rapl(tmp_path / "powercap")
    assert "not readable" in energy.measure_energy({"a": lambda: None}, 1, CPU, 60)["a"].reason


def test_a_short_window_is_no_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", rapl(tmp_path))
    found = energy.measure_energy({"a": lambda: 1 / 0}, 1, CPU, 0.5)["a"]
    assert found.reason == "not measured: window shorter than 10 s (0.5 s)" and found.joules_per_image is None


def test_energy_per_image_with_idle_apart(monkeypatch):
    class Meter:
        source, read = "a test's", 0

        def joules(self):
            Meter.read += 1
            return 2.0 * Meter.read  # two joules between any two readings
    monkeypatch.setattr(energy, "WINDOW", 0.05)
    monkeypatch.setattr(energy, "find_meter", lambda device: Meter())
    count = []
    found = energy.measure_energy({"a": lambda: count.append(1)}, 8, CPU, 0.05)["a"]
    assert found.joules_per_image == pytest.approx(2.0 / (8 * len(count))) and found.reason is None
    assert 0 < found.watts <= 2 / 0.05 and 0 < found.idle_watts <= 2 / 0.05 and found.source == "a test's"


class FakeNvml(types.ModuleType):
    """As much of pynvml as is used."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    NVMLError = type("NVMLError", (Exception,), {})

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return 5_000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlDeviceGetPowerUsage(self, handle):
        return 100_000

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return 1980

    def nvmlDeviceGetTemperature(self, handle, kind):
        raise self.NVMLError("not supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 0


def test_nvml_finds_the_gpu_by_its_uuid(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("pynvml"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="12-ab"))
    gpu = torch.device("cuda", 0)
    meter = energy.find_meter(gpu)
    assert meter.handle == "GPU-12-ab" and meter.joules() == 5.0
    assert platform.power_cap_watts(gpu) == 700.0
    assert platform.readings(gpu) == {"clock_mhz": 1980, "power_w": 100.0, "temperature_c": None,
                                      "throttle_reasons": 0}


def test_without_nvml_there_is_a_reason(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.measure_energy({"a": None}, 1, gpu, 10)["a"].reason == \
        "not measured: the package nvidia-ml-py is not installed"
    broken = FakeNvml("pynvml")
    broken.nvmlInit = lambda: (_ for _ in ()).throw(broken.NVMLError("no driver"))
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert "NVML does not answer (no driver)" in energy.measure_energy({"a": None}, 1, gpu, 10)["a"].reason
    assert platform.readings(gpu) == {} and platform.power_cap_watts(gpu) is None


# --- platform

@pytest.mark.parametrize(("made", "name"), [
    ({"kind": "cpu", "device": "Intel(R) Xeon(R) Processor", "cores": 2, "threads": 1},
     "cpu_intel_xeon_processor_2c_t1"),
    ({"kind": "cpu", "device": "Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "cores": 12, "threads": 4},
     "cpu_intel_core_i7_8700_12c_t4"),
    ({"kind": "cuda", "device": "NVIDIA H200", "cores": 16, "threads": 1}, "cuda_nvidia_h200"),
    ({"kind": "cpu", "device": "", "cores": 1, "threads": 1}, "cpu_unknown_1c_t1"),
])
def test_slug(made, name):
    assert platform.slug(made) == name


def test_fingerprint_says_what_matters_and_never_the_host():
    made = platform.fingerprint(CPU, 1)
    assert made["kind"] == "cpu" and made["threads"] == 1 and made["torch"] == torch.__version__
    assert made == platform.fingerprint(CPU, 1) == json.loads(json.dumps(made))
    text = json.dumps(made)
    for secret in (socket.gethostname(), system.release()):
        assert secret not in text


def test_fingerprint_without_cpuinfo(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "CPUINFO", tmp_path / "none")
    made = platform.fingerprint(CPU, 1)
    assert made["device"] and made["instruction_sets"] == []
    assert platform.readings(CPU) == {"clock_mhz": None}


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(UserError, match="'cuda' is not available here"):
        resolve_device("cuda")
    with pytest.raises(UserError, match="'tpu' is not known. Allowed: auto, cpu, cuda"):
        resolve_device("tpu")


def test_another_platform_is_an_error():
    assert platform.require_platform(None, "cpu_a") == platform.require_platform("cpu_a", "cpu_a") == "cpu_a"
    with pytest.raises(UserError, match="benchmark.platform is 'cuda_b', but this machine is 'cpu_a'"):
        platform.require_platform("cuda_b", "cpu_a")


# --- latency table

def plane() -> LatencyTable:
    """A table whose latencies are 1 + 2 i + 3 o + i o, and so the whole's: bilinear, so interpolation must be exact."""
    inputs, outputs = (2, 4, 8), (1, 8)
    ms = tuple(tuple(1 + 2 * i + 3 * o + i * o for o in outputs) for i in inputs)
    wholes = tuple(Whole((i,), (o,), float(1 + 2 * i + 3 * o + i * o)) for i in inputs for o in outputs)
    return LatencyTable({"conv": Layer(inputs, outputs, ms, 100)}, 64, "cpu_a", wholes)


@pytest.mark.parametrize(("i", "o"), [(2, 1), (3, 5), (4, 8), (7, 2), (8, 8)])
def test_interpolation_is_bilinear(i, o):
    assert plane().layer_ms("conv", i, o) == pytest.approx(1 + 2 * i + 3 * o + i * o)
    whole = plane().network_ms(np.array([[i], [8]]), np.array([[o], [8]]))
    assert whole == pytest.approx([1 + 2 * i + 3 * o + i * o, 105])


def timed(count: int, noise: float = 0.0) -> LatencyTable:
    """Whole networks that take 4 ms + 1.5 times the layer + 0.01 ms for each of its 100 elements a channel."""
    random, wholes = np.random.default_rng(0), []
    for i, o in zip(random.integers(2, 9, count), random.integers(1, 9, count)):
        ms = 4 + 1.5 * (1 + 2 * i + 3 * o + i * o) + 0.01 * 100 * o
        wholes.append(Whole((int(i),), (int(o),), float(ms * (1 + noise * random.normal()))))
    return LatencyTable(plane().layers, 64, "cpu_a", tuple(wholes))


def test_the_model_of_the_whole_is_found_and_its_error_is_that_of_networks_left_out():
    table = timed(12)
    assert table.fit == pytest.approx([4, 1.5, 0.01]) and table.errors() == pytest.approx(0, abs=1e-9)
    noisy = timed(12, 0.05)
    others = LatencyTable(noisy.layers, 64, "cpu_a", noisy.wholes[1:])
    out = noisy.wholes[0]
    foretold = others.network_ms(np.array(out.inputs), np.array(out.outputs))
    assert noisy.errors()[0] == pytest.approx(abs(foretold / out.milliseconds - 1)) and noisy.errors().max() > 0.01
    again = LatencyTable.from_json(json.loads(json.dumps(noisy.to_json())))
    assert again.fit.tolist() == noisy.fit.tolist() and again.wholes == noisy.wholes


def test_table_round_trips_and_refuses():
    table = LatencyTable.from_json(json.loads(json.dumps(plane().to_json())))
    assert table.layers == plane().layers and table.platform == "cpu_a" and table.batch_size == 64
    assert table.layer_ms("conv", 1, 1) == table.layer_ms("conv", 2, 1)  # below the smallest measured width
    with pytest.raises(UserError, match="layer 'fc' is not in it. It has: conv"):
        table.layer_ms("fc", 1, 1)
    with pytest.raises(UserError, match="output channels = 9 is not in 1 to 8"):
        table.layer_ms("conv", 2, 9)
    with pytest.raises(UserError, match="nothing was measured"):
        LatencyTable.from_json({"measured": False})


def test_every_layer_is_measured_over_its_widths():
    network = timing.prepared(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16, bias=False),
                                            nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.AdaptiveAvgPool2d(1),
                                            nn.Flatten(), nn.Linear(16, 5)), CPU)
    image = torch.zeros(1, 3, 8, 8)
    groups = surgery.groups(network, image)
    table = measure_table(network, groups, image, batch_size=2, rounds=1, platform="cpu_a")
    assert list(table.layers) == ["0", "1", "2", "3", "6"]
    assert table.layers["0"].inputs == (1, 2, 3) and table.layers["0"].outputs == (2, 4, 6, 8, 10, 12, 14, 16)
    assert table.layers["2"] is table.layers["3"]  # equal layers share one measurement
    depthwise = table.layers["1"]
    assert depthwise.inputs == (16,) and depthwise.outputs == (2, 4, 6, 8, 10, 12, 14, 16)
    assert [layer.elements for layer in table.layers.values()] == [2 * 36, 2 * 16, 2 * 16, 2 * 16, 2]
    assert len(table.wholes) == WHOLES and table.wholes[0].outputs == (16, 16, 16, 16, 5)
    assert all(whole.milliseconds > 0 and whole.inputs[0] == 3 for whole in table.wholes)
    assert (table.network_ms(*groups.layer_widths(np.stack([groups.sizes, groups.sizes // 2]))) > 0).all()


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_layer_widths_are_those_of_the_pruned_network(name):
    groups = zoo_groups(name)
    widths = np.stack([np.random.default_rng(seed).integers(1, groups.sizes + 1) for seed in range(3)])
    widths[:, [bool(group.protected) for group in groups]] = groups.sizes[[bool(group.protected) for group in groups]]
    for row, ins, outs in zip(widths, *groups.layer_widths(widths)):
        state = groups.sliced(zoo(name).state_dict(), [range(int(width)) for width in row])
        for layer, inputs, outputs in zip(groups.layers, ins, outs):
            shape, grouped = state[f"{layer}.weight"].shape, getattr(zoo(name).get_submodule(layer), "groups", 1) > 1
            assert outputs == shape[0] and (grouped or inputs == shape[1])


# --- public metrics and profiler

def test_system_metrics_keep_their_documented_returns():
    network = tiny()
    mean, deviation = SystemMetrics.measure_latency(network, (1, 1, 6, 6), num_iterations=3)
    assert mean > 0 and deviation >= 0
    assert SystemMetrics.measure_throughput(network, 2, (1, 6, 6), num_iterations=2) > 0
    assert SystemMetrics.count_parameters(network) == 4 * 9 + 8 + 4 * 9 + 4 + 144 * 3 + 3
    assert SystemMetrics.count_flops(network, (5, 1, 6, 6)) == 36 * 36 + 36 * 36 + 144 * 3  # MACs of one image


def test_measure_all(monkeypatch, tmp_path):
    monkeypatch.setattr("hobs_rspar.hardware.metrics.SECONDS", 0.05)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    found = SystemMetrics.measure_all(tiny(), batch_size=4, input_shape=(1, 6, 6))
    assert {"latency_ms", "latency_std_ms", "latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "parameters",
            "throughput_imgs_per_sec", "flops", "energy_j", "energy_reason"} <= set(found)
    assert found["latency_p50_ms"] <= found["latency_p90_ms"] <= found["latency_p99_ms"]
    assert found["energy_j"] is None and found["energy_reason"].startswith("not measured: ")


def test_the_measured_network_stays_as_it_was():
    network = tiny().train()
    network[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    SystemMetrics.measure_latency(network, (2, 1, 6, 6), num_iterations=1)
    SystemMetrics.count_flops(network, (1, 1, 6, 6))
    assert network.training and not network[1].training and network[2].training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network[0].weight.is_contiguous()


@pytest.mark.parametrize("measure", [
    lambda net: SystemMetrics.measure_latency(net),
    lambda net: SystemMetrics.measure_throughput(net, 2, (1, 1, 6, 6)),
    lambda net: SystemMetrics.count_flops(net, (1, 3, 6, 6)),
    lambda net: SystemMetrics.measure_all(net, 2, (1, 9, 9)),
])
def test_a_shape_that_does_not_fit(measure):
    with pytest.raises(UserError, match=r"input shape \(.*\) \(batch first\) does not fit Sequential: "):
        measure(tiny())


def test_numbers_that_make_no_sense():
    with pytest.raises(UserError, match="num_iterations is 0"):
        SystemMetrics.measure_latency(tiny(), (1, 1, 6, 6), 0)
    with pytest.raises(UserError, match="every entry must be a positive whole number"):
        measure_network(tiny(), (1, 6, 6), [0], 0.1)


def test_profiler_counts_and_nests(capsys):
    profiler = GPUProfiler()
    profiler.start("step")
    for _ in range(3):
        profiler.start("forward")
        profiler.end("forward")
    profiler.end("step")
    summary = profiler.get_summary()
    assert list(summary) == ["forward", "step"] and summary["forward"]["count"] == 3
    for row in summary.values():
        assert row["min_ms"] <= row["mean_ms"] <= row["max_ms"] <= row["total_ms"] + 1e-9
    assert summary["step"]["total_ms"] >= summary["forward"]["total_ms"]
    profiler.print_summary()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "section" and lines[1].startswith("step") and lines[2].startswith("forward")


def test_profiler_errors_and_off_switch():
    profiler = GPUProfiler()
    with pytest.raises(UserError, match="section 'a' has not begun"):
        profiler.end("a")
    profiler.start("a")
    with pytest.raises(UserError, match="section 'a' has already begun"):
        profiler.start("a")
    off = GPUProfiler(enabled=False)
    off.start("a")
    off.end("b")
    assert off.get_summary() == {}
