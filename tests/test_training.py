"""The training loop: it learns, follows its schedule, and goes on after a kill with the same bytes."""

import copy
import importlib.util
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hobs_rspar import checkpoint, device, resume, strided, teaching, training
from hobs_rspar.data import random_crops
from hobs_rspar.errors import UserError
from hobs_rspar.networks import NetworkSpec, build
from hobs_rspar.resume import Resume
from hobs_rspar.training import State, Task
from small import IMAGES, Mixed, Stream, images, recipe, seeded, trained

SRC = Path(training.__file__).parents[1]


def task(seed: int = 0, network: nn.Module | None = None, teacher: nn.Module | None = None, count: int = 160,
         **changes) -> Task:
    data = images(count)
    options = recipe(**{"epochs": 4, "flip": True, "crops": [7, 9, 9, 9]} | changes)
    return Task(network or seeded(Stream), data, images(64, seed=1), options, seed, "finetune", teacher)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = list(zip(first.state_dict().items(), second.state_dict().items()))
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# --- learning

def test_the_loss_decreases_and_the_history_is_complete():
    ours, calls = task(epochs=4, count=512, learning_rate=0.1), []
    ours.progress = calls.append
    state = training.fit(ours, State(), lambda now: None)
    assert [record["epoch"] for record in state.history] == [1, 2, 3, 4] and state.epoch == 4
    assert [record["images"] for record in state.history] == [512, 1024, 1536, 2048] and sum(calls) == 2048
    losses = [record["train_loss"] for record in state.history]
    assert losses[-1] < 0.3 * losses[0]
    out = training.logits(ours.network, ours.validation)
    assert state.history[-1]["validation_loss"] == pytest.approx(F.cross_entropy(out, ours.validation.labels).item())
    assert state.history[-1]["validation_top1"] == training.accuracy(out, ours.validation.labels) > 90
    assert not any(module.training for module in ours.network.modules())


