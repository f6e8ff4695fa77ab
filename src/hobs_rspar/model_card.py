"""The model card of an exported network: what it is, how good, how fast, for what, and where it comes from."""

from __future__ import annotations

import numpy as np
from scipy.stats import binomtest

from hobs_rspar.data import NORMALISATION

KINDS = {"onnx": "ONNX", "torch_export": "torch.export"}


def with_interval(correct: np.ndarray, confidence: float) -> dict:
    """Accuracy in percent of one network, with Wilson's interval over the test images.

    Args:
        correct: whether each test image is classified correctly [images].
        confidence: of the interval.
    """
    interval = binomtest(int(correct.sum()), len(correct)).proportion_ci(confidence, "wilson")
    return {"top1": 100 * float(correct.mean()), "lo": 100 * interval.low, "hi": 100 * interval.high,
            "images": len(correct), "confidence": confidence}


def card(record: dict) -> str:
    """Markdown of what pipeline/export.py found out."""
    accuracy, image = record["accuracy"], "x".join(map(str, record["image"]))
    mean, std = (", ".join(f"{value:g}" for value in values) for values in NORMALISATION[record["dataset"]])
    made = record["fingerprint"]
    about = [
        ("Network", f"{record['network']}, pruned by {record['method']}: {record['macs']:,} MACs per image "
                    f"({record['macs_ratio']:.3f} of the dense network's), {record['params']:,} parameters "
                    f"({record['params_ratio']:.3f})"),
        ("Input", f"`images`: float32 [N, {', '.join(map(str, record['image']))}], pixels in [0, 1] less mean "
                  f"({mean}), over standard deviation ({std}); any N"),
        ("Output", f"`logits`: float32 [N, {record['classes']}]"),
        ("Data", f"{record['dataset']}, {image} images; trained on its training images; {record['training_images']:,} "
                 "images of recovery after surgery"),
        ("Top-1 accuracy", f"{accuracy['top1']:.2f} % [{accuracy['lo']:.2f}, {accuracy['hi']:.2f}] on "
                           f"{accuracy['images']:,} test images ({accuracy['confidence']:.0%} Wilson interval of this "
                           "one network; other seeds vary more)"),
        ("Intended use", "classifying images like those of the data set; on others, measure first"),
        ("Licence", "code and weights: MIT; the data set's own licence applies to its images"),
        ("Plan", f"cell `{record['cell']}`, SHA-256 `{record['plan_digest']}`"),
        ("Weights", f"recovered.safetensors, SHA-256 `{record['weights_digest']}`"),
        ("Commit", record["commit"] or "not recorded: no Git repository")]
    files = [(KINDS[kind], f"`{entry['file']}`", f"{entry['bytes'] / 1e3:,.0f} kB",
              f"{record['equality'][kind]['largest_difference']:.1e}", f"{record['equality'][kind]['same_class']:.2%}")
             for kind, entry in record["files"].items()]
    times = [(batch, f"{row['pytorch']['p50_ms']:.3f}", f"{row['onnx_runtime']['p50_ms']:.3f}",
              f"{row['ratio']:.2f} [{row['ratio_lo']:.2f}, {row['ratio_hi']:.2f}]")
             for batch, row in record["latency"].items()]
    return "\n\n".join([
        f"# {record['network']} on {record['dataset']}, {record['macs_ratio']:.2f}x MACs",
        _table(("", ""), about),
        "## Files",
        _table(("Format", "File", "Size", "Largest difference", "Same class"), files),
        f"Differences are those of the logits on {record['equality_images']} validation images to PyTorch's, relative "
        "to the largest logit.",
        "## Latency",
        _table(("Batch", "PyTorch, p50 (ms)", "ONNX Runtime, p50 (ms)", "PyTorch / ONNX Runtime"), times),
        f"{made['device']}, {made['threads']} thread{'s' * (made['threads'] != 1)}, torch {made['torch']} eager fp32 "
        f"channels_last, ONNX Runtime {record['onnxruntime']} fp32; in turn, medians, 95 % interval of their ratio.",
    ]) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
