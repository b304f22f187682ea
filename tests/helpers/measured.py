"""What a real step of the real engine holds and sends, to hold the planner against."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe.benchmarks.collectives import Collectives
from diffmoe.benchmarks.memory import Saved
from diffmoe.checkpoints.network import routing_buffers
from diffmoe.checkpoints.pieces import HostCopy
from diffmoe.config import Config
from diffmoe.data.examples import micro_batches
from diffmoe.diffusion import create_objective
from diffmoe.models.alignment import alignment_loss, alignment_targets
from diffmoe.models.dit import DiT
from diffmoe.models.moe import routing_loss
from diffmoe.parallel.topology import create_topology
from diffmoe.training.checkpoint import pieces
from diffmoe.training.ema import EMA
from diffmoe.training.step import TrainingStep, build
from tests.helpers.tiny import random_batch, randomize


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def step_on_rank(config: Config, ds_settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """One optimizer step. -> bytes of this rank by kind, and of its collectives."""
    topology = create_topology(config.parallel.expert_parallel)
    network, engine = build(config, ds_settings or {}, topology, torch.device("cpu"))
    with torch.no_grad():
        randomize(network)
    ema = EMA(engine, config.training.ema_decay, config.training.ema_stds)
    step = TrainingStep(config, network, engine, ema, torch.device("cpu"))
    zero = engine.optimizer
    gradients: list[Tensor] = []
    work = zero._optimizer_step

    def noting(group: int) -> None:
        gradients.append(zero.single_partition_of_fp32_groups[group].grad)
        work(group)

    zero._optimizer_step = noting
    # What is kept of all gradients before stage 1 reduces them, and of this rank's own after that.
    kept: list[int] = [0]
    reduce, finish = zero.reduce_gradients, zero.step

    def keeping(**options: Any) -> None:
        parameters = [parameter for group in zero.bit16_groups for parameter in group]
        gradients = [zero.get_gradient_for_reduction(parameter) for parameter in parameters]
        kept.append(size(gradient for gradient in gradients if gradient is not None))
        reduce(**options)

    summed: list[int] = []

    def finishing() -> None:
        parts = [part for group in zero.averaged_gradients.values() for part in group]
        summed.append(size(parts))
        finish()

    zero.reduce_gradients, zero.step = keeping, finishing
    buckets: list[int] = []
    set_up = zero.setup_buckets

    def counting() -> None:
        set_up()
        held = [part for bucket in zero.ipg_buckets.values() for part in bucket.buffer]
        buckets.append(size(held))

    zero.setup_buckets = counting
    with Collectives() as sent:
        result = step.run(step.prepare(random_batch(config, 0, step.lanes), 0))
    if topology.world > 1:  # the losses travel beside the thresholds, and nobody counts them
        sent.bytes["all_reduce"] -= 8 * len(result.losses)
    moments = [
        tensor
        for part in zero.single_partition_of_fp32_groups
        for tensor in zero.optimizer.state[part].values()
        if tensor.dim()
    ]
    frozen = engine.frozen.parts.values()
    return {
        "parameters": size(zero.bit16_groups_flat) + size(one.parameter for one in frozen),
        "gradients_kept": max(kept),
        "gradients_summed": max(summed),
        "gradient_partition": size(gradients),
        "masters": size(zero.single_partition_of_fp32_groups)
        + size(one.master for one in frozen if one.parameter.dtype == torch.bfloat16),
        "moments": size(moments),
        "ema": size([average for kind in ema.averages.values() for average in kind]),
        "sent": dict(+sent.bytes),
        "buckets": max(buckets),
        "passing": [
            size(getattr(zero, name, []))
            for name in (
                "param_buffer_of_bit16_for_cpu_offload_groups",
                "temp_grad_buffer_for_cpu_offload",
                "temp_grad_buffer_for_gpu_offload",
            )
        ],
        "accumulated": size(getattr(zero, "accumulated_grads_in_cpu", {}).values()),
        "saves": size(HostCopy().take(pieces(engine, network, ema)).values()),
        "buffers": size(buffer for _, buffer in routing_buffers(network)),
    }


def saved_bytes(config: Config) -> int:
    """What autograd keeps at the end of one forward of one process, each storage once."""
    objective = create_objective(config)
    network = DiT(config.model, config.moe, align=config.align, lora=config.lora)
    randomize(network).train()
    network.checkpoint_activations(config.training.activation_checkpointing)
    if config.training.precision == "bf16":
        network.to_bf16()
    lanes = range(config.data.lanes)
    examples = next(
        iter(micro_batches(random_batch(config, 0, lanes), config, lanes, 0, objective))
    )
    with Saved(network.parameters()) as saved:
        output = network(*examples.inputs)
        loss = objective.loss(
            output.prediction, examples.x_t, examples.data, examples.noise, examples.t
        )["loss"].mean()
        loss = loss + routing_loss(output.routing, config.moe)
        if output.projected is not None:
            spatial = config.align.projector == "conv"
            targets = alignment_targets(examples.features, config.model.grid, spatial)
            loss = loss + alignment_loss(output.projected, targets)
    return saved.bytes


def step_in_pretence(config: Config, world: int) -> dict[str, Any]:
    """`step_on_rank` as rank 0 of a world of which nobody else exists; values are garbage."""
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = dist.new_group

    def pretended(*args: Any, **kwargs: Any) -> Any:  # Megatron asks for gloo beside it
        return new_group(*args, **{**kwargs, "backend": "fake"})

    dist.new_group = pretended
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return step_on_rank(config)