def test_one_step_by_hand():
    """One batch, no crops: SGD with Nesterov momentum, weight decay on weights of more than one dimension only."""
    ours = task(epochs=1, crops=[], flip=False, count=32, batch_size=32, warmup=0.0, weight_decay=0.1)
    network, data = copy.deepcopy(ours.network).train(), ours.train
    random = training.generator(0, "finetune/epoch 0")
    order = torch.randperm(32, generator=random)
    x = data.normalised(random_crops(data.pixels[order], 9, False, random))
    loss = F.cross_entropy(network(x), data.labels[order])
    loss.backward()
    state = training.fit(ours, State(), lambda now: None)
    assert state.history[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for (name, before), (_, after) in zip(network.named_parameters(), ours.network.named_parameters()):
        gradient = before.grad + (0.1 * before if before.dim() > 1 else 0)
        assert torch.allclose(after, before - 0.05 * 1.9 * gradient, atol=1e-5), name  # nesterov: g + 0.9 g


def test_distillation_is_the_published_mixture():
    teacher, network = seeded(Mixed, 5), seeded(Mixed)
    distillation = type("Distillation", (), {"weight": 0.7, "temperature": 3.0})
    ours = task(network=network, teacher=teacher, distillation=distillation)
    x, labels = IMAGES, torch.tensor([0, 1, 2, 3, 0])
    out, target = network(x), teacher(x)
    soft = (target / 3).softmax(1)
    divergence = (soft * (soft.log() - (out / 3).log_softmax(1))).sum(1).mean()
    wanted = 0.3 * F.cross_entropy(out, labels) + 0.7 * 9 * divergence
    loss = training._loss(ours, x, labels, target.detach())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and network.stem.weight.grad is not None


def test_a_teacher_is_followed():
    """Without labels of its own, a student comes to agree with its teacher."""
    data = images(512)
    teacher = trained(seeded(Stream), data, epochs=3)
    distillation = type("Distillation", (), {"weight": 1.0, "temperature": 2.0})
    unlabelled = replace(data, labels=torch.zeros(512, dtype=torch.long))
    ours = Task(seeded(Stream, 3), unlabelled, data, recipe(epochs=3, distillation=distillation), 0, "test", teacher)
    training.fit(ours, State(), lambda now: None)
    assert training.accuracy(training.logits(ours.network, data), data.labels) > 85


class Counting(nn.Module):
    """A teacher that counts the batches it is asked about."""

    def __init__(self):
        super().__init__()
        self.network, self.asked = seeded(Stream, 5).eval(), 0

    def forward(self, x):
        self.asked += 1
        return self.network(x)


def taught(seed: int = 0, student: int = 3, lessons: Path | None = None, **changes) -> tuple[nn.Module, int]:
    """A student after two epochs, and how often its teacher was asked (less once, for folding)."""
    teacher, distillation = Counting(), type("Distillation", (), {"weight": 0.9, "temperature": 2.0})
    ours = task(seed, seeded(Stream, student), teacher, epochs=2, crops=[7, 9], distillation=distillation, **changes)
    ours.lessons = lessons
    training.fit(ours, State(), lambda now: None)
    return ours.network, teacher.asked


def test_a_teacher_answers_once_for_all_methods_of_a_seed(tmp_path):
    """Kept answers change no byte, another network of the same seed asks nothing, another seed needs its own folder."""
    alone, asked = taught()
    assert asked == 2 * (1 + 5)  # one image for folding, and five batches, in each epoch
    first, before = taught(lessons=tmp_path)
    again, after = taught(lessons=tmp_path)
    assert (before, after) == (asked, 0) and same(alone, first) and same(alone, again)
    other, none = taught(student=4, lessons=tmp_path)
    assert none == 0 and same(other, taught(student=4)[0]) and not same(other, alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_answers_that_would_be_large_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(teaching, "MOST", 5 * 32 * 4 * 4 - 1)  # five batches of 32 images, four classes, float32
    _, asked = taught(lessons=tmp_path)
    assert taught(lessons=tmp_path)[1] == asked and not list(tmp_path.iterdir())


def test_answers_of_half_an_epoch_are_not_kept(tmp_path):
    def broken(images: int) -> None:
        raise KeyboardInterrupt

    ours = task(network=seeded(Stream, 3), teacher=seeded(Stream, 5).eval(), epochs=1, crops=[],
                distillation=type("Distillation", (), {"weight": 0.9, "temperature": 2.0}))
    ours.lessons, ours.progress = tmp_path, broken
    with pytest.raises(KeyboardInterrupt):
        training.fit(ours, State(), lambda now: None)
    assert not list(tmp_path.iterdir())


# --- precision

@pytest.mark.parametrize(("hardware", "name", "meant"), [(True, "auto", "bf16"), (False, "auto", "fp32"),
                                                         (True, "fp32", "fp32"), (False, "bf16", "bf16")])
def test_auto_is_bf16_only_where_the_hardware_has_it(monkeypatch, hardware, name, meant):
    monkeypatch.setattr(device, "has_bf16", lambda where: hardware)
    assert device.resolve_precision(name, torch.device("cpu")) == meant
    with device.autocast(torch.device("cpu"), name):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if meant == "bf16" else torch.float32)


def test_what_the_hardware_has_is_asked_of_pytorch(monkeypatch):
    """x86: AVX-512 without its bf16 instructions does not count; elsewhere oneDNN says."""
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    for answer in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=answer: answer)
        assert device.has_bf16(torch.device("cpu")) == answer
    monkeypatch.setattr(device.platform, "machine", lambda: "aarch64")
    assert device.has_bf16(torch.device("cpu")) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert device.has_bf16(torch.device("cuda"))


# --- schedule

