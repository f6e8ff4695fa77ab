"""Stage finetune: recovery of a pruned network, one recipe for all methods. Resumable; ends with the test images."""

import base64
import json
import time
from pathlib import Path

import numpy as np

from _stage import cell_arguments, record_seconds, run
from hobs_rspar import batchnorm, checkpoint, config, data, networks, resume, training
from hobs_rspar.device import resolve_device
from hobs_rspar.paths import Paths
from hobs_rspar.progress import image_bar

SOURCES = [Path(module.__file__) for module in (training, batchnorm, data, networks)] + [Path(__file__)]


def main() -> None:
    started = time.perf_counter()
    params = config.load()
    method, seed = cell_arguments(params)
    paths, device, recipe = Paths.of(params.study), resolve_device(params.device), params.finetune
    cell = f"{method}-{seed}"
    folder = paths.cell(cell)
    network, spec = checkpoint.load_with_spec(folder / "pruned.safetensors")
    train, validation = (data.load(paths.data, name, device) for name in ("train", "validation"))
    train = train.first(recipe.images or len(train))
    teacher = None
    if recipe.distillation.weight > 0:
        teacher = checkpoint.load(paths.dense / "dense.safetensors").to(device)
    task = training.Task(network.to(device), train, validation, recipe, seed, "finetune", teacher)
    state = recover(task, paths, cell, len(train) * recipe.epochs)

    checkpoint.save(folder / "recovered.safetensors", task.network, spec)
    result = {"history": state.history, "top1_validation": state.history[-1]["validation_top1"],
              **test(task.network, paths, device, recipe.precision), "training_images": state.history[-1]["images"]}
    (folder / "recovery.json").write_text(json.dumps(result, indent=1) + "\n")
    resume.Resume(paths.resume(cell), "").clear()
    seconds = record_seconds(paths.cost(cell, "finetune"), started)
    print(f"finetune {cell}: top-1 {result['top1_test']:.2f} % (test), {result['top1_validation']:.2f} % (validation) "
          f"after {state.epoch} epochs, {seconds:.0f} s")


def recover(task: training.Task, paths: Paths, cell: str, images: int) -> training.State:
    """Trains; goes on from the last epoch after a kill."""
    folder = paths.resume(cell)
    inputs = [*SOURCES, paths.cell(cell) / "pruned.safetensors", paths.data / "manifest.json",
              paths.dense / "dense.safetensors"]
    with resume.sole_writer(folder):
        saved = resume.Resume(folder, resume.key_of(inputs, task.recipe, task.seed))
        state = saved.load(task.network)
        with image_bar(f"finetune {cell}", images) as task.progress:
            return training.fit(task, state, lambda now: saved.save(task.network, now))


def test(network, paths: Paths, device, precision: str) -> dict:
    """The only look at the test images, after the last epoch; in the precision that the dense network is tested in."""
    images = data.load(paths.data, "test", device)
    out, labels = training.logits(network, images, precision), images.labels.cpu()
    correct = np.packbits((out.argmax(1) == labels).numpy())
    return {"top1_test": training.accuracy(out, labels), "top5_test": training.accuracy(out, labels, 5),
            "test_images": len(labels), "correct": base64.b64encode(correct.tobytes()).decode()}


if __name__ == "__main__":
    run(main)
