"""One model on several GPUs: who holds what, and checkpoints of a model that no GPU holds whole.

PyTorch's own engines, chosen by the memory plan (config.training_bytes): DistributedDataParallel where every rank can
hold the whole model, else FSDP2 (`fully_shard`: every rank holds a share of each tensor and gathers one block at a time),
with the shares in CPU memory where even they do not fit. Sharded checkpoints are torch.distributed.checkpoint's, which
any number of ranks reads, one process without a group included. Knows nothing of speech; a loss goes in as a module.
"""
from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime import Ranks

STATES = ("weights", "gradients", "optimiser", "average")    # parts of the plan that FSDP splits
SUFFIX = ".dcp"                                              # folders of torch.distributed.checkpoint
RUN = "run.pt"                                               # beside its shares: what is not a tensor of the model


# ----------------------------------------------------------------------------- the plan

@dataclass
class Plan:
    """How a run is spread. Bytes are per rank."""
    kind: str                    # alone | ddp | fsdp
    ranks: int
    needs: dict[str, int]        # parts as in config.training_bytes, of one rank
    memory: float | None         # bytes a rank has; None: unknown
    offload: bool = False        # the shares live in CPU memory

    @property
    def sharded(self) -> bool:
        return self.kind == "fsdp"

    @property
    def on_device(self) -> int:
        return sum(v for k, v in self.needs.items() if not (self.offload and k in STATES))

    def say(self) -> str:
        """One line for the terminal."""
        how = {"alone": "one process holds it", "ddp": f"every one of {self.ranks} ranks holds it whole (DistributedDataParallel)",
               "fsdp": f"split over {self.ranks} ranks (FSDP2 fully_shard)"}[self.kind]
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in self.needs.items())
        have = f" of {self.memory / 1e9:.1f} GB" if self.memory else ""
        off = f"; {', '.join(STATES)} in CPU memory, moved as they are needed" if self.offload else ""
        return f"memory plan: {how}; about {self.on_device / 1e9:.2f} GB{have} per rank ({parts}){off}"


def choose(needs, ranks: int, memory: float | None, host_memory: float | None = None, wanted: str = "auto") -> Plan:
    """The simplest way that fits `memory` bytes per rank. ValueError where none does, with what to change.

    needs(gpus) -> parts in bytes per rank when the states are split over that many. host_memory: CPU bytes per rank.
    """
    def fits(plan: Plan) -> bool:
        return memory is None or plan.on_device <= memory
    if ranks == 1:
        plan = Plan("alone", 1, needs(1), memory)
        states = sum(plan.needs[name] for name in STATES)
        if memory is not None and states > memory:
            raise ValueError(f"weights, gradients, optimiser and average take {states / 1e9:.1f} GB, this device has {memory / 1e9:.1f} GB: use a smaller --model_size, "
                             "--ema 0 (no averaged copy), --lora (fine-tuning), or several GPUs (torchrun --nproc_per_node N train.py ...)")
        return plan
    whole, split = Plan("ddp", ranks, needs(1), memory), Plan("fsdp", ranks, needs(ranks), memory)
    if wanted != "auto":
        return whole if wanted == "ddp" else split
    for plan in (whole, split):
        if fits(plan):
            return plan
    plan = Plan("fsdp", ranks, needs(ranks), memory, offload=True)
    if fits(plan) and (host_memory is None or sum(plan.needs[name] for name in STATES) <= host_memory):
        return plan
    raise ValueError(f"split over {ranks} ranks the run still takes {split.on_device / 1e9:.1f} GB per rank and each has {memory / 1e9:.1f} GB: "
                     "lower --batch_positions, add --recompute, use more ranks, or a smaller --model_size")


def device_bytes(device: torch.device) -> float | None:
    """Memory of the GPU, or this process's part of the machine's; None where the system does not say."""
    from runtime import total_memory_mb
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    total = total_memory_mb()
    return total * 1e6 / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if total else None


# ----------------------------------------------------------------------------- spreading