@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5])
def test_the_schedule_rises_and_ends_at_zero(warmup):
    options, steps = recipe(learning_rate=0.4, warmup=warmup), 100
    rates = [training.learning_rate(options, step, steps) for step in range(steps + 1)]
    top = max(1, round(warmup * steps))
    assert rates[:top] == pytest.approx([0.4 * (step + 1) / top for step in range(top)])
    assert max(rates) == rates[top] == 0.4
    assert all(a > b for a, b in zip(rates[top:], rates[top + 1:]))
    assert rates[(top + steps) // 2] == pytest.approx(0.2, abs=0.01)
    assert rates[-1] == pytest.approx(0, abs=1e-12) and rates[-2] < 0.4 * 1e-3


def test_the_schedule_is_used():
    seen, ours = [], task(epochs=2, crops=[], count=64)
    descent = training.SGD(ours.network, ours.recipe, {})
    plain = descent.step
    descent.step = lambda rate: (seen.append(rate), plain(rate))
    for epoch in range(2):
        training._epoch(ours, descent, epoch, None)
    assert seen == [training.learning_rate(ours.recipe, step, 4) for step in range(4)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_the_library(momentum):
    """Three steps against torch.optim.SGD, to the bit; weights decay, biases and batch norms do not."""
    network, options = seeded(Stream), recipe(momentum=momentum, weight_decay=0.1)
    reference = copy.deepcopy(network)
    decayed, plain = ([p for p in reference.parameters() if (p.dim() > 1) == many] for many in (True, False))
    theirs = torch.optim.SGD([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
                             lr=1.0, momentum=momentum, nesterov=momentum > 0)
    ours = training.SGD(network, options, {})
    for rate in (0.01, 0.005, 0.02):
        for net in (network, reference):
            net(images(8).normalised(images(8).pixels)).logsumexp(1).sum().backward()
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step(), theirs.zero_grad(), ours.step(rate)
        assert all(p.grad is None for p in network.parameters())
        for mine, wanted in zip(network.parameters(), reference.parameters()):
            assert torch.equal(mine, wanted)


def test_an_epoch_draws_its_images_from_the_whole_set(monkeypatch):
    """64 of 160 images an epoch: none twice within one, others in the next."""
    ours, seen = task(epochs=2, images=64, crops=[], flip=False, batch_size=32), []
    monkeypatch.setattr(training, "random_crops", lambda pixels, *_: (seen.append(pixels), pixels)[1])
    state = training.fit(ours, State(), lambda now: None)
    first, second = (torch.cat(seen[start:start + 2]).flatten(1).unique(dim=0) for start in (0, 2))
    assert len(seen) == 4 and len(first) == len(second) == 64
    assert 64 < len(torch.cat([first, second]).unique(dim=0)) < 128
    assert [entry["images"] for entry in state.history] == [64, 128]


# --- random numbers

def test_a_run_depends_on_its_seed_and_stage_alone():
    runs = []
    for seed, stage in ((0, "finetune"), (0, "finetune"), (1, "finetune"), (0, "pretrain")):
        torch.manual_seed(len(runs))  # the global generator must not matter
        ours = task(seed, epochs=1, crops=[])
        ours.stage = stage
        training.fit(ours, State(), lambda now: None)
        runs.append(ours.network)
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2]) and not same(runs[0], runs[3])


# --- crops

def crops_by_loop(pixels, size, flip, random):
    """One image at a time, by slicing."""
    count, height = len(pixels), pixels.shape[-1]
    pad = max(1, height // 12) if size >= height else 0
    padded = F.pad(pixels, (pad, pad, pad, pad))
    span = padded.shape[-1] - size + 1
    top, left = (torch.randint(span, (count, 1), generator=random)[:, 0] for _ in range(2))
    mirrored = torch.rand(count, 1, generator=random)[:, 0] < 0.5 if flip else [False] * count
    out = []
    for image, t, c, m in zip(padded, top, left, mirrored):
        crop = image[:, t:t + size, c:c + size]
        out.append(crop.flip(2) if m else crop)
    return torch.stack(out)


@pytest.mark.parametrize(("size", "flip"), [(28, True), (28, False), (20, True), (27, False), (9, True), (30, True)])
def test_crops_are_those_of_a_loop(size, flip):
    pixels = torch.randint(1, 255, (40, 3, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen = random_crops(pixels, size, flip, torch.Generator().manual_seed(4))
    assert seen.shape == (40, 3, size, size) and seen.dtype == torch.uint8
    assert torch.equal(seen, crops_by_loop(pixels, size, flip, torch.Generator().manual_seed(4)))
    assert (size >= 28) is bool((seen == 0).any())  # black border only where the crop has the full size


def test_crops_reach_every_offset_and_half_are_mirrored():
    pixels = torch.arange(12 * 12).view(1, 1, 12, 12).expand(4000, 1, 12, 12)
    seen = random_crops(pixels, 10, True, torch.Generator().manual_seed(0))
    plain = seen[:, 0, 0, 0] < seen[:, 0, 0, -1]
    offsets = torch.where(plain, seen[:, 0, 0, 0], seen[:, 0, 0, -1])
    assert set(offsets.tolist()) == {12 * top + left for top in range(3) for left in range(3)}
    assert 0.45 < plain.double().mean() < 0.55


def test_a_crop_larger_than_the_image_is_a_message():
    with pytest.raises(UserError, match="crops"):
        training.fit(task(crops=[9, 9, 40, 9]), State(), lambda now: None)


# --- going on after a kill

@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, stop):
    """Killed after each epoch (while the next one trains), and gone on in another process's memory."""
    undisturbed = task()
    wanted = training.fit(undisturbed, State(), lambda now: None)

    class Killed(BaseException):
        pass

    saved = Resume(tmp_path / "run", "key")
    first = task()
    done = []

    def die(images_done: int) -> None:
        if len(done) == stop:
            raise Killed  # in the middle of the next epoch, after a step

    def save(now: State) -> None:
        saved.save(first.network, now)
        done.append(now.epoch)

    first.progress = die
    with pytest.raises(Killed):
        training.fit(first, State(), save)
    second = task(network=seeded(Stream, 77))  # other weights: all must come from the file
    state = Resume(tmp_path / "run", "key").load(second.network)
    assert state.epoch == stop and len(state.history) == stop
    state = training.fit(second, state, lambda now: saved.save(second.network, now))
    assert same(second.network, undisturbed.network)
    assert state.history == wanted.history
    assert {name: tensor.tolist() for name, tensor in state.momentum.items()} == \
        {name: tensor.tolist() for name, tensor in wanted.momentum.items()}


SCRIPT = """
import sys, time
sys.path[:0] = [{src!r}, {tests!r}]
from pathlib import Path
from test_training import task
from hobs_rspar import checkpoint, resume, training
folder, slow = Path(sys.argv[1]), sys.argv[2] == "slow"
ours = task(precision="bf16")
with resume.sole_writer(folder):
    saved = resume.Resume(folder, "key")
    state = saved.load(ours.network)
    print("starts at", state.epoch, flush=True)
    def save(now):
        saved.save(ours.network, now)
        print("epoch", now.epoch, flush=True)
        if slow:
            time.sleep(60)
    training.fit(ours, state, save)
checkpoint.save_tensors(folder / "end.safetensors", {{k: v.contiguous() for k, v in ours.network.state_dict().items()}})
"""


def run_script(folder: Path, slow: bool) -> subprocess.Popen:
    code = textwrap.dedent(SCRIPT).format(src=str(SRC), tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, str(folder), "slow" if slow else "fast"],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_killed_process_blocks_until_it_is_gone_and_goes_on(tmp_path):
    """SIGKILL after an epoch; until then the process blocks a second writer, by name; the end is as undisturbed."""
    slow = run_script(tmp_path / "killed", slow=True)
    try:
        assert slow.stdout.readline().strip() == "starts at 0" and slow.stdout.readline().strip() == "epoch 1"
        refusal = f"is being written by process {slow.pid}; wait for it, or end it with 'kill {slow.pid}' and run again"
        with pytest.raises(UserError, match=refusal), resume.sole_writer(tmp_path / "killed"):
            pass
    finally:
        slow.send_signal(signal.SIGKILL)
        slow.communicate()
    again, undisturbed = run_script(tmp_path / "killed", slow=False), run_script(tmp_path / "undisturbed", slow=False)
    out, _ = again.communicate(timeout=300)
    undisturbed.communicate(timeout=300)
    assert out.split() == ["starts", "at", "1", "epoch", "2", "epoch", "3", "epoch", "4"]
    assert (tmp_path / "killed/end.safetensors").read_bytes() == (tmp_path / "undisturbed/end.safetensors").read_bytes()


def test_the_lock_is_given_back(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), resume.sole_writer(tmp_path / "run"):
            raise ZeroDivisionError
    with resume.sole_writer(tmp_path / "run"):
        assert (tmp_path / "run/owner").read_text() == str(os.getpid())


def test_the_key_changes_with_everything_that_matters(tmp_path):
    source, weights = tmp_path / "training.py", tmp_path / "pruned.safetensors"
    source.write_text("a"), weights.write_bytes(b"1")
    keys = [resume.key_of([source, weights], recipe(), 42)]
    assert keys[0] == resume.key_of([source, weights], recipe(), 42)
    keys += [resume.key_of([source, weights], recipe(), 43), resume.key_of([source, weights], recipe(flip=True), 42)]
    weights.write_bytes(b"2")
    keys.append(resume.key_of([source, weights], recipe(), 42))
    source.write_text("b")
    keys.append(resume.key_of([source, weights], recipe(), 42))
    assert len(set(keys)) == len(keys)


def test_a_checkpoint_of_another_key_is_ignored_and_clear_removes_all(tmp_path):
    network = seeded(Mixed)
    Resume(tmp_path / "run", "old").save(network, State(3, [{"epoch": 3}], {}))
    other = seeded(Mixed, 5)
    before = copy.deepcopy(other)
    assert Resume(tmp_path / "run", "new").load(other) == State() and same(other, before)
    assert Resume(tmp_path / "run", "old").load(other).epoch == 3 and same(other, network)
    Resume(tmp_path / "run", "old").clear()
    assert not (tmp_path / "run").exists()
    Resume(tmp_path / "run", "old").clear()  # a second time is no harm


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_keys_of_the_stages_cover_the_code_that_trains(stage, monkeypatch):
    """The numbers of a training run come from these modules; an edit of any must start it anew."""
    folder = SRC.parent / "pipeline"
    monkeypatch.syspath_prepend(str(folder))
    specification = importlib.util.spec_from_file_location(f"stage_{stage}", folder / f"{stage}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert {path.stem for path in module.SOURCES} >= {"training", "batchnorm", "data", "networks", stage}


# --- losses that are not finite

def test_a_loss_that_is_not_finite_is_a_message(tmp_path):
    ours, saved = task(learning_rate=1e6, crops=[], precision="fp32", count=320), []
    with pytest.raises(UserError, match="finetune: the loss became (nan|inf) in epoch 1, step .*; lower "
                                        "finetune.learning_rate in params.yaml, or set finetune.precision to fp32"):
        training.fit(ours, State(), saved.append)
    assert saved == []


def test_epochs_before_a_bad_one_are_kept():
    ours, saved = task(crops=[]), []

    def poison(now: State) -> None:
        saved.append(now.epoch)
        if now.epoch == 2:
            with torch.no_grad():
                ours.network.out.weight.fill_(math.nan)

    with pytest.raises(UserError, match="the loss became nan in epoch 3, step 1; .*Epochs before this one are kept"):
        training.fit(ours, State(), poison)
    assert saved == [1, 2]


def test_a_network_that_breaks_in_its_last_step_is_not_saved():
    ours, saved = task(epochs=1, crops=[], count=32, learning_rate=1e25), []
    with pytest.raises(UserError, match="not finite|became"):
        training.fit(ours, State(), saved.append)
    assert saved == []


# --- evaluation

def test_accuracy_and_logits():
    out = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5], [0.9, 0.05, 0.05]])
    labels = torch.tensor([1, 2, 0, 0])
    assert training.accuracy(out, labels) == 50 and training.accuracy(out, labels, 2) == 75
    assert training.accuracy(out, labels, 5) == 100  # no more classes than there are
    network, data = seeded(Mixed).train(), images(70)
    before = copy.deepcopy(network.state_dict())
    whole = training.logits(network, data, batch_size=32)
    assert whole.shape == (70, 4) and network.training and not whole.requires_grad
    assert torch.allclose(whole, network.eval()(data.normalised(data.pixels)), atol=1e-5)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())


