"""State dicts of graph networks, in and out."""

from flax import nnx

from deqjax.data.errors import DataError
from deqjax.interop.ignn import export_ignn, load_ignn
from deqjax.interop.torch_file import read_checkpoint, write_checkpoint
from deqjax.models.ignn import IGNN


def import_weights(path: str, model: nnx.Module) -> None:
    """Published weights: a `.pth`, `.pt` or `.safetensors` state dict."""
    if not isinstance(model, IGNN):
        raise DataError(f"{path}: published weights are of implicit networks; set explicit_layers=0.")
    load_ignn(model, read_checkpoint(path))


def export_weights(path: str, model: nnx.Module, n_nodes: int | None = None) -> str:
    """Writes the weights under TorchDEQ's names, `.safetensors`, or `.pth` with PyTorch installed; says what it wrote."""
    if not isinstance(model, IGNN):
        raise DataError("an explicit network has no published form to be exported in.")
    state_dict = export_ignn(model, n_nodes)
    write_checkpoint(path, state_dict)
    return f"Wrote {len(state_dict)} tensors to {path}."
