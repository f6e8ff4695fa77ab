"""The front door: which networks, examples and outputs the public API takes, and what it says of all others."""

import copy
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import hobs_rspar
from hobs_rspar import admission
from hobs_rspar.classifier import check_classifier
from hobs_rspar.errors import UserError
from hobs_rspar.memory import ACTIVATIONS, BATCH, batch_size, peak_memory
from hobs_rspar.protection import protected
from small import Mixed, Stream, assert_same, seeded, snapshot


def plain(**changes) -> nn.Sequential:
    """A small classifier for images [n, 3, 8, 8]; changes replace layers by their places."""
    layers = {"0": nn.Conv2d(3, 4, 3), "1": nn.ReLU(), "2": nn.Flatten(), "3": nn.Linear(144, 5)}
    return nn.Sequential(*(layers | changes).values())


X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def compiled_in_place() -> nn.Module:
    network = plain()
    network.compile()
    return network


def meta() -> nn.Module:
    with torch.device("meta"):
        return plain()


def half_of_it() -> nn.Module:
    network = plain()
    network[3].half()
    return network


def masked() -> nn.Module:
    network = plain()
    prune.l1_unstructured(network[3], "weight", 0.5)
    return network


def with_history() -> nn.Module:
    network = plain()
    network[1].seen = network(X)  # as a module that keeps its features does
    return network


def with_a_lock() -> nn.Module:
    network = plain()
    network.lock = threading.Lock()
    return network


class Computed(nn.Linear):
    """A layer without a weight of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.code = nn.Parameter(self.weight.detach().clone())
        del self.weight

    def forward(self, x):
        return F.linear(x, self.code.sin(), self.bias)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "words"), [
    (lambda: Stream, "Stream is a class: give an instance"),
    (lambda: plain().state_dict(), "seen: OrderedDict: build the network, call its load_state_dict"),
    (lambda: lambda x: x, "this is a function: give the network"),
    (lambda: "resnet18", "must be a torch.nn.Module; seen: str"),
    (lambda: torch.compile(plain()), r"the network is compiled by torch.compile; give its ._orig_mod"),
    (lambda: plain(**{"0": torch.compile(nn.Conv2d(3, 4, 3))}), "its part '0' is compiled by torch.compile"),
    (compiled_in_place, r"compiled by its method compile\(\); give copy.deepcopy\(model\)"),
    (lambda: torch.jit.script(plain()), "scripted or traced; give the network that it was made from"),
    (lambda: torch.jit.trace(plain(), X), "scripted or traced"),
    (lambda: nn.DataParallel(plain()), "wrapped in DataParallel; give its .module"),
    (lambda: plain(**{"0": nn.DataParallel(nn.Conv2d(3, 4, 3))}), "its part '0' is wrapped in DataParallel"),
    (lambda: torch.export.export(plain(), (X,)), "seen: ExportedProgram: give the network that it was made from"),
    (lambda: torch.export.export(plain(), (X,)).module(), "comes from torch.export; give the network that"),
    (lambda: torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}), "its part '3' is a quantized Linear; prune"),
    (lambda: plain(**{"3": nn.LazyLinear(5)}), "'3.weight' has no shape yet .* run the network once"),
    (meta, r"'0.weight' is on the meta device and has no values; call model.to_empty"),
    (lambda: plain().bfloat16(), r"'0.weight' is bfloat16, and float32 is needed; give model.float\(\)"),
    (lambda: plain().double(), r"'0.weight' is float64, .* model.float\(\)"),
    (half_of_it, r"'3.weight' is float16, .* model.float\(\)"),
    (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), "no parameters, so there is nothing to prune"),
    (lambda: plain(**{"0": parametrizations.weight_norm(nn.Conv2d(3, 4, 3))}),
     r"'0.weight' is parametrized; call .*remove_parametrizations\(model.get_submodule\('0'\), 'weight'\)"),
    (lambda: plain(**{"3": parametrizations.orthogonal(nn.Linear(144, 5))}), "'3.weight' is parametrized"),
    (lambda: plain(**{"0": nn.utils.weight_norm(nn.Conv2d(3, 4, 3))}),
     r"'0.weight' is computed by a WeightNorm hook; call torch.nn.utils.remove_weight_norm\("),
    (lambda: plain(**{"0": nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))}), r"remove_spectral_norm\("),
    (masked, r"'3.weight' is masked; call torch.nn.utils.prune.remove\(model.get_submodule\('3'\), 'weight'\)"),
    (lambda: plain(**{"3": Computed(144, 5)}), "the weight of '3' is computed, not a parameter"),
    (with_history, r"cannot be copied \(RuntimeError: .*because of 'seen' of its part '1'"),
    (with_a_lock, r"cannot be copied \(TypeError: .*because of 'lock' of the network"),
])
def test_networks_that_cannot_be_cut_are_refused_by_name(make, words):
    model = make()
    with pytest.raises(UserError, match=words) as seen:
        admission.check_network(model)
    assert "\n" not in str(seen.value)


@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no second device")
def test_parameters_on_two_devices_are_refused():
    with pytest.raises(UserError, match="on several devices"):
        admission.check_network(plain(**{"3": nn.Linear(144, 5).cuda()}))


@pytest.mark.parametrize("make", [lambda: plain().requires_grad_(False), lambda: torch.fx.symbolic_trace(plain()),
                                  lambda: seeded(Mixed), lambda: plain().train()])
def test_frozen_traced_and_training_networks_are_taken(make):
    admission.check_network(make())


@pytest.mark.filterwarnings("ignore")
def test_every_entrance_asks(tmp_path):
    """One wrapped network at all doors; none of them looks at the loader before."""
    model = nn.DataParallel(plain())
    doors = [lambda: hobs_rspar.compress(model, None), lambda: hobs_rspar.groups(model, X),
             lambda: hobs_rspar.HOBSSensitivityAnalyzer(model).compute_sensitivity(None),
             lambda: hobs_rspar.PhysicalPruner(model, X).prune({"0": [0]}), lambda: hobs_rspar.l1_prune(model, None),
             lambda: hobs_rspar.adaprune_prune(model, None),
             lambda: hobs_rspar.SystemMetrics.count_flops(model, (1, 3, 8, 8))]
    for door in doors:
        with pytest.raises(UserError, match="wrapped in DataParallel; give its .module"):
            door()


# --- what it runs on

class Broken(nn.Module):
    """Fails in a forward of its own, behind a layer."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = plain(), nn.BatchNorm1d(5)

    def forward(self, x):
        y = self.norm(self.body(x))
        raise KeyError("no such table") if not self.training else y