def test_half_precision_trains_in_float_weights():
    ours = task(precision="bf16", epochs=1, crops=[])
    training.fit(ours, State(), lambda now: None)
    assert {tensor.dtype for tensor in ours.network.state_dict().values()} == {torch.float32, torch.int64}
    exact = task(precision="fp32", epochs=1, crops=[])
    training.fit(exact, State(), lambda now: None)
    assert not same(ours.network, exact.network)


def test_building_does_not_touch_the_global_generator():
    state = torch.random.get_rng_state()
    first, second = (build(NetworkSpec("resnet8", 10, 1, 28), seed=3) for _ in range(2))
    assert same(first, second) and not same(first, build(NetworkSpec("resnet8", 10, 1, 28), seed=4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not first.training


def test_writing_is_atomic(tmp_path, monkeypatch):
    """A kill while a file is written leaves the old one."""
    path = tmp_path / "net.safetensors"
    checkpoint.save_tensors(path, {"a": torch.ones(3)})

    def half(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_tensors(path, {"a": torch.zeros(3)})
    assert checkpoint.load_tensors(path)[0]["a"].tolist() == [1, 1, 1]


# --- strided 1x1 convolutions

@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("inputs", [3, 7, 16])
def test_strided_convolutions_and_their_gradients_are_right(inputs, layout):
    """Against the same layer in float64: with few inputs, oneDNN's own kernel writes past its workspace."""
    layer = nn.Conv2d(inputs, 20, 1, stride=2).to(memory_format=layout)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(32, inputs, 12, 12, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    given, taken = x.clone().requires_grad_(), x.double().requires_grad_()
    with strided.sliced(layer):
        out = layer(given)
        out.square().sum().backward()
    wanted = exact(taken)
    wanted.square().sum().backward()
    for ours, theirs in ((out, wanted), (given.grad, taken.grad), (layer.weight.grad, exact.weight.grad),
                         (layer.bias.grad, exact.bias.grad)):
        assert torch.allclose(ours.double(), theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_only_strided_convolutions_of_single_pixels_are_concerned():
    layers = [nn.Conv2d(4, 4, 1, 2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1, 2, groups=4),
              nn.Conv2d(4, 4, 1, 2, padding=1)]
    assert [strided.concerned(layer) for layer in layers] == [True, False, False, False, False]
    network, x = nn.Sequential(*layers[:3]).eval(), torch.randn(2, 4, 9, 9)
    before = network(x)
    with strided.sliced(network):
        assert torch.allclose(network(x), before, atol=1e-6)
        assert ["_conv_forward" in vars(layer) for layer in network] == [True, False, False]
    assert "_conv_forward" not in vars(network[0])
