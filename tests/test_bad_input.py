"""Bad input: one message that names the file or key, what was seen, what is allowed and what to do; no traceback."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from hobs_rspar import checkpoint, config, networks, sources
from hobs_rspar.errors import UserError, did_you_mean
from hobs_rspar.methods import _registry
from hobs_rspar.networks import NetworkSpec, build, check, torchvision_models
from hobs_rspar.plan import PruningPlan
from small import ZOO, plan_of, random_kept, zoo, zoo_groups
from small_study import changed, make, set_params, stage

ROOT = Path(__file__).parents[1]

def load(params, tmp_path: Path) -> config.Params:
    path = tmp_path / "params.yaml"
    path.write_text(params if isinstance(params, str) else yaml.safe_dump(params, sort_keys=False))
    return config.load(path)


def message(params, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(params, tmp_path)
    return str(caught.value)


# --- params.yaml

def test_the_default_params_are_valid(tmp_path):
    params = load(changed(), tmp_path)
    assert params.study.budget.macs == 0.26 and len(params.cells) == 55 and params.cells[0] == "unpruned-42"
    with pytest.raises(Exception, match="frozen"):
        params.study.name = "other"
    for name in ("my_models.nets:small", "timm:resnet10t", "regnet_y_400mf"):
        assert load(changed(study__network=name), tmp_path).study.network == name


CASES = [
    # an unknown key, with the nearest right one
    (changed(finetune__learning_rat=0.1), ["unknown key 'finetune.learning_rat'", "Did you mean 'learning_rate'?",
                                           "Allowed here: batch_size, crops"]),
    (changed(studdy={}), ["unknown key 'studdy'", "Did you mean 'study'?"]),
    (changed(study__budget__mac=0.5), ["unknown key 'study.budget.mac'", "Did you mean 'macs'?", "latency_ms"]),
    (changed(finetune__distillation__temprature=4), ["'finetune.distillation.temprature'", "'temperature'"]),
    # a method's block
    (changed(methods__hobs_rspar__itrations=3), ["methods.hobs_rspar: 'itrations' is not known", "'iterations'"]),
    (changed(methods__hobs_rspar_no_repair__mesured=3),  # options that the method's file imports
     ["methods.hobs_rspar_no_repair: 'mesured' is not known", "Did you mean 'measured'?", "penalty_sign"]),
    (changed(methods__l1__power=2), ["methods.l1: 'power' is not known", "nothing (the method has no options)"]),
    (changed(methods__l3={}), ["methods: 'l3' is not known", "Did you mean 'l1'?"]),
    (changed(methods__l1=None), ["methods.l1", "(seen: None)"]),
    # names
    (changed(study__methods=["l1", "hobs_rsapr"]), ["study.methods: 'hobs_rsapr' is not known",
                                                    "Did you mean 'hobs_rspar'?", "taylor_oneshot"]),
    (changed(study__network="resent20"), ["study.network: 'resent20' is not known", "Did you mean 'resnet20'?",
                                          "every classifier of torchvision", "timm:NAME", "package.module:function"]),
    (changed(study__dataset="fashionmnist"), ["study.dataset: 'fashionmnist' is not known",
                                              "Did you mean 'fashion_mnist'?", "cifar10"]),
    (changed(study__methods=[]), ["study.methods", "at least 1"]),
    (changed(study__methods=["l1", "l1"]), ["study.methods names ['l1'] twice"]),
    (changed(study__seeds=[1, 2, 1]), ["study.seeds names [1] twice"]),
    (changed(study__claims=["alocators"]), ["study.claims: 'alocators' is not known", "Did you mean 'allocators'?"]),
    (changed(study__experiments=["penalty"]), ["study.experiments: 'penalty' is not known", "peers"]),
    (changed(speed__cells=["hobs_rspar-43"]), ["speed.cells: 'hobs_rspar-43' is not known", "'hobs_rspar-42'"]),
    (changed(allocation__round_to=0), ["allocation.round_to"]),
    (changed(study__claims=["penalty"] * 2), ["study.claims names ['penalty'] twice"]),
    (changed(study__name="My Study"), ["study.name", "My Study"]),
    (changed(methods={"l1": {}}), ["methods.unpruned is missing", "'unpruned: {}'"]),
    # budgets
    (changed(study__budget__macs=0), ["study.budget.macs", "greater than 0", "(seen: 0)"]),
    (changed(study__budget__macs=1.2), ["study.budget.macs", "less than or equal to 1", "(seen: 1.2)"]),
    (changed(study__budget__macs=-0.1), ["study.budget.macs", "(seen: -0.1)"]),
    (changed(study__budget__macs=float("nan")), ["study.budget.macs", "(seen: nan)"]),
    (changed(study__budget__macs="a quarter"), ["study.budget.macs", "valid number", "'a quarter'"]),
    (changed(study__budget={"macs": 0.5, "latency_ms": 3, "latency_ratio": None}),
     ["study.budget", "exactly one of macs, latency_ms, latency_ratio must be set (set: macs, latency_ms)",
      "write null for the others"]),
    (changed(study__budget={"macs": None, "latency_ms": None, "latency_ratio": None}), ["(set: none)"]),
    (changed(study__budget={}), ["(set: none)"]),
    # types and ranges
    (changed(device="gpu"), ["device", "'auto', 'cpu' or 'cuda'", "(seen: 'gpu')"]),
    (changed(finetune__epochs=0), ["finetune.epochs", "greater than 0"]),
    (changed(finetune__epochs=3), ["finetune", "crops must name one size per epoch (3) or be empty; it names 2"]),
    (changed(finetune__curve=[5000, 5000]), ["finetune", "curve must name ever larger numbers of images"]),
    (changed(finetune__curve=[100]), ["finetune", "curve begins with 100 images, less than a batch (128)"]),
    (changed(finetune__precision="fp16"), ["finetune.precision", "'auto', 'bf16' or 'fp32'"]),
    (changed(export__cells=["hobs_rspar-43"]), ["export.cells: 'hobs_rspar-43' is not known. Did you mean "
                                                "'hobs_rspar-42'?", "[] for none"]),
    (changed(pretrain__momentum=1.5), ["pretrain.momentum", "(seen: 1.5)"]),
    (changed(study__seeds=[-1]), ["study.seeds.0", "(seen: -1)"]),
    (changed(allocation__tolerance=0.5), ["allocation.tolerance", "(seen: 0.5)"]),
    # the file
    ("study: [", ["is not valid YAML"]),
    ("", ["(whole file)"]),
    ("- 1\n- 2\n", ["(whole file)"]),
]


@pytest.mark.parametrize(("params", "words"), CASES, ids=[words[0] for _, words in CASES])
def test_params_that_cannot_be(params, words, tmp_path):
    text = message(params, tmp_path)
    assert text.startswith(f"{tmp_path / 'params.yaml'}")
    for word in words:
        assert word in text


def test_a_missing_key_and_a_missing_file(tmp_path):
    params = changed()
    del params["prune"]["ridge"], params["report"]
    text = message(params, tmp_path)
    assert "key 'prune.ridge' is missing; configs/default.yaml shows every key" in text and "'report'" in text
    with pytest.raises(UserError, match=r"none.yaml not found; run from the repository's root, or 'make study"):
        config.load(tmp_path / "none.yaml")


def test_all_problems_are_said_at_once(tmp_path):
    text = message(changed(finetune__epoch=1, pretrain__epochs=-1, device="tpu"), tmp_path)
    assert all(key in text for key in ("finetune.epoch", "pretrain.epochs", "device")) and text.count("\n") == 2


@pytest.mark.parametrize("block", [{"clip": 1.5}, {"iterations": "many"}, {"images": 500}])
def test_values_of_a_methods_block_are_checked(block):
    """'make repro' checks them before any work, a stage of its own when it begins."""
    (key,) = block
    with pytest.raises(UserError, match=f"methods.hobs_rspar.{key}"):
        _registry.options("hobs_rspar", block)


def test_suggestions():
    assert did_you_mean("resnet2", ["resnet20", "mobilenet_v2"]) == " Did you mean 'resnet20'?"
    assert did_you_mean("zzz", ["resnet20"]) == ""


# --- networks

def test_unknown_networks():
    with pytest.raises(UserError, match="network 'resnet200' is not known. Did you mean 'resnet20'.*Allowed: resnet8"):
        build(NetworkSpec("resnet200", 10, 1, 28))
    for name in ("no_such_module:net", "torch.nn:NoSuchNet", "math:sqrt", "builtins:print"):
        with pytest.raises(UserError, match=f"network '{name}'"):
            build(NetworkSpec(name, 10, 1, 28))


NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, channels=3, kind="logits"):
        super().__init__()
        self.conv, self.out, self.kind = nn.Conv2d(channels, 4, 3), nn.Conv2d(4, classes, 1), kind

    def forward(self, x):
        y = self.out(self.conv(x).mean((2, 3), keepdim=True))
        if self.kind == "map":
            return y
        y = y.flatten(1)
        if self.kind == "auxiliary":
            return (y, y) if self.training else y
        if self.kind == "inside":
            raise KeyError("no such head")
        return {"logits": y} if self.kind == "dict" else (y, y) if self.kind == "tuple" else y

class Spoils(Net):
    def forward(self, x):
        y = self.conv(x).exp()
        return self.out(y.mul_(2).mean((2, 3), keepdim=True)).flatten(1)

ignores = lambda classes: Net(1000)
grey = lambda classes: Net(classes, 1)
map_, dict_, tuple_, auxiliary, inside = (
    lambda classes, kind=kind: Net(classes, kind=kind) for kind in ("map", "dict", "tuple", "auxiliary", "inside"))
needs_two = lambda classes, width: Net(classes)
by_name = lambda *, classes: Net(classes)
mistaken = lambda classes: Net("%d %d" % classes)
text = lambda classes: "a network"

def flat(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, classes))
"""
IN_EVALUATION = "two images [2, 3, 32, 32] in evaluation mode"
OWN_NETWORKS = [
    ("ignores", ["returns 1000 outputs per image, but the data has 5 classes; give its last layer 5 outputs",
                 "or weights of as many classes", IN_EVALUATION]),
    ("map_", ["returns a tensor [2, 5, 1, 1]; return logits [images, 5], for instance by flatten(1)"]),
    ("dict_", ["returns a dict of 1; return the logits [images, 5] alone", IN_EVALUATION]),
    ("tuple_", ["returns a tuple of 2; return the logits [images, 5] alone", IN_EVALUATION]),
    ("auxiliary", ["returns a tuple of 2; return the logits [images, 5] alone; recovery trains on them alone",
                   "aux_logits=False", "in training mode"]),
    ("inside", [f"fails on {IN_EVALUATION}: KeyError: 'no such head' (my_nets.py, line 18)"]),
    ("grey", [f"fails on {IN_EVALUATION}: RuntimeError: Given groups=1, weight of size [4, 1, 3, 3]",
              "my_nets.py, line 11", "The data has 3 channels and 32 x 32 pixels: make the network take them"]),
    ("flat", ["RuntimeError: mat1 and mat2 shapes cannot be multiplied", "3 channels and 32 x 32 pixels"]),
    ("needs_two", ["cannot be called with the number of classes alone: missing a required argument: 'width'"]),
    ("by_name", ["cannot be called with the number of classes alone: too many positional arguments"]),
    ("mistaken", ["cannot be built for 5 classes and images of 32 pixels: TypeError: not enough arguments for format "
                  "string (my_nets.py, line 32)"]),
    ("text", ["returned str; it must return a torch.nn.Module"]),
    ("none", ["cannot be imported: AttributeError: module 'my_nets' has no attribute 'none'"]),
]


