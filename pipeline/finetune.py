"""Stage finetune: recovery of a pruned network, one recipe for all methods. Resumable; ends with the test images.

Beside the study's recovery, the accuracy without any and after those of ``finetune.curve`` is measured: each is a
recovery of its own from the pruned network, by the same recipe at full image size, and ends with the test images.
"""

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from _stage import cell_arguments, record_seconds, run
from hobs_rspar import batchnorm, checkpoint, config, data, networks, resume, strided, teaching, training
from hobs_rspar.device import resolve_device, resolve_precision
from hobs_rspar.errors import UserError
from hobs_rspar.memory import keep_freed_memory
from hobs_rspar.paths import Paths
from hobs_rspar.progress import image_bar

MODULES = (training, teaching, strided, batchnorm, data, networks)
SOURCES = [Path(module.__file__) for module in MODULES] + [Path(__file__)]


@dataclass
class Cell:
    """A pruned network and what it is recovered with.

    Attributes:
        spec: of the dense network.
        recipe: ``params.finetune``.
        train: training images, of which an epoch sees as many as the recipe says.
        teacher: the dense network where the recipe distils.
        progress: called after every step with the number of images done.
    """

    name: str
    seed: int
    paths: Paths
    spec: networks.NetworkSpec
    device: torch.device
    recipe: config.Finetune
    train: data.Images
    validation: data.Images
    teacher: nn.Module | None
    progress: Callable[[int], None] = field(default=lambda images: None)

    @property
    def images(self) -> int:
        """Images of the whole recovery."""
        return min(self.recipe.images or len(self.train), len(self.train)) * self.recipe.epochs

    @property
    def kept(self) -> Path:
        """Folder of what a killed run goes on from."""
        return self.paths.resume(self.name)

    @property
    def precision(self) -> str:
        """bf16 or fp32."""
        return resolve_precision(self.recipe.precision, self.device)

    def pruned(self) -> nn.Module:
        return checkpoint.load(self.paths.cell(self.name) / "pruned.safetensors").to(self.device)

    def key(self, recipe: config.Finetune) -> str:
        """Changes with everything that a recovery by ``recipe`` depends on."""
        return resume.key_of([self.paths.cell(self.name) / "pruned.safetensors", *self._shared], recipe, self.seed)

    def lessons(self, recipe: config.Finetune) -> Path:
        """Folder of the teacher's answers; all methods of this seed share it."""
        return self.paths.lessons(resume.key_of(self._shared, recipe, self.seed, self.device.type, self.precision))

    @property
    def _shared(self) -> list[Path]:
        """Files that the recoveries of all methods depend on."""
        return [*SOURCES, self.paths.data / "manifest.json", self.paths.dense / "dense.safetensors"]


def main() -> None:
    started = time.perf_counter()
    keep_freed_memory()
    params = config.load()
    method, seed = cell_arguments(params)
    recipe = params.finetune
    torch.set_num_threads(recipe.threads)
    cell = prepared(f"{method}-{seed}", seed, Paths.of(params.study), resolve_device(params.device), recipe)
    with resume.sole_writer(cell.kept), \
            image_bar(f"finetune {cell.name}", cell.images + sum(recipe.curve)) as cell.progress:
        curve = [without_recovery(cell), *(short_recovery(cell, images) for images in recipe.curve)]
        network, state = recover(cell, recipe)
    result = write(cell, network, state, curve)
    resume.Resume(cell.kept, "").clear()
    seconds = record_seconds(cell.paths.cost(cell.name, "finetune"), started)
    print(f"finetune {cell.name}: top-1 {result['top1_test']:.2f} % (test), {result['top1_validation']:.2f} % "
          f"(validation) after {state.epoch} epochs in {cell.precision}, {seconds:.0f} s")


def prepared(name: str, seed: int, paths: Paths, device: torch.device, recipe: config.Finetune) -> Cell:
    """The cell with its images on the device.

    Raises:
        UserError: a recovery of the curve is not shorter than the study's.
    """
    _, spec = checkpoint.load_with_spec(paths.cell(name) / "pruned.safetensors")
    train, validation = (data.load(paths.data, split, device) for split in ("train", "validation"))
    teacher = None
    if recipe.distillation.weight > 0:
        teacher = checkpoint.load(paths.dense / "dense.safetensors").to(device)
    cell = Cell(name, seed, paths, spec, device, recipe, train, validation, teacher)
    if recipe.curve and recipe.curve[-1] >= cell.images:
        raise UserError(f"params.yaml: finetune.curve: {recipe.curve[-1]} images are not fewer than the {cell.images} "
                        "of the study's recovery, which ends the curve by itself; lower it, or raise finetune.epochs")
    return cell


def without_recovery(cell: Cell) -> dict:
    """The pruned network as it is: the end of a recovery of length 0."""
    network = cell.pruned()
    out = training.logits(network, cell.validation, cell.recipe.precision)
    return point(0, 0, training.accuracy(out, cell.validation.labels), test(network, cell))


def short_recovery(cell: Cell, images: int) -> dict:
    """The point of a recovery with ``images`` images; kept until the stage ends, for a run that is killed later."""
    epochs = -(-images * cell.recipe.epochs // cell.images)  # none longer than the study's
    changes = {"epochs": epochs, "images": images // epochs, "crops": [], "curve": []}
    recipe = cell.recipe.model_copy(update=changes)

    def work() -> dict:
        network, state = recover(cell, recipe)
        last = state.history[-1]
        return point(images, last["images"], last["validation_top1"], test(network, cell))

    return resume.once(cell.kept / f"{cell.key(recipe)}.json", work)


def recover(cell: Cell, recipe: config.Finetune) -> tuple[nn.Module, training.State]:
    """Trains the pruned network by ``recipe``; goes on from the last epoch after a kill."""
    network, saved = cell.pruned(), resume.Resume(cell.kept, cell.key(recipe))
    task = training.Task(network, cell.train, cell.validation, recipe, cell.seed, "finetune", cell.teacher,
                         cell.lessons(recipe), cell.progress)
    return network, training.fit(task, saved.load(network), lambda now: saved.save(network, now))


def test(network: nn.Module, cell: Cell) -> dict:
    """The only look at the test images, after the last epoch; in the precision that the dense network is tested in."""
    images = data.load(cell.paths.data, "test", cell.device)
    out, labels = training.logits(network, images, cell.recipe.precision), images.labels.cpu()
    correct = np.packbits((out.argmax(1) == labels).numpy())
    return {"top1_test": training.accuracy(out, labels), "top5_test": training.accuracy(out, labels, 5),
            "test_images": len(labels), "correct": base64.b64encode(correct.tobytes()).decode()}


def point(images: int, seen: int, top1_validation: float, tested: dict) -> dict:
    """A point of the curve; ``seen`` is less than ``images`` by what does not fill a batch."""
    return {"images": images, "seen": seen, "top1_validation": top1_validation, "top1_test": tested["top1_test"],
            "correct": tested["correct"]}


def write(cell: Cell, network: nn.Module, state: training.State, curve: list[dict]) -> dict:
    """Tests the recovered network, adds it to the curve, and writes both outputs."""
    folder, last, tested = cell.paths.cell(cell.name), state.history[-1], test(network, cell)
    checkpoint.save(folder / "recovered.safetensors", network, cell.spec)
    end = point(cell.images, last["images"], last["validation_top1"], tested)
    result = {"precision": cell.precision, "history": state.history, "top1_validation": last["validation_top1"],
              **tested, "training_images": last["images"], "recovery_curve": [*curve, end]}
    (folder / "recovery.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    run(main)
