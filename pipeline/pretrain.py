"""Stage pretrain: the dense network of the study. Trains it, or loads published weights or a file of the user's."""

import json
from pathlib import Path

from _stage import run
from hobs_rspar import batchnorm, checkpoint, config, cost, data, networks, resume, training
from hobs_rspar.device import resolve_device, resolve_precision
from hobs_rspar.errors import UserError
from hobs_rspar.memory import keep_freed_memory
from hobs_rspar.paths import Paths
from hobs_rspar.progress import image_bar

SOURCES = [Path(module.__file__) for module in (training, batchnorm, data, networks)] + [Path(__file__)]


def main() -> None:
    keep_freed_memory()
    params = config.load()
    paths = Paths.of(params.study)
    device = resolve_device(params.device)
    about = data.manifest(paths.data)
    channels, size = about["image_shape"][:2]
    spec = networks.NetworkSpec(params.study.network, len(about["classes"]), channels, size)
    splits = {name: data.load(paths.data, name, device) for name in ("train", "validation", "test")}
    if params.pretrain.source == "train":
        network, state = train(params, paths, spec, splits, device)
    else:
        network, state = load(params.pretrain.source, spec).to(device), training.State()
    write(paths.dense, network, spec, splits, state, params)


def train(params, paths: Paths, spec, splits: dict, device):
    """Trains from random weights; goes on from the last epoch after a kill."""
    recipe = params.pretrain
    network = networks.build(spec, recipe.seed)
    networks.check(network, spec, backward=True)
    network = network.to(device)
    folder = paths.resume("pretrain")
    key = resume.key_of([*SOURCES, paths.data / "manifest.json"], spec, recipe)
    with resume.sole_writer(folder):
        saved = resume.Resume(folder, key)
        state = saved.load(network)
        count = min(recipe.images or len(splits["train"]), len(splits["train"]))
        with image_bar("pretrain", count * recipe.epochs) as progress:
            task = training.Task(network, splits["train"], splits["validation"], recipe, recipe.seed, "pretrain",
                                 progress=progress)
            state = training.fit(task, state, lambda now: saved.save(network, now))
        saved.clear()
    return network, state


def load(source: str, spec):
    """Torchvision's published weights, or a .safetensors file of this network (a state dict is enough)."""
    network = networks.build(spec)
    if source == "torchvision":
        models = networks.torchvision_models()
        if not hasattr(models, spec.name):
            raise UserError(f"params.yaml: pretrain.source 'torchvision' has no weights for '{spec.name}'; use 'train' "
                            "or a .safetensors file")
        state = published(models, spec.name)
    elif source.endswith(".safetensors"):
        state, _ = checkpoint.load_tensors(source)
    else:
        raise UserError(f"params.yaml: pretrain.source '{source}' is not known. Allowed: train, torchvision, or a file "
                        "that ends in .safetensors")
    fitted(network, state, spec, source)
    networks.check(network, spec, source, backward=True)
    return network


def published(models, name: str) -> dict:
    """The state dict of torchvision's newest weights for one of its networks.

    Raises:
        UserError: they can be neither found on this machine nor fetched.
    """
    try:
        return models.get_model_weights(name).DEFAULT.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as problem:
        raise UserError(f"params.yaml: pretrain.source 'torchvision': the weights of '{name}' cannot be fetched "
                        f"({problem}); try again with a network, or give a .safetensors file") from None


def fitted(network, state: dict, spec, source: str) -> None:
    """Loads weights; where their head is the reason that they do not fit, that is said, too."""
    heads = [name for name, tensor in network.named_parameters() if tensor.dim() and len(tensor) == spec.classes]
    head = heads[-1] if heads and heads[-1] in state else None
    try:
        checkpoint.fit(network, state, source)
    except UserError as problem:
        if head is None or len(state[head]) == spec.classes:
            raise
        raise UserError(f"{problem}. Its last layer ({head}) is for {len(state[head])} classes, but the data has "
                        f"{spec.classes}: give weights of as many classes") from None


def write(folder: Path, network, spec, splits: dict, state, params) -> None:
    """The checkpoint and its metrics. The dense network's own accuracy on the test set is a fact, not a choice."""
    checkpoint.save(folder / "dense.safetensors", network, spec)
    precision = params.pretrain.precision
    out = {name: training.logits(network, splits[name], precision) for name in ("validation", "test")}
    counted = cost.count(network, spec.example().to(splits["test"].pixels.device))
    metrics = {
        "precision": resolve_precision(precision, splits["test"].pixels.device),
        "network": spec.name, "dataset": params.study.dataset, "classes": spec.classes, "macs": counted.macs,
        "params": counted.params, "epochs": state.epoch,
        "images": state.history[-1]["images"] if state.history else 0,
        "top1_validation": training.accuracy(out["validation"], splits["validation"].labels),
        "top1_test": training.accuracy(out["test"], splits["test"].labels),
        "top5_test": training.accuracy(out["test"], splits["test"].labels, 5),
        "history": state.history, "digest": checkpoint.digest(folder / "dense.safetensors"),
    }
    (folder / "dense.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(f"pretrain {spec.name} on {params.study.dataset}: top-1 {metrics['top1_test']:.2f} % (test), "
          f"{metrics['top1_validation']:.2f} % (validation), {counted.macs / 1e6:.1f} M MACs, "
          f"{counted.params / 1e6:.3f} M parameters")


if __name__ == "__main__":
    run(main)