@pytest.fixture
def my_nets(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    (folder / "my_nets.py").write_text(NETS)
    (folder / "my_broken_nets.py").write_text("import torch\n\nhalf = 1 / 0\n")
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("my_nets", None)


@pytest.mark.parametrize(("name", "words"), OWN_NETWORKS, ids=[name for name, _ in OWN_NETWORKS])
def test_networks_of_users_that_cannot_be(name, words, my_nets):
    with pytest.raises(UserError) as caught:
        build(NetworkSpec(f"my_nets:{name}", 5, 3, 32))
    text = str(caught.value)
    assert text.startswith(f"network 'my_nets:{name}' ") and "\n" not in text
    for word in words:
        assert word in text


def test_a_module_of_networks_that_fails_when_it_is_imported(my_nets):
    with pytest.raises(UserError, match=r"network 'my_broken_nets:net' cannot be imported: ZeroDivisionError: division "
                                        r"by zero \(my_broken_nets.py, line 3\). Write package.module:function"):
        build(NetworkSpec("my_broken_nets:net", 5, 3, 32))


def test_a_network_that_cannot_be_trained_is_refused_before_it_is(my_nets):
    spec = NetworkSpec("my_nets:Spoils", 5, 3, 32)
    network = build(spec)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match="in training mode: RuntimeError: one of the variables needed for gradient "
                                        "computation has been modified by an inplace operation"):
        check(network, spec, backward=True)
    assert not network.training and all(p.grad is None for p in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_check_leaves_a_network_and_the_random_numbers_as_they_are():
    spec = ZOO["efficientnet_b0"]  # batch norms and dropout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network, after = torchvision_models().efficientnet_b0(num_classes=10), torch.rand(3)
        torch.manual_seed(3)
        network = torchvision_models().efficientnet_b0(num_classes=10).eval()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        check(network, spec, backward=True)
        assert torch.equal(torch.rand(3), after)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    built = build(spec, seed=3).state_dict()
    assert all(torch.equal(tensor, built[name]) for name, tensor in before.items())


# --- networks of torchvision and timm

def test_the_names_of_torchvisions_classifiers():
    models = torchvision_models()
    assert list(config.torchvision_classifiers()) == models.list_models(module=models)
    assert set(config.OWN_NETWORKS).isdisjoint(config.torchvision_classifiers())


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 80), ("shufflenet_v2_x0_5", 32)])
def test_classifiers_of_torchvision_take_the_datas_shape(name, size):
    """Without auxiliary heads, for other images than they were published for, and with fewer channels."""
    for training in (False, True):
        network = build(NetworkSpec(name, 7, 1, size)).train(training)
        assert network(torch.zeros(2, 1, size, size)).shape == (2, 7)


