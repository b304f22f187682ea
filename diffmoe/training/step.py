"""One optimizer step, and the engine that it runs on."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from diffmoe.config import Config
from diffmoe.data.examples import Examples, micro_batches
from diffmoe.data.stream import Batch
from diffmoe.diffusion import Objective, create_objective
from diffmoe.models.alignment import alignment_loss, alignment_targets
from diffmoe.models.dit import DiT
from diffmoe.models.frozen import freeze
from diffmoe.models.moe import LayerRouting, routing_loss
from diffmoe.models.precision import DTYPES
from diffmoe.models.updates import logged_rates, updates
from diffmoe.parallel.agree import sum_over_ranks
from diffmoe.parallel.engine import Engine
from diffmoe.parallel.muon import Muon
from diffmoe.parallel.topology import Topology
from diffmoe.parallel.zero import create_engine, engine_settings
from diffmoe.training.ema import EMA
from diffmoe.training.routing_metrics import RoutingMetrics
from diffmoe.training.routing_state import RoutingState
from diffmoe.training.schedule import learning_rate
from diffmoe.tree import tree_map


def build(
    config: Config, ds_settings: dict[str, Any], topology: Topology, device: torch.device
) -> tuple[DiT, Engine]:
    """The initialized network in training mode, and its DeepSpeed engine."""
    network = DiT(config.model, config.moe, topology, config.seed, config.align, config.lora)
    network.to(device)
    network.checkpoint_activations(config.training.activation_checkpointing)
    network.train()
    if config.training.precision == "bf16":
        network.to_bf16()
    freeze(network, config.training)
    if config.training.compile:
        for layer in network.moe_layers if device.type == "cuda" else ():
            # The compiler of torch 2.11 fails there on a running count over a whole pool.
            routed = torch.compiler.disable(layer._route)
            layer._route = routed  # type: ignore[method-assign]  # of this object alone
        for block in network.all_blocks:
            block.compile()
    optimizer = config.optimizer
    options: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "fused": True,
    }
    if optimizer.type == "muon":
        options |= {"muon": optimizer.muon, "dtype": DTYPES[config.training.precision]}
    engine = create_engine(
        network,
        experts=network.expert_parameters(),
        num_experts=config.moe.experts,
        optimizer=Muon if optimizer.type == "muon" else torch.optim.AdamW,
        optimizer_options=options,
        settings=engine_settings(config, ds_settings, topology.world),
        topology=topology,
        updates=updates(network, optimizer),
    )
    return network, engine


def losses_of(
    engine: DeepSpeedEngine, objective: Objective, examples: Examples, config: Config
) -> tuple[Tensor, dict[str, Tensor], list[LayerRouting]]:
    """Forward of one micro-batch. Returns (loss, its parts by name, routing of each MoE layer)."""
    output = engine(*examples.inputs)
    given = (examples.x_t, examples.data, examples.noise, examples.t)
    parts = objective.loss(output.prediction, *given)
    parts = {name: part.mean() for name, part in parts.items()}
    auxiliary = routing_loss(output.routing, config.moe)
    targets = [layer.target_prediction for layer in output.routing]
    errors = [objective.loss(one, *given)["mse"].mean() for one in targets if one is not None]
    if errors:
        parts["target_loss"] = torch.stack(errors).mean()
        auxiliary = auxiliary + config.moe.target_loss_weight * parts["target_loss"]
    loss = parts["loss"] + auxiliary
    parts["routing_loss"] = torch.zeros_like(loss) + auxiliary
    if examples.features is not None:
        grid, spatial = config.model.grid, config.align.projector == "conv"
        wanted_BTZ = alignment_targets(examples.features, grid, spatial)
        parts["alignment_loss"] = alignment_loss(output.projected, wanted_BTZ)
        loss = loss + config.align.weight * parts["alignment_loss"]
    return loss, parts, output.routing


_NORM = "gradient_norm"  # among the numbers of a step


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank.

    numbers: of the step, on the device; the first look at `losses` or `gradient_norm` waits for it.
    """

    numbers: dict[str, Tensor]
    rates: dict[str, float]  # of `logged_rates`, at this step
    skipped: bool  # a loss or gradient was not finite: weights, EMA and thresholds stayed
    flags: dict[str, float]  # sums over the ranks of what `run` was given
    routing: dict[str, list]  # see RoutingMetrics.summary; empty unless asked for

    @cached_property
    def losses(self) -> dict[str, float]:
        """Means over all samples, by name; `loss` is the objective's."""
        return {name: value for name, value in self._read.items() if name != _NORM}

    @property
    def gradient_norm(self) -> float:
        return self._read[_NORM]

    @cached_property
    def _read(self) -> dict[str, float]:
        values = torch.stack(list(self.numbers.values())).tolist()
        return dict(zip(self.numbers, values, strict=True))