@pytest.mark.parametrize(("model", "example", "words"), [
    (plain(), X[:, :1], r"input shape \(1, 1, 8, 8\) \(batch first\) does not fit Sequential: '0' takes 3 channels, "
                        r".* gets \[1, 1, 8, 8\]"),
    (plain(), torch.zeros(1, 3, 9, 9), "does not fit Sequential: '3' takes 144 features and gets"),
    (plain(), torch.zeros(3, 8, 8), r"must be a batch .* its shape is \[3, 8, 8\]: give example\[None\]"),
    (plain(), X.bfloat16(), "does not run in '0', .*: RuntimeError: "),
    (plain(), (X,), "must be a tensor of images .* seen: tuple"),
    (Broken(), X, "Broken does not run, on an input of shape .* in evaluation mode: KeyError: 'no such table'"),
])
def test_a_forward_pass_that_fails_says_where_and_why(model, example, words):
    model.train()
    before = snapshot(model)
    with pytest.raises(UserError, match=words) as seen:
        admission.check_example(model, example)
    assert_same(before, snapshot(model))
    assert words.startswith("input shape") or "does not fit" in words or "fit" not in str(seen.value)


def test_modes_are_left_as_they_were_found():
    model = plain().train()
    model[1].eval()
    assert not admission.check_example(model, X).requires_grad
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


class Returns(nn.Module):
    """A classifier whose output is what a function makes of its logits."""

    def __init__(self, make):
        super().__init__()
        self.body, self.make = plain(), make

    def forward(self, x):
        return self.make(self.body(x))


