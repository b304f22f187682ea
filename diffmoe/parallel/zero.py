"""The DeepSpeed engine: its settings and checks, parameter groups, and the ranges ZeRO owns."""

import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import deepspeed
import deepspeed.ops
import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups, logger
from torch import Tensor, nn

from diffmoe.config import ZERO_BUCKET, Config
from diffmoe.errors import UserError
from diffmoe.files import cannot_read, read_text
from diffmoe.parallel.engine import Engine
from diffmoe.parallel.frozen import Frozen, hide_from_deepspeed
from diffmoe.parallel.gradient_types import gradient_types
from diffmoe.parallel.muon import Muon
from diffmoe.parallel.topology import Topology
from diffmoe.parallel.update import Update

# Only DeepSpeed's inference uses this extension; building it needs a compiler and over a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logger.setLevel(logging.WARNING)
# DeepSpeed warns of any optimizer but its own and torch's; the tests hold Muon's numbers.
logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
# DeepSpeed calls a collective by its old name at every step.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)

# Values that both files can hold: (path in the DeepSpeed JSON, key of ours).
_OVERLAPS = [
    (("train_batch_size",), "training.batch_size"),
    (("gradient_accumulation_steps",), "training.accumulation"),
    (("gradient_clipping",), "optimizer.gradient_clipping"),
    (("zero_optimization", "stage"), "parallel.zero_stage"),
    (("bf16", "enabled"), "training.precision"),
]


