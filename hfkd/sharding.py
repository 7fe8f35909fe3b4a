"""Weights that are spread over processes, written and read whole."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor itself, or its shards put together: all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """What ``state_dict`` gives, shards put together on the CPU: where there are any, all processes must ask."""
    return {
        name: whole(tensor).cpu() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }


def load_whole_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` of whole tensors, alike on all processes, into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: _as_there(tensor, own.get(name)) for name, tensor in state.items()})


def _as_there(tensor: Tensor, there: Tensor | None) -> Tensor:
    if not isinstance(there, DTensor):
        return tensor
    mesh = there.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, there.placements, src_data_rank=None)
