"""The whole training step, through the real engine, beside its dense twin."""

import contextlib
import gc
import io
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from threading import Lock

import torch
from torch import Tensor

from diffmoe.benchmarks.ceiling import products
from diffmoe.benchmarks.memory import Saved, peak_bytes
from diffmoe.benchmarks.newton_schulz import NEWTON_SCHULZ, newton_schulz
from diffmoe.benchmarks.reading import LANES, write_moments
from diffmoe.benchmarks.report import Report
from diffmoe.benchmarks.routing_parts import ROUTING, parts_of, seeded_layer
from diffmoe.benchmarks.timing import (
    forward_backward,
    repeat,
    seconds_of,
    synchronize,
    take_turns,
)
from diffmoe.config import Config
from diffmoe.data.examples import Examples
from diffmoe.data.lanes import DataSource
from diffmoe.data.manifest import FeatureContent
from diffmoe.data.stream import Batch, LatentStream
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.families.diffmoe import DiffMoE
from diffmoe.models.moe import LayerRouting, MoEFeedForward
from diffmoe.models.precision import DTYPES
from diffmoe.parallel.topology import Topology, create_topology
from diffmoe.planning.flops import newton_schulz_flops, step_flops
from diffmoe.planning.layouts import Layout
from diffmoe.training.ema import EMA
from diffmoe.training.routing_metrics import RoutingMetrics
from diffmoe.training.step import TrainingStep, build, losses_of
from diffmoe.training.telemetry import Telemetry
from diffmoe.tree import tree_map

OURS = "diffmoe fp32"
_READING = Lock()  # steps that take turns share one stream of batches


def dense_twin(config: Config) -> Config:
    """The dense model of equal activated size. Raises UserError where there is none."""
    moe, model = config.moe, config.model
    activated = moe.expert_ratio * moe.capacity + moe.shared_expert_ratio
    same = math.isclose(activated, model.mlp_ratio)
    if moe.type != "diffmoe" or moe.activation != "gelu" or not same:
        raise UserError(
            f"moe.type={moe.type}, moe.activation={moe.activation}, an activated ratio of "
            f"{activated:g} and model.mlp_ratio={model.mlp_ratio:g}: the benchmark wants a diffmoe "
            "recipe with gelu whose expert_ratio * capacity + shared_expert_ratio is mlp_ratio"
        )
    return config.replace({"moe.type": "dense"})


class TimedStep:
    """The training step on batches of its own; calling it takes the next batch.

    history: of every step, the seconds of its phases.
    """

    def __init__(
        self, config: Config, topology: Topology, device: torch.device, batches: Iterator[Batch]
    ) -> None:
        self.config, self.device, self.batches = config, device, batches
        config = config.replace({"data.lanes": LANES})
        self.network, engine = build(config, {}, topology, device)
        ema = EMA(engine, config.training.ema_decay, config.training.ema_stds)
        self.step = TrainingStep(config, self.network, engine, ema, device)
        self.step.phase = self._phase
        self.history: list[dict[str, float]] = []
        self._thread = ThreadPoolExecutor(1)
        self._ahead = self._thread.submit(self._prepare)

    def __call__(self) -> None:
        self.history.append(defaultdict(float))
        with self._phase("data wait"):
            examples = self._next()
        self.step.run(examples)

    def forward(self) -> tuple[Tensor, list[LayerRouting], Tensor]:
        """The loss and routing of the next batch's first micro-batch."""
        step = self.step
        examples = tree_map(lambda tensor: tensor.to(self.device), self._next()[0])
        loss, _, routing = losses_of(step.engine, step.objective, examples, step.config)
        return loss, routing, examples.t

    def checkpointed(self) -> None:
        """The same step with activation checkpointing; not in the history."""
        self.network.checkpoint_activations(True)
        self()
        self.network.checkpoint_activations(False)
        self.history.pop()

    def _prepare(self) -> list[Examples]:
        with _READING:
            batch = next(self.batches)
        return self.step.prepare(batch, self.step.samples)

    def _next(self) -> list[Examples]:
        """Prepared ahead by a thread, as a run's stream does."""
        examples = self._ahead.result()
        self._ahead = self._thread.submit(self._prepare)
        return examples

    def saved_bytes(self) -> int:
        """What a forward keeps for its backward."""
        with Saved(self.network.parameters()) as saved:
            loss, *_ = self.forward()
        del loss
        return saved.bytes

    def phase(self, name: str, rounds: int) -> float:
        """Median seconds of a phase in the last `rounds` turns, of two steps each."""
        return median(seconds[name] for seconds in self.history[-1 : -2 * rounds : -2])

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.history[-1][name] += time.perf_counter() - start