def read_ds_config(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON. Raises UserError naming the file and what is wrong with it."""
    try:
        settings = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"--ds_config: {cannot_read(path, error)}") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not even text
        raise UserError(f"--ds_config {path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"--ds_config {path} must hold an object, it holds {settings!r}")
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise UserError(
                f"{path}: '{section}' belongs to the run's configuration; remove it here and set "
                "optimizer.* there"
            )
    for section in ("fp16", "bf16", "zero_optimization", "data_types"):
        if not isinstance(settings.get(section, {}), dict):
            raise UserError(
                f"{path}: '{section}' must be an object such as "
                f'{{"{"stage" if section == "zero_optimization" else "enabled"}": ...}}, '
                f"it is {settings[section]!r}"
            )
    if "bfloat16" in settings:
        raise UserError(f"{path}: write 'bf16' instead of 'bfloat16'")
    for section, key in (
        ("zero_optimization", "compute_grad_norm"),
        ("bf16", "check_grad_overflow"),
    ):
        if settings.get(section, {}).get(key) is False:
            raise UserError(
                f"{path}: {section}.{key}=false would let non-finite steps pass; remove it"
            )
    if settings.get("fp16", {}).get("enabled"):
        raise UserError(f"{path}: fp16.enabled=true is not supported; use bf16")
    return settings


def reconcile(config: Config, settings: dict[str, Any], path: str = "ds_config") -> Config:
    """Hold the DeepSpeed JSON against the configuration.

    A value that only one of them sets holds for both. Raises UserError with all that differ.
    """
    changes, conflicts = {}, []
    for ds_key, key in _OVERLAPS:
        value: Any = settings
        for part in ds_key:
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            continue
        wanted = bool if key == "training.precision" else int | float
        if not isinstance(value, wanted):
            raise UserError(
                f"{path}: {'.'.join(ds_key)}={value!r} must be a plain value; leave it out "
                f"and {key} holds"
            )
        if key == "training.precision":
            value = "bf16" if value else "fp32"
        section, field = key.split(".")
        ours = getattr(config, section)
        if getattr(ours, field) == value:
            continue
        if field in ours.model_fields_set:
            shown = {"bf16": "true", "fp32": "false"}.get(value, value)
            conflicts.append(
                f"  {'.'.join(ds_key)}={shown} in {path}, but {key}={getattr(ours, field)}"
            )
        changes[key] = value
    if conflicts:
        raise UserError(
            "the DeepSpeed JSON and the configuration differ; make them agree, or leave the value "
            "out of the JSON:\n" + "\n".join(conflicts)
        )
    return config.replace(changes) if changes else config


def engine_settings(config: Config, settings: dict[str, Any], world: int) -> dict[str, Any]:
    """All that deepspeed.initialize needs: the JSON plus what the configuration says."""
    training = config.training
    micro_batch = training.batch_size // (world * training.accumulation)
    given = settings.get("train_micro_batch_size_per_gpu", micro_batch)
    if given != micro_batch:
        raise UserError(
            f"train_micro_batch_size_per_gpu={given} in the DeepSpeed JSON, but "
            f"training.batch_size={training.batch_size} over {world} ranks times "
            f"training.accumulation={training.accumulation} is {micro_batch}; leave it out"
        )
    accumulated, reduced = gradient_types(settings)
    if accumulated == "bf16" and training.precision != "bf16":
        raise UserError(
            "data_types.grad_accum_dtype=bf16 in the DeepSpeed JSON, but training.precision="
            f"{training.precision}; leave it out"
        )
    zero = {"reduce_bucket_size": ZERO_BUCKET, "allgather_bucket_size": ZERO_BUCKET}
    zero |= settings.get("zero_optimization", {}) | {"stage": config.parallel.zero_stage}
    overlapping = {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "bf16": settings.get("bf16", {}) | {"enabled": training.precision == "bf16"},
        "data_types": settings.get("data_types", {}) | {"grad_accum_dtype": accumulated},
        "communication_data_type": reduced,
        "zero_optimization": zero,
        # torch's own AdamW, on flat partitions.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return {"steps_per_print": 1 << 62} | settings | overlapping


class ExpertParallelRoot(MoE):
    """The root module by which DeepSpeed recognizes a mixture of experts.

    It only delegates to the network: DeepSpeed treats an engine as MoE if some module is an
    instance of its own MoE layer, whose constructor would build layers that we do not want.
    """

    def __init__(self, network: nn.Module, experts: int, topology: Topology) -> None:
        nn.Module.__init__(self)
        self.network = network
        self.topology = topology
        self.num_experts = experts
        self.ep_size = topology.expert_parallel
        self.num_local_experts = experts // topology.expert_parallel
        self.expert_group_name = expert_group_name(topology)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Hand Megatron's groups to DeepSpeed instead of letting it build its own."""
        for registry, group in (
            ("_EXPERT_PARALLEL_GROUP", self.topology.expert_group),
            ("_EXPERT_DATA_PARALLEL_GROUP", self.topology.expert_data_group),
        ):
            getattr(groups, registry)[self.expert_group_name] = group
            ranks = torch.distributed.get_process_group_ranks(group)
            getattr(groups, registry + "_RANKS")[self.expert_group_name] = ranks

    def forward(self, *inputs: Tensor) -> Any:
        return self.network(*inputs)


def expert_group_name(topology: Topology) -> str:
    return f"ep_size_{topology.expert_parallel}"


def create_engine(
    network: nn.Module,
    experts: dict[str, nn.Parameter],
    num_experts: int,
    optimizer: type[torch.optim.Optimizer],
    optimizer_options: dict[str, Any],
    settings: dict[str, Any],
    topology: Topology,
    updates: Mapping[str, Update] = MappingProxyType({}),
) -> Engine:
    """Wrap the network in a ZeRO engine.

    network: in the types that it computes in, see `DiT.to_bf16`; what takes no gradient is
    `Engine.frozen`. experts: by name, the parameters
    of which every expert-parallel rank holds its own. updates: by name, what differs from
    optimizer_options, of all parameters or none; groups of Muon's hold theirs as `matrices`.
    """
    expert_ids = {id(parameter) for parameter in experts.values()}
    by_id = {id(network.get_parameter(name)): update for name, update in updates.items()}
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    dense = [parameter for parameter in parameters if id(parameter) not in expert_ids]
    # ZeRO flattens a group. Its first one's type is what DeepSpeed takes for the network's.
    parameter_groups: list[dict[str, Any]] = []
    for dtype in dict.fromkeys(p.dtype for p in dense):
        alike = [p for p in dense if p.dtype == dtype]
        parameter_groups += _groups(alike, by_id, name=f"dense {dtype}")
    root: nn.Module = network
    hide_from_deepspeed(experts)
    trained = [parameter for parameter in experts.values() if parameter.requires_grad]
    if trained:
        name = expert_group_name(topology)
        for parameter in trained:
            parameter.allreduce = False  # type: ignore[attr-defined]  # DeepSpeed reads both
            parameter.group_name = name  # type: ignore[attr-defined]  # as above
        parameter_groups += _groups(trained, by_id, moe=True, name=name)
        root = ExpertParallelRoot(network, num_experts, topology)
    client = optimizer(parameter_groups, **optimizer_options)
    engine = Engine(  # what deepspeed.initialize does with a plain configuration
        args=None,
        model=root,
        optimizer=client,
        config=settings,
        config_class=deepspeed.DeepSpeedConfig(settings),
        dist_init_required=False,
    )
    engine._configure_python_gc()
    engine.frozen = Frozen(network, experts)
    if isinstance(client, Muon):
        client.attach(engine.optimizer)
    return engine


def _groups(
    parameters: Iterable[nn.Parameter], updates: Mapping[int, Update], **named: Any
) -> list[dict[str, Any]]:
    """Parameter groups of those that are updated alike, AdamW's first. updates: by id."""
    found: dict[Any, dict[str, Any]] = {}
    for parameter in parameters:
        update = updates.get(id(parameter))
        options = {} if update is None else update.options
        group = found.setdefault(update and update.shared, {"params": [], **options, **named})
        group["params"].append(parameter)
        if update is not None and update.matrices is not None:
            group.setdefault("matrices", []).append(update.matrices)
    return sorted(found.values(), key=lambda group: "matrices" in group)


class OwnedRange(NamedTuple):
    """A piece of a parameter whose fp32 master and optimizer state this rank holds.

    The piece is [start, start + length) of the flattened global tensor, experts under their global
    numbers; `master` is a view of it. `state(optimizer)` is the optimizer's, of the same range.
    partition: which holds it, from `offset` on; None of a frozen parameter, which has no state.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    master: Tensor
    partition: nn.Parameter | None
    offset: int

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """By its key, such as exp_avg; views."""
        if self.partition is None:
            return {}
        return {
            key: tensor.narrow(0, self.offset, len(self.master))
            for key, tensor in optimizer.state[self.partition].items()
            if tensor.dim()  # no counter
        }


def owned_ranges(
    engine: Engine, network: nn.Module, experts: dict[str, nn.Parameter]
) -> Iterator[OwnedRange]:
    """What this rank owns of each named parameter; over all ranks every element once."""
    topology = cast(Topology, network.topology)
    for name, parameter in network.named_parameters():
        shape, first = tuple(parameter.shape), 0
        if name in experts:
            shape = (shape[0] * topology.expert_parallel, *shape[1:])
            first = topology.expert_rank * parameter.numel()
        frozen = engine.frozen.parts.get(name)
        if frozen is not None:
            if len(frozen.master):
                yield OwnedRange(name, shape, first + frozen.start, frozen.master, None, 0)
            continue
        piece = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed sets it
        if piece is None:
            continue
        yield OwnedRange(
            name=name,
            shape=shape,
            start=first + piece.lp_fragment_address.start,
            master=piece.hp_fragment,
            partition=engine.optimizer.single_partition_of_fp32_groups[piece.param_group_index],
            offset=piece.hp_fragment_address.start,
        )
