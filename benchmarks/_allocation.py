"""What the experiments of allocation share: the study's dense network as rewards by look-up.

Everything comes from files of the sensitivity stage and from params.yaml; no image is looked at.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from _experiment import publish
from hobs_rspar import config
from hobs_rspar.allocation.reward import JointReward, SeparableReward
from hobs_rspar.allocation.space import Space
from hobs_rspar.checkpoint import load_tensors
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.joint import JointModel
from hobs_rspar.errors import UserError
from hobs_rspar.paths import Paths


@dataclass(frozen=True)
class Problem:
    """The allocation problem of the study.

    Attributes:
        params: params.yaml.
        dense: dense.json, what is known about the dense network.
        space: its allocations that meet the study's budget.
        scores: per group H-OBS's scores [channels], whose ranking is the order of elimination.
        relative: per group the relative output error after each elimination [channels].
        gates: tensors of the sensitivity stage.
    """

    params: config.Params
    dense: dict
    space: Space
    scores: list[Tensor]
    relative: list[np.ndarray]
    gates: dict[str, Tensor]

    @property
    def subject(self) -> str:
        study = self.params.study
        return f"{study.network} on {study.dataset}, {study.budget.macs:g}x MACs"

    def publish(self, record: dict) -> None:
        """Writes and prints what was found."""
        publish(self.params, record)

    def separable(self) -> SeparableReward:
        return SeparableReward.from_relative(self.relative)

    def joint(self) -> JointReward:
        order = [torch.argsort(score, stable=True).numpy() for score in self.scores]
        return JointReward(JointModel.of_gates(self.gates["true_rows"], self.gates["sampled_rows"]), order)


def load() -> Problem:
    """Reads the study; sets the number of threads to that of the allocate stage."""
    params = config.load()
    torch.set_num_threads(params.allocation.threads)
    if params.study.budget.macs is None:
        raise UserError("params.yaml: study.budget.macs is null; the benchmarks of allocation need a kept fraction in "
                        "(0, 1]")
    folder = Paths.of(params.study).dense
    gates, _ = load_tensors(folder / "gates.safetensors")
    groups = Groups.from_json(json.loads((folder / "groups.json").read_text()))
    space = Space(groups, params.study.budget.macs, params.allocation.min_ratio, params.allocation.tolerance)
    scores, relative = (gates[name].split(groups.sizes.tolist()) for name in ("hobs", "relative"))
    return Problem(params, json.loads((folder / "dense.json").read_text()), space, list(scores),
                   [part.numpy() for part in relative], gates)