def test_a_transformer_is_built_for_the_datas_size_or_refused():
    with pytest.raises(UserError, match="network 'vit_b_16' cannot be built for 7 classes and images of 30 pixels: "
                                        "AssertionError: Input shape indivisible by patch size"):
        build(NetworkSpec("vit_b_16", 7, 3, 30))


def test_another_stem_keeps_what_the_first_layer_is():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 2, 2, padding_mode="reflect", bias=False))
    stem = networks._with_input_channels(network, 2)[0]
    assert repr(stem) == repr(nn.Conv2d(2, 4, 3, 2, 2, 2, padding_mode="reflect", bias=False))


def test_timms_networks():
    torchvision_models()
    pytest.importorskip("timm", reason="the optional extra timm is not installed")
    assert build(NetworkSpec("timm:resnet10t", 5, 1, 64))(torch.zeros(2, 1, 64, 64)).shape == (2, 5)
    assert build(NetworkSpec("timm:vit_tiny_patch16_224", 5, 3, 64))(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(UserError, match="timm .* has no network 'resnet10x'. Did you mean 'resnet10t'"):
        build(NetworkSpec("timm:resnet10x", 5, 3, 64))


def test_timm_is_asked_for_where_it_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="network 'timm:resnet10t' needs the package timm, .*: pip install timm"):
        build(NetworkSpec("timm:resnet10t", 5, 3, 64))


