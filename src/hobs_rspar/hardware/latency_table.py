"""What a network of other widths would take: latencies of its layers, and what they leave out, as data.

Layers were timed alone. A network also runs norms, activations and additions, and memory is shared; so its latency is

    constant + slope x (sum over layers) + rate x (elements of all layers' outputs),

whose three numbers, none negative, were fitted to whole networks that were timed, too. How far the model is off is
measured by leaving each of those networks out (hardware/latency_measurement.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import nnls

from hobs_rspar.errors import UserError


@dataclass(frozen=True)
class Layer:
    """Latencies of one layer.

    Attributes:
        inputs: widths of the input, rising; only the dense one where the input follows the output (depthwise).
        outputs: widths of the output, rising.
        milliseconds: median at [input, output].
        elements: of one output channel in one call, all images together.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    milliseconds: tuple[tuple[float, ...], ...]
    elements: int


@dataclass(frozen=True)
class Whole:
    """A network that was timed as a whole.

    Attributes:
        inputs: of every layer, in the order of the table; ``outputs`` likewise.
        milliseconds: median.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    milliseconds: float


class LatencyTable:
    """Latencies of the layers of one network on one platform, interpolated between the measured widths.

    Args:
        layers: by name, in order of execution.
        batch_size: images per call.
        platform: slug of the platform.
        wholes: networks that the model of the whole is fitted to.

    Attributes:
        fit: constant in ms, slope, and ms per element.
    """

    def __init__(self, layers: dict[str, Layer], batch_size: int, platform: str, wholes: tuple[Whole, ...]):
        self.layers, self.batch_size, self.platform, self.wholes = layers, batch_size, platform, wholes
        self.fit = self._fitted(wholes)

    def layer_ms(self, name: str, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Latencies of a layer in ms [...], bilinear between the measured widths.

        Below the smallest width they are its own: the fixed time of a call is what is left there.

        Args:
            name: of the layer.
            inputs: channels [...].
            outputs: likewise.

        Raises:
            UserError: the layer is not in the table, or a width is outside it.
        """
        if name not in self.layers:
            raise UserError(f"latency table: layer '{name}' is not in it. It has: {', '.join(self.layers)}")
        layer = self.layers[name]
        row, down = _place(layer.inputs, inputs, f"{name}: input channels")
        column, right = _place(layer.outputs, outputs, f"{name}: output channels")
        ms, below, after = np.array(layer.milliseconds), *(np.minimum(at + 1, len(widths) - 1) for at, widths in
                                                           ((row, layer.inputs), (column, layer.outputs)))
        return ((1 - down) * ((1 - right) * ms[row, column] + right * ms[row, after])
                + down * ((1 - right) * ms[below, column] + right * ms[below, after]))

    def network_ms(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Latencies of whole networks in ms [...] whose layers have some inputs and outputs [..., layers]."""
        return self._terms(inputs, outputs) @ self.fit

    def errors(self) -> np.ndarray:
        """|predicted / measured - 1| of every network that was timed, predicted without it [wholes]."""
        others = [tuple(whole for whole in self.wholes if whole is not out) for out in self.wholes]
        predicted = [float(self._terms(np.array(out.inputs), np.array(out.outputs)) @ self._fitted(rest))
                     for out, rest in zip(self.wholes, others)]
        return np.abs(np.array(predicted) / [whole.milliseconds for whole in self.wholes] - 1)

    def to_json(self) -> dict:
        return {"measured": True, "platform": self.platform, "batch_size": self.batch_size,
                "layers": {name: asdict(layer) for name, layer in self.layers.items()},
                "wholes": [asdict(whole) for whole in self.wholes]}

    @classmethod
    def from_json(cls, record: dict) -> LatencyTable:
        """The table that :meth:`to_json` wrote.

        Raises:
            UserError: nothing was measured.
        """
        if not record["measured"]:
            raise UserError("latency.json: nothing was measured, because the study's budget is MACs; set "
                            "study.budget.latency_ms or latency_ratio and run 'dvc repro latency'")
        layers = {name: Layer(tuple(layer["inputs"]), tuple(layer["outputs"]), tuple(map(tuple, layer["milliseconds"])),
                              layer["elements"]) for name, layer in record["layers"].items()}
        wholes = tuple(Whole(tuple(whole["inputs"]), tuple(whole["outputs"]), whole["milliseconds"])
                       for whole in record["wholes"])
        return cls(layers, record["batch_size"], record["platform"], wholes)

    def _terms(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """What the model multiplies: 1, the sum over layers in ms, the elements [..., 3]."""
        total = sum(self.layer_ms(name, inputs[..., i], outputs[..., i]) for i, name in enumerate(self.layers))
        elements = outputs @ np.array([layer.elements for layer in self.layers.values()])
        return np.stack([np.ones_like(total), total, elements], -1)

    def _fitted(self, wholes: tuple[Whole, ...]) -> np.ndarray:
        """The three numbers that fit best, relative errors counting."""
        measured = np.array([whole.milliseconds for whole in wholes])
        terms = np.stack([self._terms(np.array(whole.inputs), np.array(whole.outputs)) for whole in wholes])
        scale = terms.max(0)
        return nnls(terms / scale / measured[:, None], np.ones(len(wholes)))[0] / scale


def _place(widths: tuple[int, ...], at: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Index of the measured width at or below some widths [...], and how far each is on the way to the next one."""
    at = np.asarray(at)
    if at.min() < 1 or at.max() > widths[-1]:
        raise UserError(f"latency table: {what} = {at.max() if at.max() > widths[-1] else at.min():g} is not in 1 to "
                        f"{widths[-1]}")
    position = np.interp(at, widths, np.arange(len(widths)))
    below = np.minimum(position.astype(int), max(0, len(widths) - 2))
    return below, position - below
