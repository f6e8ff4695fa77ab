"""Stage prune: removes the plan's channels physically, repairs, and checks that the budget is met.

What repair does is measured in steps: ``cut`` (the criterion alone), ``batchnorm`` (its statistics estimated anew) and,
where the plan asks for it, ``refit`` (the consumers too). The network that goes on is repaired as its plan says.
"""

import copy
import json
import time

import torch

from _stage import cell_arguments, record_seconds, run
from hobs_rspar import checkpoint, config, cost, data, slicing
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature import repair
from hobs_rspar.device import resolve_device
from hobs_rspar.errors import UserError
from hobs_rspar.memory import keep_freed_memory
from hobs_rspar.paths import Paths
from hobs_rspar.plan import PruningPlan
from hobs_rspar.seeds import generator
from hobs_rspar.training import accuracy, logits

HELD_OUT = 512  # validation images for the reconstruction error


def main() -> None:
    started = time.perf_counter()
    keep_freed_memory()
    params = config.load()
    method, seed = cell_arguments(params)
    torch.set_num_threads(params.prune.threads)
    paths, device = Paths.of(params.study), resolve_device(params.device)
    cell = f"{method}-{seed}"
    folder = paths.cell(cell)
    dense, spec = checkpoint.load_with_spec(paths.dense / "dense.safetensors")
    groups = Groups.from_json(json.loads((paths.dense / "groups.json").read_text()))
    plan = PruningPlan.load(folder / "plan.json")
    plan.check(groups)
    if trained := checkpoint.load_tensors(folder / "weights.safetensors")[0]:
        dense = checkpoint.fit(dense, trained, str(folder / "weights.safetensors"))
    pruned = slicing.remove(dense, groups, plan)
    counted = check_budget(pruned, dense, spec, plan, params.allocation)

    dense, pruned = (network.to(device, memory_format=torch.channels_last) for network in (dense, pruned))
    validation = data.load(paths.data, "validation", device)
    calibration = data.load(paths.data, "calibration", device).first(params.prune.images)
    steps = repair_in_steps(pruned, dense, groups, plan, calibration, validation, params.prune)

    checkpoint.save(folder / "pruned.safetensors", pruned, spec)
    found = counted | {"repair": plan.repair, "repair_steps": steps}
    (folder / "prune.json").write_text(json.dumps(found, indent=1) + "\n")
    seconds = record_seconds(paths.cost(cell, "prune"), started)
    shown = ", ".join(f"{step['top1']:.1f} % {name}" for name, step in steps.items())
    print(f"prune {cell}: kept {counted['macs_ratio']:.4f} of MACs, {counted['params_ratio']:.3f} of parameters; "
          f"validation top-1 {shown} (repair: {plan.repair}), {seconds:.0f} s")


def check_budget(pruned, dense, spec, plan: PruningPlan, rules: config.Allocation) -> dict:
    """The post-condition: what was removed is what the plan promised, and the budget is met.

    Where widths are rounded, nothing may be above the budget, and most of it is left unused by some widths.
    """
    before, after = (cost.count(network, spec.example()) for network in (dense, pruned))
    ratio = after.macs / before.macs
    budget = ratio if plan.method == "unpruned" else plan.budget.get("macs", ratio)  # a latency is measured later
    off = ratio - budget if rules.round_to > 1 else abs(ratio - budget)
    if after.macs != plan.macs or off > rules.tolerance * budget + 1e-12:
        widest = max(plan.groups, key=lambda group: len(group.kept) / group.channels)
        raise UserError(f"prune {plan.method}-{plan.seed}: {ratio:.4f}x MACs remain, the plan says "
                        f"{plan.macs_ratio:.4f}x, the budget {budget:g}x +-{rules.tolerance:.0%}; widest group: "
                        f"{widest.name} ({len(widest.kept)} of {widest.channels}). Allocate again")
    return {"macs": after.macs, "params": after.params, "macs_ratio": ratio,
            "params_ratio": after.params / before.params}


def repair_in_steps(pruned, dense, groups, plan: PruningPlan, calibration, validation, options) -> dict[str, dict]:
    """Repairs ``pruned`` in place as the plan says; name of each step to its result, in order."""
    def measured(network) -> dict[str, float]:
        return measure(network, dense, groups, plan, validation, options.precision)

    steps, aside = {"cut": measured(pruned)}, copy.deepcopy(pruned)
    repair.reestimate_batchnorm(aside, calibration)
    steps["batchnorm"] = measured(aside)
    repair.carry_out(plan, pruned, dense, groups, calibration, options, generator(plan.seed, "prune", plan.method))
    if plan.repair == "least_squares":
        steps["refit"] = measured(pruned)
    return steps


def measure(pruned, dense, groups, plan: PruningPlan, validation, precision: str) -> dict[str, float]:
    """Validation accuracy in percent, and mean relative output error of the consumers on held-out images."""
    error = repair.reconstruction_error(pruned, dense, groups, plan.kept, validation.first(HELD_OUT), 32,
                                        generator(plan.seed, "prune/error"))
    return {"top1": accuracy(logits(pruned, validation, precision), validation.labels), "reconstruction_error": error}


if __name__ == "__main__":
    run(main)