def test_a_users_own_network(monkeypatch, tmp_path):
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n\ndef tiny(classes):\n    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), "
        "nn.Linear(2, classes))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build(NetworkSpec("my_networks:tiny", 7, 1, 3))(torch.zeros(1, 1, 3, 3)).shape == (1, 7)


# --- data files

NAMES = list(sources.FASHION_MNIST)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four files whose content is not Fashion-MNIST's."""
    content = bytes(torch.randint(16, (10_000,), generator=torch.Generator().manual_seed(0)).tolist())
    for name in NAMES:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    return tmp_path


def test_wrong_checksum(folder):
    with pytest.raises(UserError, match=rf"{folder}/train-images-idx3-ubyte.gz: SHA-256 of the content is "
                                        r"[0-9a-f]{16}\.\.\., expected c59f468a2f672dc8\.\.\.; .*fetch it again"):
        sources.fashion_mnist(str(folder))


def test_missing_file(folder):
    (folder / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz not found; data.folder must hold train-.*t10k"):
        sources.fashion_mnist(str(folder))
    with pytest.raises(UserError, match="/no/such/folder/train-images-idx3-ubyte.gz not found"):
        sources.fashion_mnist("/no/such/folder")


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b[:-4], lambda b: b"", lambda b: b"no gzip",
                                    lambda b: b[:12] + bytes(8) + b[20:]],
                         ids=["half", "no end", "empty", "text", "damaged inside"])