class TrainingStep:
    """The optimizer step, with its clock: `run(prepare(batch, clock))` trains on one.

    samples, number, skipped: how many samples were trained on, in how many steps, and how many of
        these steps were skipped. Set them when a run resumes.
    phase: a context manager by the name of a phase, entered around it; for measuring.
    """

    def __init__(
        self,
        config: Config,
        network: DiT,
        engine: DeepSpeedEngine,
        ema: EMA,
        device: torch.device,
    ) -> None:
        """network, engine: of `build`."""
        self.config, self.network, self.engine, self.ema = config, network, engine, ema
        self.device = device
        self.objective = create_objective(config)
        self._peaks = logged_rates(network, config.optimizer)
        self.routing_state = RoutingState(network)
        self.lanes = own_lanes(config, network.topology)
        self.samples = self.number = self.skipped = 0
        self.phase: Callable[[str], AbstractContextManager] = lambda name: nullcontext()

    def prepare(self, batch: Batch, clock: int) -> list[Examples]:
        """Draw what training adds to a batch; a stream calls it ahead, in its thread.

        clock: samples trained on before it. For a GPU the examples lie in pinned memory, so that
        copying them there is nothing to wait for.
        """
        examples = micro_batches(batch, self.config, self.lanes, clock, self.objective)
        if self.device.type == "cuda":
            examples = [tree_map(Tensor.pin_memory, one) for one in examples]
        return examples

    def run(
        self,
        examples: list[Examples],
        read_flags: Callable[[], Mapping[str, float]] = dict,
        measure_routing: bool = False,
    ) -> StepResult:
        """Train on this rank's part of a batch, as `prepare` made it; every rank calls it.

        read_flags: called after the backward; numbers of this rank, to be summed over all ranks
            in the step's one collective.
        measure_routing: fill `StepResult.routing`.
        """
        config, world = self.config, self.network.topology.world
        samples = self.samples + config.training.batch_size
        rate_now = partial(learning_rate, config.optimizer, samples, config.training.total_samples)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate_now(group["peak_lr"])

        # Forward and backward. The engine acts at the last micro-batch only.
        metrics = RoutingMetrics(self.network) if measure_routing else None
        losses: dict[str, Tensor] = {}
        for one in examples:
            one = tree_map(lambda tensor: tensor.to(self.device, non_blocking=True), one)
            with self.phase("forward and backward"):
                loss, parts, routing = losses_of(self.engine, self.objective, one, config)
                # A loss can overflow while its gradient is finite. NaN makes all gradients NaN, so
                # that the engine skips the step on every rank.
                self.engine.backward(loss * torch.where(loss.isfinite(), 1.0, torch.nan))
            with self.phase("optimizer"):
                self.engine.step()
            with self.phase("routing state"):
                self.routing_state.observe(routing)
            if metrics is not None:
                metrics.observe(routing, one.t)
            for name, part in parts.items():
                part = part.detach().double() / config.training.accumulation
                losses[name] = losses[name] + part if name in losses else part

        # Beside the engine's and the experts', the one collective of the step, on a GPU two.
        seen_LX = self.routing_state.seen()
        with self.phase("sums over ranks"):
            flags, tensors = sum_over_ranks(
                read_flags(),
                {f"loss: {name}": loss for name, loss in losses.items()}
                | {
                    "routing state": seen_LX,
                    "routing": metrics.flat() if metrics is not None else torch.empty(0),
                },
                self.device,
            )
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.double)
        numbers = {name: tensors[f"loss: {name}"] / world for name in losses}
        numbers[_NORM] = norm.to(self.device)

        skipped = bool(self.engine.optimizer.overflow)
        self.samples, self.number, self.skipped = samples, self.number + 1, self.skipped + skipped
        if skipped:
            self.routing_state.forget()
        else:
            with self.phase("routing state"):
                self.routing_state.step((tensors["routing state"] / world).to(seen_LX.dtype))
            with self.phase("EMA"):
                self.ema.update(self.number - self.skipped)
        return StepResult(
            numbers=numbers,
            rates={name: rate_now(peak) for name, peak in self._peaks.items()},
            skipped=skipped,
            flags=flags,
            routing={} if metrics is None else metrics.summary(tensors["routing"] / world),
        )


def own_lanes(config: Config, topology: Topology) -> range:
    """The lanes of the data that this rank reads."""
    lanes = config.data.lanes // topology.world
    return range(topology.rank * lanes, (topology.rank + 1) * lanes)