@contextmanager
def random_batches(config: Config, topology: Topology) -> Iterator[Iterator[Batch]]:
    """What this rank's share of `LANES` lanes reads from shards of noise, by the run's workers."""
    model = config.model
    shape = model.latent_shape
    n = config.training.batch_size // LANES
    with tempfile.TemporaryDirectory() as folder:
        features = None
        if config.align.block is not None:
            map_shape = (config.align.width, *model.grid)
            features = FeatureContent(encoder="none", layer="none", checksum=None, shape=map_shape)
        manifest = write_moments(
            Path(folder), 2 * LANES, 8 * n, False, shape, model.num_classes, features
        )
        mine = LANES // topology.world
        yield iter(
            LatentStream(
                DataSource(
                    folder,
                    manifest,
                    lanes=LANES,
                    seed=config.seed,
                    features_until=config.align.end,
                ),
                range(topology.rank * mine, (topology.rank + 1) * mine),
                n,
                workers=config.data.workers,
            )
        )


def benchmark_training(config: Config, rounds: int, device: torch.device, report: Report) -> None:
    """Figures of the recipe's step on one process, which must have a process group.

    Precision, compilation and checkpointing are what it compares, whatever the recipe says. Rivals
    meet the step one at a time: with all their states in memory none would run as it does alone.
    """
    plain = {"precision": "fp32", "compile": False, "activation_checkpointing": False}
    config = config.replace({f"training.{key}": value for key, value in plain.items()})
    steps_between_logs = config.logging.log_samples // config.training.batch_size
    topology = create_topology(1)
    layout, dense = Layout(config, 1, 1), Layout(dense_twin(config), 1, 1)
    gemms = {precision: gemm_of(layout, dtype, device) for precision, dtype in DTYPES.items()}
    rivals = {
        "dense fp32": dense,
        "diffmoe bf16": layout.changed({"training.precision": "bf16"}),
        "diffmoe compiled": layout.changed({"training.compile": True}),
    }
    timed, first = {}, {}
    with random_batches(config, topology) as batches:
        ours = TimedStep(config, topology, device, batches)

        def meet(name: str, work: Callable[[], object], precision: str) -> None:
            gemm = gemms[precision][0]
            works: dict[str, Callable[[], object]] = {"GEMM": gemm, OURS: ours, name: work}
            timed[name] = take_turns(works, rounds, device, calls=2)

        meet("checkpointing", ours.checkpointed, "fp32")
        phases = {phase: ours.phase(phase, rounds) for phase in ours.history[-1]}
        for name, rival in rivals.items():
            step = TimedStep(rival.config, topology, device, batches)
            first[name] = seconds_of(step, device)
            meet(name, step, rival.config.training.precision)
            del step
            gc.collect()
        parts = take_turns({OURS: ours, **_parts(config, device)}, rounds, device)
        kept = ours.saved_bytes()
        ours.network.checkpoint_activations(True)
        kept_checkpointing = ours.saved_bytes()
        logging = _logging_seconds(ours, steps_between_logs, device)

    for name, turns, of in [
        (OURS, timed["dense fp32"], layout),
        *((name, timed[name], rival) for name, rival in rivals.items()),
    ]:
        precision = of.config.training.precision
        rate = gemms[precision][1] / turns.median("GEMM")
        report.add(f"{name}: GEMM ceiling", rate / 1e9, "GFLOP/s")
        report.add(f"{name}: step", turns.median(name), "s")
        images = config.training.batch_size / turns.median(name)
        report.add(f"{name}: images", images, "images/s")
        report.add(f"{name}: tokens", images * layout.tokens_per_sample, "tokens/s")
        used = step_flops(of) / gemms[precision][1] * turns.ratio("GEMM", name)
        target = 0.82 if name == OURS else None
        report.add(f"{name}: share of the ceiling", used, "", at_least=target)
    for name, beside, (least, most) in [
        (
            "diffmoe to dense (target: 1.08 x their FLOPs)",
            "dense fp32",
            (None, 1.08 * step_flops(layout) / step_flops(dense)),
        ),
        ("fp32 to bf16", "diffmoe bf16", (1.7, None)),
    ]:
        turns = timed[beside]
        report.add(
            name, turns.median(OURS), "s", turns.ratio(OURS, beside), at_least=least, at_most=most
        )
    for name, title, most in [
        ("diffmoe compiled", "compiled", None),
        ("checkpointing", "activation checkpointing", 1.35),
    ]:
        turns = timed[name]
        report.add(f"{title}: step", turns.median(name), "s", turns.ratio(name, OURS), at_most=most)
    report.add("compiled: its first step", first["diffmoe compiled"], "s")
    report.add(
        "activation checkpointing: saved for backward",
        kept_checkpointing / 2**20,
        "MiB",
        kept_checkpointing / kept,
        at_most=0.35,
    )
    whole = timed["checkpointing"].median(OURS)
    for phase, seconds in phases.items():
        report.add(f"phase of the step: {phase}", seconds * 1e3, "ms", seconds / whole)
    update = phases["optimizer"] + phases["EMA"]
    report.add("optimizer and EMA", update * 1e3, "ms", update / whole, at_most=0.05)
    report.add("logging, a step's share", logging * 1e3, "ms", logging / whole, at_most=0.01)
    if config.optimizer.type == "muon":
        report.add("Newton-Schulz: its operations", newton_schulz_flops(layout) / 1e12, "TFLOP")
    for name, times in _occurrences(config).items():
        seconds = times * parts.median(name)
        ratio = times * parts.ratio(name, OURS)
        most = 0.1 if name == NEWTON_SCHULZ else None
        label = f"part of the step: {name} x {times}"
        report.add(label, seconds * 1e3, "ms", ratio, at_most=most)
    for kind, size in peak_bytes(device).items():
        report.add(f"peak memory, {kind}, all of the above", size / 2**30, "GiB")


