"""Stage export: a recovered network as ONNX and torch.export files, checked and timed, with a model card.

python pipeline/export.py CELL        for example hobs_rspar-42
"""

import base64
import subprocess
import time

import numpy as np
import onnxruntime

from _cell import named_cell
from _stage import run
from hobs_rspar import checkpoint, config, data, deployment
from hobs_rspar.hardware import platform, timing
from hobs_rspar.hardware.record import CellFiles, write_json
from hobs_rspar.model_card import card, with_interval

IMAGES = 512  # validation images on which the files are compared with PyTorch


def main() -> None:
    started = time.perf_counter()
    params = config.load()
    files, options = named_cell(params), params.benchmark
    cell = files.name
    files.require()
    network, spec = checkpoint.load_with_spec(files.recovered)
    images = data.load(files.paths.data, "validation", deployment.CPU).first(IMAGES)
    folder, shape = files.paths.cell(cell) / "export", list(spec.example().shape[1:])
    deployment.write(network, spec, folder)
    with timing.threads(options.threads):
        runs = deployment.load(folder, options.threads)
        equality = deployment.compared(network, runs, images.normalised(images.pixels))
        latency = deployment.latency(network, runs, shape, options.batch_sizes, options.seconds)
    found = about(files, spec, params.report.confidence) | {
        "files": deployment.sizes(folder), "equality": equality, "equality_images": len(images), "latency": latency,
        "image": shape, "onnxruntime": onnxruntime.__version__,
        "fingerprint": platform.fingerprint(deployment.CPU, options.threads)}
    record = files.paths.report / "exports" / f"{cell}.json"
    write_json(record, found)
    record.with_suffix(".md").write_text(card(found))
    worst = max(entry["largest_difference"] for entry in equality.values())
    size = min(entry["bytes"] for entry in found["files"].values()) / 1e3
    print(f"export {cell}: ONNX and torch.export, {size:,.0f} kB, logits within {worst:.1e} of PyTorch's, "
          f"{time.perf_counter() - started:.0f} s")


def about(files: CellFiles, spec, confidence: float) -> dict:
    """What the earlier stages know about the network."""
    plan, prune, recovery = (files.read(stage) for stage in ("plan", "prune", "recovery"))
    bits = np.frombuffer(base64.b64decode(recovery["correct"]), dtype=np.uint8)
    correct = np.unpackbits(bits, count=recovery["test_images"]).astype(bool)
    sizes = {key: prune[key] for key in ("macs", "params", "macs_ratio", "params_ratio")}
    return sizes | {
        "cell": files.name, "method": files.method, "network": spec.name, "dataset": plan["dataset"],
        "classes": spec.classes, "training_images": recovery["training_images"],
        "accuracy": with_interval(correct, confidence), "plan_digest": checkpoint.digest(files.plan),
        "weights_digest": checkpoint.digest(files.recovered), "commit": commit()}


def commit() -> str | None:
    """The commit that is checked out, whose dvc.lock and params.yaml say how the network came about."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    run(main)