def shard(model: nn.Module, blocks, plan: Plan, device: torch.device, bf16: bool) -> None:
    """fully_shard each block and then the rest, in place; `model.loss` gathers what it needs as a forward does.

    Blocks compute in bfloat16 on a GPU where bf16 is set; shares, gradients and their sums stay float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    options = {"mesh": init_device_mesh(device.type, (plan.ranks,))}
    if plan.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 and device.type == "cuda" else MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mp_policy=narrow, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "loss")


def fill(model: nn.Module, whole: dict[str, Tensor], device: torch.device, offload: bool) -> None:
    """Weights of rank 0 (a full state dict there, {} elsewhere) -> the shares of a model that was sharded on the meta device."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    model.to_empty(device="cpu" if offload else device)
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload))


def scatter(model: nn.Module) -> None:
    """Forget what was gathered of a sharded model: its shares have changed. Nothing to do for other models."""
    from torch.distributed.fsdp import FSDPModule
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_on_every_rank(objective: nn.Module) -> nn.Module:
    """DistributedDataParallel: gradients are averaged over the ranks while backward runs; parameters begin as rank 0's."""
    # which additions a batch uses depends on the batch: a parameter may get no gradient on some ranks, or on all
    return nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True, gradient_as_bucket_view=True)


def without_sync(objective: nn.Module, quiet: bool):
    """Context in which DistributedDataParallel only adds up gradients: all micro-batches but the last."""
    return objective.no_sync() if quiet and hasattr(objective, "no_sync") else contextlib.nullcontext()


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor; the tensor itself where it is not sharded. Both share memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (every rank must ask); the tensor itself where it is not sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ----------------------------------------------------------------------------- sharded checkpoints

def _state(model: nn.Module, optimisers: list, average: dict[str, Tensor]) -> dict:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimisers)}
    return state | ({"ema": average} if average else {})


@contextlib.contextmanager
def _quiet():
    """Without the warning that one process is on its own: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save_shards(folder: Path, model: nn.Module, optimisers: list, average: dict[str, Tensor], ranks: Ranks, write_run) -> Path:
    """Write folder (every rank its shares; write_run(path) on rank 0), whole or not at all: it has its name only once it is complete."""
    import torch.distributed.checkpoint as dcp
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.unfinished")
    if ranks.main:
        for left in (temporary, folder):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.wait()
    dcp.save(_state(model, optimisers, average), checkpoint_id=temporary)
    if ranks.main:
        write_run(temporary / RUN)
        os.replace(temporary, folder)
    ranks.wait()
    return folder


def load_shards(folder: Path, model: nn.Module, optimisers: list, average: dict[str, Tensor]) -> None:
    """Fill model, optimisers and average (in place) from a folder of save_shards, whatever number of ranks wrote it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
    state = _state(model, optimisers, average)
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=folder)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise ValueError(f"{folder} is damaged or of another model ({str(error).splitlines()[0][:150]}): use another --resume") from None
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimisers, state["optimizer"])


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Whole tensors of the weights in a folder of save_shards, averaged where there is an average; needs no process group."""
    import torch.distributed.checkpoint as dcp
    about = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state: dict = {"model": {}, "ema": {}}
    for name, entry in about.items():
        part, _, rest = name.partition(".")
        if part in state and hasattr(entry, "size"):
            state[part][rest] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with _quiet():
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state["model"] | state["ema"]


def point(name: Path, folder: Path) -> None:
    """Make `name` a link to the folder beside it, atomically, and remove the folders of their kind that nothing points to."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, name)
    links = {path.resolve() for path in name.parent.glob(f"*{SUFFIX}") if path.is_symlink()}
    for path in name.parent.glob(f"*{SUFFIX}"):
        if not path.is_symlink() and path.resolve() not in links:
            shutil.rmtree(path, ignore_errors=True)


# ----------------------------------------------------------------------------- rehearsal without the machines

def rehearse(model: nn.Module, blocks, plan: Plan) -> dict[str, int]:
    """Shard a meta-device model over plan.ranks pretended ranks -> numbers that rank 0 would hold, groups and tensors.

    The process group is PyTorch's fake one: it counts as many ranks as asked and moves nothing.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=plan.ranks)
    try:
        shard(model, blocks, plan, torch.device("cpu"), bf16=False)
        parameters = list(model.parameters())
        return {"numbers": sum(local(p).numel() for p in parameters), "tensors": len(parameters), "groups": len(list(blocks)) + 1}
    finally:
        dist.destroy_process_group()