def test_truncated_file(folder, damage):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path}.*fetch it again"):
        sources.fashion_mnist(str(folder))


# --- model files and plans

@pytest.fixture
def saved(tmp_path) -> Path:
    checkpoint.save(tmp_path / "dense.safetensors", zoo("resnet8"), ZOO["resnet8"])
    return tmp_path / "dense.safetensors"


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated_checkpoint(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{saved} is not a readable safetensors file .*truncated.*Delete it and run"):
        checkpoint.load(saved)


def test_missing_and_foreign_checkpoints(saved, tmp_path):
    with pytest.raises(UserError, match="none.safetensors not found; 'dvc repro' makes it, or check the path"):
        checkpoint.load(tmp_path / "none.safetensors")
    checkpoint.save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="other.safetensors holds tensors, but its metadata name no network"):
        checkpoint.load(tmp_path / "other.safetensors")


def state_of(name: str) -> dict:
    return {key: tensor.clone() for key, tensor in zoo(name).state_dict().items()}


def test_a_checkpoint_that_does_not_fit():
    spec = ZOO["resnet8"]
    with pytest.raises(UserError, match=r"weights.safetensors does not fit the network: 0 tensors are missing "
                                        r"\(none\), \d+ are unknown \(layer1.1.bn1.bias.*give a checkpoint of"):
        checkpoint.fit(build(spec), state_of("resnet20"), "weights.safetensors")
    short = state_of("resnet8")
    del short["linear.bias"]
    with pytest.raises(UserError, match=r"1 tensors are missing \(linear.bias\), 0 are unknown \(none\)"):
        checkpoint.fit(build(spec), short, "weights")
    large = state_of("resnet8")
    large["linear.weight"] = torch.zeros(11, 64)
    with pytest.raises(UserError, match=r"linear.weight has shape \[11, 64\], the network's is \[10, 64\]"):
        checkpoint.fit(build(spec), large, "weights")
    flat = state_of("resnet8")
    flat["conv1.weight"] = torch.zeros(16, 9)
    with pytest.raises(UserError, match=r"conv1.weight has shape \[16, 9\]"):
        checkpoint.fit(build(spec), flat, "weights")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"groups": 3}', '{"groups": [], "macs_ratio": 1}'])
def test_a_file_that_is_no_plan(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match="plan.json is not a pruning plan .*run 'dvc repro allocate' again"):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(UserError, match="none.json not found; 'dvc repro allocate' makes it"):
        PruningPlan.load(tmp_path / "none.json")


# --- the scripts

@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    return make(tmp_path, monkeypatch)


def test_scripts_say_how_they_are_called(study, monkeypatch):
    for arguments in ((), ("l1",), ("l1", "x"), ("l1", "1", "2")):
        assert stage("allocate", monkeypatch, *arguments) == \
            "error: usage: python pipeline/allocate.py METHOD SEED, for example: python pipeline/allocate.py l1 7"
    assert stage("prune", monkeypatch, "l2_globl", "7").startswith(
        "error: method 'l2_globl' has no block in params.yaml. Did you mean 'l2_global'?")


def test_a_plan_for_another_network_stops_the_prune_stage(study, monkeypatch):
    groups = zoo_groups("resnet20")
    cell = study / "artifacts/small/cells/l1-7"
    plan_of(groups, random_kept(groups, 0), "resnet20").save(cell / "plan.json")
    text = stage("prune", monkeypatch, "l1", "7")
    assert text.startswith("error: the plan is for another network: it was made for 'resnet20' with 12 groups, this "
                           "network has 6") and text.endswith("Allocate again")
    assert sorted(path.name for path in cell.iterdir()) == ["plan.json"]


def test_a_plan_that_misses_its_budget_stops_the_prune_stage(study, monkeypatch):
    assert stage("allocate", monkeypatch, "l1", "7") == ""
    path = study / "artifacts/small/cells/l1-7/plan.json"
    text = json.loads(path.read_text())
    text["groups"][0]["kept"] = list(range(16))
    path.write_text(json.dumps(text))
    found = stage("prune", monkeypatch, "l1", "7")
    assert found.startswith("error: prune l1-7: 0.") and "the budget 0.26x" in found
    assert "widest group: conv1 (16 of 16). Allocate again" in found


