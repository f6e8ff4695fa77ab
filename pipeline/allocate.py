"""Stage allocate: one method decides, for one seed, which channels every group keeps.

Writes plan.json, and weights.safetensors: those that the method trained, without tensors where it trained none.
"""

import json
import time

import torch

from _stage import cell_arguments, record_seconds, run
from hobs_rspar import checkpoint, config
from hobs_rspar.allocation.expense import limited
from hobs_rspar.allocation.space import Space
from hobs_rspar.coupling import Groups
from hobs_rspar.device import resolve_device
from hobs_rspar.memory import keep_freed_memory
from hobs_rspar.methods import _registry
from hobs_rspar.methods._protocol import Context, FileInputs
from hobs_rspar.paths import Paths


def main() -> None:
    started = time.perf_counter()
    keep_freed_memory()
    params = config.load()
    method, seed = cell_arguments(params)
    options = _registry.options(method, params.methods[method])
    torch.set_num_threads(params.allocation.threads)
    paths = Paths.of(params.study)
    device = resolve_device(params.device)
    network, spec = checkpoint.load_with_spec(paths.dense / "dense.safetensors")
    groups = Groups.from_json(json.loads((paths.dense / "groups.json").read_text()))
    asked = params.study.budget.model_dump()
    budget, expense = limited(groups, asked, json.loads(paths.latency.read_text()))
    rules = params.allocation
    space = Space(groups, budget, rules.min_ratio, rules.tolerance, expense, rules.round_to)
    context = Context(network.to(device, memory_format=torch.channels_last), spec, space, method, seed,
                      params.study.dataset, {key: value for key, value in asked.items() if value is not None},
                      FileInputs(paths.dense, paths.data, device))
    plan = _registry.method(method).plan(context, options)
    plan.check(groups)
    plan.save(paths.cell(context.cell) / "plan.json")
    checkpoint.save_tensors(paths.cell(context.cell) / "weights.safetensors", plan.weights or {})
    seconds = record_seconds(paths.cost(context.cell, "allocate"), started)
    searched = f", {plan.search['evaluations']} allocations evaluated" if plan.search else ""
    print(f"allocate {context.cell}: kept {plan.macs_ratio:.4f} of MACs (budget {budget:.3g}x {expense.unit}){searched}"
          f", {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
