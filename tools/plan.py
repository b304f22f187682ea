"""Estimate memory, traffic, FLOPs and time of a run on a machine, and recommend a layout.

  python tools/plan.py --recipe xl_e16 --nodes 4 --gpus-per-node 8 --gpu-memory 80
  python tools/plan.py --recipe l_e8 --nodes 1 --expert-parallel 8 --micro-batch 32 \\
      training.precision=bf16

Without --expert-parallel, --zero-stage or --micro-batch all possible values are tried, each with
and without activation checkpointing. Needs neither a GPU nor the data. Settings are written as for
train.py. With --ds_config, optimizer states that DeepSpeed offloads count as host memory.
--parameters lists every parameter with the optimizer and rate that it gets, and plans nothing.
"""

import argparse
import math
import re

from diffmoe.errors import run_command
from diffmoe.planning.machine import Machine


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe",
        required=True,
        help="recipe name or YAML file; xl_e16 stands for diffmoe_xl_e16_flow",
    )
    parser.add_argument("--nodes", type=int, default=1, help="default 1")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default 8")
    parser.add_argument(
        "--ds_config", metavar="JSON", help="DeepSpeed JSON; its offload, buckets and stage count"
    )
    parser.add_argument("--expert-parallel", type=int, metavar="P", help="default: try all")
    parser.add_argument("--zero-stage", type=int, choices=[1, 2], help="default: try both")
    parser.add_argument(
        "--micro-batch", type=int, metavar="N", help="samples per GPU and forward; default: try all"
    )
    default = Machine()
    card = parser.add_argument_group("the machine (defaults: H100, NVLink, 400 Gbit/s per GPU)")
    for flag, value, unit in (
        ("--gpu-memory", default.memory / 1e9, "GB per GPU"),
        ("--tflops-bf16", default.flops_bf16 / 1e12, "TFLOP/s that matrix products achieve"),
        ("--tflops-fp32", default.flops_fp32 / 1e12, "TFLOP/s that matrix products achieve"),
        ("--within", default.within / 1e9, "GB/s per GPU inside a node"),
        ("--between", default.between / 1e9, "GB/s per GPU between nodes"),
        ("--device-bandwidth", default.device / 1e9, "GB/s of a GPU's own memory"),
        ("--host-bandwidth", default.host / 1e9, "GB/s between GPU and host, for offloaded states"),
    ):
        card.add_argument(flag, type=float, default=value, help=f"{unit}; default {value:g}")
    card.add_argument(
        "--node-memory", type=float, metavar="GB", help="host memory per node; default: unlimited"
    )
    parser.add_argument(
        "--parameters", action="store_true", help="list which optimizer gets which parameter"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def main() -> None:
    options = parse()
    from diffmoe.planning.estimate import plan, recommend
    from diffmoe.planning.layouts import Zero, possible_layouts
    from diffmoe.planning.report import plan_details, plan_table
    from diffmoe.recipes import load_config

    name = options.recipe
    if re.fullmatch(r"(s|b|l|xl)_e\d+", name):
        name = f"diffmoe_{name}_flow"
    config = load_config(name, options.overrides)
    if options.parameters:
        from diffmoe.planning.parameters import parameter_table

        print(parameter_table(config))
        return
    given = {}
    if options.ds_config:
        from diffmoe.parallel.zero import read_ds_config, reconcile

        given = read_ds_config(options.ds_config)
        config = reconcile(config, given, options.ds_config)
    machine = Machine(
        memory=options.gpu_memory * 1e9,
        node_memory=math.inf if options.node_memory is None else options.node_memory * 1e9,
        flops_bf16=options.tflops_bf16 * 1e12,
        flops_fp32=options.tflops_fp32 * 1e12,
        within=options.within * 1e9,
        between=options.between * 1e9,
        device=options.device_bandwidth * 1e9,
        host=options.host_bandwidth * 1e9,
    )
    choices = possible_layouts(
        config,
        options.nodes,
        options.gpus_per_node,
        options.expert_parallel,
        options.zero_stage or given.get("zero_optimization", {}).get("stage"),
        options.micro_batch,
        Zero.of(given),
    )
    plans = [plan(layout, machine) for layout in choices]
    print(f"{name}, {options.nodes} nodes x {options.gpus_per_node} GPUs\n")
    print(plan_table(plans))
    best = plan_details(recommend(plans), machine.node_memory)
    print(f"\nrecommended: {best}\n\n{machine.assumptions()}")


if __name__ == "__main__":
    run_command(main)