@pytest.mark.parametrize(("make", "words"), [
    (lambda y: (y, y), r"it is a tuple of 2: give a wrapper .* model\(x\)\[0\]"),
    (lambda y: [y, y, y], "it is a list of 3"),
    (lambda y: {"loss": 0, "logits": y}, r"it is a dict with loss, logits: .* model\(x\)\['logits'\]"),
    (lambda y: SimpleNamespace(out=y), "it is a SimpleNamespace"), (lambda y: None, "it is None"),
    (lambda y: y[:, :, None, None], r"its shape is \[1, 5, 1, 1\]: give nn.Sequential\(model, nn.Flatten\(\)\)"),
    (lambda y: y[:, :, None, None].expand(-1, -1, 4, 4), r"for an input of 1 its shape is \[1, 5, 4, 4\]: give a net"),
    (lambda y: y[0], r"for one image its shape is \[5\]: a squeeze\(\)"),
    (lambda y: y.mean(), r"for an input of 1 its shape is \[\]"),
    (lambda y: y.argmax(1), r"it is int64 of shape \[1\]: return the logits, not the classes"),
    (lambda y: y[:, :1], r"its shape is \[1, 1\], one output: give a network of two"),
    (lambda y: y / 0, "it is not finite"), (lambda y: y.softmax(1), "it is probabilities, .* leave the softmax"),
])
def test_outputs_that_are_no_logits(make, words):
    with pytest.raises(UserError, match=f"the output must be logits .n, classes.; {words}"):
        check_classifier(Returns(make), X)


def test_logits_are_taken_whatever_their_number_of_images():
    assert check_classifier(plain(), X) == 5
    assert check_classifier(Returns(lambda y: y.log_softmax(1)), X.repeat(3, 1, 1, 1)) == 5


# --- protect

def test_protect_takes_names_and_modules_one_or_several():
    model = seeded(Mixed)
    for given, wanted in ((None, []), ((), []), ("stem", ["stem"]), (model.stem, ["stem"]),
                          ({"out", "stem"}, ["stem", "out"]), ([model.down, "stem", "down"], ["stem", "down"]),
                          ((module for module in [model.out]), ["out"])):
        assert protected(model, given) == wanted
    nested = nn.Sequential(plain(), nn.Linear(5, 2))
    assert protected(nested, "0") == protected(nested, nested[0]) == protected(nested, [nested[0]]) == ["0.0", "0.3"]


@pytest.mark.parametrize(("given", "words"), [
    ("stm", "'stm' is not a layer of Mixed. Did you mean 'stem'"), (["stem", ""], "'' is not a layer of Mixed"),
    (nn.Conv2d(1, 1, 1), "this Conv2d is not a part of the network that is pruned"), (3, "seen: 3"), ([3], "seen: 3"),
    ("stem_bn", "stem_bn makes no channels of its own; name the convolution"),
])
def test_protect_refuses_what_is_no_layer(given, words):
    with pytest.raises(UserError, match=words):
        protected(seeded(Mixed), given)


def test_a_protected_head_is_whole_anyway():
    model = seeded(Stream)
    data = [(torch.randn(32, 2, 9, 9), torch.randint(4, (32,))) for _ in range(2)]
    smaller, _, _ = hobs_rspar.compress(model, data, 0.85, protect=[model.out, "inner"], method="l1")
    assert smaller.stem.out_channels == 24 and smaller.down.out_channels < 48 and smaller.out.out_features == 4


# --- memory

def test_batches_are_sized_by_the_activations_of_one_image(monkeypatch):
    model = plain().eval()  # input 192, convolution and ReLU 144 each, flattened 144, logits 5
    monkeypatch.setattr("hobs_rspar.memory.ACTIVATIONS", 4 * (192 + 3 * 144 + 5) * 10 + 3)
    assert batch_size(model, X) == 10 and batch_size(model, X, most=7) == 7
    monkeypatch.setattr("hobs_rspar.memory.ACTIVATIONS", 1)
    assert batch_size(model, X) == 1
    monkeypatch.setattr("hobs_rspar.memory.ACTIVATIONS", ACTIVATIONS)
    assert batch_size(model, X) == BATCH
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it in a file")
def test_peak_memory_is_what_the_system_says():
    def told() -> int:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    assert abs(peak_memory() - told()) < 2**23  # the kernel sums up both lazily


def test_a_copy_of_a_compiled_network_is_what_the_message_says():
    network = compiled_in_place()
    admission.check_network(copy.deepcopy(network))
