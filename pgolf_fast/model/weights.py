"""Weights from files, checked strictly against the model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_tensors

Tensors = Mapping[str, Tensor]


def load_weights(model: nn.Module, tensors: Tensors, origin: str, *, assign: bool = False) -> None:
    """Copy weights into a model, or let it use them with `assign`.

    Raises PgolfError listing names and shapes of `origin` that do not fit.
    """
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the model needs {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise PgolfError(f"{origin} holds another model: {shown}")
    model.load_state_dict(tensors, strict=True, assign=assign)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a run's model.safetensors, a checkpoint, or a community .pt file.

    A .pt file is read without running pickled code. Raises PgolfError for anything but a dict of tensors.
    """
    if path.suffix == ".pt":
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            why = f"{type(error).__name__} {str(error).splitlines()[0]}"
            raise PgolfError(f"{path} cannot be read as a PyTorch state dict: {why}") from error
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            hint = "save model.state_dict() and nothing else"
            raise PgolfError(f"{path} is not a state dict of tensors: {hint}")
        return state
    tensors, _ = load_tensors(path)
    prefixed = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
    return prefixed or tensors