def gemm_of(
    layout: Layout, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], int]:
    """The products that a model is held against, of its dense MLP's shapes, and their FLOPs."""
    model = layout.config.model
    hidden = int(model.width * model.mlp_ratio)
    work, flops = products(layout.tokens, model.width, hidden, dtype, device)
    count = 10 if device.type == "cuda" else 1  # alone a GPU's would partly be its launch
    return partial(repeat, count, work), count * flops


def _parts(config: Config, device: torch.device) -> dict[str, Callable[[], object]]:
    """Forward and backward of one of each part, by name, in the recipe's precision."""
    dtype = DTYPES[config.training.precision]
    layer = DiffMoE(config.model, config.moe, Topology())
    layer = seeded_layer(layer, device, dtype)
    # Two blocks are a dense one and a mixture.
    network = DiT(config.model.model_copy(update={"depth": 2}), config.moe)
    network = network.to(device, dtype).train()
    attention = network.blocks[0].get_submodule("attention")
    mlp = network.feed_forwards[0]
    tokens = math.prod(config.model.grid)
    shape = (config.training.batch_size, tokens, config.model.width)
    x = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    parts = {
        "attention": forward_backward(
            lambda x, *_: attention(x, network.rotation), x, *attention.parameters()
        ),
        **parts_of(layer, x.detach().flatten(0, 1).requires_grad_()),
    }
    if config.optimizer.type == "muon":
        parts[NEWTON_SCHULZ] = newton_schulz(config, device, dtype)
    if not isinstance(mlp, MoEFeedForward):
        parts["dense MLP"] = forward_backward(lambda x, *_: mlp(x), x, *mlp.parameters())
    return parts


def _occurrences(config: Config) -> dict[str, int]:
    """How many of each part a step has."""
    layout = Layout(config, 1, 1)
    depth, mixtures = config.model.depth, layout.moe_layers
    parts = dict.fromkeys((*ROUTING, "experts"), mixtures) | {"attention": depth}
    if config.optimizer.type == "muon":
        parts[NEWTON_SCHULZ] = 1
    return parts | ({"dense MLP": depth - mixtures} if mixtures < depth else {})


def _logging_seconds(step: TimedStep, steps_between: int, device: torch.device) -> float:
    """What the bar at every step, and a line of metrics now and then, cost a step."""
    samples, (_, decisions, times) = count(1), step.forward()
    quiet = step.config.replace({"logging.wandb": False})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        telemetry = Telemetry(quiet.replace({"output": folder}), active=True)
        telemetry.begin(0)

        def write() -> None:
            routing = RoutingMetrics(step.network)
            routing.observe(decisions, times)
            telemetry.metrics(next(samples), routing.summary(routing.flat()))

        timed = take_turns(
            {"bar": lambda: telemetry.step(next(samples), 1.0, 1.0), "line": write}, 5, device
        )
        telemetry.close()
    return timed.median("bar") + timed.median("line") / max(1, steps_between)