def test_nothing_is_lost_when_the_loss_is_not_finite(study, monkeypatch):
    for name in ("allocate", "prune"):
        assert stage(name, monkeypatch, "l1", "7") == ""
    cell = study / "artifacts/small/cells/l1-7"
    before = {path.name: path.read_bytes() for path in cell.iterdir()}
    set_params(study, finetune__learning_rate=1e30)
    text = stage("finetune", monkeypatch, "l1", "7")
    assert text.startswith("error: finetune: the loss became ")
    assert "lower finetune.learning_rate in params.yaml" in text
    assert {path.name: path.read_bytes() for path in cell.iterdir()} == before
    set_params(study, finetune__learning_rate=0.01)
    assert stage("finetune", monkeypatch, "l1", "7") == ""
    assert json.loads((cell / "recovery.json").read_text())["history"][0]["epoch"] == 1


def test_a_network_that_does_not_fit_the_study(study, monkeypatch):
    """A dense checkpoint given by the user, of another network."""
    checkpoint.save(study / "mine.safetensors", zoo("resnet20"), ZOO["resnet20"])
    set_params(study, pretrain__source=str(study / "mine.safetensors"))
    assert stage("pretrain", monkeypatch).startswith(f"error: {study}/mine.safetensors does not fit the network")
    set_params(study, pretrain__source="torchvison")
    assert "pretrain.source 'torchvison' is not known. Allowed: train, torchvision, or a file" in \
        stage("pretrain", monkeypatch)
    set_params(study, pretrain__source="torchvision")
    assert "pretrain.source 'torchvision' has no weights for 'resnet8'" in stage("pretrain", monkeypatch)


def test_weights_for_other_numbers_of_classes(study, monkeypatch):
    """A head is never shrunk as a pruned layer is, and the message names both numbers."""
    source = study / "mine.safetensors"
    set_params(study, pretrain__source=str(source))
    fewer = (f"network 'resnet8' with the weights of {source} returns 3 outputs per image, but the data has 10 "
             "classes; give its last layer 10 outputs")
    more = "Its last layer (linear.bias) is for 12 classes, but the data has 10: give weights of as many classes"
    for classes, words in ((3, fewer), (12, more)):
        spec = NetworkSpec("resnet8", classes, 1, 28)
        checkpoint.save(source, build(spec), spec)
        text = stage("pretrain", monkeypatch)
        assert text.startswith("error: ") and words in text and text.count("\n") == 0


def test_a_network_of_a_user_for_other_data_stops_the_pretrain_stage(study, monkeypatch, my_nets):
    set_params(study, study__network="my_nets:ignores")
    assert "fails on two images [2, 1, 28, 28] in evaluation mode" in stage("pretrain", monkeypatch)
    assert not (study / "artifacts/small/resume").exists()  # nothing was trained


def test_published_weights_that_cannot_be_fetched(study, monkeypatch):
    def offline(*_arguments, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    set_params(study, study__network="resnet18", pretrain__source="torchvision")
    assert "the weights of 'resnet18' cannot be fetched (no route to host); try again with a network, or give a " \
        ".safetensors file" in stage("pretrain", monkeypatch)


def test_stages_that_come_too_early_say_what_is_missing(study, monkeypatch):
    assert "cells/l1-7/plan.json not found; 'dvc repro allocate' makes it" in stage("prune", monkeypatch, "l1", "7")
    assert "cells/l1-7/pruned.safetensors not found" in stage("finetune", monkeypatch, "l1", "7")
    (study / "data/fashion_mnist/manifest.json").unlink()
    assert "manifest.json not found; run 'dvc repro data'" in stage("pretrain", monkeypatch)


def script(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "pipeline" / f"{name}.py"), *arguments], cwd=folder,
                          capture_output=True, text=True, timeout=300)


def test_scripts_end_with_status_1_and_no_traceback(study, tmp_path_factory):
    """As a person sees it: in a process of its own."""
    truncated = study / "artifacts/dense/fashion_mnist_resnet8/dense.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:1000])
    files = tmp_path_factory.mktemp("files")
    (files / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"0" * 999)[:20])
    set_params(study, data__folder=str(files))
    seen = [(script("allocate", study, "l1", "7"), "dense.safetensors is not a readable safetensors file"),
            (script("data", study), "train-images-idx3-ubyte.gz is truncated or no gzip file"),
            (script("data", files), "params.yaml not found; run from the repository's root")]
    for done, words in seen:
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
